"""The estimate of a run's memory against the allocator's peak, for bases of several sizes.

    python benchmarks/memory.py                     # on a CUDA device

The networks are built from their sizes, without checkpoints. Three optimizer steps on examples of
random tokens are made with each; the peak is that of the last. Nothing depends on the values, so
on a CUDA runtime that executes nothing the peak is the same. Sizes that do not fit are left out.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import LORA, Ours, trust_if_counting, write_result
from benchmarks.sizes import SIZES
from data.batches import Schedule
from data.encode import IGNORE, Example
from errors import BadOption, run_script
from model.qwen2 import Qwen2
from run.device import DTYPES, describe, pick_precision
from run.memory import MemoryModel
from run.options import option, parse

QWEN = ("Qwen2.5-0.5B", "Qwen2.5-1.5B", "Qwen2.5-3B", "Qwen2.5-7B")


@dataclass(frozen=True)
class MemoryConfig:
    sizes: tuple[str, ...] = option(QWEN, f"sizes of the base: {', '.join(SIZES)}")
    batch_size: int = option(16, "examples in a micro-batch", least=1)
    length: int = option(200, "mean tokens of an example; half of them are supervised", least=4)
    precision: str = option("auto", "dtype of the base", choices=("auto", "bf16", "fp16", "fp32"))
    targets: tuple[str, ...] = option(("attention",), "layers to adapt")
    dora: bool = option(False, "adapters with DoRA")
    dropout: float = option(0.1, "dropout of the adapters", least=0, below=1)
    compile: bool = option(False, "compile the layers, which cannot be recomputed then")
    json: str | None = option(None, "file to write the result to")


def main(argv: list[str] | None = None) -> None:
    """One line for each size, without and with recomputation."""
    config = parse(MemoryConfig, argv, "The estimate of a step's memory against its peak.")
    if not torch.cuda.is_available():
        raise BadOption("the peak is that of CUDA's allocator, and there is no CUDA device",
                        "run this on a machine with a GPU")  # fmt: skip
    trust_if_counting()
    device = torch.device("cuda", 0)
    torch.backends.cuda.enable_cudnn_sdp(False)  # as run.device.prepare does
    precision, _ = pick_precision(config.precision, device)
    print(f"{describe(device)}, {precision}")
    print(f"{'base':<14}{'tokens':>8}{'recomputed':>12}{'estimate':>10}{'peak':>8}   difference")
    ways = [False] if config.compile else [False, True]  # recomputed
    found = [
        line for size in config.sizes for recompute in ways
        if (line := compare(config, size, DTYPES[precision], device, recompute=recompute))
    ]  # fmt: skip
    write_result(config, {"device": describe(device), "precision": precision, "found": found})


def compare(
    config: MemoryConfig, size: str, dtype: torch.dtype, device: torch.device, *, recompute: bool
) -> dict | None:
    """The estimate and the peak, in GB; None if a step does not fit."""
    lora = replace(LORA, targets=config.targets, dora=config.dora, dropout=config.dropout)
    with torch.device("meta"):
        network = Qwen2(SIZES[size])
    schedule = Schedule(examples(config), config.batch_size, 1, epochs=1, seed=0)
    step = schedule.step(0)
    memory = MemoryModel(network, lora, dtype, device, compiled=config.compile).of_a_step(
        step.token_count, step.supervised_count, recompute=recompute
    )
    model = network.to(dtype).requires_grad_(False)
    try:
        ours = Ours(model.to_empty(device=device), lora, compile=config.compile)
        model.model.checkpoint_activations = recompute
        for _ in range(3):
            torch.cuda.reset_peak_memory_stats()
            ours.step(step)
    except torch.OutOfMemoryError:
        print(f"{size:<14}{step.token_count:>8,}{recompute!s:>12}{memory.gb:>10.2f}   -")
        return None
    peak = torch.cuda.max_memory_allocated()
    print(f"{size:<14}{step.token_count:>8,}{recompute!s:>12}{memory.gb:>10.2f}"
          f"{peak / 1e9:>8.2f}   {memory.gb * 1e9 / peak - 1:+.1%}   {memory}")  # fmt: skip
    return {"size": size, "tokens": step.token_count, "recompute": recompute,
            "estimate": memory.gb, "peak": peak / 1e9}  # fmt: skip


def examples(config: MemoryConfig) -> list[Example]:
    """Examples of half to one and a half times the mean length, with random tokens."""
    rng = np.random.default_rng(0)
    lengths = np.linspace(0.5, 1.5, config.batch_size) * config.length
    found = []
    for row_id, length in enumerate(lengths.astype(int)):
        tokens = rng.integers(0, 1000, length)
        targets = np.full(length, IGNORE)
        targets[length // 2 :] = tokens[length // 2 :]
        found.append(Example(row_id, tokens, targets))
    return found


if __name__ == "__main__":
    sys.exit(run_script(main))
