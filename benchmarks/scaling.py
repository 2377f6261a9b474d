"""Scaling: what a training step costs as one size grows, compared with what arithmetic predicts.

    python benchmarks/scaling.py --json scaling.json      # some minutes on two cores

A step should cost what its matrix products and its saved tensors cost. Each axis grows one size of
a small model with random weights. Each point's time is divided by its number of floating-point
operations, and its peak memory by the bytes that the formulas below give. If that quotient exceeds
the lowest of the earlier points of the axis by more than WORSE, the cost grows worse than the
arithmetic, and is reported.

The points of an axis are timed in turns, since a machine's speed drifts. Memory is exact: on a CPU
the largest sum of what PyTorch's allocator had given out at one time during a step, from its
profiler; on CUDA `max_memory_allocated` minus what was allocated before. Neither counts weights.

Legend: T tokens, N supervised tokens, C hidden size, F MLP size, K = G x D key/value size, L
layers, V vocabulary size.
"""

import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import Ours, spread, step_flop, timed, write_result
from data.batches import Step
from data.encode import IGNORE, Example
from errors import run_script
from lora.config import LoRAConfig
from model.loss import LOGITS_BYTES, PROBABILITIES_BYTES
from model.qwen2 import Qwen2, Qwen2Config
from run.device import DTYPES, describe, pick_device, pick_precision, prepare
from run.options import option, parse

WORSE = 1.3  # growth relative to the arithmetic above which a cost is reported


@dataclass(frozen=True)
class ScalingConfig:
    repeat: int = option(3, "timed steps per point", least=1)
    device: str = option("auto", "device to train on", choices=("auto", "cuda", "cpu"))
    precision: str = option(
        "auto", "dtype of the base (except on its own axis)", choices=("auto", "bf16", "fp32")
    )
    json: str | None = option(None, "file to write the result to")


