"""Scaling: what a training step costs against one size at a time, beside what arithmetic says.

    python benchmarks/scaling.py --json scaling.json      # some minutes on two cores

The one idea: a step should cost what its products and its saved tensors cost. So each axis grows
one size of a small model with random weights, and each point's seconds are divided by its FLOPs
and its peak memory by the bytes that the formulas below give. Where that quotient is over 1.3 times
the lowest of the smaller points, growth is worse than the arithmetic, and that is said.

Points of an axis take turns, since a machine's speed drifts. Memory is exact: on a CPU the highest
sum of what PyTorch's allocator gave out and had not got back during one step, by its profiler; on
CUDA `max_memory_allocated` above what lay there. The weights are in neither.

Legend: T tokens, N supervised, C hidden, F MLP, K = G x D key/value size, L layers, V vocabulary.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import spread, write_result
from data.batches import Batch, flat_batch
from data.encode import IGNORE, Example
from errors import run_script
from lora.inject import LoRAConfig, inject, seed_dropout, trained_parameters
from model.loss import BLOCK_BYTES, CHUNK_BYTES, linear_cross_entropy
from model.qwen2 import Qwen2, Qwen2Config
from run.device import DTYPES, describe, pick_device, pick_precision, prepare_memory, synchronize
from run.options import option, parse, to_json

WORSE = 1.3  # times the arithmetic's growth, from which on it is said


@dataclass(frozen=True)
class ScalingConfig:
    repeat: int = option(3, "timed steps of each point", least=1)
    device: str = option("auto", "where to train", choices=("auto", "cuda", "cpu"))
    precision: str = option("auto", "of all axes but its own", choices=("auto", "bf16", "fp32"))
    json: str | None = option(None, "file to write the result to")


@dataclass(frozen=True)
class Point:
    """The sizes of one step; half of each example is supervised."""

    lengths: tuple[int, ...] = (128,) * 8
    rank: int = 8
    vocabulary: int = 16_384
    layers: int = 6
    hidden: int = 512
    precision: str = "bf16"

    @property
    def supervised(self) -> int:
        return sum(n // 2 for n in self.lengths)

    @property
    def config(self) -> Qwen2Config:
        return Qwen2Config(
            hidden_size=self.hidden, intermediate_size=3 * self.hidden,
            num_hidden_layers=self.layers, num_attention_heads=self.hidden // 64,
            num_key_value_heads=2, vocab_size=self.vocabulary,
        )  # fmt: skip


def axes(base: Point) -> dict[str, dict[str, Point]]:
    """Axis -> name -> point; what the later points are judged by comes first."""
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


def flop(p: Point) -> float:
    """Of a step, a multiply and an add being 2.

    A frozen weight costs 4 a token (forward, and its input's gradient), a trained one 6; attention
    4 C a pair of a token and one that it sees, and 8 C backward; the head 4 a supervised token.
    """
    C, F, K, L, T = p.hidden, 3 * p.hidden, 128, p.layers, sum(p.lengths)
    frozen = 2 * C * C + 2 * C * K + 3 * C * F  # q, o; k, v; gate, up, down
    trained = p.rank * (2 * (C + C) + 2 * (C + K))
    pairs = sum(n * (n + 1) // 2 for n in p.lengths)
    head = 4 * C * p.vocabulary * p.supervised_count
    return L * ((4 * frozen + 6 * trained) * T + 12 * C * pairs) + head


def peak_bytes(p: Point) -> float:
    """Of a step: what the forward pass keeps for the backward pass, and the loss's buffers.

    A layer keeps for each token: its two norms' inputs, four adapters' dropped inputs (C each),
    their masks (a byte a channel) and their r numbers, q, k, v and attention's result, and the
    MLP's gate and up.
    """
    C, F, K, T, N = p.hidden, 3 * p.hidden, 128, sum(p.lengths), p.supervised_count
    size = DTYPES[p.precision].itemsize
    kept = size * (2 * C + 4 * C + 4 * p.rank + 2 * C + 2 * K + 2 * F) + 4 * C
    logits = min(CHUNK_BYTES, size * N * p.vocabulary)
    probabilities = min(BLOCK_BYTES, 4 * N * p.vocabulary)
    return p.layers * T * kept + logits + probabilities


class Step:
    """A point's model and batch; `run` makes one optimizer step, as the loop of train.py does."""

    def __init__(self, p: Point, device: torch.device):
        torch.manual_seed(0)
        with torch.device(device):
            self.model = Qwen2(p.config).to(DTYPES[p.precision])
        inject(self.model, LoRAConfig(r=p.rank))
        self.parameters = list(trained_parameters(self.model).values())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, fused=True)
        rng, examples = np.random.default_rng(0), []
        for row, length in enumerate(p.lengths):
            tokens = rng.integers(0, p.vocabulary, length)
            targets = np.where(np.arange(length) < length - length // 2, IGNORE, tokens)
            examples.append(Example(row, tokens, targets))
        self.batch: Batch = flat_batch(examples, device)
        self.device = device

    def run(self) -> float:
        """Seconds of it."""
        b = self.batch
        synchronize(self.device)
        started = time.perf_counter()
        seed_dropout(self.model, seed=0, epoch=0, row_ids=b.row_ids, positions=b.positions)
        hidden = self.model(b.tokens, b.positions, b.lengths)  # (T, C)
        nats, _ = linear_cross_entropy(hidden, self.model.head_weight, b.targets, b.supervised_rows)
        (nats / len(b.supervised_rows)).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        synchronize(self.device)
        return time.perf_counter() - started


@dataclass
class Found:
    """What was measured of one point."""

    point: Point
    peak: int = 0  # bytes above what lay there before the step
    seconds: list[float] = field(default_factory=list)


def main(argv: list[str] | None = None) -> None:
    """Measure axis by axis; print a table, and what grows worse than it should."""
    config = parse(ScalingConfig, argv, "What a training step costs against each of its sizes.")
    device = pick_device(config.device)
    prepare_memory(device)
    precision, _ = pick_precision(config.precision, device)
    print(f"{describe(device)}, {precision}; base: 8 x 128 tokens, rank 8, 6 layers, 512 wide")
    print(f"{'':<22}{'ms':>9}{'GFLOP/s':>10}{'growth':>9}{'MB':>11}{'formula':>9}{'growth':>9}")
    rows = []
    for name, points in axes(Point(precision=precision)).items():
        print(name)
        found = measure(points, config.repeat, device)
        for row in judged(name, found):
            rows.append(row)
            print(line(row))
    print("growth: cost over its formula, against the lowest of the points above it in the axis")
    print("\n".join(verdicts(rows)))
    about = {"options": to_json(config), "device": describe(device)}
    write_result(config.json, about | {"rows": rows})


def measure(points: dict[str, Point], repeat: int, device: torch.device) -> dict[str, Found]:
    """One step to warm up, one whose memory is watched, then timed ones in turns."""
    found = {name: Found(point) for name, point in points.items()}
    steps = {name: Step(point, device) for name, point in points.items()}
    for name, step in steps.items():
        step.run()
        with watched_memory(device) as peak:
            step.run()
        found[name].peak = peak[0]
    for _ in range(repeat):
        for name, step in steps.items():
            found[name].seconds.append(step.run())
    return found


@contextmanager
def watched_memory(device: torch.device) -> Iterator[list[int]]:
    """Yields a list that afterwards holds the peak, in bytes above what lay there before."""
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
    assert moves, "the profiler saw no memory"
    peak.append(int(np.cumsum([size for _, size in moves]).max()))


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, nothing is printed, not even by C++: the profiler tells each start and stop."""
    sys.stdout.flush()
    with open(os.devnull, "w") as nowhere:
        kept = {number: os.dup(number) for number in (1, 2)}
        for number in kept:
            os.dup2(nowhere.fileno(), number)
        yield
    for number, stream in kept.items():
        os.dup2(stream, number)


def judged(axis: str, found: dict[str, Found]) -> list[dict[str, Any]]:
    """A row for each point, with how far its costs outgrow the formulas'."""
    rows: list[dict[str, Any]] = []
    for name, f in found.items():
        seconds = statistics.median(f.seconds)
        row = {
            "axis": axis, "name": name, "point": asdict(f.point), "flop": flop(f.point),
            "seconds": spread(f.seconds), "gflop_per_second": flop(f.point) / seconds / 1e9,
            "peak_bytes": f.peak, "formula_bytes": peak_bytes(f.point),
            "time_over_formula": seconds / flop(f.point),
            "memory_over_formula": f.peak / peak_bytes(f.point),
        }  # fmt: skip
        for cost in ("time", "memory"):
            before = [r[f"{cost}_over_formula"] for r in rows] or [row[f"{cost}_over_formula"]]
            row[f"{cost}_growth"] = row[f"{cost}_over_formula"] / min(before)
        rows.append(row)
    return rows


def line(row: dict[str, Any]) -> str:
    """A point in 80 columns."""
    marked = [row["time_growth"], row["memory_growth"]]
    marked = [f"{growth:.2f}{'*' if growth > WORSE else ' '}" for growth in marked]
    return (
        f"  {row['name']:<20}{1e3 * row['seconds']['median']:>9,.1f}"
        f"{row['gflop_per_second']:>10,.0f}{marked[0]:>10}"
        f"{row['peak_bytes'] / 1e6:>10,.1f}{row['formula_bytes'] / 1e6:>9,.1f}"
        f"{marked[1]:>10}"
    )


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    """What is to be said of each axis: mixed lengths, precisions, and each * of the table."""
    by_name = {(row["axis"], row["name"]): row for row in rows}
    said = []
    if long := by_name.get(("mixed", "9 x 550")):
        mixed = by_name["mixed", "8 x 50 + 550"]
        memory_share, share = (mixed[key] / long[key] for key in ("peak_bytes", "flop"))
        time_share = mixed["seconds"]["median"] / long["seconds"]["median"]
        said.append(
            f"8 sequences of 50 and one of 550 against nine of 550: {time_share:.0%} of the time,"
            f"\n  {memory_share:.0%} of the memory; {share:.0%} of the arithmetic"
        )
    if wide := by_name.get(("precision", "fp32")):
        narrow = by_name["precision", "bf16"]
        slower = wide["seconds"]["median"] / narrow["seconds"]["median"]
        larger = wide["peak_bytes"] / narrow["peak_bytes"]
        said.append(f"fp32 against bf16: {slower:.1f} times the time, {larger:.1f} the memory")
    for row in rows:
        for cost in ("time", "memory"):
            over = row[f"{cost}_growth"]  # between precisions, time is the hardware's affair
            if over > WORSE and (row["axis"], cost) != ("precision", "time"):
                point = f"{row['axis']}, {row['name']}"
                said.append(f"{point}: {cost} grows worse than the arithmetic ({over:.1f} times)")
    return said


if __name__ == "__main__":
    sys.exit(run_script(main))
