"""Flat micro-batches, and which rows each step takes: a pure function of (seed, epoch, step).

A micro-batch is its examples end to end, without padding. A step is `grad_accum` micro-batches on
each rank; an epoch's last step takes what is left, so every row is taken exactly once an epoch.

Of several sources, each is shuffled again and again by itself, without end; in epoch e one of n
rows and weight w gives those from e*w*n to (e+1)*w*n of that, rounded down. So its rows are taken
as evenly as can be, and after any number of epochs as often as the weight says.

Legend: T tokens of a micro-batch, N supervised ones.
"""

import functools
import math
from bisect import bisect_right
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.encode import IGNORE, Example


@dataclass(frozen=True)
class Batch:
    """One flat micro-batch, on one device."""

    tokens: Tensor  # (T,) int64
    targets: Tensor  # (T,) int64, IGNORE where silent
    positions: Tensor  # (T,) int64, from 0 in each example
    row_ids: Tensor  # (T,) int64: the row id of each token's example, which keys its dropout
    supervised_rows: Tensor  # (N,) int64: indices at which targets are not IGNORE
    lengths: list[int]  # of the examples, T in all


def flat_batch(examples: list[Example], device: torch.device | str = "cpu") -> Batch:
    """Examples laid end to end; copied to the device without waiting for it."""
    lengths = [len(e.tokens) for e in examples]
    targets = np.concatenate([e.targets for e in examples])
    arrays = (
        np.concatenate([e.tokens for e in examples]),
        targets,
        np.concatenate([np.arange(n) for n in lengths]),
        np.repeat([e.row_id for e in examples], lengths),
        np.flatnonzero(targets != IGNORE),
    )
    flat = torch.from_numpy(np.concatenate(arrays))  # one copy instead of five
    if torch.device(device).type == "cuda":
        flat = flat.pin_memory()  # without it the host would wait for what the GPU has yet to do
    parts = flat.to(device, non_blocking=True).split([len(a) for a in arrays])
    return Batch(*parts, lengths)


@dataclass(frozen=True)
class Step:
    """What one optimizer step learns from, over all ranks."""

    epoch: int  # from 0
    micro_batches: list[list[Example]]  # this rank's
    token_count: int  # over all ranks
    supervised_count: int  # over all ranks: the summed loss is divided by it
    row_ids: list[int]  # over all ranks


class Share(NamedTuple):
    """One source's part in an epoch."""

    count: int  # of its examples
    weight: Fraction = Fraction(1)  # how often an epoch takes each of them

    def taken(self, epochs: int) -> int:
        """How many rows so many epochs take in all."""
        return math.floor(self.weight * self.count * epochs)


@dataclass(frozen=True)
class Schedule:
    """The steps of a whole training run over `examples`."""

    examples: list[Example]
    batch_size: int  # examples of a micro-batch
    grad_accum: int  # micro-batches of a step and rank
    epochs: int
    seed: int
    rank: int = 0
    ranks: int = 1
    sources: tuple[Share, ...] = ()  # whose examples follow one another; none: they are all of one

    @property
    def shares(self) -> tuple[Share, ...]:
        return self.sources or (Share(len(self.examples)),)

    @property
    def examples_per_step(self) -> int:
        return self.batch_size * self.grad_accum * self.ranks

    @property
    def steps_per_epoch(self) -> int:
        """Of the first epoch; where weights are fractions, others may have a step more or less."""
        return self.epoch_start(1)

    @property
    def total_steps(self) -> int:
        return self.epoch_start(self.epochs)

    def epoch_start(self, epoch: int) -> int:
        """How many steps come before `epoch`."""
        ends = epoch_ends(self.shares, self.examples_per_step, self.epochs)
        rounds, rest = divmod(epoch, len(ends))
        return rounds * ends[-1] + (ends[rest - 1] if rest else 0)

    def place(self, index: int) -> tuple[int, int]:
        """(epoch, step in it) of step `index`, all from 0."""
        ends = epoch_ends(self.shares, self.examples_per_step, self.epochs)
        rounds, rest = divmod(index, ends[-1])
        epoch = rounds * len(ends) + bisect_right(ends, rest)
        return epoch, index - self.epoch_start(epoch)

    def epochs_in(self, steps: int) -> float:
        """How many epochs the first so many steps are."""
        epoch, step = self.place(steps)
        size = self.epoch_start(epoch + 1) - self.epoch_start(epoch)
        return min((epoch * size + step) / size, self.epochs)

    def step(self, index: int, halved: int = 0) -> Step:
        """Step `index`, from 0; in micro-batches halved so many times."""
        epoch, place = self.place(index)
        order = epoch_examples(self.shares, self.seed, epoch)
        n = self.examples_per_step
        group = [self.examples[i] for i in order[place * n : (place + 1) * n]]
        mine = group[self.rank :: self.ranks]
        return Step(
            epoch=epoch,
            micro_batches=in_batches(mine, max(1, self.batch_size >> halved)),
            token_count=sum(len(e.tokens) for e in group),
            supervised_count=sum(e.supervised_count for e in group),
            row_ids=[e.row_id for e in group],
        )


@functools.lru_cache(maxsize=4)
def epoch_ends(shares: tuple[Share, ...], per_step: int, epochs: int) -> tuple[int, ...]:
    """Steps up to the end of each epoch, until epochs are as long again as the first ones were."""
    period = math.lcm(*((share.weight * share.count).denominator for share in shares))
    steps, ends = 0, []
    for epoch in range(min(period, epochs)):
        rows = sum(share.taken(epoch + 1) - share.taken(epoch) for share in shares)
        steps += -(-rows // per_step)
        ends.append(steps)
    return tuple(ends)


@functools.lru_cache(maxsize=2)
def epoch_examples(shares: tuple[Share, ...], seed: int, epoch: int) -> np.ndarray:
    """(rows of the epoch,) which examples it takes, all sources shuffled together."""
    first, chosen = 0, []
    for number, share in enumerate(shares, 1):
        start, end = share.taken(epoch), share.taken(epoch + 1)
        for turn in range(start // share.count, -(-end // share.count)):
            # Of three numbers, the last not 0, so that it is none of `epoch_order`'s.
            order = np.random.default_rng((seed, turn, number)).permutation(share.count)
            before = turn * share.count
            chosen.append(first + order[max(0, start - before) : end - before])
        first += share.count
    chosen = np.sort(np.concatenate(chosen))  # so that whole turns leave the order to the epoch
    return chosen[epoch_order(len(chosen), seed, epoch)]


def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """(count,) a shuffle of 0..count-1 that depends on (seed, epoch) alone."""
    return np.random.default_rng((seed, epoch)).permutation(count)


def in_batches(items: list, size: int) -> list[list]:
    """`items` in order, `size` at a time."""
    return [items[i : i + size] for i in range(0, len(items), size)]
