"""Tests of the benchmarks: each can be started, and its figures come from the product as it is."""

import importlib
import json
import math
import pkgutil
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train
from benchmarks import (
    by_shape,
    checkpoint_cost,
    generate_speed,
    gpu_day,
    launches,
    scaling,
    startup,
    train_speed,
)
from benchmarks.common import CudaCounter, Ours
from model.qwen2 import Qwen2, Qwen2Config
from tests import toys

FOLDER = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "common")


def figures(value):
    """Every number in a JSON value."""
    if isinstance(value, dict | list):
        inner = value.values() if isinstance(value, dict) else value
        return [number for item in inner for number in figures(item)]
    return [value] if isinstance(value, int | float) else []


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_help_of_every_benchmark_names_its_options(script, capsys):
    declared = re.findall(r"^ +(\w+): .* = option\(", (FOLDER / f"{script}.py").read_text(), re.M)
    with pytest.raises(SystemExit) as end:
        importlib.import_module(f"benchmarks.{script}").main(["--help"])
    shown = capsys.readouterr().out
    assert end.value.code == 0 and declared
    assert [name for name in declared if f"--{name.replace('_', '-')}" not in shown] == []


def test_the_step_that_is_measured_is_that_of_train(checkpoint, arithmetic, tmp_path, monkeypatch):
    given, loop = [], train.train
    monkeypatch.setattr(train, "train", lambda *args: given.extend(args) or loop(*args))
    flags = "--precision fp32 --device cpu --batch-size 4 --grad-accum 2 --max-steps 3 --seed 5"
    flags += f" --schedule constant --warmup 0 --model {checkpoint} --data {arithmetic}"
    train.main([*flags.split(), "--out", str(tmp_path / "run")])
    _, data, base, *_ = given
    ours = Ours(base.load(), seed=5)
    losses = [ours.step(data.schedule.step(i)) for i in range(3)]
    logged = toys.read_log(tmp_path / "run" / "metrics.jsonl")
    assert losses == [line["train_loss"] for line in logged if "train_loss" in line]


@pytest.mark.parametrize(
    "script, options",
    [
        (train_speed, ["--no-peer", "--steps", 2, "--batch-size", 2]),
        (generate_speed, ["--no-peer", "--problems", 2, "--rounds", 1]),
        (checkpoint_cost, ["--repeat", 2]),
    ],
)
def test_the_smallest_job_of_a_benchmark_gives_finite_figures(
    script, options, checkpoint, arithmetic, tmp_path
):
    data = [] if script is checkpoint_cost else ["--data", arithmetic]
    script.main(["--model", checkpoint, *data, *options, "--json", tmp_path / "result.json"])
    found = figures(json.loads((tmp_path / "result.json").read_text()))
    assert len(found) > 8 and all(math.isfinite(x) and x >= 0 for x in found)


