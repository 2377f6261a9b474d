"""Start-up: the seconds from the start of a `train.py` process to its first step, by part.

    python benchmarks/startup.py --model FOLDER --data FOLDER --json startup.json
    python benchmarks/startup.py --model FOLDER --data FOLDER --other CHECKOUT   # taking turns

The one idea: each sample is a whole process, which runs `train.main` as it stands. The functions
that `main` calls by name are wrapped from outside to note when they begin and end, so nothing in
the product is there for the benchmark. A part's time is the main thread's: what another thread does
meanwhile costs only where it is waited for. After its first step the process leaves. One sample
that is not counted goes first, and brings files into the page cache.
"""

import functools
import inspect
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
if __name__ == "__main__":  # or what the child imports would be counted before its clock starts
    STARTED = time.monotonic()

# What train.py calls, by its own names: (name, part). What a part calls in turn is taken off it.
PARTS = {
    "parse": "command line",
    "load_mixture": "read rows",
    "find_checkpoint": "find the base",
    "read_config": "find the base",
    "check_adapters": "names of layers",
    "ChatFormat.from_folder": "tokenizer",
    "fingerprint_base": "hash of the base",
    "mixture_identity": "hash of the rows",
    "check_run": "run folder",
    "encode_mixture": "split and encode",
    "audit_mixture": "audit",
    "load_model": "weights",
    "inject": "adapters",
    "count": "adapters",
    "write_run": "run folder",
    "torch.optim.AdamW": "optimizer",
}
STEP_BEGINS, STEP_ENDS = "Schedule.step", "JsonLines.write"  # the first and last call of a step
HEAVY = ("torch._dynamo", "torch._inductor", "sympy", "torch.distributed.tensor", "pyarrow",
         "matplotlib", "huggingface_hub", "transformers")  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Start processes one after the other, and say where their time goes."""
    sys.path.insert(0, str(HERE.parents[1]))
    from benchmarks.common import shown, spread, write_result
    from run.options import option, parse, to_json

    @dataclass(frozen=True)
    class StartConfig:
        model: str = option("Qwen/Qwen2-0.5B-Instruct", "folder or Hub id of the base")
        data: str = option("gsm8k", "a task, a folder, or a .jsonl or .parquet file")
        batch_size: int = option(16, "sequences of the first step", least=1)
        repeat: int = option(5, "processes that are counted", least=1)
        other: str | None = option(None, "another checkout of this repository, to take turns with")
        json: str | None = option(None, "file to write the result to")

    config = parse(StartConfig, argv, "Time the start of train.py, by part.")
    checkouts = {"here": HERE.parents[1]}
    if config.other:
        checkouts["other"] = Path(config.other).resolve()
    asked = ["--model", config.model, "--data", config.data]
    asked += ["--batch-size", str(config.batch_size)]
    samples = {name: [] for name in checkouts}
    for i in range(config.repeat + 1):
        for name, checkout in checkouts.items():
            sample = measure(checkout, asked)
            if i > 0:
                samples[name].append(sample)
                print(f"{name} {i} of {config.repeat}: {sample['to the first step']:.2f} s")

    result = {"options": to_json(config)}
    for name, found in samples.items():
        parts = {part: spread([s[part] for s in found]) for part in found[0] if part != "heavy"}
        result[name] = {"seconds": parts, "heavy imports": found[0]["heavy"], "samples": found}
        print(f"\n{name + ': part':<40}{'seconds, median (range)':>30}")
        for part, seconds in parts.items():
            print(f"{part:<40}{shown(seconds, '.2f'):>30}")
        print("heavy imports: " + (", ".join(found[0]["heavy"]) or "none"))
    write_result(config.json, result)


def measure(checkout: Path, asked: list[str]) -> dict[str, Any]:
    """Seconds of one process by part, in the order that parts begin, and which modules it had."""
    with tempfile.TemporaryDirectory() as folder:
        times, log = Path(folder) / "times.json", Path(folder) / "log"
        command = [sys.executable, HERE, "--child", times, checkout, *asked, "--out", f"{folder}/o"]
        with log.open("w") as output:
            started = time.monotonic()
            subprocess.run(command, cwd=checkout, stdout=output, stderr=output, check=False)
        if not times.exists():
            raise SystemExit(f"train.py did not reach its first step:\n{log.read_text()[-2000:]}")
        found = json.loads(times.read_text())
    parts = {"interpreter": found["entered"] - started} | own_seconds(found["spans"])
    to_step = found["step_began"] - started
    parts["all else"] = to_step - sum(parts.values())
    parts |= {"to the first step": to_step, "first step": found["ended"] - found["step_began"]}
    return parts | {"heavy": found["heavy"]}


def own_seconds(spans: list[tuple[str, float, float]]) -> dict[str, float]:
    """Seconds of each part without those of the parts that it called."""
    seconds: dict[str, float] = {}
    within: list[tuple[str, float, float]] = []
    for part, begin, end in sorted(spans, key=lambda span: (span[1], -span[2])):
        while within and within[-1][2] <= begin:
            within.pop()
        if within:
            seconds[within[-1][0]] -= end - begin
        seconds[part] = seconds.get(part, 0.0) + end - begin
        within.append((part, begin, end))
    return seconds


def child(times: str, checkout: str, *argv: str) -> None:
    """Run a checkout's train.py to the end of its first step, and leave the times in a file."""
    spans: list[tuple[str, float, float]] = []
    sys.path[0] = checkout
    importing = time.monotonic()
    import torch  # noqa: F401

    spans.append(("import torch", importing, time.monotonic()))
    import train

    spans.append(("import the rest", spans[0][2], time.monotonic()))
    for name, part in PARTS.items():
        wrap(train, name, functools.partial(_timed, part, spans))
    began: list[float] = []

    def begins(function: Callable) -> Callable:
        def step(*args, **options):
            began.append(time.monotonic())
            return function(*args, **options)

        return step

    def ends(_: Callable) -> Callable:
        def write(*args, **values):
            found = {"entered": STARTED, "spans": spans, "step_began": began[0]}
            found |= {"ended": time.monotonic(), "heavy": [n for n in HEAVY if n in sys.modules]}
            Path(times).write_text(json.dumps(found))
            os._exit(0)

        return write

    wrap(train, STEP_BEGINS, begins)
    wrap(train, STEP_ENDS, ends)
    sys.argv = ["train.py", *argv]
    sys.exit(train.run_script(train.main))


def wrap(module: Any, name: str, wrapper: Callable[[Callable], Callable]) -> None:
    """Put `wrapper(function)` where `module` finds `function`."""
    *path, last = name.split(".")
    owner = functools.reduce(getattr, path, module)
    assert hasattr(owner, last), f"train.py knows no {name}: put PARTS right"
    function = getattr(owner, last)
    wrapped = wrapper(function)
    setattr(owner, last, staticmethod(wrapped) if inspect.ismethod(function) else wrapped)


def _timed(part: str, spans: list, function: Callable) -> Callable:
    def call(*args, **options):
        started = time.monotonic()
        try:
            return function(*args, **options)
        finally:
            if threading.current_thread() is threading.main_thread():
                spans.append((part, started, time.monotonic()))

    return call


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    else:
        main()
