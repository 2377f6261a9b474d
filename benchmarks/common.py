"""Shared by the benchmarks: our training step and its arithmetic, clocks, statistics, machine."""

import ctypes
import gc
import importlib.util
import json
import os
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.batches import Step
from errors import UserError
from lora.config import LoRAConfig
from lora.inject import inject, trained_parameters
from lora.options import lora_config
from model.qwen2 import Qwen2
from run.device import synchronize
from train import TrainConfig, forward_backward

T = TypeVar("T")

DEFAULTS = TrainConfig()
LORA = lora_config(asdict(DEFAULTS))  # rank 8, alpha 16, dropout 0.1, on the attention projections
PACKAGES = ("torch", "safetensors", "tokenizers", "numpy")


class Ours:
    """A model with adapters, and `step`: the loop of `train.py` without its checks and records."""

    def __init__(self, model: Qwen2, lora: LoRAConfig = LORA, *, seed: int = 0):
        inject(model, lora, seed=seed)
        self.model, self.seed = model.train(), seed
        self.parameters = trained_parameters(model)
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=DEFAULTS.learning_rate, weight_decay=0.0, fused=True
        )
        self.scaler = torch.amp.GradScaler(model.head_weight.device.type, enabled=False)

    def step(self, step: Step) -> None:
        """One optimizer step."""
        self.backward(step)
        nn.utils.clip_grad_norm_(self.parameters.values(), DEFAULTS.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def backward(self, step: Step) -> float:
        """Add the gradients of the step's mean loss; returns that loss."""
        sums = torch.zeros(2, device=self.model.head_weight.device)  # nats, correct tokens
        for examples in step.micro_batches:
            sums += forward_backward(self.model, examples, step, seed=self.seed, scaler=self.scaler)
        return sums[0].item() / step.supervised_count


def frozen_weights(model: Qwen2) -> list[Tensor]:
    """The frozen weight matrices (out, in) of one layer."""
    layer = model.model.layers[0].parameters()
    return [p for p in layer if p.dim() == 2 and not p.requires_grad]


def step_flop(model: Qwen2, step: Step) -> float:
    """The fewest floating-point operations of a step; a multiplication and an addition count as 2.

    A frozen weight costs 4 per token (forward pass and gradient of its input), a trained one 6.
    Attention costs 4 C forward and 8 C backward per pair of a token and a token it attends to,
    where C is the hidden size. The output embedding costs 4 per weight and supervised token.
    Padding, unsupervised rows of the output embedding, and recomputation are not counted.
    """
    C, layers = model.config.hidden_size, model.config.num_hidden_layers
    frozen = layers * sum(w.numel() for w in frozen_weights(model))
    trained = sum(p.numel() for p in trained_parameters(model).values())
    lengths = [len(e.tokens) for micro_batch in step.micro_batches for e in micro_batch]
    pairs = sum(n * (n + 1) // 2 for n in lengths)
    head = 4 * model.head_weight.numel() * step.supervised_count
    return (4 * frozen + 6 * trained) * step.token_count + 12 * C * layers * pairs + head


def mean_counts(steps: list[Step]) -> tuple[float, float]:
    """(tokens, supervised tokens) of a step, on average."""
    tokens = sum(step.token_count for step in steps)
    return tokens / len(steps), sum(step.supervised_count for step in steps) / len(steps)


class GemmPeak:
    """The speed of the matrix products of one step, timed alone: what the machine can do at best.

    Frozen layers make two products each, forward and the gradient of their input; the output
    embedding makes them for the supervised tokens only. Adapters and attention, 3 % of the
    arithmetic, are left out.
    """

    def __init__(self, model: Qwen2, steps: list[Step], device: torch.device):
        self.device = device
        self.repeat = 10 if device.type == "cuda" else 1  # or waiting would outweigh the product
        tokens, supervised = map(round, mean_counts(steps))
        layers = model.config.num_hidden_layers
        self.products = [(w, tokens, layers) for w in frozen_weights(model)]  # weight, rows, times
        self.products += [(model.head_weight, supervised, 1)]

    def measure(self) -> float:
        """FLOP/s over all products, each weighted by how often a step makes it."""
        flop = seconds = 0.0
        for weight, rows, times in self.products:
            for matrix in (weight, weight.t()):  # input gradient, forward
                x = torch.randn(rows, matrix.shape[0], device=self.device).to(matrix.dtype)
                fastest = min(self._seconds(x, matrix) for _ in range(2))
                flop += times * 2 * rows * weight.numel()
                seconds += times * fastest
        return flop / seconds

    def _seconds(self, x: Tensor, matrix: Tensor) -> float:
        y = x.new_empty(len(x), matrix.shape[1])

        def products() -> None:
            for _ in range(self.repeat):
                torch.mm(x, matrix, out=y)

        return timed(products, self.device)[0] / self.repeat


# The peer


def is_installed(peer: str, packages: tuple[str, ...]) -> bool:
    """Whether what the peer needs is installed; if not, prints what is missing."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        print(f"{peer}: not measured, without {', '.join(missing)} (pip install -e '.[bench]')")
    return not missing


class UnequalWork(UserError):
    """Ours and the peer do not compute the same, so comparing their speeds means nothing."""


# Clocks and memory


def timed(function: Callable[[], T], device: torch.device) -> tuple[float, T]:
    """(seconds, result) of a call, including the work that it queued on the device."""
    synchronize(device)
    started = time.perf_counter()
    result = function()
    synchronize(device)
    return time.perf_counter() - started, result


class MemoryMeter:
    """Peak memory between `start` and `stop`, in GB above what was in use at `start`.

    With CUDA: what PyTorch has allocated. On a CPU: the process's anonymous resident memory, which
    excludes mapped weight files, sampled after the allocator has returned its free memory.
    """

    INTERVAL = 0.01  # seconds between samples

    def __init__(self, device: torch.device):
        self.device = device

    def start(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
            return
        if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
            libc.malloc_trim(0)
        self.before = self.peak = resident_bytes()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._sample, daemon=True)
        self.thread.start()

    def _sample(self) -> None:
        while not self.done.wait(self.INTERVAL):
            self.peak = max(self.peak, resident_bytes())

    def stop(self) -> float:
        if self.device.type == "cuda":
            return (torch.cuda.max_memory_allocated(self.device) - self.before) / 1e9
        self.done.set()
        self.thread.join()
        return (self.peak - self.before) / 1e9


def resident_bytes() -> int:
    """Anonymous resident memory of this process; 0 where the system does not report it."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(x.split()[1]) * 1024 for x in lines if x.startswith("RssAnon:")), 0)


class StepTimer:
    """The seconds of one trainer's timed steps, and the peak memory of its first step."""

    def __init__(self, device: torch.device, warm_up: int):
        self.device, self.warm_up = device, warm_up
        self.count = 0  # steps so far
        self.seconds: list[float] = []
        self.memory_gb = 0.0  # above what was in use before the step
        self.meter = MemoryMeter(device)

    def begin(self) -> None:
        if self.count == 0:
            self.meter.start()
        synchronize(self.device)
        self.started = time.perf_counter()

    def time(self, step: Callable[[], None]) -> None:
        self.begin()
        step()
        self.end()

    def end(self) -> None:
        synchronize(self.device)
        seconds = time.perf_counter() - self.started
        if self.count == 0:
            self.memory_gb = self.meter.stop()
        if self.count >= self.warm_up:
            self.seconds.append(seconds)
        self.count += 1


# Statistics


def spread(values: list[float]) -> dict[str, float]:
    """Median, minimum and maximum."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratio(a: list[float], b: list[float]) -> dict[str, float]:
    """The ratio of the medians, and the spread of the ratios of values measured in turns."""
    pairs = spread([x / y for x, y in zip(a, b, strict=True)])
    return pairs | {"of_medians": statistics.median(a) / statistics.median(b)}


def shown(values: dict[str, float], form: str) -> str:
    """A `spread` for people: "1.23 (1.20 to 1.31)"."""
    return f"{values['median']:{form}} ({values['min']:{form}} to {values['max']:{form}})"


# The machine


def machine() -> dict[str, Any]:
    """What the figures depend on. A load average above `cores` means a busy machine."""
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "load_average": os.getloadavg()[0],
        "platform": platform.platform(),
        "versions": versions(),
    }


def processor() -> str:
    """The processor's name, as the system reports it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str | None]:
    """The versions of Python and of `packages`; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def write_result(path: str | None, result: dict[str, Any]) -> None:
    """Write the figures and the machine as JSON; without a path, nothing."""
    if path:
        text = json.dumps(result | {"machine": machine()}, indent=2)
        Path(path).write_text(text + "\n")
