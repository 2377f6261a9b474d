"""Tests of what a run or an evaluation is of: base, data, adapter, step, checkpoint and program."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import evaluate
from errors import BadAdapter, BadRun
from files import HashedFiles, write_json
from lora.inject import trained_parameters
from lora.peft_format import CONFIG, WEIGHTS, inject_adapter, read_adapter
from model.load import load_model
from run import export, identity
from run.base import Base, checked_adapter
from tests import toys
from tests.campaign.harness import (
    SHORT,
    FileCalls,
    await_steps,
    copy,
    finish,
    results,
    resume_with_ranks,
    run,
    slowed,
    start,
    start_ranks,
    toy_flags,
)
from tests.evaluations import COMMON, write_tuned
from tests.refusals import snapshot
from tests.scripts import copy_product
from tests.toys import read_log

ROOT = Path(__file__).resolve().parents[1]


def edited_program(folder: Path):
    """Not a fault of the run: its code is `folder`'s, in which train.py was edited."""
    copy_product(folder)
    with (folder / "train.py").open("a") as file:
        file.write("# edited\n")

    def fault():
        identity.ROOT = folder
        identity.program.cache_clear()

    return fault


def without_owner(folder: Path) -> dict:
    """What a folder holds, except who locked it last."""
    return {k: v for k, v in snapshot(folder).items() if not k.endswith("lock.owner")}


# The program


def test_the_program_is_the_products_own_code_and_nothing_else(tmp_path, monkeypatch):
    edited_program(tmp_path / "copy")
    for name in ("tests", "benchmarks"):
        (tmp_path / "copy" / name).mkdir()

    def found() -> str:
        identity.program.cache_clear()
        return identity.program()["program_sha256"]

    original = found()
    monkeypatch.setattr(identity, "ROOT", tmp_path / "copy")
    edited = found()
    assert edited != original and identity.program()["program_git"] is None
    for name in ("README.md", "tests/test_new.py", "benchmarks/new.py", "notes.py"):
        (tmp_path / "copy" / name).write_text("# changed\n")
        assert found() == edited
    for name in ("model/qwen2.py", "hub.py", "lora/new.py"):
        (tmp_path / "copy" / name).write_text("# changed\n")
        assert found() != edited
        edited = found()
    monkeypatch.undo()
    assert found() == original


def test_whoever_edits_the_loop_and_repeats_the_command_sees_the_edit_run(tiny, tmp_path):
    copy_product(tmp_path / "code")

    def train(*flags: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "train.py", *tiny, *SHORT, "--max-steps", "2", "--out", "../run"]
        return subprocess.run(
            [*command, *flags], cwd=tmp_path / "code", capture_output=True, text=True, timeout=200
        )

    assert train().returncode == 0
    loop = (tmp_path / "code/train.py").read_text()
    edited = loop.replace('group["lr"] = lr * group["ratio"]', 'group["lr"] = 0.0')
    assert edited != loop
    (tmp_path / "code/train.py").write_text(edited)
    again = train()
    assert again.returncode == 2 and len(again.stderr.splitlines()) == 2, again.stderr
    assert "was finished by other code" in again.stderr and "--fresh" in again.stderr
    fresh = train("--fresh")
    assert fresh.returncode == 0, fresh.stderr
    adapter = load_file(tmp_path / f"run-2/best/{WEIGHTS}")
    assert not any(tensor.any() for name, tensor in adapter.items() if "lora_B" in name)


def test_a_finished_run_of_the_same_code_is_answered_and_one_of_other_code_is_refused(
    short, finished, tmp_path
):
    out = copy(finished, tmp_path / "run")
    assert "finished in " in finish(short, out).out
    before = without_owner(out)
    ended = run(short, out, fault=edited_program(tmp_path / "code"))
    assert ended.code == 2 and "was finished by other code" in ended.two_line_error()
    assert "--fresh" in ended.err and without_owner(out) == before


def test_a_run_finished_before_programs_were_recorded_is_of_other_code(short, finished, tmp_path):
    out = copy(finished, tmp_path / "run")
    for path in (out / "checkpoints").iterdir():
        state = json.loads((path / "progress.json").read_text())
        files = {"progress.json": {k: v for k, v in state.items() if "program" not in k}}
        rewrite_checkpoint(path, files)
    assert "by other code: an earlier version" in run(short, out).two_line_error()


