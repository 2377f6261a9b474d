"""Tests of the Hub's client against a stub that serves a toy checkpoint and a small gsm8k."""

import json
import re
import shutil
import sys
import time
from pathlib import Path

import pytest

from tests.hub_stub import (
    COMMIT,
    COMMITS,
    FETCH,
    FEW_ANSWERS,
    MODEL,
    TRAIN_ON_HUB,
    WEIGHTS,
    fetch,
    is_complete,
    kill_while_downloading,
    python,
)
from tests.toys import free_port


def test_a_run_fetches_its_base_and_data_once_and_then_trains_and_evaluates_offline(hub, tmp_path):
    out, place = tmp_path / "run", {"home": tmp_path, "hub": hub.url}
    first = python(*TRAIN_ON_HUB, "--out", out, **place)
    assert first.returncode == 0, first.stderr
    assert all(commit in first.stdout for commit in COMMITS.values())
    identity = json.loads((out / "config.json").read_text())["identity"]
    assert [identity["base_commit"], identity["data_commit"]] == list(COMMITS.values())
    adapter = json.loads((out / "best" / "adapter_config.json").read_text())
    assert (adapter["base_model_name_or_path"], adapter["revision"]) == (MODEL, COMMIT)
    assert any(path.endswith(f"/resolve/{COMMIT}/model.safetensors") for path in hub.requests)
    unneeded = ("README", "socratic", ".bin", ".py", ".pkl")
    assert not any(part in path for path in hub.requests for part in unneeded)

    hub.requests.clear()
    second = python(*TRAIN_ON_HUB, "--out", tmp_path / "again", **place, HF_HUB_OFFLINE="1")
    assert second.returncode == 0, second.stderr
    weights = "best/adapter_model.safetensors"
    assert (out / weights).read_bytes() == (tmp_path / "again" / weights).read_bytes()
    third = python(
        "evaluate.py", "--adapter", out / "best", *FEW_ANSWERS, **place, HF_HUB_OFFLINE="1"
    )
    assert third.returncode == 0, third.stderr
    assert "base" in third.stdout and "tuned" in third.stdout
    assert hub.requests == []


def test_a_download_says_once_what_from_where_and_how_much_and_shows_no_bar_if_it_is_short(
    hub, tmp_path
):
    place, files = {"home": tmp_path, "hub": hub.url}, hub.files["models/toy/qwen2"]
    wanted = [files[name] for name in files if name.endswith((".json", ".safetensors"))]
    first = fetch(MODEL, **place)
    size = f"{sum(map(len, wanted)) / 1000:.0f}kB"
    (line,) = first.stdout.splitlines()[:-1]
    assert line == f"downloading model {MODEL}: {len(wanted)} files, {size}, from {hub.url}"
    assert first.stderr == ""
    assert len(fetch(MODEL, **place).stdout.splitlines()) == 1  # the folder alone
    (path,) = tmp_path.glob(f"cache/hub/*/snapshots/{COMMIT}/config.json")
    path.unlink()
    assert "1 file, " in fetch(MODEL, **place).stdout


def test_on_a_terminal_a_download_has_one_bar(hub, tmp_path):
    terminal = (
        "import pty, sys; pty.spawn(['sh', '-c', 'stty cols 79 rows 24; exec \"$@\"', *sys.argv])"
    )
    command = [sys.executable, "-c", FETCH, MODEL, "", "model"]
    shown = python("-c", terminal, *command, home=tmp_path, hub=hub.url).stdout
    bars = [part for part in re.split(r"[\r\n]", shown) if "/s]" in part]
    assert bars and all(bar.startswith("download: ") for bar in bars), shown
    assert "415k/415k" in bars[-1] and "\x1b[A" not in shown  # never a second line


@pytest.mark.parametrize("revision", ["", "v1", COMMIT])
def test_if_the_hub_fails_the_cached_copy_is_used_and_a_line_says_so(hub, tmp_path, revision):
    place = {"home": tmp_path, "hub": hub.url}
    once = fetch(MODEL, revision, **place)
    assert once.returncode == 0 and once.stdout.strip().endswith(COMMIT), once.stderr
    hub.fault = (500, "")
    later = fetch(MODEL, revision, **place)
    assert later.returncode == 0, later.stderr
    assert f"using the cached copy of model {MODEL}" in later.stdout
    assert later.stdout.splitlines()[-1] == once.stdout.splitlines()[-1]


def test_a_cached_copy_that_lacks_files_is_not_used(hub, tmp_path):
    place = {"home": tmp_path, "hub": hub.url}
    folder = Path(fetch(MODEL, **place).stdout.splitlines()[-1])
    (folder / "tokenizer.json").unlink()
    result = fetch(MODEL, **place, HF_HUB_OFFLINE="1")
    assert result.returncode == 2 and "is not in the cache" in result.stderr
    assert fetch(MODEL, **place).returncode == 0 and (folder / "tokenizer.json").exists()


