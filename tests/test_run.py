"""Tests of a run: options, learning rate, checkpoints, folder, log, device and precision."""

import copy
import dataclasses
import json
import math
import os
import re
import string
import subprocess
import sys
import typing
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cli
import evaluate
from data.batches import Schedule, SourceRows
from data.tasks import TASKS
from errors import BadOption, BadRun
from files import JsonLines, write_json
from run import device as run_device
from run.checkpoint import load_checkpoint, save_checkpoint
from run.device import pick_device, pick_precision
from run.folder import Progress, Run
from run.identity import program
from run.options import command, in_two_columns, option, parse, to_json
from tests.refusals import snapshot
from tests.toys import new_training, read_log, train_steps
from train import DEMO, GROUPS, HELP, TrainConfig, learning_rate

settings.register_profile("no deadline", deadline=None)  # a busy machine is no failure
settings.load_profile("no deadline")

# Options


@dataclasses.dataclass(frozen=True)
class Every:
    """Options of every type and with every limit."""

    text: str = option("a", "a text")
    path: str | None = option(None, "an optional text")
    names: tuple[str, ...] = option(("a", "b"), "several texts")
    shape: str = option("flat", "one of two", choices=("flat", "round"))
    fast: bool = option(False, "a switch")
    slow: bool = option(True, "a switch that is on")
    count: int = option(3, "a whole number", least=1)
    limit: int | None = option(None, "an optional whole number", least=2)
    rate: float = option(2e-4, "a real number", above=0)
    share: float = option(0.1, "a fraction", least=0, below=1)


def values(field: dataclasses.Field, kind: type) -> st.SearchStrategy:
    """Values that an option may take."""
    least, above, below = (field.metadata[key] for key in ("least", "above", "below"))
    word = st.text(string.ascii_letters + string.digits + "-_/. é'\"\\=#", min_size=1)
    if typing.get_origin(kind) is tuple:
        return st.lists(word, min_size=1).map(tuple)
    if typing.get_args(kind):
        bare = next(k for k in typing.get_args(kind) if k is not type(None))
        return st.none() | values(field, bare)
    if kind is float:
        low = above if above is not None else least
        limits = {"exclude_min": above is not None, "exclude_max": below is not None}
        return st.floats(low, below or 1e308, **limits)
    if kind is int:
        below = field.metadata["below"] or 2**62
        return st.integers(least, int(below) - 1)
    return st.booleans() if kind is bool else st.sampled_from(field.metadata["choices"] or ["x"])


def configs(cls: type) -> st.SearchStrategy:
    types = typing.get_type_hints(cls)
    return st.builds(cls, **{f.name: values(f, types[f.name]) for f in dataclasses.fields(cls)})


def command_line(config: object) -> list[str]:
    """The flags that give `config`."""
    flags = []
    for name, value in vars(config).items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(flag if value else "--no-" + flag[2:])
        elif value is not None:
            flags.append(f"{flag}={','.join(value) if isinstance(value, tuple) else value}")
    return flags


@given(configs(Every) | configs(TrainConfig))
def test_every_option_survives_the_command_line_and_json(config):
    assert parse(type(config), command_line(config), "") == config
    saved = json.loads(json.dumps(to_json(config)))
    restored = {k: tuple(v) if type(v) is list else v for k, v in saved.items()}
    assert type(config)(**restored) == config


