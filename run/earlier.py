"""Options saved by earlier versions, under the names and in the form of today. Without torch."""

from collections.abc import Mapping
from typing import Any

from errors import BadRun

GONE = {"init": "kaiming", "bias": "none"}  # options that were removed: what is always used now


def upgrade_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of an earlier version by their current names; those of today as they are.

    Raises BadRun if the run used a feature that no longer exists: PiSSA or gaussian
    initialization, or trained biases.
    """
    renamed = rename_options(options)
    if used := [f"--{name} {renamed[name]}" for name in GONE if name in renamed]:
        raise BadRun(
            f"this run was started with {' and '.join(used)}, which no longer exists",
            "start a new run in another --out, or resume this one with the version that started it",
        )
    return renamed


def rename_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """`upgrade_options` without a refusal: features that no longer exist keep their old names."""
    options = {name: x for name, x in options.items() if name not in GONE or x != GONE[name]}
    if "r" in options:  # --rank and --alphas had only the entries by name then
        ranks, alphas = options.pop("rank", None), options.pop("alphas", None)
        options["rank"] = _joined(options.pop("r"), ranks)
        options["alpha"] = _joined(options.get("alpha", 16.0), alphas)
    return options


def _joined(number: Any, by_name: Any) -> str:
    """`8,q_proj=16`; whole numbers have no decimal point."""
    entries = [str(number), *str(by_name or "").split(",")]
    return ",".join(entry.removesuffix(".0") for entry in entries if entry)