@dataclass(frozen=True)
class Point:
    """The sizes of one step. Half of each example is supervised."""

    lengths: tuple[int, ...] = (128,) * 8
    rank: int = 8
    vocabulary: int = 16_384
    layers: int = 6
    hidden: int = 512
    precision: str = "bf16"

    @property
    def supervised_count(self) -> int:
        return sum(n // 2 for n in self.lengths)

    @property
    def config(self) -> Qwen2Config:
        return Qwen2Config(
            hidden_size=self.hidden, intermediate_size=3 * self.hidden,
            num_hidden_layers=self.layers, num_attention_heads=self.hidden // 64,
            num_key_value_heads=2, vocab_size=self.vocabulary,
        )  # fmt: skip


def axes(base: Point) -> dict[str, dict[str, Point]]:
    """Axis -> name -> point. Each point is compared with the earlier ones of its axis."""
    lengths, one_long = (64, 128, 256, 512, 1024, 2048), (50,) * 8 + (550,)
    return {
        "length": {f"4 x {n}": replace(base, lengths=(n,) * 4) for n in lengths},
        "batch": {f"{n} x 128": replace(base, lengths=(128,) * n) for n in (2, 8, 32, 64)},
        "mixed": {
            "9 x 550": replace(base, lengths=(550,) * 9),
            "8 x 50 + 550": replace(base, lengths=one_long),
        },
        "rank": {f"rank {r}": replace(base, rank=r) for r in (4, 8, 32, 128)},
        "vocabulary": {
            f"{v:,} tokens": replace(base, vocabulary=v) for v in (4_096, 16_384, 65_536, 151_936)
        },
        "depth": {f"{n} layers": replace(base, layers=n) for n in (2, 6, 12, 24)},
        "width": {f"{c} wide": replace(base, hidden=c) for c in (256, 512, 1024)},
        "precision": {p: replace(base, precision=p) for p in ("bf16", "fp32")},
    }


def peak_bytes(p: Point) -> float:
    """Peak memory of a step: what is kept for the backward pass, and the buffers of the loss.

    For each token a layer keeps: the inputs of its two norms; of four adapters, the input after
    dropout (C), its mask (one byte per channel) and the r values; q, k, v and the result of
    attention; and the MLP's gate and up.
    """
    C, F, K, T, N = p.hidden, 3 * p.hidden, 128, sum(p.lengths), p.supervised_count
    size = DTYPES[p.precision].itemsize
    kept = size * (2 * C + 4 * C + 4 * p.rank + 2 * C + 2 * K + 2 * F) + 4 * C
    logits = min(LOGITS_BYTES, size * N * p.vocabulary)
    probabilities = min(PROBABILITIES_BYTES, 4 * N * p.vocabulary)
    return p.layers * T * kept + logits + probabilities


class Case:
    """A point's model, and the step that is measured."""

    def __init__(self, p: Point, device: torch.device):
        torch.manual_seed(0)
        with torch.device(device):
            model = Qwen2(p.config).to(DTYPES[p.precision])
        self.ours, self.device = Ours(model, LoRAConfig(r=p.rank)), device
        rng, examples = np.random.default_rng(0), []
        for row_id, length in enumerate(p.lengths):
            tokens = rng.integers(0, p.vocabulary, length)
            targets = np.where(np.arange(length) < length - length // 2, IGNORE, tokens)
            examples.append(Example(row_id, tokens, targets))
        self.step = Step(
            epoch=0, micro_batches=[examples], token_count=sum(p.lengths),
            supervised_count=p.supervised_count, row_ids=list(range(len(examples))),
        )  # fmt: skip

    def seconds(self) -> float:
        """Make one step; returns how long it took."""
        return timed(lambda: self.ours.step(self.step), self.device)[0]


@dataclass
class Measured:
    """The measurements of one point."""

    point: Point
    flop: float  # of a step
    peak: int  # bytes above those allocated before the step
    seconds: list[float] = field(default_factory=list)


def main(argv: list[str] | None = None) -> None:
    """Measure axis by axis; print a table and what grows worse than the arithmetic."""
    config = parse(ScalingConfig, argv, "What a training step costs as its sizes grow.")
    device = pick_device(config.device)
    prepare(device)
    precision, _ = pick_precision(config.precision, device)
    print(f"{describe(device)}, {precision}; base: 8 x 128 tokens, rank 8, 6 layers, 512 wide")
    print(f"{'':<22}{'ms':>9}{'GFLOP/s':>10}{'growth':>9}{'MB':>11}{'formula':>9}{'growth':>9}")
    rows = []
    for name, points in axes(Point(precision=precision)).items():
        print(name)
        found = measure(points, config.repeat, device)
        for row in rows_of(name, found):
            rows.append(row)
            print(line(row))
    print("growth: cost / formula, relative to the lowest of the earlier points of the axis")
    print("\n".join(conclusions(rows)))
    write_result(config, {"device": describe(device), "rows": rows})


def measure(points: dict[str, Point], repeat: int, device: torch.device) -> dict[str, Measured]:
    """Each point makes a warm-up step and one whose memory is measured; then all are timed."""
    cases = {name: Case(point, device) for name, point in points.items()}
    found = {}
    for name, case in cases.items():
        case.seconds()
        with peak_memory(device) as peak:
            case.seconds()
        found[name] = Measured(points[name], step_flop(case.ours.model, case.step), peak[0])
    for _ in range(repeat):
        for name, case in cases.items():
            found[name].seconds.append(case.seconds())
    return found


@contextmanager
def peak_memory(device: torch.device) -> Iterator[list[int]]:
    """Yields a list that afterwards holds the peak, in bytes above those allocated before."""
    peak: list[int] = []
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.append(torch.cuda.max_memory_allocated(device) - before)
        return
    with quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield peak
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    moves = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    assert moves, "the profiler recorded no allocation"
    peak.append(int(np.cumsum([size for _, size in moves]).max()))


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, nothing is printed, not even by C++: the profiler prints when it starts and stops."""
    sys.stdout.flush()
    with open(os.devnull, "w") as nowhere:
        saved = {number: os.dup(number) for number in (1, 2)}  # stdout and stderr
        for number in saved:
            os.dup2(nowhere.fileno(), number)
        yield
    for number, stream in saved.items():
        os.dup2(stream, number)
        os.close(stream)


def rows_of(axis: str, found: dict[str, Measured]) -> list[dict[str, Any]]:
    """A table row for each point, with the growth of its costs relative to the formulas."""
    rows: list[dict[str, Any]] = []
    for name, f in found.items():
        seconds = statistics.median(f.seconds)
        row = {
            "axis": axis, "name": name, "point": asdict(f.point), "flop": f.flop,
            "seconds": spread(f.seconds), "gflop_per_second": f.flop / seconds / 1e9,
            "peak_bytes": f.peak, "formula_bytes": peak_bytes(f.point),
            "time_over_formula": seconds / f.flop,
            "memory_over_formula": f.peak / peak_bytes(f.point),
        }  # fmt: skip
        for cost in ("time", "memory"):
            before = [r[f"{cost}_over_formula"] for r in rows] or [row[f"{cost}_over_formula"]]
            row[f"{cost}_growth"] = row[f"{cost}_over_formula"] / min(before)
        rows.append(row)
    return rows


def line(row: dict[str, Any]) -> str:
    """A table row in 80 columns; `*` marks a growth above WORSE."""
    growths = [row["time_growth"], row["memory_growth"]]
    time, memory = (f"{growth:.2f}{'*' if growth > WORSE else ' '}" for growth in growths)
    return (
        f"  {row['name']:<20}{1e3 * row['seconds']['median']:>9,.1f}"
        f"{row['gflop_per_second']:>10,.0f}{time:>10}"
        f"{row['peak_bytes'] / 1e6:>10,.1f}{row['formula_bytes'] / 1e6:>9,.1f}"
        f"{memory:>10}"
    )


def conclusions(rows: list[dict[str, Any]]) -> list[str]:
    """Sentences about mixed lengths, precisions, and each `*` of the table."""
    by_name = {(row["axis"], row["name"]): row for row in rows}
    sentences = []
    if long := by_name.get(("mixed", "9 x 550")):
        mixed = by_name["mixed", "8 x 50 + 550"]
        memory_share, share = (mixed[key] / long[key] for key in ("peak_bytes", "flop"))
        time_share = mixed["seconds"]["median"] / long["seconds"]["median"]
        sentences.append(
            "8 sequences of 50 tokens and one of 550, compared with nine of 550:\n"
            f"  {time_share:.0%} of the time, {memory_share:.0%} of the memory,"
            f" {share:.0%} of the arithmetic"
        )
    if wide := by_name.get(("precision", "fp32")):
        narrow = by_name["precision", "bf16"]
        slower = wide["seconds"]["median"] / narrow["seconds"]["median"]
        larger = wide["peak_bytes"] / narrow["peak_bytes"]
        sentences.append(f"fp32 needs {slower:.1f}x the time and {larger:.1f}x the memory of bf16")
    for row in rows:
        for cost in ("time", "memory"):
            growth = row[f"{cost}_growth"]
            # How precisions differ in time depends on the hardware.
            if growth > WORSE and (row["axis"], cost) != ("precision", "time"):
                point = f"{row['axis']}, {row['name']}"
                sentences.append(f"{point}: {cost} grows {growth:.1f}x as much as the arithmetic")
    return sentences


if __name__ == "__main__":
    sys.exit(run_script(main))
