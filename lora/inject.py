"""Where adapters go, and the verbs one uses on a model that has them.

inject(model, LoRAConfig(r=8, alpha=16))     wrap the target layers, freeze all the rest
seed_dropout(model, ...)                     before each training forward
with disabled(model): ...                    the base, bit for bit
merge(model); unmerge(model)                 fold the adapters into the weights, and back
count(model)                                 trainable and base parameters
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from errors import BadOption
from lora.dropout import token_keys
from lora.layer import LoRALinear

TARGET_GROUPS = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "all-linear": None,  # every linear layer but the head
}
BIASES = ("none", "all", "lora_only")


@dataclass(frozen=True)
class LoRAConfig:
    """What an adapter is, but for its weights; `targets` are last parts of names, or a group."""

    r: int = 8
    alpha: float = 16
    dropout: float = 0.1
    targets: tuple[str, ...] = ("attention",)
    bias: str = "none"
    rslora: bool = False


def inject(model: nn.Module, config: LoRAConfig, *, seed: int = 0) -> None:
    """Wrap the target layers of `model` in `LoRALinear`, in place, and freeze everything else.

    Raises BadOption for a target that matches no linear layer.
    """
    assert not list(adapters(model)), "the model has adapters already"
    for index, name in enumerate(target_names(model, config.targets)):
        parent, _, last = name.rpartition(".")
        layer = LoRALinear(
            model.get_submodule(name),
            r=config.r,
            alpha=config.alpha,
            dropout=config.dropout,
            rslora=config.rslora,
            index=index,
            seed=seed,
        )
        setattr(model.get_submodule(parent), last, layer.train(model.training))
    freeze(model, config.bias)


def target_names(model: nn.Module, targets: tuple[str, ...]) -> list[str]:
    """Full names of the linear layers that `targets` mean, in the model's order."""
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    last_parts = {name.rpartition(".")[2] for name in linear}
    wanted: set[str] = set()
    for target in targets:
        wanted |= set(TARGET_GROUPS.get(target, (target,)) or last_parts)
    if missing := sorted(wanted - last_parts):
        raise BadOption(
            f"--targets: no linear layer is named {', '.join(missing)}",
            f"use {', '.join(TARGET_GROUPS)}, or some of: {', '.join(sorted(last_parts))}",
        )
    return [name for name in linear if name.rpartition(".")[2] in wanted]


def freeze(model: nn.Module, bias: str = "none") -> None:
    """Leave trainable only the adapters and, as PEFT means it, biases: none, all, or lora_only.

    A trained bias becomes fp32, like all that is trained; its first value is kept for `disabled`.
    """
    assert bias in BIASES, f"bias {bias!r} is not one of {BIASES}"
    model.requires_grad_(False)
    for layer in adapters(model):
        layer.lora_A.requires_grad_(True)
        layer.lora_B.requires_grad_(True)
    adapted = {id(layer.base_layer) for layer in adapters(model)}
    for module in model.modules():
        has_bias = isinstance(module, nn.Linear) and module.bias is not None
        if has_bias and (bias == "all" or bias == "lora_only" and id(module) in adapted):
            module.register_buffer("untrained_bias", module.bias.detach(), persistent=False)
            module.bias = nn.Parameter(module.bias.detach().to(torch.float32, copy=True))


def adapters(model: nn.Module) -> Iterator[LoRALinear]:
    """Every adapter in `model`, in the model's order."""
    return (module for module in model.modules() if isinstance(module, LoRALinear))


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What an optimizer is given and a checkpoint keeps, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def count(model: nn.Module) -> tuple[int, int]:
    """(trainable parameters, parameters of the base)."""
    trainable = sum(p.numel() for p in trained_parameters(model).values())
    added = sum(layer.lora_A.numel() + layer.lora_B.numel() for layer in adapters(model))
    return trainable, sum(p.numel() for p in model.parameters()) - added


def seed_dropout(
    model: nn.Module, *, seed: int, epoch: int, rows: Tensor, positions: Tensor
) -> None:
    """Key the next training forward's dropout by `rows (T,)` and `positions (T,)` of its tokens."""
    keys = token_keys(seed, epoch, rows, positions)  # (T,)
    for layer in adapters(model):
        layer.dropout.keys = keys


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Inside, the model answers as its base, bit for bit, trained biases included."""
    layers = list(adapters(model))
    biased = [m for m in model.modules() if getattr(m, "untrained_bias", None) is not None]
    trained = [m.bias.data for m in biased]
    merged = [(layer, layer.base_layer.weight.data) for layer in layers if layer.merged]
    enabled = [layer for layer in layers if layer.enabled]
    for layer, _ in merged:
        layer.unmerge()
    for layer in layers:
        layer.enabled = False
    for module in biased:
        module.bias.data = module.untrained_bias.to(module.bias.dtype)
    try:
        yield
    finally:
        for layer in enabled:
            layer.enabled = True
        for layer, weight in merged:
            layer.unmerged_weight = layer.base_layer.weight.data
            layer.base_layer.weight.data = weight
        for module, bias in zip(biased, trained):
            module.bias.data = bias


def merge(model: nn.Module, dtype: torch.dtype | None = None) -> float:
    """Fold every adapter into its base weight, rounded to `dtype` (default: the base's).

    Returns the share of the adapters' change that rounding lost, by norm:
    ||(merged - base) - delta|| / ||delta||, 0 for fresh adapters.
    """
    lost = change = 0.0
    for layer in adapters(model):
        layer.merge(dtype)
        delta = layer.delta()
        moved = layer.base_layer.weight.float() - layer.unmerged_weight.float()
        lost += (moved - delta).square().sum().item()
        change += delta.square().sum().item()
    return (lost / change) ** 0.5 if change else 0.0


def unmerge(model: nn.Module) -> None:
    """Undo `merge`, bit for bit."""
    for layer in adapters(model):
        layer.unmerge()


def unwrapped_state(model: nn.Module) -> dict[str, Tensor]:
    """The base's tensors under the names they had before `inject`, merged or not as they are."""
    state = {}
    for name, tensor in model.state_dict().items():
        if not name.endswith(("lora_A", "lora_B")):
            state[name.replace(".base_layer.", ".")] = tensor
    return state


@torch.no_grad()
def load_trained(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copy `tensors` into the model; their names must be those of `trained_parameters`."""
    parameters = trained_parameters(model)
    assert parameters.keys() == tensors.keys(), parameters.keys() ^ tensors.keys()
    for name, parameter in parameters.items():
        parameter.copy_(tensors[name])
