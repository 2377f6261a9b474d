"""Where adapters go, and the verbs one uses on a model that has them.

inject(model, LoRAConfig(r=8, alpha=16))     wrap the target layers, freeze all the rest
seed_dropout(model, ...)                     before each training forward
with disabled(model): ...                    the base, bit for bit
merge(model); unmerge(model)                 fold the adapters into the weights, and back
count(model)                                 trainable and base parameters
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn

from errors import BadOption
from lora.dora import DoRALinear
from lora.dropout import token_keys
from lora.init import start
from lora.layer import LoRALinear

T = TypeVar("T")

TARGET_GROUPS = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "all-linear": None,  # every linear layer but the head
}
BIASES = ("none", "all", "lora_only")


@dataclass(frozen=True)
class LoRAConfig:
    """What an adapter is, but for its weights; `targets` are ends of names, or a group.

    `ranks` and `alphas` say which layers have others than `r` and `alpha`, by the ends of their
    names: `{"q_proj": 16}`. Of several that match a layer, the first counts, as in PEFT.
    """

    r: int = 8
    alpha: float = 16
    dropout: float = 0.1
    targets: tuple[str, ...] = ("attention",)
    bias: str = "none"
    rslora: bool = False
    dora: bool = False
    init: str = "kaiming"
    ranks: dict[str, int] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        """For people: `rank 8 (q_proj 16), alpha 16, dropout 0.1, on attention, DoRA`."""
        ranks, alphas = (
            f" ({', '.join(f'{k} {v:g}' for k, v in values.items())})" if values else ""
            for values in (self.ranks, self.alphas)
        )
        words = f"rank {self.r}{ranks}, alpha {self.alpha:g}{alphas}, dropout {self.dropout:g}"
        words += f", on {', '.join(self.targets)}" + ", rsLoRA" * self.rslora + ", DoRA" * self.dora
        words += f", biases {self.bias}" if self.bias != "none" else ""
        return words + (f", from {self.init}" if self.init != "kaiming" else "")


def inject(model: nn.Module, config: LoRAConfig, *, seed: int = 0) -> None:
    """Wrap the target layers of `model` in `LoRALinear`, in place, and freeze everything else.

    Raises BadOption for a target that matches no linear layer, as `layer_ranks` does.
    """
    assert not list(adapters(model)), "the model has adapters already"
    kind = DoRALinear if config.dora else LoRALinear
    for index, (name, r) in enumerate(layer_ranks(model, config).items()):
        parent, _, last = name.rpartition(".")
        layer = kind(
            model.get_submodule(name),
            r=r,
            alpha=of_layer(name, config.alphas, config.alpha),
            dropout=config.dropout,
            rslora=config.rslora,
            index=index,
            seed=seed,
        )
        start(layer, config.init, seed=seed, index=index)
        if config.dora:
            layer.start_magnitude()
        setattr(model.get_submodule(parent), last, layer.train(model.training))
    freeze(model, config.bias)


def target_names(model: nn.Module, targets: tuple[str, ...]) -> list[str]:
    """Full names of the linear layers that `targets` mean, in the model's order."""
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    last_parts = {name.rpartition(".")[2] for name in linear}
    wanted: dict[str, bool] = {}
    for target in targets:
        wanted |= dict.fromkeys(TARGET_GROUPS.get(target, (target,)) or last_parts, True)
    if missing := [end for end in sorted(wanted) if not any(ends_in(n, end) for n in linear)]:
        raise BadOption(
            f"--targets: no linear layer is named {', '.join(missing)}",
            f"use {', '.join(TARGET_GROUPS)}, or some of: {', '.join(sorted(last_parts))}",
        )
    return [name for name in linear if of_layer(name, wanted, False)]


def of_layer(name: str, values: dict[str, T], usual: T) -> T:
    """The first of `values` whose key `name` ends in, in whole parts; `usual` if none does."""
    return next((value for end, value in values.items() if ends_in(name, end)), usual)


def ends_in(name: str, end: str) -> bool:
    """Whether `end` is the last part of a layer's `name`, or the last few: `self_attn.q_proj`."""
    return f".{name}".endswith(f".{end}")


