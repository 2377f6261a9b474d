"""Ranks: how many processes train together, and the two sums that make them one.

Every rank knows the whole schedule, so what each step is divided by is known everywhere without
asking; only gradients and sums travel. One process is a world of one rank, on the same lines.
Start several with `torchrun --nproc-per-node 2 train.py ...`.
"""

import atexit
import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from errors import TrainingFailed


@dataclass(frozen=True)
class World:
    """This process's place among all ranks."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def is_main(self) -> bool:
        """Whether this rank prints and writes."""
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """The sum of each value over all ranks, in fp64."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        with _all_there():
            dist.all_reduce(total)
            return total.tolist()

    def any(self, yes: bool) -> bool:
        """Whether any rank says yes: clocks differ, and all ranks must take the same turn."""
        return self.sum(float(yes)) != [0.0]

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum every gradient over all ranks, in one message; a rank that had no rows adds zeros."""
        if self.size == 1:
            return
        parameters = list(parameters)
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([g.flatten() for g in grads])
        with _all_there():
            dist.all_reduce(flat)
        for p, grad in zip(parameters, flat.split([p.numel() for p in parameters])):
            p.grad = grad.view_as(p)

    def wait(self) -> None:
        """Return once every rank has come here."""
        if self.size > 1:
            with _all_there():
                dist.barrier()


@contextlib.contextmanager
def _all_there() -> Iterator[None]:
    """TrainingFailed if another rank is lost meanwhile: what it failed of, it says itself."""
    try:
        yield
    except RuntimeError as error:
        raise TrainingFailed(
            f"rank {dist.get_rank()} has lost another rank, and leaves: {str(error)[:100]}",
            "the other says why; the same command goes on",
        ) from error


def local_rank() -> int:
    """Which of this machine's devices is this process's own."""
    return int(os.environ.get("LOCAL_RANK", 0))


def join(device: torch.device) -> World:
    """The world that torchrun's environment describes; a world of one without it."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        return World(device=device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    atexit.register(dist.destroy_process_group)
    return World(dist.get_rank(), dist.get_world_size(), device)