def test_an_unfinished_run_resumes_with_edited_code_says_so_and_records_it(
    short, half, expected, tmp_path
):
    ended = run(short, half, fault=edited_program(tmp_path / "code"))
    assert ended.code == 0 and "resuming, although the code was " in ended.out
    config = json.loads((half / "config.json").read_text())
    assert [change.startswith("the code was ") for change in config["changes"]] == [True]
    assert results(half) == expected  # the edit was a comment
    assert identity.program()["program_sha256"] != config["program_sha256"]


def test_fresh_resumes_its_own_unfinished_run_and_leaves_the_others(short, finished, tmp_path):
    out = copy(finished, tmp_path / "run")
    before = snapshot(out)
    killed = FileCalls(within="save_checkpoint", nth=5, at=0)
    assert run([*short, "--fresh"], out, fault=killed).code == 137
    assert (tmp_path / "run-2/config.json").exists()
    finish([*short, "--fresh"], out)
    assert results(tmp_path / "run-2") == results(out)
    assert snapshot(out) == before and not (tmp_path / "run-3").exists()


# Where things are is no identity


def test_a_run_resumes_with_its_base_and_data_at_other_places(tmp_path):
    tiny = toy_flags(tmp_path / "first")
    command = [*tiny, *SHORT, "--save-every", 0]
    finish(command, tmp_path / "whole")
    out = tmp_path / "run"
    assert run(command, out, fault=FileCalls(within="save_checkpoint", nth=5, at=0)).code == 137
    (tmp_path / "first").rename(tmp_path / "scratch")
    rows = tmp_path / "scratch/data"
    (rows / "train.jsonl").rename(rows / "sums.jsonl")
    places = {tiny[1]: f"{tmp_path}/scratch/base/", tiny[3]: rows / "sums.jsonl"}
    finish([places.get(word, word) for word in command], out)
    log = [{k: line.get(k) for k in ("step", "train_loss", "val_loss")} for line in
           read_log(out / "metrics.jsonl")]  # fmt: skip
    assert log == [{k: line.get(k) for k in ("step", "train_loss", "val_loss")} for line in
                   read_log(tmp_path / "whole/metrics.jsonl")]  # fmt: skip
    assert (out / "best" / WEIGHTS).read_bytes() == (tmp_path / "whole/best" / WEIGHTS).read_bytes()


def losses(out: Path) -> list[float]:
    return [line["train_loss"] for line in read_log(out / "metrics.jsonl") if "train_loss" in line]


def test_a_step_is_its_number_of_sequences_however_they_are_split(short, half, expected, finished):
    finish([*short, "--batch-size", 8, "--grad-accum", 1], half)
    assert losses(half) == pytest.approx(losses(finished), abs=1e-6)
    changes = json.loads((half / "config.json").read_text())["changes"]
    assert changes == ["batch_size was 2, is 8", "grad_accum was 4, is 1"]


def test_a_run_continues_on_one_rank_then_two_then_one(tiny, two_ranks, tmp_path):
    flags, out = [*tiny, *SHORT, "--save-every", 0], tmp_path / "run"
    saved = FileCalls(within="save_checkpoint", nth=3, at=0)
    assert run([*flags, "--grad-accum", 4], out, fault=saved).code == 137
    two = [*flags, "--grad-accum", 2]
    first, second = start_ranks(two, out, fault=slowed(0.05))
    await_steps(first, out, 6)
    second.send(15)
    assert {first.wait().code, second.wait().code} == {75, 143}
    done = len(losses(out))
    finish([*flags, "--grad-accum", 4], out)
    assert 2 < done < 10 and len(losses(out)) == 10
    resume_with_ranks(two, tmp_path / "ranks")
    assert losses(out) == pytest.approx(losses(tmp_path / "ranks"), abs=1e-6)


# The base and the adapter


@pytest.fixture
def exchanged(tmp_path):
    """A finished run whose base was exchanged under the same path."""
    tiny = toy_flags(tmp_path / "tiny")
    finish([*tiny, *SHORT, "--max-steps", 1], tmp_path / "run")
    change_tensor(Path(tiny[1]) / "model.safetensors")
    return tmp_path


def change_tensor(path: Path) -> None:
    tensors = load_file(path)
    tensors["model.norm.weight"] += 1
    save_file(tensors, path, metadata={"format": "pt"})