def test_without_flags_every_option_has_its_default():
    assert parse(Every, [], "") == Every()
    assert parse(TrainConfig, [], "") == TrainConfig()


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--cuont", "3"], "--cuont"),
        (["--coun", "3"], "--coun"),  # no abbreviations: a new option would change their meaning
        (["3"], "3"),
        (["--count"], "--count"),
        (["--count", "many"], "'many'"),
        (["--count", "2.5"], "'2.5'"),
        (["--limit", ""], "--limit"),
        (["--rate", "fast"], "'fast'"),
        (["--shape", "square"], "'square'"),
        (["--count", "0"], "--count 0 is less than 1"),
        (["--limit", "1"], "--limit 1 is less than 2"),
        (["--rate", "0"], "--rate 0.0 is not above 0"),
        (["--rate", "nan"], "--rate nan is not a finite number"),
        (["--rate", "1e999"], "--rate inf is not a finite number"),
        (["--share", "1"], "--share 1.0 is not below 1"),
        (["--share", "-0.1"], "--share -0.1 is less than 0"),
        (["--count", "-" + "9" * 400], "--count -99"),
    ],
)
def test_a_wrong_flag_or_value_is_a_bad_option_that_names_it(flags, named):
    with pytest.raises(BadOption) as refusal:
        parse(Every, flags, "")
    assert named in refusal.value.cause and "--help" in refusal.value.remedy
    assert len(str(refusal.value).splitlines()) == 2


@pytest.mark.parametrize("flags", [["--r", "8"], ["--r=8"], ["--count", "2", "--r"]])
def test_a_renamed_option_is_a_bad_option_whose_remedy_is_the_new_name(flags):
    with pytest.raises(BadOption) as refusal:
        parse(Every, flags, "", renamed={"r": "count"})
    assert (refusal.value.cause, refusal.value.remedy) == ("there is no option --r", "use --count")


def test_a_whole_number_of_any_size_is_accepted():
    assert parse(Every, ["--count", "9" * 400], "").count == int("9" * 400)


def test_all_invalid_values_are_reported_at_once():
    with pytest.raises(BadOption) as refusal:
        parse(Every, ["--count=0", "--rate=-1", "--share=2", "--limit=1"], "")
    for flag in ("--count 0", "--rate -1.0", "--share 2.0", "--limit 1"):
        assert flag in refusal.value.cause


def test_help_names_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit) as exit:
        parse(TrainConfig, ["--help"], "")
    text = " ".join(capsys.readouterr().out.split())
    assert exit.value.code == 0
    for field in dataclasses.fields(TrainConfig):
        flag = "--" + field.name.replace("_", "-")
        assert flag in text and " ".join(field.metadata["help"].split()) in text
        default = field.default
        shown = ",".join(default) if isinstance(default, tuple) else default
        assert shown in (None, "", False) or f"(default: {shown})" in text
    assert "(default: None)" not in text


def test_help_has_its_options_in_groups_and_ends_with_examples(capsys):
    with pytest.raises(SystemExit):
        parse(TrainConfig, ["--help"], HELP, groups=GROUPS)
    text = capsys.readouterr().out
    titles = [line[:-1] for line in text.splitlines() if re.fullmatch(r"[a-z].*:", line)]
    assert titles == ["options", *GROUPS, "examples"]
    for title, flag in (("adapter", "--rank"), ("training", "--seed"), ("machine", "--device")):
        section = text.partition(f"\n{title}:\n")[2].partition("\n\n")[2].partition("\n\n")[0]
        assert f"\n  {flag} " in "\n" + section
    found = [line for line in text.splitlines() if line.startswith(f"  {command()} ")]
    assert len(found) == len(GROUPS) + 3
    for example in found:  # each can be parsed, and fits a terminal
        flags = example.removeprefix(f"  {command()} ")
        assert len(f"  .venv/bin/python train.py {flags}") <= 80
        parse(TrainConfig, flags.split(), HELP, presets={"demo": DEMO}, groups=GROUPS)


@pytest.mark.parametrize("config, help, groups", [
    (TrainConfig, HELP, GROUPS), (evaluate.EvalConfig, evaluate.HELP, evaluate.GROUPS),
])  # fmt: skip
def test_help_names_every_built_in_task_and_fits_80_columns(
    capsys, monkeypatch, config, help, groups
):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        parse(config, ["--help"], help, groups=groups)
    text = capsys.readouterr().out
    assert f"tasks ({', '.join(TASKS)})" in " ".join(text.split())
    options = [line for line in text.splitlines() if command() not in line]
    assert max(map(len, options)) <= 80