def layer_ranks(model: nn.Module, config: LoRAConfig) -> dict[str, int]:
    """The rank of each layer that `config` adapts, by its full name, in the model's order.

    Raises BadOption for names that match none of them, and for ranks above what PiSSA can fill.
    """
    names = target_names(model, config.targets)
    for option, values in (("--rank", config.ranks), ("--alphas", config.alphas)):
        if unused := [end for end in values if not any(ends_in(n, end) for n in names)]:
            raise BadOption(
                f"{option}: no adapted layer is named {', '.join(unused)}",
                f"adapted are {', '.join(sorted({n.rpartition('.')[2] for n in names}))}",
            )
    ranks = {name: of_layer(name, config.ranks, config.r) for name in names}
    for name, r in ranks.items():
        most = min(model.get_submodule(name).weight.shape)
        if config.init == "pissa" and r > most:
            raise BadOption(
                f"--init pissa: {name} has {most} singular directions, and its rank is {r}",
                "use a smaller --r, or another for it: --rank NAME=R",
            )
    return ranks


def added_numbers(model: nn.Module, config: LoRAConfig) -> int:
    """How many trained numbers `config` adds to `model`, which has no adapters yet."""
    ranks = layer_ranks(model, config)
    shapes = {name: model.get_submodule(name).weight.shape for name in ranks}
    return sum(r * sum(shapes[n]) + config.dora * shapes[n][0] for n, r in ranks.items())


def by_target(option: str, text: str | None, kind: type[T]) -> dict[str, T]:
    """`q_proj=16,default=8` as a dict; BadOption names all entries that are not so."""
    found, bad = {}, []
    for entry in text.split(",") if text else []:
        name, _, number = entry.partition("=")
        try:
            value = kind(number)
        except ValueError:
            value = 0
        if not name or not 0 < value < math.inf or name in found:
            bad.append(entry)
        found[name] = value
    if bad:
        raise BadOption(
            f"{option} {', '.join(bad)}: not a name and a number above 0, or a name twice",
            f"give it as {option} q_proj=16,default=8",
        )
    return found


def freeze(model: nn.Module, bias: str = "none") -> None:
    """Leave trainable only the adapters and, as PEFT means it, biases: none, all, or lora_only.

    A trained bias becomes fp32, like all that is trained; its first value is kept for `disabled`.
    """
    assert bias in BIASES, f"bias {bias!r} is not one of {BIASES}"
    model.requires_grad_(False)
    for layer in adapters(model):
        for parameter in layer.parameters(recurse=False):  # A, B, and DoRA's lengths
            parameter.requires_grad_(True)
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
    added = sum(p.numel() for layer in adapters(model) for p in layer.parameters(recurse=False))
    return trainable, sum(p.numel() for p in model.parameters()) - added


def seed_dropout(
    model: nn.Module, *, seed: int, epoch: int, row_ids: Tensor, positions: Tensor
) -> None:
    """Key the next training forward's dropout by its tokens' `row_ids (T,)` and `positions (T,)`."""
    keys = token_keys(seed, epoch, row_ids, positions)  # (T,)
    for layer in adapters(model):
        layer.dropout.keys = keys


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Inside, the model answers as its base, bit for bit, trained biases included."""
    layers = list(adapters(model))
    biased = [m for m in model.modules() if getattr(m, "untrained_bias", None) is not None]
    trained = [m.bias.data for m in biased]
    weights = [(layer, layer.base_layer.weight.data, layer.unmerged_weight) for layer in layers]
    enabled = [layer for layer in layers if layer.enabled]
    for layer in layers:
        if layer.merged:
            layer.unmerge()
        if layer.taken_out:
            layer.base_layer.weight.data = layer.taken_out.weight
        layer.enabled = False
    for module in biased:
        module.bias.data = module.untrained_bias.to(module.bias.dtype)
    try:
        yield
    finally:
        for layer in enabled:
            layer.enabled = True
        for layer, weight, unmerged in weights:
            layer.base_layer.weight.data, layer.unmerged_weight = weight, unmerged
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
        if not name.rpartition(".")[2].startswith("lora_"):
            state[name.replace(".base_layer.", ".")] = tensor
    return state


@torch.no_grad()
def load_trained(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copy `tensors` into the model; their names must be those of `trained_parameters`."""
    parameters = trained_parameters(model)
    assert parameters.keys() == tensors.keys(), parameters.keys() ^ tensors.keys()
    for name, parameter in parameters.items():
        parameter.copy_(tensors[name])
