"""A base spread over ranks: each holds a part of every layer, and gathers a whole layer to compute.

PyTorch's FSDP2 (`fully_shard`) does both. Only the layers are sharded. Embedding, final norm and
output embedding are whole on every rank, because the loss and decoding read the output embedding
outside of any layer. Adapters are inserted afterwards, so they are whole as well, and their
gradients are summed as without shards.

A gather needs all ranks, but ranks have different numbers of micro-batches and of answers. So one
number is exchanged before each forward pass, and a rank that has finished computes dummy tokens
until all others have: `Lockstep`.

Source: PyTorch FSDP, arXiv:2304.11277; FSDP2 is its form with one tensor per parameter.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

IDLE, FORWARD, BACKWARD = range(3)  # what a rank is about to do


def shard_layers(model: nn.Module, device: torch.device) -> "Lockstep":
    """Shard the layers of `model`, a frozen Qwen2 on the meta device, over all ranks. Their
    forward passes then follow the lockstep that is returned.
    """
    from torch.distributed.device_mesh import init_device_mesh  # takes half a second to import
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in model.get_submodule("model.layers").children():
        fully_shard(layer, mesh=mesh)
    whole = {p for p in model.parameters() if not is_sharded(p)}
    fully_shard(model, mesh=mesh, ignored_params=whole)  # gathers the next layer in advance
    return Lockstep(model, device)


def own_part(tensor: Tensor, parameter: Tensor) -> Tensor:
    """What this rank holds of `tensor`, as `parameter` is sharded: all of it if it is not."""
    if not is_sharded(parameter):
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(parameter, DTensor)
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)  # sends nothing


def is_sharded(parameter: Tensor) -> bool:
    """Whether it is a DTensor, of which each rank holds its part."""
    return hasattr(parameter, "placements")


class Lockstep:
    """Lets ranks make different numbers of forward passes through one sharded model."""

    def __init__(self, model: nn.Module, device: torch.device):
        self.model, self.device, self.finishing = model, device, False
        model.register_forward_pre_hook(self._announce)

    def start(self) -> None:
        """One forward pass of every rank, in which FSDP makes its buffers.

        Made in inference mode, they could not be used in training.
        """
        self._dummy(FORWARD)

    def finish(self) -> None:
        """Return once no rank computes any more; every rank calls this after its own work."""
        was_training, self.finishing = self.model.training, True
        self.model.eval()  # without dropout, whose masks belong to other tokens
        while (others := self._exchange(IDLE)) != IDLE:
            self._dummy(others)
        self.model.train(was_training)
        self.finishing = False

    def _dummy(self, kind: int) -> None:
        """The gathers of a forward pass, and with BACKWARD those of a backward pass."""
        zero = torch.zeros(1, dtype=torch.long, device=self.device)
        with torch.inference_mode(False), torch.set_grad_enabled(kind == BACKWARD):
            hidden = self.model(zero, zero, [1])  # (1, C)
            if kind == BACKWARD:
                hidden.backward(torch.zeros_like(hidden))

    def _announce(self, *_: object) -> None:
        if not self.finishing:
            self._exchange(BACKWARD if torch.is_grad_enabled() else FORWARD)

    def _exchange(self, own: int) -> int:
        """The most that any rank is about to do."""
        most = torch.tensor(own, device=self.device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return int(most) if own == IDLE else own  # reading it waits for the device