@pytest.mark.parametrize(
    "argv, original, script, expected",
    [
        (["train.py"], ["python", "train.py"], "", "python train.py"),
        (["a b/train.py"], [".venv/bin/python", "a b/train.py"], "evaluate",
         ".venv/bin/python 'a b/evaluate.py'"),
        (["plain-lora train"], ["/usr/bin/python3", "/x/plain-lora"], "", "plain-lora train"),
        (["'/a b/plain-lora' train"], ["python"], "evaluate", "'/a b/plain-lora' evaluate"),
    ],
)  # fmt: skip
def test_commands_are_printed_as_the_program_was_started(
    monkeypatch, argv, original, script, expected
):
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "orig_argv", original)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    assert command(script) == expected


def test_the_help_of_an_installed_package_names_its_commands(monkeypatch, capsys):
    monkeypatch.setattr(cli.sys, "argv", ["plain-lora", "--help"])
    cli.main()
    said = capsys.readouterr().out
    assert [line.split()[0] for line in said.split("\n\n")[1].splitlines()] == [*cli.SCRIPTS]


@pytest.mark.parametrize("name", cli.SCRIPTS)
def test_the_installed_program_names_itself_in_its_help(name):
    code = "import cli, sys; sys.argv = ['plain-lora', *sys.argv[1:]]; cli.main()"
    ended = subprocess.run(
        [sys.executable, "-c", code, name, "--help"], cwd=Path(cli.__file__).parent,
        capture_output=True, text=True,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith(f"usage: plain-lora {name} [options]\n")
    assert "python" not in ended.stdout.replace("as for train.py", "")


def test_the_printed_options_show_every_value_in_80_columns():
    lines = in_two_columns(to_json(TrainConfig())).splitlines()
    shown = " ".join(lines).split()
    assert max(map(len, lines)) <= 80
    assert all(name in shown for name in to_json(TrainConfig()))


# The learning rate, and the steps that validate


@given(
    st.sampled_from(["constant", "linear", "cosine"]),
    st.integers(1, 300), st.floats(0, 0.99), st.just(0.0) | st.floats(1e-9, 10),
)  # fmt: skip
def test_the_learning_rate_rises_linearly_and_then_decays_as_its_schedule_says(
    shape, last, warmup, peak
):
    config = TrainConfig(schedule=shape, warmup=warmup, learning_rate=peak)
    top = min(round(warmup * last), last - 1)  # the step at the peak, if the warm-up ends
    rates = [learning_rate(config, step, last) for step in range(last)]
    if round(warmup * last) == last:
        assert rates == pytest.approx([peak * (s + 1) / (last + 1) for s in range(last)])
        return
    end = {"constant": peak, "linear": 0, "cosine": 0}[shape]
    expected = np.interp(range(last), [-1, top, last], [0, peak, end])
    if shape == "cosine":
        done = np.interp(range(last), [top, last], [0, 1])
        expected[top:] = peak * np.cos(done[top:] * math.pi / 2) ** 2
    assert rates == pytest.approx(list(expected), rel=1e-9, abs=1e-12 * peak)
    assert max(rates) == rates[top] == peak and min(rates) >= 0


@given(st.integers(1, 50), st.integers(1, 60), st.integers(1, 160))
def test_validations_are_spread_evenly_and_come_after_every_epoch_and_the_last_step(
    per_epoch, evals, last
):
    schedule = Schedule(
        [], 1, 1, epochs=200, seed=0, max_steps=last, sources=(SourceRows(per_epoch, per_epoch),)
    )
    steps = schedule.validation_steps(evals)
    assert min(steps) == 0 and max(steps) == last
    assert {s for s in range(1, last + 1) if s % per_epoch == 0} <= steps
    gaps = np.diff([0, *sorted(steps)])
    assert max(gaps) <= max(1, math.ceil(per_epoch / evals))
    assert len(steps) <= evals * math.ceil(last / per_epoch) + 2


# Progress


LOSSES = st.floats() | st.sampled_from([math.nan, math.inf, 1.0, 2.0])


@given(st.lists(LOSSES))
def test_the_best_validation_is_the_first_with_the_lowest_loss_and_never_nan(losses):
    progress = Progress()
    for step, loss in enumerate(losses):
        progress.cursor = progress.step = step
        earlier = [x for x in losses[:step] if math.isfinite(x)]
        is_best = math.isfinite(loss) and all(loss < x for x in earlier)
        assert progress.record_validation(loss) == is_best
    finite = [x for x in losses if math.isfinite(x)]
    assert progress.best_loss == min(finite, default=None)
    assert progress.best_step == (losses.index(min(finite)) if finite else 0)
    worse = range(progress.best_step + 1 if finite else 0, len(losses))
    assert progress.validations_since_best == len(set(worse) - {0, 1})  # the first two are free
    assert progress.validations == sum(map(math.isfinite, losses[1:]))


def test_the_validation_before_the_first_step_takes_nothing_from_the_patience():
    with_it, without = Progress(), Progress()
    with_it.record_validation(1.0)
    for step, loss in enumerate([1.2, 1.3, 1.4, 1.5], 1):
        for progress in (with_it, without):
            progress.cursor = progress.step = step
            progress.record_validation(loss)
        assert with_it.validations_since_best == without.validations_since_best == step - 1
    assert (with_it.best_step, without.best_step) == (0, 1)


@given(st.lists(st.tuples(LOSSES, st.sampled_from([0.0, 0.5, 1.0])), min_size=1))
def test_with_exact_match_the_best_validation_has_the_most_correct_then_the_lowest_loss(found):
    progress = Progress()
    for progress.step, (loss, exact_match) in enumerate(found, 1):
        progress.record_validation(loss, exact_match)
    finite = [(loss, match) for loss, match in found if math.isfinite(loss)]
    best = min(finite, key=lambda pair: (-pair[1], pair[0]), default=(None, None))
    assert (progress.best_loss, progress.best_exact_match) == best
    assert progress.best_step == (found.index(best) + 1 if finite else 0)


# Checkpoints


@pytest.mark.parametrize("scaled", [True, False])
def test_training_resumed_from_a_checkpoint_has_the_same_weights_moments_and_scaler(
    tmp_path, scaled
):
    model, state = new_training(scaled)
    train_steps(model, state, range(5))
    progress = Progress(cursor=5, step=4, best_loss=0.1 + 0.2, seconds=1 / 3, log_bytes=9)
    save_checkpoint(Run(tmp_path), progress, **state)
    again, restored = new_training(scaled)
    assert load_checkpoint(Run(tmp_path), **restored) == progress == Run(tmp_path).read_progress()
    train_steps(model, state, range(5, 9))
    train_steps(again, restored, range(5, 9))
    assert restored["scaler"].state_dict() == state["scaler"].state_dict()
    for name, p in state["parameters"].items():
        assert torch.equal(p, restored["parameters"][name])
        one, other = (s["optimizer"].state[s["parameters"][name]] for s in (state, restored))
        assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_without_a_checkpoint_training_starts_from_the_given_weights(tmp_path):
    model, state = new_training()
    before = copy.deepcopy(model.state_dict())
    assert Run(tmp_path).read_progress() is None
    assert load_checkpoint(Run(tmp_path), **state) == Progress()
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())