@pytest.mark.parametrize(
    "fault, arguments, cause",
    [
        (None, ["toy/missing"], "model toy/missing was not found on the Hub"),
        ((404, "RepoNotFound"), [MODEL], "model toy/qwen2 was not found on the Hub"),
        (None, [MODEL, "v9"], "model toy/qwen2 at revision v9 does not exist"),
        (None, [MODEL, "9" * 40], f"model toy/qwen2 at revision {'9' * 40} does not exist"),
        (None, ["openai/gsm8k", "v9", "dataset"], "dataset openai/gsm8k at revision v9 does not"),
        ((403, "GatedRepo"), [MODEL], "model toy/qwen2 is gated"),
        ((401, "GatedRepo"), [MODEL], "model toy/qwen2 is gated"),
        ((429, ""), [MODEL], "the Hub refuses model toy/qwen2: too many requests"),
        ((500, ""), [MODEL], "the Hub could not be reached for model toy/qwen2"),
        ("nothing listens", [MODEL], "the Hub could not be reached for model toy/qwen2"),
        ("offline", [MODEL], "model toy/qwen2 is not in the cache, and HF_HUB_OFFLINE is set"),
        (None, ["toy/qwen 2?"], "the Hub refused model toy/qwen 2?"),
    ],
)
def test_what_the_hub_refuses_is_reported_in_two_lines_within_a_minute(
    hub, tmp_path, fault, arguments, cause
):
    hub.fault = fault if isinstance(fault, tuple) else None
    offline = {"HF_HUB_OFFLINE": "1"} if fault == "offline" else {}
    url = f"http://127.0.0.1:{free_port()}" if fault == "nothing listens" else hub.url
    started = time.monotonic()
    result = fetch(*arguments, home=tmp_path, hub=url, **offline)
    assert time.monotonic() - started < 60 and result.returncode == 2, result.stderr
    lines = result.stderr.splitlines()
    assert len(lines) == 2 and lines[0].startswith("error: " + cause), result.stderr
    assert lines[1].startswith("  ")


def test_a_run_that_cannot_reach_the_hub_is_refused_before_it_creates_its_folder(tmp_path):
    nowhere = f"http://127.0.0.1:{free_port()}"
    result = python(*TRAIN_ON_HUB, "--out", tmp_path / "run", home=tmp_path, hub=nowhere)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 2, result.stderr
    assert not (tmp_path / "run").exists()


# Temporary faults


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("only", ["/api/models/toy/qwen2", "/resolve/"])
def test_a_busy_or_failing_hub_is_asked_again(hub, tmp_path, status, only):
    hub.fault, hub.only, hub.times = (status, ""), only, 2
    result = fetch(MODEL, home=tmp_path, hub=hub.url)
    assert result.returncode == 0, result.stderr
    assert hub.times < 0 and result.stdout.strip().endswith(COMMIT)


def test_a_download_killed_halfway_is_completed_by_the_next_start(hub, tmp_path):
    kill_while_downloading(hub, tmp_path, 0.5)
    assert not list(tmp_path.glob(f"cache/hub/*/{WEIGHTS}"))
    result = fetch(MODEL, home=tmp_path, hub=hub.url)
    assert result.returncode == 0 and is_complete(hub, tmp_path), result.stderr


def test_a_download_that_is_cut_off_resumes_by_itself(hub, tmp_path):
    hub.fault, hub.only, hub.times, hub.cuts = 0.5, "/model.safetensors", 2, True
    result = fetch(MODEL, home=tmp_path, hub=hub.url)
    assert result.returncode == 0 and is_complete(hub, tmp_path), result.stderr
    assert hub.times < 0


# Without a network


OFFLINE = """
import sys
sys.addaudithook(lambda event, args: event.startswith("socket.") and print("opened", event))
"""


def test_offline_a_full_cache_needs_no_socket_and_an_empty_one_is_refused_naming_the_files(
    hub, tmp_path
):
    place = {"home": tmp_path, "hub": hub.url}
    first = python("-c", OFFLINE + FETCH, MODEL, "", "model", **place)
    assert "opened socket.connect" in first.stdout
    offline = place | {"HF_HUB_OFFLINE": "1"}
    again = python("-c", OFFLINE + FETCH, MODEL, "", "model", **offline)
    assert again.returncode == 0 and "opened" not in again.stdout, again.stdout + again.stderr
    command = ["train.py", "--model", MODEL, "--data", tmp_path / "sums", "--out", tmp_path / "run"]
    nothing = python(*command, **offline | {"home": tmp_path / "empty"})
    assert nothing.returncode == 2
    last = nothing.stderr.splitlines()[-1]
    assert all(name in last for name in ("config.json", "tokenizer.json", "*.safetensors"))


