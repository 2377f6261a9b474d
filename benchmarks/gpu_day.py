"""What agrees on a machine with a GPU, and how fast it is: everything in one command.

    python benchmarks/gpu_day.py --model FOLDER --data FOLDER --out gpu-day     # in 10 minutes
    python benchmarks/gpu_day.py --model FOLDER --data FOLDER --part attention  # one part

It needs no network. A part is a generator of (name, figure) pairs, and runs in its own process with
a time limit. Each figure is written to `result.json` and `table.md` as it comes, so that a part
that hangs or fails costs its limit and nothing else. The most important parts come first.
"""

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common
from benchmarks.common import Ours, device_seconds, timed
from data.batches import Step, flat_batch
from errors import BadOption, run_script
from files import write_json
from lora.dropout import KeyedDropout, token_keys
from model import attention
from model.qwen2 import Qwen2, plain_attention
from run.base import Base
from run.compiling import check_compiler
from run.device import DTYPES, describe, peak_memory_gb
from run.options import option, parse

Figures = Iterator[tuple[str, Any]]  # a name with its unit, and the value

LENGTHS = [1, 2, 127, 128, 129, 300, 64, 511, 3]  # of the examples that attention is tried on
WARM_UP = 5  # steps


@dataclass(frozen=True)
class DayConfig:
    model: str = option("Qwen/Qwen2-0.5B-Instruct", "base model: folder or Hub id")
    data: str = option("gsm8k", "a task, or a folder with train.jsonl and test.jsonl")
    out: str = option("gpu-day", "folder for result.json, table.md and the runs")
    part: tuple[str, ...] = option((), "run these parts only, in this process, without a limit")
    minutes: float = option(9.5, "time limit of all parts", above=0)
    batch_size: int = option(16, "sequences in an optimizer step", least=1)
    steps: int = option(40, "timed training steps", least=1)
    problems: int = option(256, "test problems to answer", least=1)
    widths: tuple[str, ...] = option(("128", "256", "512"), "sequences decoded in parallel")
    device: str = option("cuda", "device to measure", choices=("cuda", "cpu"))


@dataclass(frozen=True)
class Day:
    """What all parts need."""

    config: DayConfig
    base: Base
    out: Path

    @property
    def device(self) -> torch.device:
        return self.base.device

    def load(self, precision: str = "", device: str = "") -> Qwen2:
        device = torch.device(device or self.device)
        return replace(self.base, device=device, precision=precision or self.base.precision).load()

    def steps(self, count: int) -> list[Step]:
        return common.training_steps(self.base, self.config.data, count, self.config.batch_size)

    @property
    def flags(self) -> list[Any]:
        """Options of the scripts that parts run."""
        c = self.config
        return ["--model", c.model, "--data", c.data, "--batch-size", c.batch_size]


def main(argv: list[str] | None = None) -> None:
    """Run each part in a process; with --part, the given ones in this process."""
    config = parse(DayConfig, argv, "What agrees on this GPU, and how fast it is.")
    if unknown := set(config.part) - set(PARTS):
        raise BadOption(f"--part: no {', '.join(sorted(unknown))}", f"parts: {', '.join(PARTS)}")
    common.trust_if_counting()
    day = Day(config, Base.find(config.model, device=config.device), Path(config.out).resolve())
    day.out.mkdir(parents=True, exist_ok=True)
    for name in config.part:
        run_part(day, name)
    if config.part:
        return
    (day.out / "result.json").unlink(missing_ok=True)
    deadline = time.monotonic() + 60 * config.minutes
    for name, (_, limit, _) in PARTS.items():
        seconds = min(limit, deadline - time.monotonic())
        if seconds < 5:
            record(day, name, "skipped", "no time was left")
            continue
        command = [sys.executable, __file__, *(argv or sys.argv[1:]), "--part", name]
        process = subprocess.Popen(list(map(str, command)), start_new_session=True)
        try:
            if code := process.wait(seconds):
                record(day, name, "exit code", code)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with the scripts that it started
            record(day, name, "stopped", f"after {seconds:.0f} s")


def run_part(day: Day, name: str) -> None:
    """Record a part's figures as they come; what it raises is a figure too."""
    (part, _, needs), started = PARTS[name], time.monotonic()
    shutil.rmtree(day.out / name, ignore_errors=True)  # its runs, which would otherwise resume
    missing = [n for n in needs if not (day.device.type == n if n == "cuda" else find_spec(n))]
    if missing:
        return record(day, name, "skipped", f"not here: {', '.join(missing)}")
    try:
        for figure, value in part(day):
            record(day, name, figure, value)
    except Exception as error:
        record(day, name, "failed", f"{type(error).__name__}: {str(error)[:300]}")
        raise
    record(day, name, "all of this part, s", time.monotonic() - started)