def test_the_two_newest_checkpoints_are_kept_and_unfinished_ones_are_not_read(tmp_path):
    _, state = new_training()
    for cursor in (5, 40, 300, 999_999, 1_000_000):
        save_checkpoint(Run(tmp_path), Progress(cursor=cursor), **state)
    assert Run(tmp_path).read_progress().cursor == 1_000_000
    names = ["step-1000000", "step-999999"]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == names
    (tmp_path / "checkpoints" / "step-2000000.new").mkdir()
    assert Run(tmp_path).read_progress().cursor == 1_000_000
    save_checkpoint(Run(tmp_path), Progress(cursor=1_000_000, step=7), **state)
    assert Run(tmp_path).read_progress().step == 7


def test_a_json_file_is_replaced_completely_or_not_at_all(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}


# Which run a folder holds

DEFAULTS = to_json(TrainConfig())
CONFIG = {"options": to_json(TrainConfig()), "identity": {"ranks": 1, "base_commit": None}}
CONFIG |= program()


def changed(**options: object) -> dict:
    return CONFIG | {"options": CONFIG["options"] | options}


def test_a_missing_or_empty_folder_is_a_new_run_and_the_same_options_resume_it(tmp_path):
    assert Run(tmp_path / "a" / "b").check(CONFIG, DEFAULTS) is None
    assert not (tmp_path / "a").exists()
    assert Run(tmp_path).check(CONFIG, DEFAULTS) is None
    write_json(tmp_path / "config.json", CONFIG)
    assert Run(tmp_path).check(CONFIG, DEFAULTS) == []
    changes = Run(tmp_path).check(changed(evals_per_epoch=1, epochs=5, out="x"), DEFAULTS)
    assert "epochs was 3, is 5" in changes and len(changes) == 3