# What the files are


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "train-*.parquet"])
def test_one_flipped_bit_in_the_cache_is_refused_offline_too(hub, tmp_path, file):
    place = {"home": tmp_path, "hub": hub.url}
    command = [*TRAIN_ON_HUB, "--max-steps", 1, "--out"]
    assert python(*command, tmp_path / "run", **place).returncode == 0
    (path,) = tmp_path.glob(f"cache/hub/*/snapshots/*/**/{file}")
    data = path.read_bytes()
    path.resolve().write_bytes(data[:-2] + bytes([data[-2] ^ 128]) + data[-1:])
    again = python(*command, tmp_path / "again", **place, HF_HUB_OFFLINE="1")
    assert again.returncode == 2 and len(again.stderr.splitlines()) == 2, again.stderr
    assert "is damaged" in again.stderr and str(path.resolve()) in again.stderr
    path.resolve().unlink()  # the remedy
    assert python(*command, tmp_path / "again", **place).returncode == 0


def test_a_new_commit_on_the_hub_does_not_lock_a_run_out(hub, tmp_path, monkeypatch):
    out, place = tmp_path / "run", {"home": tmp_path, "hub": hub.url}
    command = [*TRAIN_ON_HUB, "--out", out]
    assert python(*command, "--max-steps", 1, **place).returncode == 0
    hub.earlier = list(COMMITS.values())
    for number, repo in enumerate(list(COMMITS), 3):
        monkeypatch.setitem(COMMITS, repo, str(number) * 40)
    for offline in ({}, {"HF_HUB_OFFLINE": "1"}):
        resumed = python(*command, "--max-steps", 2 + len(offline), **place, **offline)
        assert resumed.returncode == 0, resumed.stderr
        identity = json.loads((out / "config.json").read_text())["identity"]
        assert [identity["base_commit"], identity["data_commit"]] == hub.earlier
    new = python(*command, "--out", tmp_path / "new", **place)
    assert new.returncode == 0 and "3" * 40 in new.stdout and "4" * 40 in new.stdout


def test_a_base_that_was_a_folder_is_never_asked_of_the_hub(hub, tmp_path):
    place = {"home": tmp_path, "hub": hub.url}
    folder = fetch(MODEL, **place).stdout.splitlines()[-1]
    shutil.copytree(folder, tmp_path / "toy/qwen2")  # the Hub has a repository of that name
    code = "import os, sys; from errors import run_script; from {0} import main; os.chdir({1!r});"
    code += "sys.exit(run_script(main))"
    toys = f"--data {tmp_path}/sums --precision fp32 --device cpu".split()
    train = [code.format("train", str(tmp_path)), *toys, "--out", "run", "--max-steps", 1]
    train += ["--model", "toy/qwen2"]
    evaluate = [
        code.format("evaluate", str(tmp_path)),
        *toys,
        "--adapter",
        "run/best",
        "--limit",
        1,
    ]
    first = python("-c", *train, **place)
    assert first.returncode == 0, first.stderr
    adapter = (tmp_path / "run/best/adapter_config.json").read_text()
    assert json.loads(adapter)["base_model_name_or_path"] is None and str(tmp_path) not in adapter
    assert python("-c", *evaluate, **place).returncode == 0  # found through the run
    shutil.rmtree(tmp_path / "toy")
    hub.requests.clear()
    for command in (train, evaluate):
        again = python("-c", *command, **place)
        assert (
            again.returncode == 2
            and "toy/qwen2, " in again.stderr
            and "is not there" in again.stderr
        ), again.stderr
    assert hub.requests == []


# Secrets


def test_a_planted_secret_is_in_no_output_and_no_file(hub, tmp_path):
    url = hub.url.replace("//", "//me:sesame-word@")
    place = {"home": tmp_path, "hub": url, "HF_TOKEN": "hf_" + "sesame" * 5}
    hub.fault, hub.only, hub.times = (503, ""), "/tree/", 1  # the client would warn of it
    runs = [python(*TRAIN_ON_HUB, "--out", tmp_path / "run", **place)]
    assert runs[0].returncode == 0 and hub.times < 0, runs[0].stderr
    hub.only, hub.times = "", 10**6
    for fault in ((403, "GatedRepo"), (400, ""), (503, "")):
        hub.fault = fault
        runs.append(fetch("toy/other", **place))
    runs.append(python("train.py", "--model", "https://me:sesame-word@hub/toy/qwen2", **place))
    runs.append(
        fetch("toy/other", **place | {"hub": f"http://me:sesame-word@127.0.0.1:{free_port()}"})
    )
    assert all(run.returncode == 2 for run in runs[1:])
    output = "".join(run.stdout + run.stderr for run in runs)
    assert "sesame" not in output, output
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(files) > 20 and not any(b"sesame" in p.read_bytes() for p in files)
