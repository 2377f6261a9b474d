"""Ranks: the processes that train together. One process is a world of one rank.

Every rank knows the whole schedule, and so the token count that a step's loss is divided by; only
gradients and a few sums are exchanged.
Start several ranks with `torchrun --nproc-per-node 2 train.py ...`.
"""

import atexit
import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn

from errors import BadOption, TrainingFailed, listed
from model.shard import Lockstep
from run.stopping import Notice, StopRequested

T = TypeVar("T")

# How long a rank waits for another one that is alive. The longest work between two exchanges is
# generating the answers of an exact-match validation: 1,319 take ten minutes on two CPU cores, and
# NCCL's default timeout of ten minutes would end such a run. The death of a rank closes its
# connections; with Gloo, the others notice that at once.
PATIENCE = timedelta(hours=1)
LOST = ("gloo", "Gloo", "NCCL", "Connection", "Broken pipe")  # in what a lost connection raises


@dataclass(frozen=True)
class World:
    """This process among all ranks."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    lockstep: Lockstep | None = None  # with a sharded base
    notice: Notice | None = None  # of a stop request; None for a single rank

    @property
    def is_main(self) -> bool:
        """Whether this rank prints and writes."""
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """The sum of each value over all ranks, in fp64.

        Clocks and signals differ between ranks, but all must branch alike: they branch on a sum.
        """
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        with self._exchange():
            dist.all_reduce(total)
            return total.tolist()

    def sum_gradients(self, parameters: Iterable[nn.Parameter], *flags: bool) -> list[bool]:
        """Sum every gradient over all ranks; returns whether each flag is set on any rank.

        Both travel in one message. A rank without rows adds zeros.
        """
        if self.size == 1:
            return list(flags)
        parameters = list(parameters)
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        raised = grads[0].new_tensor(flags)  # (flags,)
        flat = torch.cat([g.flatten() for g in grads] + [raised])
        with self._exchange():
            dist.all_reduce(flat)
        *grads, raised = flat.split([p.numel() for p in parameters] + [len(flags)])
        for p, grad in zip(parameters, grads):
            p.grad = grad.view_as(p)
        return [count > 0 for count in raised.tolist()]

    def wait(self) -> None:
        """Return once every rank has called this."""
        if self.size > 1:
            with self._exchange():
                dist.barrier()

    def gather(self, value: T) -> list[T]:
        """The value of each rank, which can be pickled."""
        values = [value] * self.size
        if self.size > 1:
            with self._exchange():
                dist.all_gather_object(values, value)
        return values

    @contextlib.contextmanager
    def stopping_together(self) -> Iterator[None]:
        """If the block raises StopRequested on any rank, it is raised after the block on all."""
        stopped = False
        try:
            yield
        except StopRequested:
            stopped = True
        if any(self.sum(stopped)):
            raise StopRequested

    @contextlib.contextmanager
    def _exchange(self) -> Iterator[None]:
        """Around an exchange: with a sharded base, the others first get the gathers they need."""
        with lost_ranks_reported():
            if self.lockstep:
                self.lockstep.finish()
            yield


@contextlib.contextmanager
def lost_ranks_reported() -> Iterator[None]:
    """Raise TrainingFailed if another rank dies during an exchange; it reports its own cause."""
    try:
        yield
    except RuntimeError as error:
        if not dist.is_initialized() or not any(word in str(error) for word in LOST):
            raise
        raise TrainingFailed(
            f"rank {dist.get_rank()} lost another rank and stops: {str(error)[:100]}",
            "see the other rank's error; rerun the command to resume",
        ) from error


def check_shard(other_options: dict[str, bool]) -> None:
    """Raise BadOption where `--shard` cannot be used; flags that exclude it -> whether given."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        raise BadOption(
            "--shard spreads the base over ranks, and this is the only one",
            "start several: torchrun --nproc-per-node N train.py ..., or omit --shard",
        )
    if given := [flag for flag, is_given in other_options.items() if is_given]:
        raise BadOption(
            f"--shard does not work with {listed(given)}", f"omit {listed(given)}, or omit --shard"
        )


def local_rank() -> int:
    """The index of this process, and of its device, on this machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def join(device: torch.device) -> World:
    """The world described by torchrun's environment variables; a world of one without them."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        return World(device=device)
    store, rank, size = next(dist.rendezvous("env://", timeout=PATIENCE))
    group = {"store": store, "rank": rank, "world_size": size, "timeout": PATIENCE}
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # With its device, NCCL connects now: a network that does not work is an error at the start.
        dist.init_process_group("nccl", device_id=device, **group)
    else:
        dist.init_process_group("gloo", **group)
    atexit.register(dist.destroy_process_group)
    return World(rank, size, device, notice=Notice(store))