def test_the_folder_of_another_run_is_refused_with_the_old_and_new_values(tmp_path):
    write_json(tmp_path / "config.json", CONFIG)
    before = snapshot(tmp_path)
    new = {"rank": "16", "alpha": "1", "learning_rate": 1e-3, "targets": ["q_proj"], "data": "x",
           "model": "y", "seed": 5, "batch_size": 2, "grad_accum": 2}  # fmt: skip
    for name, value in new.items():
        with pytest.raises(BadRun) as refusal:
            Run(tmp_path).check(changed(**{name: value}), DEFAULTS)
        assert f"{name} was {CONFIG['options'][name]}, is {value}" in refusal.value.cause
    with pytest.raises(BadRun, match="ranks was 1, is 2.*seed was 0, is 1"):
        Run(tmp_path).check(
            changed(seed=1) | {"identity": CONFIG["identity"] | {"ranks": 2}}, DEFAULTS
        )
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    "files",
    [
        {"best": ""}, {"config.json": "{"}, {"config.json": "[]"}, {"config.json": "{}"},
        {"config.json": '{"model_type": "qwen2"}'}, {"config.json": "\udcff"},
        {"metrics.jsonl": ""}, {"config.json": '{"options": 1, "identity": 2}'},
    ],
)  # fmt: skip
def test_a_folder_with_parts_of_a_run_or_of_a_model_is_refused_and_not_changed(tmp_path, files):
    for name, text in files.items():
        (tmp_path / name).write_bytes(text.encode(errors="surrogateescape"))
    before = snapshot(tmp_path)
    with pytest.raises(BadRun, match="config.json"):
        Run(tmp_path).check(CONFIG, DEFAULTS)
    assert snapshot(tmp_path) == before


def test_a_path_where_no_folder_can_be_created_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("file", "file/below", "file/far/below", "dangling", "dangling/below"):
        with pytest.raises(BadRun, match="give another --out"):
            Run(tmp_path / name).check(CONFIG, DEFAULTS)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(BadRun, match="cannot be written"):
        Run(tmp_path / "run").check(CONFIG, DEFAULTS)


# Reading a run's folder


def test_the_folder_of_no_run_reads_as_empty(tmp_path):
    for run in (Run(tmp_path), Run(tmp_path / "missing"), Run.of_adapter(None)):
        assert run.config == run.options == run.identity == run.progress() == run.audit() == {}
        assert (run.log(), run.checkpoints(), run.read_progress()) == (([], 0), [], None)
        assert run.format is None
    assert not list(tmp_path.iterdir())


