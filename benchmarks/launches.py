"""What a training step and a decoded token cost the host on a CUDA device, against targets.

    python benchmarks/launches.py --model FOLDER --data FOLDER
    python benchmarks/launches.py --model FOLDER --data FOLDER --compile --no-decode

Counted, not timed: kernel launches, waits of the host for the device, copies between them, and the
allocator's peak. These figures hold for every device of a kind, so they can be laws; exit code 1
says that one exceeds its target. On a GPU they come from torch.profiler. A CUDA runtime that
executes nothing but counts its calls is read by its own counters, if COUNTING names its library.

Host time is the CPU time of the process in steps on rows cut to a few tokens, so that a GPU is
never what is waited for. A decoded token's figures are those of a whole batch: the difference of
two generations of different lengths, so that prompts do not count.
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import (
    CudaCounter,
    Ours,
    answer,
    problem_prompts,
    training_steps,
    trust_if_counting,
    write_result,
)
from data.batches import Step
from errors import BadOption, run_script
from run.base import Base
from run.device import describe
from run.options import option, parse

TOKENS = 3200  # of the step that is counted: near the mean of 16 GSM8K rows
CUT = 8  # tokens of a row, in host time
SHORT, LONG = 8, 24  # tokens of the two generations

# For 16 rows of 24 layers, as counted: lower these when a change saves some. Only the time of the
# host is a goal, which is not met yet.
TARGETS = {
    "train": {"waits": 1, "host_ms": 14},
    "decode": {"launches": 487, "waits": 1},
}
TRAIN_TARGETS = {
    "plain": {"launches": 1991, "peak_gb": 3.52},
    "compiled": {"launches": 1855, "peak_gb": 3.93},
    "recomputed": {"launches": 2783, "peak_gb": 1.57},
    "in CUDA graphs": {"launches": 99},  # recorded graphs that launch nothing hold no activations
    "no flash attention": {"launches": 2052, "peak_gb": 3.71},
}


@dataclass(frozen=True)
class LaunchConfig:
    model: str = option("Qwen/Qwen2-0.5B-Instruct", "base model: folder or Hub id")
    data: str = option("gsm8k", "a task, or a folder with train.jsonl and test.jsonl")
    batch_size: int = option(16, "sequences in an optimizer step", least=1)
    steps: int = option(4, "training steps that host time is the median of", least=1)
    prompts: int = option(128, "prompts decoded in parallel", least=1)
    precision: str = option("auto", "dtype of the base", choices=("auto", "bf16", "fp16", "fp32"))
    checkpoint_activations: bool = option(False, "recompute each layer, as train.py can")
    compile: bool = option(False, "compile the layers, as train.py --compile does")
    cuda_graphs: bool = option(False, "replay CUDA graphs, as train.py --cuda-graphs does")
    decode: bool = option(True, "count a decoded token too")
    json: str | None = option(None, "file to write the result to")


def main(argv: list[str] | None = None) -> int:
    """Count, and print each figure with its target; returns 1 if a figure exceeds it."""
    config = parse(LaunchConfig, argv, "Launches, waits, copies and host time, against targets.")
    if not torch.cuda.is_available():
        raise BadOption("launches are counted on a CUDA device, and there is none",
                        "run this on a machine with a GPU")  # fmt: skip
    trust_if_counting()
    base = Base.find(config.model, precision=config.precision, device="cuda")
    print(f"{describe(base.device)}, sm_{''.join(map(str, torch.cuda.get_device_capability()))},"
          f" {base.precision}{', compiled' * config.compile}"
          f"{', in CUDA graphs' * config.cuda_graphs}")  # fmt: skip
    found = {"train": count_training(config, base)}
    if config.decode:
        found["decode"] = count_decoding(config, base)
    exceeded = [line for part in found for line in report(part, found[part], targets(config, base))]
    write_result(config, found | {"exceeded": exceeded}, base)
    return 1 if exceeded else 0


def count_training(config: LaunchConfig, base: Base) -> dict[str, float]:
    """The figures of one optimizer step, on the rows nearest to TOKENS."""
    steps = training_steps(base, config.data, 32, config.batch_size)
    step = min(steps, key=lambda s: abs(s.token_count - TOKENS))
    ours = Ours(base.load(), compile=config.compile, graphs=config.cuda_graphs)
    ours.model.model.checkpoint_activations = config.checkpoint_activations
    for warm_up in (step, steps[0], step):  # kernels are tried, and graphs compiled or recorded
        ours.step(warm_up)
    torch.cuda.reset_peak_memory_stats()
    ours.step(step)
    peak = torch.cuda.max_memory_allocated() / 1e9
    counts = CudaCounter().count(lambda: ours.step(step))
    short = [cut(s) for s in (steps * config.steps)[: config.steps + 1]]
    host = [cpu_seconds(lambda: ours.step(s)) for s in short]  # noqa: B023
    return {"tokens": step.token_count, **counts, "peak_gb": peak,
            "host_ms": statistics.median(host[1:]) * 1e3}  # fmt: skip


def cut(step: Step) -> Step:
    """The step with the last tokens of each row only, which are supervised."""
    rows = [replace(e, tokens=e.tokens[-CUT:], targets=e.targets[-CUT:])
            for e in step.micro_batches[0]]  # fmt: skip
    return replace(step, micro_batches=[rows])


def count_decoding(config: LaunchConfig, base: Base) -> dict[str, float]:
    """The figures of one token of all prompts, and the launches that process the prompts."""
    prompts, _ = problem_prompts(base, config.data, config.prompts)
    model, counter, vocab_size = base.load(), CudaCounter(), base.chat.vocab_size
    answer(model, prompts, [2] * len(prompts), vocab_size, config.prompts)  # warm-up
    torch.cuda.reset_peak_memory_stats()
    runs = [
        partial(answer, model, prompts, [n] * len(prompts), vocab_size, config.prompts)
        for n in (SHORT, LONG)
    ]
    short, long = map(counter.count, runs)
    short_seconds, long_seconds = map(cpu_seconds, runs)
    tokens = LONG - SHORT
    found = {name: (long[name] - short[name]) / tokens for name in short}
    return {
        "prompts": len(prompts),
        **found,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
        "host_ms": (long_seconds - short_seconds) / tokens * 1e3,
        "launches of all prompts": short["launches"] - SHORT * found["launches"],
    }


def cpu_seconds(function: Callable[[], object]) -> float:
    """CPU seconds of the process, all threads: on a busy machine the clock would say more."""
    torch.cuda.synchronize()
    started = time.process_time()
    function()
    return time.process_time() - started


def targets(config: LaunchConfig, base: Base) -> dict[str, dict[str, float]]:
    """The largest allowed figure, by part and name; combined options were not counted."""
    flash = torch.cuda.get_device_capability() >= (8, 0) and base.precision != "fp32"
    chosen = (config.compile, config.checkpoint_activations, config.cuda_graphs, not flash)
    kinds = [kind for kind, on in zip(list(TRAIN_TARGETS)[1:], chosen) if on] or ["plain"]
    counted = TRAIN_TARGETS[kinds[0]] if len(kinds) == 1 else {}
    return TARGETS | {"train": TARGETS["train"] | counted}


def report(part: str, found: dict[str, float], allowed: dict[str, dict[str, float]]) -> list[str]:
    """Print one line per figure; returns those that exceed their target."""
    print(f"\n{'a training step' if part == 'train' else 'a decoded token of the whole batch'}")
    exceeded = []
    for name, value in found.items():
        most = allowed[part].get(name)
        target = "" if most is None else f"target {most:,g}"
        line = f"{name:<24}{value:>12,.{0 if float(value).is_integer() else 2}f}   {target}"
        if most is not None and value > most:
            exceeded.append(f"{part}: {name} {value:,.2f}, target {most:,g}")
            line += ", exceeded"
        print("  " + line)
    return exceeded


if __name__ == "__main__":
    sys.exit(run_script(main))
