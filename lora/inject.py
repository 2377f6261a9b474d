"""Adapters in a model: insert them, train them, switch them off, merge them.

inject(model, LoRAConfig(r=8, alpha=16))     wrap the target layers and freeze everything else
seed_dropout(model, ...)                     before each training forward pass
with disabled(model): ...                    compute with the base model, bit for bit
merge(model); unmerge(model)                 fold the adapters into the weights, and undo it
bake_scale(model, config)                    fold the scaling into B, for readers that ignore it
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora.cast import cast_adapters, remove_casts
from lora.config import LoRAConfig, layer_ranks, linear_layer, of_layer
from lora.dora import DoRALinear
from lora.dropout import fused_works, token_keys
from lora.layer import LoRALinear


def inject(model: nn.Module, config: LoRAConfig, *, seed: int = 0) -> None:
    """Wrap the target layers of `model` in place and freeze everything but the adapters.

    The initial values depend only on `seed` and the order of the layers. Raises BadOption for
    names in `config` that match no layer; the model is then unchanged.
    """
    assert not list(adapters(model)), "the model already has adapters"
    layer_type = DoRALinear if config.dora else LoRALinear
    for index, (name, r) in enumerate(layer_ranks(model, config).items()):
        layer = layer_type(
            linear_layer(model, name),
            r=r,
            alpha=of_layer(name, config.alphas, config.alpha),
            dropout=config.dropout,
            rslora=config.rslora,
            index=index,
            seed=seed,
        )
        if isinstance(layer, DoRALinear):
            layer.init_magnitude()
        parent, _, last_part = name.rpartition(".")
        setattr(model.get_submodule(parent), last_part, layer.train(model.training))
    freeze(model)
    layers = list(adapters(model))
    model.register_forward_pre_hook(partial(cast_adapters, layers))
    model.register_forward_hook(partial(remove_casts, layers), always_call=True)


def freeze(model: nn.Module) -> None:
    """Make the adapters' own parameters trainable and all others not."""
    model.requires_grad_(False)
    for layer in adapters(model):
        for parameter in layer.parameters(recurse=False):  # A, B, and DoRA's magnitudes
            parameter.requires_grad_(True)


def adapters(model: nn.Module) -> Iterator[LoRALinear]:
    """Every adapted layer, in the order of the model."""
    return (module for module in model.modules() if isinstance(module, LoRALinear))


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters by name: what an optimizer updates and a checkpoint stores."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def count(model: nn.Module) -> tuple[int, int]:
    """(number of trainable parameters, number of parameters of the base model)."""
    trainable = sum(p.numel() for p in trained_parameters(model).values())
    added = sum(p.numel() for layer in adapters(model) for p in layer.parameters(recurse=False))
    return trainable, sum(p.numel() for p in model.parameters()) - added


def seed_dropout(
    model: nn.Module, *, seed: int, epoch: int, row_ids: Tensor, positions: Tensor
) -> None:
    """Determine the dropout masks of the next training forward pass.

    Args:
        seed, epoch: of the run; each pair gives every token new masks.
        row_ids: (T,) the row of data that each token belongs to.
        positions: (T,) the position of each token in its row.
    """
    keys = token_keys(seed, epoch, row_ids, positions)  # (T,)
    for layer in adapters(model):
        layer.dropout.keys, layer.dropout.fused = keys, fused_works(keys.device)


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Inside the block, the model computes exactly what its base computes, even if merged."""
    enabled = {layer: layer.enabled for layer in adapters(model)}
    merged = {layer: layer.base_layer.weight.data for layer in enabled if layer.merged}
    for layer in enabled:
        layer.enabled = False
        if layer.merged:
            layer.unmerge()
    try:
        yield
    finally:
        for layer, before in enabled.items():
            layer.enabled = before
        for layer, weight in merged.items():
            layer.unmerged_weight = layer.base_layer.weight.data
            layer.base_layer.weight.data = weight


def merge(model: nn.Module, dtype: torch.dtype | None = None) -> float:
    """Add every adapter to its base weight, rounded to `dtype` (default: the dtype of the base).

    Returns the fraction of the change that rounding lost: ||(merged - base) - delta|| / ||delta||
    in the Frobenius norm over all layers, or 0 if the adapters change nothing.
    """
    lost = change = 0.0  # squared norms
    for layer in adapters(model):
        layer.merge(dtype)
        delta = layer.delta()
        moved = layer.base_layer.weight.float() - layer.original_weight().float()
        lost += (moved - delta).square().sum().item()
        change += delta.square().sum().item()
    return (lost / change) ** 0.5 if change else 0.0


@torch.no_grad()
def bake_scale(model: nn.Module, config: LoRAConfig) -> LoRAConfig:
    """Give every adapter the scaling 1 and one rank, without changing what it computes.

    B is multiplied by the scaling; A and B are padded with zeros to the largest rank. Returns the
    new settings: alpha = r, no ranks or alphas by name, no rsLoRA. Programs that ignore those, or
    divide alpha by the rank of each tensor, then compute the same update as this project.
    """
    assert not config.dora, "DoRA's magnitudes cannot be expressed by A and B"
    rank = max(layer.lora_A.shape[0] for layer in adapters(model))
    for layer in adapters(model):
        missing = rank - layer.lora_A.shape[0]
        A = functional.pad(layer.lora_A, (0, 0, 0, missing))  # (rank, in)
        B = functional.pad(layer.lora_B * layer.scaling, (0, missing))  # (out, rank)
        layer.lora_A, layer.lora_B, layer.scaling = nn.Parameter(A), nn.Parameter(B), 1.0
    return replace(config, r=rank, alpha=rank, rslora=False, ranks={}, alphas={})


def unmerge(model: nn.Module) -> None:
    """Undo `merge`, bit for bit."""
    for layer in adapters(model):
        layer.unmerge()


def unwrapped_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without adapters, under the names from before `inject`.

    After `merge` it holds the merged weights.
    """
    state = {}
    for name, tensor in model.state_dict().items():
        if not name.rpartition(".")[2].startswith("lora_"):
            state[name.replace(".base_layer.", ".")] = tensor
    return state


@torch.no_grad()
def load_trained(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copy `tensors` into the trainable parameters; both must have the same names."""
    parameters = trained_parameters(model)
    assert parameters.keys() == tensors.keys(), parameters.keys() ^ tensors.keys()
    for name, parameter in parameters.items():
        parameter.copy_(tensors[name])
