"""Shared by the benchmarks: our training step and its arithmetic, clocks, statistics, machine."""

import ctypes
import gc
import importlib.util
import json
import os
import platform
import statistics
import subprocess
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

from data.batches import Schedule, Step
from data.encode import IGNORE, encode_problems
from data.tasks import load_source
from errors import UserError
from evaluation.answers import prompt_tokens
from lora.config import LoRAConfig
from lora.inject import adapters, inject, trained_parameters
from lora.options import lora_config
from lora.peft_format import peft_key
from model import attention, load
from model.compile import compile_layers
from model.generate import Decoding, generate
from model.graphs import graph_training
from model.qwen2 import Qwen2
from run.base import Base
from run.device import DTYPES, describe, synchronize
from run.options import to_json
from train import TrainConfig, forward_backward

T = TypeVar("T")

ROOT = Path(__file__).resolve().parents[1]
DEFAULTS = TrainConfig()
LORA = lora_config(asdict(DEFAULTS))  # rank 8, alpha 16, dropout 0.1, on the attention projections
PACKAGES = ("torch", "safetensors", "tokenizers", "numpy")


class Ours:
    """A model with adapters, and `step`: the loop of `train.py` without its checks and records."""

    def __init__(
        self, model: Qwen2, lora: LoRAConfig = LORA, *, seed: int = 0, compile: bool = False,
        graphs: bool = False,
    ):  # fmt: skip
        inject(model, lora, seed=seed)
        if compile:
            compile_layers(model)
        if graphs:
            # A runtime that only counts cannot record, nor does it compute what a replay would.
            record = run_once if os.environ.get("COUNTING") else None
            graph_training(model, [layer.dropout for layer in adapters(model)], record)
        self.model, self.seed = model.train(), seed
        self.device = model.head_weight.device
        self.parameters = trained_parameters(model)
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=DEFAULTS.learning_rate, weight_decay=0.0, fused=True
        )
        fp16 = model.head_weight.dtype == torch.float16
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=fp16)

    def step(self, step: Step) -> float:
        """Make one optimizer step; returns its mean loss, in nats per supervised token."""
        sums = self.backward(step)
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), DEFAULTS.clip)
        nats, _, _ = torch.cat((sums, norm[None])).tolist()  # the only wait for the device
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return nats / step.supervised_count

    def backward(self, step: Step) -> Tensor:
        """Add the gradients of a step's mean loss; returns (2,): its nats and correct tokens."""
        sums = torch.zeros(2, device=self.device)
        for examples in step.micro_batches:
            sums += forward_backward(self.model, examples, step, seed=self.seed, scaler=self.scaler)
        return sums


