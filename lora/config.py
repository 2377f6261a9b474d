"""The settings of an adapter, and which layers of a model they select.

Layers are selected by the end of their full name, in whole dotted parts: `q_proj` selects
`model.layers.0.self_attn.q_proj` and its counterpart in every other layer, while
`layers.0.self_attn.q_proj` selects only the first.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from torch import nn

from errors import BadOption, listed

T = TypeVar("T")

TARGET_GROUPS = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "all-linear": None,  # every linear layer except the output head
}


@dataclass(frozen=True)
class LoRAConfig:
    """The settings of an adapter: everything except its weights.

    Args:
        r: rank of the layers that `ranks` does not name.
        alpha: numerator of the scaling alpha / r, for the layers that `alphas` does not name.
        dropout: probability of dropping an input of an adapter in training.
        targets: name endings of the layers to adapt, or keys of `TARGET_GROUPS`.
        rslora: scale by alpha / sqrt(r) instead (arXiv:2312.03732).
        dora: also train the magnitude of each weight row (`dora.py`).
        ranks: ranks by name ending, as in `{"q_proj": 16}`; the first match counts, as in PEFT.
        alphas: alphas by name ending, likewise.
    """

    r: int = 8
    alpha: float = 16
    dropout: float = 0.1
    targets: tuple[str, ...] = ("attention",)
    rslora: bool = False
    dora: bool = False
    ranks: dict[str, int] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        """For people: `rank 8 (q_proj 16), alpha 16, dropout 0.1, on attention, DoRA`."""
        ranks, alphas = (_by_name_text(by_name) for by_name in (self.ranks, self.alphas))
        text = f"rank {self.r}{ranks}, alpha {self.alpha:g}{alphas}, dropout {self.dropout:g}"
        text += f", on {layers_text(self.targets)}"
        return text + ", rsLoRA" * self.rslora + ", DoRA" * self.dora


def layers_text(names: Iterable[str]) -> str:
    """Layer names for people: `q_proj, v_proj of layers 0-3, 7` instead of ten full names."""
    others, numbers = [], dict[str, list[int]]()  # last part of a name -> numbers of its layers
    for name in names:
        number = next((part for part in name.split(".") if part.isdecimal()), None)
        if number is None:
            others.append(name)
        else:
            numbers.setdefault(last_part(name), []).append(int(number[:9]))
    ends: dict[str, list[str]] = {}  # the same, the other way around
    for end, found in numbers.items():
        ends.setdefault(_ranges(found), []).append(end)
    grouped = [f"{', '.join(names)} of layers {places}" for places, names in ends.items()]
    return "; ".join([", ".join(others)] * bool(others) + grouped)


def _ranges(numbers: Iterable[int]) -> str:
    """`0-3, 7` of 0, 1, 2, 3, 7."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{first}-{last}" if first < last else f"{first}" for first, last in runs)


def _by_name_text(by_name: Mapping[str, float]) -> str:
    """` (q_proj 16, up_proj 4)`: at most four of them."""
    if not by_name:
        return ""
    texts = [f"{name} {value:g}" for name, value in by_name.items()]
    rest = f", and {len(texts) - 4} more" if len(texts) > 4 else ""
    return f" ({', '.join(texts[:4])}{rest})"


def target_names(model: nn.Module, targets: tuple[str, ...]) -> list[str]:
    """Full names of the linear layers that `targets` select, in the order of the model.

    Raises BadOption, listing every target that selects no layer.
    """
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    last_parts = {last_part(name) for name in linear}
    ends = {end for target in targets for end in TARGET_GROUPS.get(target, (target,)) or last_parts}
    if unmatched := [end for end in sorted(ends) if not any(ends_in(n, end) for n in linear)]:
        raise BadOption(
            f"--targets: no linear layer is named {', '.join(unmatched)}",
            f"use {', '.join(TARGET_GROUPS)}, or some of: {', '.join(sorted(last_parts))}",
        )
    return [name for name in linear if any(ends_in(name, end) for end in ends)]


def layer_ranks(model: nn.Module, config: LoRAConfig) -> dict[str, int]:
    """The rank of each layer to adapt, by full name, in the order of the model.

    Raises BadOption, listing every name in `ranks` and `alphas` that matches no adapted layer, or
    every target that selects no layer.
    """
    names = target_names(model, config.targets)
    problems = []
    for option, by_name in (("--rank", config.ranks), ("--alpha", config.alphas)):
        if unmatched := [end for end in by_name if not any(ends_in(n, end) for n in names)]:
            problems.append(f"{option}: no adapted layer is named {', '.join(unmatched)}")
    if problems:
        adapted = sorted({last_part(name) for name in names})
        raise BadOption(listed(problems), f"the adapted layers are named {', '.join(adapted)}")
    return {name: of_layer(name, config.ranks, config.r) for name in names}


def added_parameters(model: nn.Module, config: LoRAConfig) -> int:
    """Number of trained parameters that `inject` would add to `model`; raises like `layer_ranks`.

    Only shapes are read, so the model may be on the meta device.
    """
    total = 0
    for name, r in layer_ranks(model, config).items():
        layer = linear_layer(model, name)
        total += r * (layer.in_features + layer.out_features) + config.dora * layer.out_features
    return total


def linear_layer(model: nn.Module, name: str) -> nn.Linear:
    """The linear layer of this full name."""
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear), f"{name} is a {type(layer).__name__}"
    return layer


def of_layer(name: str, by_name: Mapping[str, T], default: T) -> T:
    """The value of the first key in `by_name` that layer `name` ends in, or `default`."""
    return next((value for end, value in by_name.items() if ends_in(name, end)), default)


def ends_in(name: str, end: str) -> bool:
    """Whether the last dotted parts of `name` are `end`: x.q_proj ends in q_proj, not in proj."""
    return f".{name}".endswith(f".{end}")


def last_part(name: str) -> str:
    """`q_proj` of `model.layers.0.self_attn.q_proj`."""
    return name.rpartition(".")[2]
