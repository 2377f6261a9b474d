"""Tests of files that are read back, edited or of a newer version, and of how files are written."""

import json
import os
import shutil
from dataclasses import dataclass

import pytest

import evaluate
import train
from errors import BadAdapter, BadRun, run_script
from files import json_bytes, make_folder, publish, write_file, write_folder
from lora.peft_format import CONFIG, WEIGHTS
from run import export
from run.base import ORIGIN, checked_adapter
from run.folder import Progress, Run
from tests import toys
from tests.campaign.harness import copy, run
from tests.mutations import CPU, check_mutations
from tests.refusals import refused, training
from typed import fits, record


def test_no_script_has_a_traceback_whatever_a_json_file_of_a_run_holds(
    evaluated_run, tmp_path, capsys
):
    check_mutations(evaluated_run, tmp_path, range(30), capsys)


@pytest.mark.parametrize(
    "kind, good, bad",
    [
        (int, [0, -3, 2**62], [2**63, -(10**400), 1.0, True, "1", None, [1]]),
        (float, [0, 1.5, -2], [float("nan"), float("inf"), 10**400, True, "1", None]),
        (bool, [True], [1, 0, "true", None]),
        (str | None, ["", None], [1, ["x"]]),
        (list[str], [[], ["x"]], ["x", [1], None, {}]),
        (dict[str, int], [{}, {"a": 1}], [{"a": 1.5}, [], None]),
    ],
)
def test_a_json_value_fits_its_declared_type_or_not(kind, good, bad):
    assert all(fits(value, kind) for value in good)
    assert not any(fits(value, kind) for value in bad)


def test_a_record_of_a_newer_version_or_with_a_wrong_value_names_the_key():
    @dataclass
    class Kind:
        a: int
        b: list[str]
        c: float | None = None

    assert record(Kind, {"a": 1, "b": ["x"]}) == Kind(1, ["x"])
    for values, cause in (
        ({"a": 1}, "b is missing"),
        ({"a": 1, "b": [], "d": 1}, "d is not known to this version"),
        ({"a": "1", "b": []}, "a is '1', not a whole number"),
        ([1], "not an object"),
    ):
        with pytest.raises(ValueError, match=cause):
            record(Kind, values)


def test_a_checkpoint_of_a_newer_version_is_refused_with_its_file_and_key(short, half):
    newest = max((half / "checkpoints").glob("step-??????"))
    state = json.loads((newest / "progress.json").read_text())
    state["progress"]["of_a_newer_version"] = 1
    files = {"progress.json": json_bytes(state)}
    files["state.safetensors"] = (newest / "state.safetensors").read_bytes()
    write_folder(newest, files)
    with pytest.raises(BadRun, match="progress.json: of_a_newer_version is not known"):
        Run(half).read_progress()
    ended = run(short, half)
    assert ended.code == 2 and "of_a_newer_version" in ended.two_line_error()
    assert Progress() == record(Progress, {})


# An adapter's own hash


def test_an_adapter_that_is_not_as_it_was_written_is_refused(evaluated_run, tmp_path, capsys):
    best, origin = tmp_path / "best", json.loads((evaluated_run / "run/best" / ORIGIN).read_text())
    assert checked_adapter(evaluated_run / "run/best").sha256 == origin["adapter_sha256"][0]
    for name in (CONFIG, WEIGHTS):
        copy(evaluated_run / "run/best", best)
        if name == CONFIG:
            toys.change_json(best / CONFIG, lora_alpha=160)
        else:
            data = bytearray((best / WEIGHTS).read_bytes())
            data[-1] ^= 1
            (best / WEIGHTS).write_bytes(data)
        model = ["--model", evaluated_run / "base", *CPU]
        for main, flags in (
            (evaluate.main, ["--adapter", best, *model]),
            (train.main, ["--from-adapter", best, *model, "--data", evaluated_run / "data",
                          "--out", tmp_path / "new"]),
        ):  # fmt: skip
            assert run_script(lambda main=main, flags=flags: main([str(f) for f in flags])) == 2
            assert "is not as it was written" in capsys.readouterr().err
        (best / ORIGIN).unlink()
        checked_adapter(best)
    (best / ORIGIN).write_text('{"adapter_sha256": "x"}')
    with pytest.raises(BadAdapter):
        checked_adapter(best)