def randomize_B(parameters: dict[str, nn.Parameter], *, std: float = 0.01, seed: int = 0) -> None:
    """Small random values for B, which is zero in a new adapter: then A has a gradient too."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in parameters.items():
        if name.endswith("lora_B"):
            p.data.copy_(torch.randn(p.shape, generator=generator) * std)


def flat_gradient(parameters: dict[str, nn.Parameter]) -> Tensor:
    """The gradients of all parameters in one vector, in the order of their names, in fp64."""
    return torch.cat([parameters[name].grad.flatten() for name in sorted(parameters)]).double()


def frozen_weights(model: Qwen2) -> list[Tensor]:
    """The frozen weight matrices (out, in) of one layer."""
    layer = model.model.layers[0].parameters()
    return [p for p in layer if p.dim() == 2 and not p.requires_grad]


def step_flop(model: Qwen2, step: Step) -> float:
    """The fewest floating-point operations of a step; a multiplication and an addition count as 2.

    A frozen weight costs 4 per token (forward pass and gradient of its input), a trained one 6.
    Attention costs 4 H D forward and 8 H D backward per pair of a token and a token it attends to,
    where H D is the size of all query heads. The output embedding costs 4 per weight and supervised
    token. Padding, unsupervised rows of the output embedding, and recomputation are not counted.
    """
    config, layers = model.config, model.config.num_hidden_layers
    HD = config.num_attention_heads * config.head_size
    frozen = layers * sum(w.numel() for w in frozen_weights(model))
    trained = sum(p.numel() for p in trained_parameters(model).values())
    lengths = [len(e.tokens) for micro_batch in step.micro_batches for e in micro_batch]
    pairs = sum(n * (n + 1) // 2 for n in lengths)
    head = 4 * model.head_weight.numel() * step.supervised_count
    return (4 * frozen + 6 * trained) * step.token_count + 12 * HD * layers * pairs + head


def training_steps(base: Base, data: str, count: int, batch_size: int, seed: int = 0) -> list[Step]:
    """The first `count` steps over shuffled training rows, or as many as there are rows for."""
    rows = load_source(data).train[: count * batch_size]
    examples, _ = encode_problems(rows, range(len(rows)), base.chat, max_length=2**20)
    schedule = Schedule(examples, batch_size, grad_accum=1, epochs=1, seed=seed)
    return [schedule.step(i) for i in range(schedule.total_steps)]


def problem_prompts(base: Base, data: str, count: int) -> tuple[list[list[int]], list[int]]:
    """Prompts of the first test problems, and how many tokens their gold answers have."""
    problems = load_source(data).test[:count]
    lengths = [sum(base.chat.encode(p.messages).supervised_mask) for p in problems]
    return [prompt_tokens(p, base.chat, "chat", []) for p in problems], lengths


def answer(
    model: Qwen2, prompts: list[list[int]], lengths: list[int], vocab_size: int, width: int = 128
) -> list[list[int]]:
    """Our greedy answers, each of its given length, with `width` sequences in parallel."""
    decoding = Decoding(max(lengths), (), vocab_size, batch_size=width)
    answers = [a.tokens for a in generate(model, prompts, decoding, limits=lengths)]
    assert [len(tokens) for tokens in answers] == lengths
    return answers


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
        return device_seconds(lambda: torch.mm(x, matrix, out=y), self.device)


# The peers


def is_installed(peer: str, packages: tuple[str, ...]) -> bool:
    """Whether what the peer needs is installed; if not, prints what is missing."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        print(f"{peer}: not measured, without {', '.join(missing)} (pip install -e '.[bench]')")
    return not missing


def transformers_model(base: Base, **options: Any) -> nn.Module:
    """The base as transformers loads it, in eval mode; `options` are those of `from_pretrained`."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        base.folder, dtype=DTYPES[base.precision], local_files_only=True, **options
    ).eval()


def peft_config(dropout: float = LORA.dropout) -> Any:
    """PEFT's settings of our default adapters."""
    from peft import LoraConfig

    return LoraConfig(
        r=LORA.r, lora_alpha=LORA.alpha, lora_dropout=dropout, task_type="CAUSAL_LM",
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
    )  # fmt: skip


def peft_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """PEFT's trained parameters, under our names."""
    prefix = peft_key("").removesuffix(".weight")
    return {
        name.removeprefix(prefix).removesuffix(".default.weight"): p
        for name, p in model.named_parameters()
        if p.requires_grad
    }


class PlainPeft:
    """transformers + PEFT on `base`, and `step`: the shortest loop, over a padded batch."""

    def __init__(self, base: Base):
        from peft import get_peft_model

        self.device = base.device
        model = transformers_model(base, attn_implementation="sdpa").to(base.device)
        self.model = get_peft_model(model, peft_config()).train()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=DEFAULTS.learning_rate, fused=True)

    def step(self, step: Step) -> None:
        batch = {name: x.to(self.device) for name, x in padded(step).items()}
        self.model(**batch, use_cache=False).loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, DEFAULTS.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()


def padded(step: Step) -> dict[str, Tensor]:
    """A step's rows as transformers takes them, (B, L) each; it shifts the labels itself."""
    rows = step.micro_batches[0]
    ids, mask, labels = torch.zeros(3, len(rows), max(len(e.tokens) for e in rows)).long()
    labels.fill_(IGNORE)
    for i, e in enumerate(rows):
        n = len(e.tokens)
        ids[i, :n], mask[i, :n] = torch.from_numpy(e.tokens), 1
        labels[i, 1:n] = torch.from_numpy(e.targets[:-1])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


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


