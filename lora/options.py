"""Adapter settings as options: `--rank 8,q_proj=16 --alpha 16 --dora` to and from `LoRAConfig`.

`--rank` and `--alpha` are texts: a number for all layers, and NAME=NUMBER for layers whose names
end in NAME. The first NAME that matches a layer counts, as in PEFT.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from errors import BadOption, listed
from lora.config import LoRAConfig
from lora.peft_format import read_adapter_config

T = TypeVar("T", int, float)

RENAMED = {"r": "rank", "alphas": "alpha"}  # options of earlier versions: their names today


def lora_config(options: Mapping[str, Any]) -> LoRAConfig:
    """The adapter settings that options describe; options that are absent have their defaults.

    Reads rank, alpha, dropout, targets, rslora, dora and from_adapter. If `from_adapter` names an
    adapter folder, the settings are those of that adapter, with the dropout of the options.

    Raises BadOption, listing every malformed entry or every option that contradicts the adapter,
    and BadAdapter if the adapter's own settings cannot be used.
    """
    defaults = lora_options(LoRAConfig())
    options = defaults | dict(options)
    r, ranks, bad_ranks = _numbers(options["rank"], int, LoRAConfig.r)
    alpha, alphas, bad_alphas = _numbers(options["alpha"], float, LoRAConfig.alpha)
    problems = [f"--rank {bad!r}: not a whole number above 0, or given twice" for bad in bad_ranks]
    problems += [f"--alpha {bad!r}: not a number above 0, or given twice" for bad in bad_alphas]
    if problems:
        raise BadOption(listed(problems), "write 8 or 8,q_proj=16")
    asked = LoRAConfig(
        r=r, alpha=alpha, dropout=options["dropout"], targets=tuple(options["targets"]),
        rslora=options["rslora"], dora=options["dora"], ranks=ranks, alphas=alphas,
    )  # fmt: skip
    if options.get("from_adapter") is None:
        return asked
    folder = options["from_adapter"]
    config, _, _ = read_adapter_config(Path(folder))
    config = replace(config, dropout=asked.dropout)
    given, in_adapter = lora_options(asked), lora_options(config)
    contradictions = [
        f"--{name} is {_shown(in_adapter[name])} in the adapter, {_shown(value)} here"
        for name, value in given.items()
        if value not in (in_adapter[name], defaults[name])
    ]
    if contradictions:
        raise BadOption(
            f"--from-adapter {folder}: {listed(contradictions)}",
            "omit these options: they are taken from the adapter",
        )
    return config


def lora_options(config: LoRAConfig) -> dict[str, Any]:
    """The options that describe `config`, in canonical form: the reverse of `lora_config`."""
    return {
        "rank": _text(config.r, (f"{name}={r}" for name, r in config.ranks.items())),
        "alpha": _text(config.alpha, (f"{name}={a}" for name, a in config.alphas.items())),
        "dropout": config.dropout,
        "targets": config.targets,
        "rslora": config.rslora,
        "dora": config.dora,
    }


def _numbers(text: str, kind: type[T], default: T) -> tuple[T, dict[str, T], list[str]]:
    """(number for all layers, numbers by layer name, malformed entries) of `8,q_proj=16`."""
    numbers: dict[str, T] = {}  # the name "" stands for all layers
    bad = []
    for entry in text.split(","):
        name, equals, number = entry.rpartition("=")
        try:
            value = kind(number)
        except ValueError:
            value = 0  # refused below
        if not 0 < value < math.inf or name in numbers or (equals and not name):
            bad.append(entry)
        numbers[name] = value
    return numbers.pop("", default), numbers, bad


def _text(number: float, by_name: Iterable[str]) -> str:
    """`8,q_proj=16`; whole numbers have no decimal point."""
    return ",".join(entry.removesuffix(".0") for entry in [str(number), *by_name] if entry)


def _shown(value: Any) -> str:
    return ",".join(value) if isinstance(value, tuple) else str(value)
