"""Flat micro-batches, and which rows each step takes: a pure function of (seed, epoch, step).

A micro-batch is its examples end to end, without padding. A step is `grad_accum` micro-batches on
each rank; an epoch's last step takes what is left, so every row is taken exactly once an epoch.

Legend: T tokens of a micro-batch, N supervised ones.
"""

from dataclasses import dataclass

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
    rows: Tensor  # (T,) int64: the row number of each token's example
    supervised: Tensor  # (N,) int64: where targets are not IGNORE
    lengths: list[int]  # of the examples, T in all


def flat_batch(examples: list[Example], device: torch.device | str = "cpu") -> Batch:
    """Examples laid end to end; copied to the device without waiting for it."""
    lengths = [len(e.tokens) for e in examples]
    targets = np.concatenate([e.targets for e in examples])
    arrays = (
        np.concatenate([e.tokens for e in examples]),
        targets,
        np.concatenate([np.arange(n) for n in lengths]),
        np.repeat([e.row for e in examples], lengths),
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
    tokens: int  # of all ranks
    supervised: int  # of all ranks: what the summed loss is divided by
    rows: list[int]  # of all ranks


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

    @property
    def examples_per_step(self) -> int:
        return self.batch_size * self.grad_accum * self.ranks

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.examples) // self.examples_per_step)

    @property
    def total_steps(self) -> int:
        return self.steps_per_epoch * self.epochs

    def step(self, index: int, halved: int = 0) -> Step:
        """Step `index`, from 0; in micro-batches halved so many times."""
        epoch, place = divmod(index, self.steps_per_epoch)
        order = epoch_order(len(self.examples), self.seed, epoch)
        n = self.examples_per_step
        group = [self.examples[i] for i in order[place * n : (place + 1) * n]]
        mine = group[self.rank :: self.ranks]
        return Step(
            epoch=epoch,
            micro_batches=in_batches(mine, max(1, self.batch_size >> halved)),
            tokens=sum(len(e.tokens) for e in group),
            supervised=sum(e.supervised for e in group),
            rows=[e.row for e in group],
        )


def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """(count,) a shuffle of 0..count-1 that depends on (seed, epoch) alone."""
    return np.random.default_rng((seed, epoch)).permutation(count)


def in_batches(items: list, size: int) -> list[list]:
    """`items` in order, `size` at a time."""
    return [items[i : i + size] for i in range(0, len(items), size)]
