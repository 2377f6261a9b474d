"""Tests of the benchmarks: each can be started, and its figures come from the product as it is."""

import importlib
import json
import math
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import train
from benchmarks import checkpoint_cost, generate_speed, scaling, startup, train_speed
from benchmarks.common import Ours
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
