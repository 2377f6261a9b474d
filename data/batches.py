"""Flat micro-batches, and the schedule: which rows each step takes.

A micro-batch is its examples concatenated, without padding. A step is `grad_accum` micro-batches
on each rank. The schedule is a pure function of (seed, epoch, step), so a run can resume anywhere.

Each source is an endless sequence of shuffles of its examples, and every epoch takes the next
`per_epoch` of them: all once if that is their count, half of them or each twice at other weights.
All sources' rows are then shuffled together. The last step of an epoch takes the remaining rows.

Legend: T tokens in a micro-batch, N supervised ones.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.encode import IGNORE, Example


@dataclass(frozen=True)
class Batch:
    """One flat micro-batch, on one device."""

    tokens: Tensor  # (T,) int64
    targets: Tensor  # (T,) int64: the next token where it is supervised, else IGNORE
    positions: Tensor  # (T,) int64, from 0 in each example
    row_ids: Tensor  # (T,) int64: the row id of each token's example, which keys its dropout
    supervised_rows: Tensor  # (N,) int64: indices where `targets` is not IGNORE
    lengths: list[int]  # tokens of each example; their sum is T


def flat_batch(examples: list[Example], device: torch.device | str = "cpu") -> Batch:
    """Concatenate examples into one micro-batch; the copy to a GPU is asynchronous."""
    lengths = [len(e.tokens) for e in examples]
    targets = np.concatenate([e.targets for e in examples])
    arrays = (
        np.concatenate([e.tokens for e in examples]),
        targets,
        np.concatenate([np.arange(n) for n in lengths]),
        np.repeat([e.row_id for e in examples], lengths),
        np.flatnonzero(targets != IGNORE),
    )
    flat = torch.from_numpy(np.concatenate(arrays))  # one copy to the device instead of five
    if torch.device(device).type == "cuda":
        flat = flat.pin_memory()  # a copy from pageable memory would wait for the GPU's queue
    flat = flat.to(device, non_blocking=True)
    tokens, targets, positions, row_ids, supervised_rows = flat.split([len(a) for a in arrays])
    return Batch(tokens, targets, positions, row_ids, supervised_rows, lengths)


@dataclass(frozen=True)
class Step:
    """The rows of one optimizer step."""

    epoch: int  # from 0
    micro_batches: list[list[Example]]  # of this rank
    token_count: int  # over all ranks
    supervised_count: int  # over all ranks: the divisor of the summed loss
    row_ids: list[int]  # over all ranks


class SourceRows(NamedTuple):
    """How many examples a source has, and how many an epoch takes of them."""

    available: int
    per_epoch: int


@dataclass(frozen=True)
class Schedule:
    """The steps of a whole training run over `examples`, as one of its ranks sees them."""

    examples: list[Example]
    batch_size: int  # examples in a micro-batch
    grad_accum: int  # micro-batches in a step, on each rank
    epochs: int
    seed: int
    max_steps: int | None = None
    rank: int = 0
    ranks: int = 1
    sources: tuple[SourceRows, ...] = ()  # in the order of `examples`; (): each row once an epoch

    @property
    def source_rows(self) -> tuple[SourceRows, ...]:
        """The rows of each source; all rows as one source if there is only one."""
        count = len(self.examples)
        return self.sources or (SourceRows(count, per_epoch=count),)

    @property
    def examples_per_step(self) -> int:
        """Sequences of an optimizer step, over all micro-batches and ranks."""
        return self.batch_size * self.grad_accum * self.ranks

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch; the last one may have fewer sequences."""
        rows = sum(source.per_epoch for source in self.source_rows)
        return -(-rows // self.examples_per_step)  # rounded up

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        steps = self.epoch_start(self.epochs)
        return min(steps, self.max_steps or steps)

    def epoch_start(self, epoch: int) -> int:
        """How many steps precede `epoch`."""
        return epoch * self.steps_per_epoch

    def place(self, index: int) -> tuple[int, int]:
        """(epoch, step within it) of step `index`, all from 0."""
        return divmod(index, self.steps_per_epoch)

    def epochs_in(self, steps: int) -> float:
        """How many epochs the first `steps` steps make up."""
        return min(steps / self.steps_per_epoch, self.epochs)

    def validation_steps(self, evals_per_epoch: int) -> set[int]:
        """After how many steps to validate: none, evenly spaced in each epoch, and at the end."""
        size, last = self.steps_per_epoch, self.total_steps
        offsets = [round((k + 1) * size / evals_per_epoch) for k in range(evals_per_epoch)]
        steps = {start + offset for start in range(0, last, size) for offset in offsets}
        return {step for step in steps | {0, last} if step <= last}

    def step(self, index: int, halved: int = 0) -> Step:
        """Step `index`, from 0, with the micro-batch size halved `halved` times."""
        epoch, place = self.place(index)
        order = epoch_order(self.source_rows, self.seed, epoch)
        first = place * self.examples_per_step
        group = [self.examples[i] for i in order[first : first + self.examples_per_step]]
        mine = deal([len(e.tokens) for e in group], self.ranks)[self.rank]
        return Step(
            epoch=epoch,
            micro_batches=in_batches([group[i] for i in mine], max(1, self.batch_size >> halved)),
            token_count=sum(len(e.tokens) for e in group),
            supervised_count=sum(e.supervised_count for e in group),
            row_ids=[e.row_id for e in group],
        )


def deal(lengths: list[int], ranks: int) -> list[list[int]]:
    """By rank, the indices of its rows, in order: equal counts, and nearly equal tokens.

    The longest row first, each to the rank that has the fewest tokens and still takes rows. A step
    takes as long as its slowest rank. Dealt by count alone, that one of 8 has 1.12 times the mean
    tokens of GSM8K rows.
    """
    most = -(-len(lengths) // ranks)  # rows of a rank, rounded up
    mine: list[list[int]] = [[] for _ in range(ranks)]
    tokens = [0] * ranks
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        rank = min((r for r in range(ranks) if len(mine[r]) < most), key=tokens.__getitem__)
        mine[rank].append(i)
        tokens[rank] += lengths[i]
    return [sorted(rows) for rows in mine]


@functools.lru_cache(maxsize=2)
def epoch_order(sources: tuple[SourceRows, ...], seed: int, epoch: int) -> np.ndarray:
    """(rows of the epoch,) indices of the examples that `epoch` takes, in order."""
    first, chosen = 0, []  # `first`: index of the source's first example
    for number, (count, per_epoch) in enumerate(sources, 1):
        start, end = epoch * per_epoch, (epoch + 1) * per_epoch  # places in the source's sequence
        for repeat in range(start // count, -(-end // count)):  # its shuffles that overlap them
            # A third number that is not 0 makes it a different generator from `shuffle`'s.
            order = np.random.default_rng((seed, repeat, number)).permutation(count)
            begin = repeat * count
            chosen.append(first + order[max(0, start - begin) : end - begin])
        first += count
    chosen = np.sort(np.concatenate(chosen))  # so the order depends only on which rows they are
    return chosen[shuffle(len(chosen), seed, epoch)]


def shuffle(count: int, seed: int, epoch: int) -> np.ndarray:
    """(count,) a permutation of 0..count-1 that depends on nothing but seed and epoch."""
    return np.random.default_rng((seed, epoch)).permutation(count)


def in_batches(items: list, size: int) -> list[list]:
    """Consecutive slices of `items`, each of `size`; the last may be shorter."""
    return [items[i : i + size] for i in range(0, len(items), size)]