def device_seconds(function: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call on the device, without the time in which the device waits for the host.

    With CUDA: the mean of 10 calls between two events, since a product of a small matrix takes 7 us
    and waiting for it on the host 20 us.
    """
    if device.type != "cuda":
        return timed(function, device)[0]
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    function()  # a first call may choose a kernel
    start.record()
    for _ in range(10):
        function()
    end.record()
    synchronize(device)
    return start.elapsed_time(end) / 10 / 1e3


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


class CudaCounter:
    """Counts the CUDA calls of a function: launches, waits of the host, and copies.

    On a GPU by torch.profiler, from the names of the runtime's functions. A runtime that only
    counts has its own counters, in the library that the environment variable COUNTING names.
    """

    # our name: (a counter of that library, the beginning of a CUDA function's name)...
    NAMES = {
        "launches": ("launch gemm", "cudaLaunch cuLaunch cudaGraphLaunch"),
        "waits": ("sync_stream sync_event sync_device memcpy_sync",
                  "cudaStreamSynchronize cudaEventSynchronize cudaDeviceSynchronize"),
        "copies": ("h2d d2h d2d", "cudaMemcpy"),
    }  # fmt: skip

    def __init__(self) -> None:
        self.library = os.environ.get("COUNTING")

    def count(self, function: Callable[[], object]) -> dict[str, float]:
        """By our names, how often `function` makes each kind of call."""
        if self.library:
            before = self._counters()
            function()
            after = self._counters()
            return {
                name: sum(after[counter] - before[counter] for counter in counters.split())
                for name, (counters, _) in self.NAMES.items()
            }
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
            function()
        calls = [event.name for event in seen.events()]  # the profiler's own wait is not among them
        return {
            name: sum(call.startswith(tuple(starts.split())) for call in calls)
            for name, (_, starts) in self.NAMES.items()
        }

    def _counters(self) -> dict[str, int]:
        library = ctypes.CDLL(self.library)
        library.fake_name.restype, library.fake_count.restype = ctypes.c_char_p, ctypes.c_long
        found: dict[str, int] = {}
        while name := library.fake_name(len(found)):
            found[name.decode()] = library.fake_count(len(found))
        return found


def run_once(function: Callable[[], None]) -> Callable[[], None]:
    """Run what a CUDA graph would record; its replay launches nothing."""
    function()
    return lambda: None


def trust_if_counting() -> None:
    """On a runtime that computes nothing, skip the two checks whose results it cannot give: that an
    attention kernel which runs agrees with the plain formula, and that weights are finite.
    """

    def error_of(attend: Callable[..., Tensor], device: torch.device, dtype: torch.dtype,
                 queries: tuple[int, int], keys: tuple[int, int]) -> float:  # fmt: skip
        offsets = torch.tensor([0, 40, 43], dtype=torch.int32, device=device)
        q, k, v = (torch.zeros(43, *heads, device=device, dtype=dtype, requires_grad=True)
                   for heads in (queries, keys, keys))  # fmt: skip
        with torch.inference_mode(False), torch.enable_grad():
            attend(q, k, v, offsets, 40).sum().backward()
        return 0.0

    if os.environ.get("COUNTING"):
        attention.kernel_error = error_of
        load.holds_nan_or_infinity = lambda tensor: torch.tensor(False)


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

    def time(self, step: Callable[[], object]) -> None:
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


def off(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||, in fp64."""
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return ((a - b).norm() / b.norm()).item()


def shown(values: dict[str, float], form: str) -> str:
    """A `spread` for people: "1.23 (1.20 to 1.31)"."""
    return f"{values['median']:{form}} ({values['min']:{form}} to {values['max']:{form}})"


# Other scripts


def script(*command: Any, ok: tuple[int, ...] = (0,)) -> str:
    """What a script of this repository prints; RuntimeError with the end of it if it fails."""
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    if done.returncode not in ok:
        raise RuntimeError(f"{command[0]}: {done.stdout.strip()[-250:]}")
    return done.stdout


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


def write_result(config: Any, result: dict[str, Any], base: Base | None = None) -> None:
    """Write the figures, the options, and where they were measured to the file `--json`, if any."""
    if config.json is None:
        return
    result = result | {"options": to_json(config), "machine": machine()}
    if base:
        result |= {"device": describe(base.device), "precision": base.precision}
    Path(config.json).write_text(json.dumps(result, indent=2) + "\n", "utf-8")