DAMAGED = [b"", b"{", b"[]", b"3", b"null", b"\xff\xfe", b"\0" * 99, b"[" * 99_999,
           b'{"progress": 1}']  # fmt: skip


@pytest.mark.parametrize("content", DAMAGED)
def test_damaged_files_of_a_run_are_read_without_an_exception_and_not_changed(tmp_path, content):
    _, state = new_training()
    run = Run(tmp_path)
    for cursor in (5, 6):
        save_checkpoint(run, Progress(cursor=cursor), **state)
    (tmp_path / "checkpoints" / "step-000006" / "progress.json").write_bytes(content)
    (tmp_path / "audit.json").write_bytes(content)
    run.log_file.write_bytes(b'{"step": 1}\n' + content + b'\n{"step": 2}\n{"st')
    before = snapshot(tmp_path)
    assert run.progress()["cursor"] == 5  # of the older checkpoint
    assert run.audit() in ({}, {"progress": 1})
    lines, damaged = run.log()
    assert (lines[0], lines[-1]) == ({"step": 1}, {"step": 2}) and len(lines) + damaged == 3
    assert snapshot(tmp_path) == before


def test_folders_in_place_of_a_runs_files_are_read_without_an_exception(tmp_path):
    for name in ("audit.json", "metrics.jsonl", "checkpoints/step-000001/progress.json"):
        (tmp_path / name).mkdir(parents=True)
    run = Run(tmp_path)
    assert (run.audit(), run.log(), run.progress()) == ({}, ([], 0), {})


@pytest.mark.parametrize(
    "content", [*DAMAGED, b'{"options": 3}', b'{"options": {}, "identity": 1}']
)
def test_a_damaged_configuration_of_a_run_is_refused_in_two_lines(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(BadRun, match="config.json") as refusal:
        _ = Run(tmp_path).options
    assert len(str(refusal.value).splitlines()) == 2


# The log


def test_a_log_that_is_switched_off_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log = JsonLines(None, keep=7)
    log.write(step=1)
    assert log.sync() == 0 and not list(tmp_path.iterdir())


def test_a_resumed_log_is_truncated_to_the_size_in_the_checkpoint(tmp_path):
    log = JsonLines(tmp_path / "m.jsonl")
    log.write(step=1, loss=0.1 + 0.2)
    size = log.sync()
    log.write(step=2, loss=0.5)
    again = JsonLines(tmp_path / "m.jsonl", keep=size)
    again.write(step=2, loss=0.5)
    assert read_log(tmp_path / "m.jsonl") == [
        {"step": 1, "loss": 0.1 + 0.2},
        {"step": 2, "loss": 0.5},
    ]


def test_what_is_not_finite_is_logged_as_null_also_inside_of_a_value(tmp_path):
    infinite = {"a": math.inf, "b": -0.5}
    JsonLines(tmp_path / "m.jsonl").write(loss=math.nan, by_source=infinite, parts=[-math.inf, 1])
    text = (tmp_path / "m.jsonl").read_text()
    assert text == '{"loss": null, "by_source": {"a": null, "b": -0.5}, "parts": [null, 1]}\n'


def test_a_torn_last_line_is_not_read(tmp_path):
    complete = b'{"step": 1}\n{"step": 2}\n'
    for torn in (b"", b'{"st', b"\xff\x00", b'{"step": 3}'):
        (tmp_path / "m.jsonl").write_bytes(complete + torn)
        assert read_log(tmp_path / "m.jsonl") == [{"step": 1}, {"step": 2}]


def test_a_log_that_was_lost_starts_again_and_can_be_read(tmp_path):
    JsonLines(tmp_path / "m.jsonl", keep=1000).write(step=7)
    assert read_log(tmp_path / "m.jsonl") == [{"step": 7}]


# Device and precision

CPU, GPU, MPS = (torch.device(name) for name in ("cpu", "cuda", "mps"))


@pytest.mark.parametrize(
    "device, gpu_has_bf16, flags, precision",
    [
        (GPU, True, "", "bf16"), (GPU, False, "amx_bf16", "fp16"), (MPS, True, "", "fp32"),
        (CPU, True, "fpu sse2 avx512f", "fp32"), (CPU, False, "fpu avx512_bf16", "bf16"),
        (CPU, False, "amx_bf16 amx_tile", "bf16"), (CPU, False, "asimd bf16", "bf16"),
        (CPU, True, "notbf16 bf16x", "fp32"),
    ],
)  # fmt: skip
def test_auto_precision_is_the_one_the_hardware_has_units_for(
    tmp_path, monkeypatch, device, gpu_has_bf16, flags, precision
):
    (tmp_path / "cpuinfo").write_text(f"processor : 0\nflags : {flags}\n\nprocessor : 1\n")
    monkeypatch.setattr(run_device, "Path", lambda _: tmp_path / "cpuinfo")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: gpu_has_bf16)
    assert pick_precision("auto", device)[0] == precision
    for name in ("bf16", "fp16", "fp32"):
        assert pick_precision(name, device)[0] == name


