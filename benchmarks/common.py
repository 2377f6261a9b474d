"""What benchmarks share: the machine and versions behind figures, and medians with their ranges."""

import json
import os
import platform
import statistics
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "safetensors", "tokenizers", "numpy")


def spread(values: list[float]) -> dict[str, float]:
    """The median and both ends."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def shown(values: dict[str, float], form: str) -> str:
    """A `spread` for people: "1.23 (1.20 to 1.31)"."""
    return f"{values['median']:{form}} ({values['min']:{form}} to {values['max']:{form}})"


def machine() -> dict[str, Any]:
    """What figures depend on; a load average above the cores means that others were busy too."""
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "load_average": os.getloadavg()[0],
        "platform": platform.platform(),
        "versions": versions(),
    }


def processor() -> str:
    """The processor's name, as the system has it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str | None]:
    """Of Python and of `packages`; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def write_result(path: str | None, result: dict[str, Any]) -> None:
    """The figures, and the machine behind them, as JSON."""
    if path:
        text = json.dumps(result | {"machine": machine()}, indent=2)
        Path(path).write_text(text + "\n")