def test_a_base_exchanged_under_the_same_path_is_refused_unless_it_is_named(exchanged, capsys):
    adapter, base = str(exchanged / "run/best"), str(exchanged / "tiny/base")
    evaluation = ["--adapter", adapter, "--data", str(exchanged / "tiny/data"), *COMMON]
    merging = ["--adapter", adapter, "--out", str(exchanged / "merged")]
    for main, flags in ((evaluate.main, evaluation), (export.main, merging)):
        with pytest.raises(BadAdapter, match="was trained on another base"):
            main(flags)
        main([*flags, "--model", base])
        assert "used anyway, since --model names it" in capsys.readouterr().out


def test_an_adapter_inside_the_folder_of_a_base_has_no_run_and_is_evaluated_and_exported(
    tuned, tmp_path
):
    base = shutil.copytree(tuned / "base", tmp_path / "base")
    adapter = str(shutil.copytree(tuned / "run/best", base / "adapter"))
    evaluate.main(["--adapter", adapter, "--data", str(tuned / "sums"), *COMMON, "--limit", "2"])
    assert len([*base.glob("evaluation/*/result.json")]) == 1
    export.main(["--adapter", adapter, "--out", str(tmp_path / "merged")])
    toys.change_json(base / "config.json", identity={})  # that of a run which lost its options
    with pytest.raises(BadRun, match="is not the configuration of a run"):
        export.main(["--adapter", adapter, "--out", str(tmp_path / "again")])


def test_an_adapter_that_left_its_run_names_no_path_but_knows_its_base(exchanged, capsys):
    adapter = shutil.copytree(exchanged / "run/best", exchanged / "alone/adapter")
    merging = ["--adapter", str(adapter), "--out", str(exchanged / "merged")]
    with pytest.raises(BadAdapter, match="names no base model"):
        export.main(merging)
    export.main([*merging, "--model", str(exchanged / "tiny/base")])
    assert "was trained on another base" in capsys.readouterr().out