def test_auto_device_is_the_best_available_one_and_a_missing_one_is_refused(monkeypatch):
    for cuda, mps, best in ((True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        monkeypatch.setattr(run_device, "check_kernels", lambda device: None)
        monkeypatch.setattr(run_device, "refuse_idle_gpu", lambda: None)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda mps=mps: mps)
        assert pick_device("auto").type == best
    for name in ("cuda", "mps"):
        with pytest.raises(BadOption, match=f"--device {name}"):
            pick_device(name)


def test_auto_does_not_train_on_the_cpu_where_there_is_a_gpu_that_cannot_be_used(
    monkeypatch, tmp_path
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(run_device, "NVIDIA", (str(tmp_path),))
    with pytest.raises(BadOption, match="has an NVIDIA GPU.*cannot use"):
        pick_device("auto")
    assert pick_device("cpu").type == "cpu"
    monkeypatch.setattr(run_device, "NVIDIA", (str(tmp_path / "none"),))
    pick_device("auto")


@pytest.mark.parametrize(
    "capability, built, works",
    [
        ((7, 5), ["sm_75", "sm_80", "sm_90"], True), ((8, 9), ["sm_80", "sm_90"], True),
        ((9, 0), ["sm_80", "sm_90a"], True), ((7, 0), ["sm_75", "sm_80"], False),
        ((6, 0), ["sm_75", "sm_80", "compute_80"], False), ((12, 1), ["sm_90"], False),
        ((12, 1), ["sm_90", "compute_90"], True), ((8, 0), ["sm_86"], False), ((9, 4), [], True),
    ],
)  # fmt: skip
def test_a_gpu_for_which_pytorch_has_no_kernels_is_refused(monkeypatch, capability, built, works):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    if works:
        assert pick_device("cuda").type == "cuda"
    else:
        with pytest.raises(BadOption, match="a GPU .*needs kernels"):
            pick_device("cuda")


def test_attention_never_chooses_cudnn(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", chosen.append)
    run_device.prepare(torch.device("cuda"))
    assert chosen == [False]


@pytest.mark.parametrize("argv", [["--targets", "a,b"], ["--targets", "a", "b"]])
def test_names_are_separated_by_commas_or_spaces(argv):
    assert parse(TrainConfig, argv, "").targets == ("a", "b")


def test_other_data_with_the_same_name_is_another_run(tmp_path):
    write_json(tmp_path / "config.json", changed() | {"identity": {"data_sha256": "a"}})
    with pytest.raises(BadRun, match="data_sha256 was a, is b"):
        Run(tmp_path).check(changed() | {"identity": {"data_sha256": "b"}}, DEFAULTS)