# Data that were a folder


def test_data_that_were_a_folder_are_never_asked_of_the_hub(workspace, monkeypatch, capsys):
    (workspace / "owner").mkdir()
    shutil.copytree("data", "owner/name")
    monkeypatch.setattr("data.custom.fetch", lambda *a, **k: pytest.fail("asked the Hub"))
    flags = training("--data owner/name --max-steps 1 --evals-per-epoch 1 --batch-size 2 --rank 2")
    train.main(flags.split())
    shutil.rmtree("owner/name")
    assert "owner/name, which was a folder, is gone" in refused(train.main, flags, capsys)
    evaluating = "--adapter out/best --model base --device cpu --precision fp32"
    assert "owner/name, which was a folder, is gone" in refused(evaluate.main, evaluating, capsys)


# Publishing


@pytest.fixture
def calls(monkeypatch):
    """What is synced and renamed, in order."""
    made, fsync = [], os.fsync

    def synced(number: int) -> None:
        made.append(("sync", os.readlink(f"/proc/self/fd/{number}")))
        fsync(number)

    for name in ("rename", "replace"):
        call = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda a, b, call=call: made.append(("rename", str(b))) or call(a, b)
        )
    monkeypatch.setattr(os, "fsync", synced)
    return made


def test_what_is_published_is_synced_then_renamed_then_its_folder_is_synced(tmp_path, calls):
    write_file(tmp_path / "a", b"1")
    at = str(tmp_path)
    assert calls == [("sync", f"{at}/a.new"), ("rename", f"{at}/a"), ("sync", at)]
    for final in ("new", "new"):  # then replaced
        calls.clear()
        (tmp_path / "made").mkdir()
        (tmp_path / "made" / "inner").mkdir()
        (tmp_path / "made" / "inner" / "file").write_bytes(b"1")
        publish(tmp_path / "made", tmp_path / final)
        *synced, renamed, last = calls
        names = [f"{at}/made", f"{at}/made/inner", f"{at}/made/inner/file"]
        assert sorted(synced) == [("sync", name) for name in names]
        assert (renamed, last) == (("rename", f"{at}/new"), ("sync", at))
        shutil.rmtree(tmp_path / "new")
    calls.clear()
    write_folder(tmp_path / "checkpoint", {"x": b"1"})
    renamed = calls.index(("rename", f"{at}/checkpoint"))
    names = ["", "/x", "/manifest.json"]
    assert set(calls[:renamed]) >= {("sync", f"{at}/checkpoint.new{name}") for name in names}
    assert calls[renamed + 1] == ("sync", at)


def test_the_parents_of_a_new_folder_are_synced_from_the_top(tmp_path, calls):
    make_folder(tmp_path / "a" / "b" / "c")
    at = str(tmp_path)
    assert calls == [("sync", at), ("sync", f"{at}/a"), ("sync", f"{at}/a/b")]
    calls.clear()
    make_folder(tmp_path / "a" / "b" / "c")
    assert calls == []


# What others are told


def test_no_export_names_the_path_of_a_base_that_is_a_folder(evaluated_run, tmp_path):
    for number, flags in enumerate((["--portable"], ["--dtype", "fp32"], ["--gguf"])):
        out = tmp_path / ("x.gguf" if "--gguf" in flags else str(number))
        where = ["--adapter", evaluated_run / "run/best", "--model", evaluated_run / "base"]
        export.main([str(flag) for flag in (*where, *flags, "--out", out)])
        files = [out] if out.is_file() else [path for path in out.rglob("*") if path.is_file()]
        found = [path for path in files if bytes(evaluated_run / "base") in path.read_bytes()]
        assert files and not found