def test_a_base_that_is_overwritten_during_a_run_is_reported_with_exit_code_1(tmp_path):
    tiny = toy_flags(tmp_path / "tiny")
    child = start([*tiny, *SHORT], tmp_path / "run", fault=slowed(0.05))
    await_steps(child, tmp_path / "run", 2)
    with (Path(tiny[1]) / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    ended = child.wait()
    assert ended.code == 1 and "were changed during the run" in ended.two_line_error()


def test_files_have_changed_if_they_hold_something_else(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"one")
    files = HashedFiles([path])
    assert not files.changed()
    os.utime(path, (1, 1))
    assert not files.changed()  # only looked at again
    path.write_bytes(b"two")
    assert files.changed()
    path.unlink()
    assert files.changed()


def test_an_adapter_overwritten_after_it_was_hashed_has_the_values_that_were_hashed(
    adapter, checkpoint
):
    models = [load_model(checkpoint, dtype=torch.float32) for _ in range(2)]
    read_adapter(adapter, models[0])
    hashed = checked_adapter(adapter)
    assert hashed.sha256 == HashedFiles([adapter / CONFIG, adapter / WEIGHTS]).sha256
    (adapter / CONFIG).unlink()
    with (adapter / WEIGHTS).open("r+b") as file:  # in place: a mapped file would change too
        file.seek(-400, os.SEEK_END)
        file.write(bytes(400))
    inject_adapter(hashed, models[1])
    expected, found = map(trained_parameters, models)
    assert all(torch.equal(found[name], expected[name]) for name in expected | found)


def test_training_and_evaluation_give_base_and_adapter_the_same_hash(tuned, tmp_path):
    out, adapter = tmp_path / "run", tuned / "run/best"
    flags = ["--model", tuned / "base", "--data", tuned / "sums", "--from-adapter", adapter]
    finish([*flags, "--precision", "fp32", "--device", "cpu", "--max-steps", 1], out)
    trained = json.loads((out / "config.json").read_text())["identity"]
    evaluate.main(["--adapter", str(adapter), "--data", str(tuned / "sums"), "--limit", "1",
                   "--out", str(tmp_path), *COMMON])  # fmt: skip
    (path,) = tmp_path.glob("evaluation/*/settings.json")
    settings = json.loads(path.read_text())
    assert settings["base_sha256"] == trained["base_sha256"]
    assert settings["adapter_sha256"] == trained["from_adapter_sha256"]
    origin = json.loads((out / "best/origin.json").read_text())
    assert origin.pop("adapter_sha256") == [checked_adapter(out / "best").sha256]
    assert origin.items() <= trained.items() and origin.keys() > {"base_sha256", "data_content"}
    base = Base.find(str(tuned / "base"), device="cpu")
    assert base.identity()["base_sha256"] == trained["base_sha256"]


# Evaluations


def test_a_result_of_other_code_is_refused_and_fresh_measures_in_a_numbered_folder(
    tmp_path, monkeypatch
):
    tuned = write_tuned(tmp_path)
    flags = ["--adapter", str(tuned / "run/best"), "--data", str(tuned / "sums"), *COMMON]
    flags += ["--limit", "2"]
    evaluate.main(flags)
    (first,) = (tuned / "run/evaluation").glob("test-*")
    use_edited = edited_program(tmp_path / "code")
    monkeypatch.setattr(identity, "ROOT", ROOT)  # restored at the end
    use_edited()
    try:
        before = snapshot(first)
        with pytest.raises(BadRun, match="was made by other code"):
            evaluate.main(flags)
        assert snapshot(first) == before
        evaluate.main([*flags, "--fresh"])
        assert (first.with_name(f"{first.name}-2") / "result.json").exists()
        (first / "result.json").unlink()  # unfinished: it resumes, and records it
        evaluate.main(flags)
        settings = json.loads((first / "result.json").read_text())["settings"]
        assert len(settings["earlier_programs"]) == 1
        assert settings["program_sha256"] == identity.program()["program_sha256"]
    finally:
        identity.program.cache_clear()


# Checkpoints: absent, unreadable, damaged, foreign


def rewrite_checkpoint(checkpoint: Path, files: dict[str, object]) -> None:
    """Replace JSON files of a checkpoint, and its manifest accordingly."""
    for name, value in files.items():
        toys.write_json(checkpoint / name, value)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    for name in manifest:
        data = (checkpoint / name).read_bytes()
        manifest[name] = {"bytes": len(data), "sha256": toys.sha256(data)}
    toys.write_json(checkpoint / "manifest.json", manifest)


def newest(out: Path) -> Path:
    return max((out / "checkpoints").glob("step-??????"))


def test_a_whole_checkpoint_of_another_run_is_refused_and_nothing_is_changed(short, half, finished):
    copy(newest(finished), half / "checkpoints/step-000099")
    before = without_owner(half)
    ended = run(short, half)
    assert ended.code == 2 and "is of another run" in ended.two_line_error()
    assert without_owner(half) == before


def test_a_checkpoint_whose_manifest_lists_too_few_files_is_set_aside(short, half, expected):
    last = newest(half)
    write_json(last / "manifest.json", {})
    ended = finish(short, half)
    assert "manifest.json does not list progress.json, state.safetensors" in ended.out
    assert f"mv {half}/checkpoints/{last.name}.bad-" in ended.out  # how to put it back
    assert results(half) == expected


def test_a_run_whose_checkpoints_are_gone_is_not_a_new_one(short, half):
    shutil.rmtree(half / "checkpoints")
    before = snapshot(half / "best")
    ended = run(short, half)
    assert ended.code == 2 and "holds no checkpoint, although" in ended.two_line_error()
    assert snapshot(half / "best") == before


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EMFILE, errno.EACCES])
def test_a_checkpoint_that_cannot_be_read_at_the_moment_is_not_damaged(
    short, half, expected, number
):
    def fault():
        read_bytes = Path.read_bytes

        def failing(path):
            if path.name == "state.safetensors":
                raise OSError(number, os.strerror(number), str(path))
            return read_bytes(path)

        Path.read_bytes = failing

    names = sorted(p.name for p in (half / "checkpoints").iterdir())
    ended = run(short, half, fault=fault)
    assert ended.code == 1 and os.strerror(number) in ended.two_line_error()
    assert sorted(p.name for p in (half / "checkpoints").iterdir()) == names
    finish(short, half)
    assert results(half) == expected


def test_a_log_that_is_shorter_than_its_checkpoint_knows_is_reported(short, half):
    log = (half / "metrics.jsonl").read_bytes()
    (half / "metrics.jsonl").write_bytes(log[: len(log) // 4])
    assert "bytes of the" in finish(short, half).out


def test_other_peoples_files_in_the_folder_are_no_obstacle(short, expected, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/train.log").write_text("the output of the run itself")
    finish(short, tmp_path / "run")
    assert results(tmp_path / "run") == expected
