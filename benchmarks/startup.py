"""Startup: the seconds from the start of a `train.py` process to its first step, by part.

    python benchmarks/startup.py --model FOLDER --data FOLDER --json startup.json
    python benchmarks/startup.py --model FOLDER --data FOLDER --other CHECKOUT   # taking turns

Each sample is a whole process that runs `train.main` unchanged. The functions in PARTS are wrapped
from outside and record when they begin and end, so the product contains nothing for the benchmark.
Only the main thread is timed: what another thread does in parallel counts where the main thread
waits for it. The process ends after its first step. One process that is not counted runs first and
brings the files into the page cache.
"""

import functools
import inspect
import json
import os
import pkgutil
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
if __name__ == "__main__":  # before the imports that the child process measures
    STARTED = time.monotonic()

# "module:function" -> the part that its time belongs to. The time of a function in PARTS that it
# calls belongs to that one's part. Functions that train.py imports are replaced in train.py.
PARTS = {
    "train:parse": "command line",
    "train:load_mixture": "read rows",
    "train:Base.find": "find the base",
    "run.base:ChatFormat.from_folder": "tokenizer",
    "train:Qwen2": "network without weights",  # its first embedding imports torch._dynamo
    "train:added_parameters": "find the layers to adapt",
    "concurrent.futures:Future.result": "wait for the hash of the base",
    "train:mixture_identity": "hash of the rows",
    "train:Run.check": "run folder",
    "train:encode_mixture": "split and encode",
    "train:audit_mixture": "audit",
    "train:Base.load": "weights",
    "train:inject": "adapters",
    "train:count": "adapters",
    "train:Run.write_start": "run folder",
    "train:torch.optim.AdamW": "optimizer",
    "train:validate": "validation before the first step",
    "train:publish_best": "publish the first best/",
}
# What the first step begins and ends with: taking its rows, and writing its line of the log.
STEP_BEGINS, STEP_ENDS = "train:Schedule.step", "train:RunLog.write"
HEAVY = ("torch._dynamo", "torch._inductor", "sympy", "torch.distributed.tensor", "pyarrow",
         "matplotlib", "huggingface_hub", "transformers")  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Start processes one after the other, and print where their time goes."""
    sys.path.insert(0, str(HERE.parents[1]))
    from benchmarks.common import shown, spread, write_result
    from run.options import option, parse

    @dataclass(frozen=True)
    class StartupConfig:
        model: str = option("Qwen/Qwen2-0.5B-Instruct", "base model: folder or Hub id")
        data: str = option("gsm8k", "a task, a folder, or a .jsonl or .parquet file")
        batch_size: int = option(16, "sequences of the first step", least=1)
        repeat: int = option(5, "processes that are counted", least=1)
        other: str | None = option(None, "another checkout of this repository, to take turns with")
        json: str | None = option(None, "file to write the result to")

    config = parse(StartupConfig, argv, "Measure the startup of train.py, by part.")
    checkouts = {"here": HERE.parents[1]}
    if config.other:
        checkouts["other"] = Path(config.other).resolve()
    options = ["--model", config.model, "--data", config.data]
    options += ["--batch-size", str(config.batch_size)]
    samples = {name: [] for name in checkouts}
    for i in range(config.repeat + 1):
        for name, checkout in checkouts.items():
            sample = measure(checkout, options)
            if i > 0:
                samples[name].append(sample)
                print(f"{name} {i} of {config.repeat}: {sample['to the first step']:.2f} s")

    result = {}
    for name, found in samples.items():
        parts = {part: spread([s[part] for s in found]) for part in found[0] if part != "heavy"}
        result[name] = {"seconds": parts, "heavy imports": found[0]["heavy"], "samples": found}
        print(f"\n{name + ': part':<40}{'seconds, median (range)':>30}")
        for part, seconds in parts.items():
            print(f"{part:<40}{shown(seconds, '.2f'):>30}")
        print("heavy imports: " + (", ".join(found[0]["heavy"]) or "none"))
    write_result(config, result)


def measure(checkout: Path, options: list[str]) -> dict[str, Any]:
    """Seconds of one process by part, in the order in which parts begin; and its heavy modules."""
    with tempfile.TemporaryDirectory() as folder:
        times, log = Path(folder) / "times.json", Path(folder) / "log"
        command = [sys.executable, HERE, "--child", times, checkout, *options]
        command += ["--out", f"{folder}/o"]
        with log.open("w") as output:
            started = time.monotonic()
            subprocess.run(command, cwd=checkout, stdout=output, stderr=output, check=False)
        if not times.exists():
            raise SystemExit(f"train.py did not reach its first step:\n{log.read_text()[-2000:]}")
        found = json.loads(times.read_text())
    parts = {"interpreter": found["entered"] - started} | own_seconds(found["spans"])
    to_step = found["step_began"] - started
    parts["everything else"] = to_step - sum(parts.values())
    parts |= {"to the first step": to_step, "first step": found["ended"] - found["step_began"]}
    return parts | {"heavy": found["heavy"]}


def own_seconds(spans: list[tuple[str, float, float]]) -> dict[str, float]:
    """Seconds of each part, without those of the parts that it called."""
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
    """Run a checkout's train.py to the end of its first step, and write the times to a file."""
    spans: list[tuple[str, float, float]] = []
    sys.path[0] = checkout
    importing = time.monotonic()
    import torch  # noqa: F401

    spans.append(("import torch", importing, time.monotonic()))
    import train

    spans.append(("other imports", spans[0][2], time.monotonic()))
    for name, part in PARTS.items():
        wrap(name, functools.partial(_timed, part, spans))
    began: list[float] = []

    def begins(function: Callable) -> Callable:
        def step(*args, **options):
            began.append(time.monotonic())
            return function(*args, **options)

        return step

    def ends(write_line: Callable) -> Callable:
        def write(*args, **values):
            if not began:  # the validation before the first step
                return write_line(*args, **values)
            found = {"entered": STARTED, "spans": spans, "step_began": began[0]}
            found |= {"ended": time.monotonic(), "heavy": [n for n in HEAVY if n in sys.modules]}
            Path(times).write_text(json.dumps(found))
            os._exit(0)

        return write

    wrap(STEP_BEGINS, begins)
    wrap(STEP_ENDS, ends)
    sys.argv = ["train.py", *argv]
    sys.exit(train.run_script(train.main))


def wrap(name: str, wrapper: Callable[[Callable], Callable]) -> None:
    """Replace the function of this name by `wrapper(function)`.

    Another checkout may not have it; its time is then part of "everything else".
    """
    module, _, path = name.partition(":")
    owner_path, _, last = path.rpartition(".")
    try:
        owner = pkgutil.resolve_name(f"{module}:{owner_path}")
        function = getattr(owner, last)
    except (AttributeError, ImportError) as error:
        print(f"{name}: {error}")
        return
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