def test_a_base_of_zeros_trains_as_any_other_and_occupies_no_disk(
    checkpoint, arithmetic, tmp_path, monkeypatch, capsys
):
    sizes = Qwen2Config(64, 4096, 3, 4, 2, toys.TABLE)
    monkeypatch.setitem(by_shape.SIZES, "Qwen2.5-7B", sizes)
    options = f"--data {arithmetic} --max-steps 1 --device cpu --precision fp32"
    flags = ["--tokenizer", str(checkpoint), "--options", options]
    assert by_shape.main(flags) == 0
    assert f"of {count_of(sizes):,} parameters (" in capsys.readouterr().out
    shutil.copytree(checkpoint, tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()
    by_shape.write_zeros(sizes, tmp_path / "base")
    file = (tmp_path / "base" / "model.safetensors").stat()
    assert file.st_size > 2 * count_of(sizes) and file.st_blocks * 512 < 100_000


def count_of(sizes: Qwen2Config) -> int:
    """The parameters of a base."""
    with torch.device("meta"):
        return sum(p.numel() for p in Qwen2(sizes).parameters())


def test_what_a_cpu_can_run_of_the_gpu_day_agrees_with_itself(checkpoint, arithmetic, tmp_path):
    parts = ["attention", "network", "eager", "kernels", "decode", "company", "resume"]
    sizes = ["--batch-size", 2, "--steps", 2, "--problems", 3, "--widths", 1, 3]
    flags = ["--model", checkpoint, "--data", arithmetic, "--device", "cpu", "--out", tmp_path]
    gpu_day.main([*flags, *sizes, "--part", *parts])
    found = json.loads((tmp_path / "result.json").read_text())
    assert list(found) == parts and found["kernels"] == {"skipped": "not here: cuda"}
    assert all(math.isfinite(x) for x in figures(found)) and "failed" not in str(found)
    assert max(v for k, v in found["attention"].items() if k.endswith("off by")) < 0.02
    network, resume = found["network"], found["resume"]
    assert network["dropout has the bits of a CPU"] and network["fp32: logits, loss off by"] == [
        0,
        0,
    ]
    assert resume["again: the same bits"] and resume["resumed: the same bits"]
    assert all(not any(changed) for name, changed in found["company"].items() if "answers" in name)
    assert (tmp_path / "table.md").read_text().count("\n") == 2 + sum(map(len, found.values()))


def test_parts_of_the_gpu_day_for_which_no_time_is_left_are_named(tmp_path, checkpoint):
    gpu_day.main(["--out", tmp_path, "--model", checkpoint, "--device", "cpu", "--minutes", 0.001])
    found = json.loads((tmp_path / "result.json").read_text())
    assert found == {name: {"skipped": "no time was left"} for name in gpu_day.PARTS}


def test_a_figure_above_its_target_is_named_and_one_without_a_target_is_not(capsys):
    found = {"launches": 2901, "waits": 1, "tokens": 10**6}
    exceeded = launches.report("train", found, {"train": {"launches": 2900, "waits": 1}})
    assert exceeded == ["train: launches 2,901.00, target 2,900"]
    assert capsys.readouterr().out.count("exceeded") == 1


def test_launches_need_a_cuda_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(launches.BadOption, match="counted on a CUDA device"):
        launches.main([])


def test_on_a_gpu_calls_are_counted_by_the_names_that_the_profiler_gives_them(monkeypatch):
    monkeypatch.delenv("COUNTING", raising=False)
    names = ["cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cudaMemcpyAsync",
             "cudaStreamSynchronize", "aten::mm", "cudaEventRecord"]  # fmt: skip

    class Profiler:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def events(self):
            return [SimpleNamespace(name=name) for name in names]

    monkeypatch.setattr(torch.profiler, "profile", lambda activities: Profiler())
    assert CudaCounter().count(lambda: None) == {"launches": 3, "waits": 1, "copies": 1}


def test_too_few_rows_for_the_steps_are_refused(checkpoint, arithmetic):
    with pytest.raises(train_speed.BadData, match="100 rows, and 7 steps take 112"):
        train_speed.main(["--model", str(checkpoint), "--data", str(arithmetic), "--no-peer"])


def test_a_point_of_the_scaling_benchmark_costs_what_its_sizes_say():
    small = scaling.Point(lengths=(8, 5), rank=2, vocabulary=64, layers=1, hidden=128)
    points = {"rank 2": small, "rank 4": scaling.replace(small, rank=4)}
    found = scaling.measure(points, repeat=1, device=torch.device("cpu"))
    row = scaling.rows_of("rank", found)[1]
    # 2 ranks more in q, k, v and o, all 128 x 128: 6 FLOP per parameter and token
    assert row["flop"] - found["rank 2"].flop == 13 * 6 * 2 * 4 * (128 + 128)
    assert row["peak_bytes"] > 0 and row["seconds"]["median"] > 0


def test_every_function_that_the_startup_benchmark_times_exists():
    names = [*startup.PARTS, startup.STEP_BEGINS, startup.STEP_ENDS]
    assert all(callable(pkgutil.resolve_name(name)) for name in names)


def test_the_startup_benchmark_divides_all_seconds_to_the_first_step(checkpoint, arithmetic):
    options = ["--model", str(checkpoint), "--data", str(arithmetic), "--max-steps", "1"]
    found = startup.measure(FOLDER.parent, options)
    parts = list(found)[: list(found).index("to the first step")]
    assert {"import torch", "network without weights", "weights", "everything else"} <= set(parts)
    assert sum(found[part] for part in parts) == pytest.approx(found["to the first step"])
    assert found["first step"] > 0