def record(day: Day, part: str, figure: str, value: Any) -> None:
    """Print a figure, and add it to `result.json` and `table.md`."""
    path = day.out / "result.json"
    found = json.loads(path.read_text("utf-8")) if path.exists() else {}
    found.setdefault(part, {})[figure] = value
    write_json(path, found)
    table = "| part | figure | value |\n|---|---|---|\n"
    for name, values in found.items():
        table += "".join(f"| {name} | {key} | {shown(v)} |\n" for key, v in values.items())
    (day.out / "table.md").write_text(table, "utf-8")
    print(f"{part}: {figure}: {shown(value)}", flush=True)


def shown(value: Any) -> str:
    """A figure for people, with four digits."""
    if isinstance(value, dict):
        return ", ".join(f"{k} {shown(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(shown, value))
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


# What agrees


def machine(day: Day) -> Figures:
    """The machine, and the best it can do."""
    yield "device", f"{describe(day.device)}, {day.base.precision}, CUDA {torch.version.cuda}"
    yield "machine", common.machine()
    dtype = DTYPES[day.base.precision]
    a, b = torch.zeros(2, 2**26, dtype=dtype, device=day.device)
    yield "copy, GB/s", 2 * a.nbytes / device_seconds(lambda: b.copy_(a), day.device) / 1e9
    for n, k in ((896, 896), (4864, 896), (896, 4864)):
        x, w = (torch.randn(rows, k, device=day.device).to(dtype) for rows in (3200, n))
        seconds = device_seconds(lambda: x @ w.t(), day.device)  # noqa: B023
        yield f"3,200 x {k} -> {n}, TFLOP/s", 2 * 3200 * k * n / seconds / 1e12


def attentions(day: Day) -> Figures:
    """Values and gradients of each implementation, against the plain formula in fp64."""
    flat, shapes = attention.FlatAttention(LENGTHS, day.device), ((14, 64), (2, 64), (2, 64))
    offsets = torch.tensor([0, *LENGTHS], device=day.device).cumsum(0, dtype=torch.int32)
    paths: dict[str, Callable[..., Tensor]] = {"the chosen one": lambda *qkv: flat(0, *qkv)}
    paths["attend_each"] = partial(attention.attend_each, lengths=LENGTHS)
    for name, kernel in vars(attention).get("KERNELS", {"varlen": attention.attend_varlen}).items():
        paths[name] = partial(kernel, offsets=offsets, longest=max(LENGTHS))
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        generator = torch.Generator().manual_seed(0)
        qkv = [torch.randn(sum(LENGTHS), *s, generator=generator).to(dtype) for s in shapes]
        exact = [x.double().requires_grad_() for x in qkv]
        examples = zip(*(x.split(LENGTHS) for x in exact), strict=True)
        plain = torch.cat([plain_attention(*example) for example in examples])
        expected = [plain, *torch.autograd.grad(plain.square().sum(), exact)]
        leaves = [x.to(day.device).requires_grad_() for x in qkv]
        for name, attend in paths.items():
            try:
                y = attend(*leaves)
                found = [y, *torch.autograd.grad(y.float().square().sum(), leaves)]
                yield f"{name}, {dtype}: off by", max(map(common.off, found, expected))
                seconds = device_seconds(lambda: attend(*leaves), day.device)  # noqa: B023
                yield f"{name}, {dtype}: forward, ms", seconds * 1e3
            except (RuntimeError, ImportError, TypeError, AttributeError) as error:
                yield f"{name}, {dtype}", f"not here: {str(error).splitlines()[0][:80]}"


def network(day: Day) -> Figures:
    """Dropout's bits, logits, loss and adapter gradients, against a CPU in fp32."""
    masks = []
    for device in ("cpu", day.device):
        tokens = torch.arange(3000, device=device)
        dropout = KeyedDropout(0.1, 896, 7).to(device)
        dropout.keys = token_keys(3, 2, tokens // 200, tokens % 200)
        masks.append(dropout.mask(896).cpu())
    yield "dropout has the bits of a CPU", torch.equal(*masks)
    expected = outcome(day, Ours(day.load("fp32", "cpu")))
    for precision in ("fp32", "fp16", "bf16"):
        found = outcome(day, Ours(day.load(precision)))
        logits, loss, gradient = map(common.off, found, expected)
        yield f"{precision}: logits, loss off by", [logits, loss]
        yield f"{precision}: gradients off by", gradient


def outcome(day: Day, ours: Ours) -> list[Tensor]:
    """Logits of an example; the loss of a step of three examples; all adapters' gradients."""
    common.randomize_B(ours.parameters)
    step = common.training_steps(day.base, day.config.data, 1, batch_size=3)[0]
    batch = flat_batch(step.micro_batches[0][:1], ours.device)
    with torch.inference_mode():
        hidden = ours.model.eval()(batch.tokens, batch.positions, batch.lengths)
        logits = hidden @ ours.model.head_weight.t()
    ours.model.train()
    nats, _ = ours.backward(step)
    ours.scaler.unscale_(ours.optimizer)
    return [logits, nats, torch.cat([p.grad.flatten() for p in ours.parameters.values()])]


def company(day: Day) -> Figures:
    """How many greedy answers change with the number that is decoded in parallel."""
    prompts, _ = common.problem_prompts(day.base, day.config.data, min(24, day.config.problems))
    for precision in dict.fromkeys(("fp32", day.base.precision)):
        run = partial(common.answer, day.load(precision), prompts, [40] * len(prompts))
        alone, *others = (run(day.base.chat.vocab_size, width) for width in (1, 8, 24))
        changed = [sum(a != b for a, b in zip(alone, texts, strict=True)) for texts in others]
        yield f"{precision}: answers of {len(prompts)} changed by 8 and 24 in parallel", changed


def resume(day: Day) -> Figures:
    """12 steps in one go, again, and in two sessions: how far apart the adapters are."""
    flags = ["--limit", 20 * day.config.batch_size, "--epochs", 1, "--evals-per-epoch", 1]
    flags += ["--schedule", "constant", "--warmup", 0]
    states = {}
    for name, sessions in {"whole": [12], "again": [12], "resumed": [6, 12]}.items():
        for steps in sessions:
            out = train(day, f"resume/{name}", *flags, "--max-steps", steps)
        folder = max((out / "checkpoints").glob("step-*"))
        states[name] = load_file(folder / "state.safetensors")
    for name in ("again", "resumed"):
        pairs = [(states[name][k], w) for k, w in states["whole"].items() if "lora" in k]
        yield f"{name}: the same bits", all(torch.equal(a, b) for a, b in pairs)
        yield f"{name}: off by", max(common.off(a, b) for a, b in pairs)


def train(day: Day, name: str, *flags: Any) -> Path:
    """`train.py` as users run it, in `out/name`."""
    out = day.out / name
    common.script("train.py", *day.flags, "--device", day.config.device, "--out", out, *flags)
    return out


def laws(day: Day) -> Figures:
    """The tests whose device is that of the command line, on this one."""
    flags = ["-m", "device", "--device", day.config.device, "-p", "no:cacheprovider"]
    printed = common.script("-m", "pytest", "-q", "--tb=no", *flags, "tests", ok=(0, 1))
    yield "tests", printed.splitlines()[-1]
    yield "failures", [x[7:] for x in printed.splitlines() if x.startswith("FAILED")]


# How fast it is


def eager(day: Day) -> Figures:
    """Training steps, made as `train.py` makes them."""
    yield from time_steps(day, Ours(day.load()))


def compiled(day: Day) -> Figures:
    """The same with compiled layers, whose gradients are first compared with the plain ones."""
    check_compiler(day.device, DTYPES[day.base.precision], dora=False)
    plain = outcome(day, Ours(day.load()))
    found = outcome(day, Ours(day.load(), compile=True))
    yield "logits, loss, gradients off the plain ones by", list(map(common.off, found, plain))
    yield from time_steps(day, Ours(day.load(), compile=True))


def graphed(day: Day) -> Figures:
    """The same by CUDA graphs of plain and of compiled layers, which are compared as they come."""
    for kind, compile in {"plain": False, "compiled": True}.items():
        ours = Ours(day.load(), compile=compile, graphs=True)
        for step in 2 * day.steps(WARM_UP + day.config.steps):  # recorded first, then compared
            ours.step(step)
        graphs = ours.model.forward.graphs.values()  # none if they were given up
        yield f"{kind}: sizes recorded, and in use", [len(graphs), sum(g.checked for g in graphs)]
        yield from ((f"{kind}: {figure}", value) for figure, value in time_steps(day, ours))


def time_steps(day: Day, ours: Ours) -> Figures:
    steps = day.steps(WARM_UP + day.config.steps)
    seconds = [timed(lambda: ours.step(step), day.device)[0] for step in steps]  # noqa: B023
    yield "the first step, s", seconds[0]
    kept, tokens = seconds[WARM_UP:], sum(step.token_count for step in steps[WARM_UP:])
    yield "ms a step: median, min, max", [1e3 * f(kept) for f in (statistics.median, min, max)]
    yield "tokens/s", round(tokens / sum(kept))
    yield "peak memory, GB", peak_memory_gb(day.device)


def launches(day: Day) -> Figures:
    """Counts, and the host's time, by benchmarks/launches.py."""
    for kind, flags in {"plain": (), "compiled": ("--compile", "--no-decode")}.items():
        found = measured("launches", day, *flags)
        yield from ((f"{kind}: {k}", v) for k, v in found.items() if k in ("train", "decode"))
        yield f"{kind}: targets exceeded", found["exceeded"]


def measured(benchmark: str, day: Day, *flags: Any) -> dict[str, Any]:
    """What a benchmark writes; an exit code of 1 says that a target is exceeded."""
    path = day.out / f"{benchmark}.json"
    common.script(f"benchmarks/{benchmark}.py", *day.flags, *flags, "--json", path, ok=(0, 1))
    return json.loads(path.read_text("utf-8"))


def kernels(day: Day) -> Figures:
    """In which kernels the device spends a step."""
    from torch.profiler import ProfilerActivity, profile

    ours, steps = Ours(day.load()), day.steps(6)
    for step in steps[:3]:
        ours.step(step)
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for step in steps[3:]:
            ours.step(step)
        torch.cuda.synchronize()
    rows = sorted(seen.key_averages(), key=lambda row: -row.self_device_time_total)
    yield "device, ms a step", sum(row.self_device_time_total for row in rows) / 3e3
    yield from ((f"`{r.key[:80]}`, ms a step", r.self_device_time_total / 3e3) for r in rows[:20])


def decode(day: Day) -> Figures:
    """Greedy answers as long as the gold ones, at several widths."""
    model, vocab_size = day.load(), day.base.chat.vocab_size
    prompts, lengths = common.problem_prompts(day.base, day.config.data, day.config.problems)
    common.answer(model, prompts[:4], lengths[:4], vocab_size)  # warm-up
    for width in map(int, day.config.widths):
        run = partial(common.answer, model, prompts, lengths, vocab_size, width)
        seconds, _ = timed(run, day.device)
        yield f"{len(prompts)} problems, {width} in parallel: s", seconds
        yield f"{width} in parallel: tokens/s", round(sum(lengths) / seconds)
        yield f"{width} in parallel: peak memory so far, GB", peak_memory_gb(day.device)


def epoch(day: Day) -> Figures:
    """An epoch as users run it: one process, with validation, checkpoints and the report."""
    started = time.monotonic()
    out = train(day, "epoch/run", "--epochs", 1)
    yield "the whole process, s", time.monotonic() - started
    lines = [json.loads(x) for x in (out / "metrics.jsonl").read_text("utf-8").splitlines()]
    steps = [line for line in lines if "train_loss" in line]
    yield "tokens/s, median", round(statistics.median(x["tokens_per_second"] for x in steps))
    yield "training loss, first and last", [steps[i]["train_loss"] for i in (0, -1)]
    yield "validation losses", [line["val_loss"] for line in lines if "val_loss" in line]


# The peers


def peft(day: Day) -> Figures:
    """transformers + PEFT in a plain loop over padded batches, in turns with ours."""
    trainers = (common.PlainPeft(day.base), Ours(day.load()))
    times: list[list[float]] = [[], []]
    for step in day.steps(WARM_UP + day.config.steps):
        for trainer, seconds in zip(trainers, times, strict=True):
            seconds.append(timed(lambda: trainer.step(step), day.device)[0])  # noqa: B023
    peer, ours = (statistics.median(seconds[WARM_UP:]) * 1e3 for seconds in times)
    yield "ms a step, theirs and ours", [peer, ours]
    yield "ours is faster by", peer / ours


def trl(day: Day) -> Figures:
    """TRL in turns with ours, by benchmarks/train_speed.py: as it comes, and without padding."""
    for name, flags in {"plain": (), "padding-free": ("--peer-flags", "padding_free")}.items():
        found = measured("train_speed", day, "--device", day.config.device, "--steps", 12, *flags)
        yield f"{name}: ours is faster by", found["ratio"]["of_medians"]
        for who in ("peer", "ours"):
            yield f"{name}, {who}: ms a step", statistics.median(found[who]["seconds"]) * 1e3
            yield f"{name}, {who}: memory, GB", found[who]["peak_memory_above_loading_gb"]


# name: (part, its limit in seconds, the device and packages that it needs)
PARTS: dict[str, tuple[Callable[[Day], Figures], int, tuple[str, ...]]] = {
    "machine": (machine, 40, ()),
    "attention": (attentions, 45, ()),
    "network": (network, 70, ()),
    "eager": (eager, 50, ()),
    "kernels": (kernels, 40, ("cuda",)),
    "decode": (decode, 80, ()),
    "compiled": (compiled, 120, ()),
    "graphs": (graphed, 120, ("cuda",)),
    "peft": (peft, 60, ("transformers", "peft")),
    "epoch": (epoch, 120, ()),
    "launches": (launches, 100, ("cuda",)),
    "resume": (resume, 90, ()),
    "company": (company, 60, ()),
    "trl": (trl, 120, ("transformers", "peft", "trl", "accelerate", "datasets")),
    "laws": (laws, 90, ("pytest", "hypothesis")),
}

if __name__ == "__main__":
    sys.exit(run_script(main))
