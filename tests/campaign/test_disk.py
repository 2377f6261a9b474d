"""Disks that fill up and files that rot, at length."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

import evaluate
from errors import run_script
from files import damage
from tests.campaign.harness import (
    FileCalls,
    await_steps,
    check_instant,
    copy,
    count_moments,
    disk_full,
    finish,
    left_behind,
    run,
    start,
)
from tests.test_faults import cuts, survive_flips

pytestmark = pytest.mark.campaign


@pytest.mark.parametrize(
    "within, nth",
    [("write_start", 1), ("save_checkpoint", 3), ("publish_best", 1), ("publish_best", 2),
     ("write_report", 1)],
)  # fmt: skip
def test_a_disk_that_is_full_at_any_file_call_is_told_and_the_same_command_goes_on(
    short, expected, tmp_path, within, nth
):  # fmt: skip
    moments = count_moments(short, tmp_path / "counted", within, nth)
    codes = []
    for at in range(moments):
        out = tmp_path / "run"
        ended = run(short, out, fault=FileCalls(at, disk_full, within=within, nth=nth))
        codes.append(ended.code)
        if ended.code != 0:  # 0: what could not be removed goes the next time
            assert ended.code == 1 and "the disk is full" in ended.in_two_lines(), f"moment {at}"
        check_instant(out)
        finish(short, out)
        assert left_behind(out) == expected, f"moment {at}"
        shutil.rmtree(out)
    print(f"{within} {nth}: {moments} moments, {codes.count(1)} told")
    assert codes.count(1) > 0.7 * moments


def test_a_disk_that_is_full_at_any_line_of_the_log_is_told(short, expected, tmp_path):
    for at in range(0, 200, 5):
        out = tmp_path / "run"
        ended = run(short, out, fault=FileCalls(at, disk_full))
        assert ended.code == 1 and "the disk is full" in ended.in_two_lines(), f"moment {at}"
        finish(short, out)
        assert left_behind(out) == expected, f"moment {at}"
        shutil.rmtree(out)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 70 MiB, which is just enough."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=70m", "none", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("no disk can be mounted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill(place: Path) -> Path:
    with (place / "filler").open("wb", buffering=0) as file:
        try:
            while file.write(bytes(1 << 16)):
                pass
        except OSError:
            return place / "filler"


def test_a_real_disk_that_fills_up_in_a_run(short, expected, small_disk, tmp_path):
    out, log = small_disk / "run", tmp_path / "log"
    child = start(short, out, log=log)
    await_steps(child, out, 3)
    child.send(signal.SIGSTOP)
    filler = fill(small_disk)
    child.send(signal.SIGCONT)
    ended = child.wait()
    assert ended.code == 1 and "No space left on device" in ended.in_two_lines()
    check_instant(out)
    again = run(short, out, log=log)  # while it is still full
    assert again.code == 1 and "No space left on device" in again.in_two_lines()
    filler.unlink()
    assert run(short, out, log=log).code == 0 and left_behind(out) == expected


def test_a_real_disk_that_is_too_full_or_read_only_at_the_start(short, small_disk, tmp_path):
    (small_disk / "filler").write_bytes(bytes(10 << 20))
    ended = run(short, small_disk / "run", log=tmp_path / "log")
    assert ended.code == 2 and ended.seconds < 5 and "bytes free" in ended.in_two_lines()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    ended = run(short, small_disk / "run", log=tmp_path / "log")
    assert ended.code == 2 and "cannot be written" in ended.in_two_lines()
    assert [p.name for p in small_disk.iterdir()] == ["filler"]


def test_200_of_200_flipped_bits_are_noticed(whole, tmp_path):
    folder = copy(max((whole / "checkpoints").iterdir()), tmp_path / "step-000010")
    assert survive_flips(folder, range(200)) == 200


def test_every_flip_of_a_manifest_is_noticed(whole, tmp_path):
    folder = copy(max((whole / "checkpoints").iterdir()), tmp_path / "step-000010")
    (folder / "manifest.json").rename(tmp_path / "manifest.json")
    data = (tmp_path / "manifest.json").read_bytes()
    for bit in range(8 * len(data)):
        spoilt = bytearray(data)
        spoilt[bit // 8] ^= 1 << bit % 8
        (folder / "manifest.json").write_bytes(spoilt)
        assert damage(folder), f"bit {bit}"


@pytest.mark.parametrize("name", ["manifest.json", "progress.json", "state.safetensors"])
def test_a_cut_or_flipped_file_of_the_newest_checkpoint_costs_that_checkpoint_only(
    short, expected, half, tmp_path, name
):  # fmt: skip
    newest = max((half / "checkpoints").glob("step-??????")).name
    data = (half / "checkpoints" / newest / name).read_bytes()
    spoilt = [data[:size] for size in cuts(len(data))]
    spoilt += [data[:i] + bytes([data[i] ^ 4]) + data[i + 1 :] for i in (9, len(data) // 2)]
    for bad in spoilt:
        out = copy(half, tmp_path / "run")
        (out / "checkpoints" / newest / name).write_bytes(bad)
        ended = run(short, out)
        assert ended.code == 0 and f"{newest} is damaged (" in ended.out
        assert left_behind(out) == expected


def test_an_evaluation_may_read_the_best_of_a_run_that_goes_on(short, expected, tiny, tmp_path):
    out = tmp_path / "run"
    child = start(short, out)
    await_steps(child, out, 8)
    child.send(signal.SIGSTOP)
    flags = ["--adapter", out / "best", "--limit", 2, "--max-new-tokens", 2, "--device", "cpu"]
    started = time.monotonic()
    assert run_script(lambda: evaluate.main([str(f) for f in flags])) == 0
    print(f"{time.monotonic() - started:.1f} s")
    child.send(signal.SIGCONT)
    assert child.wait().code == 0 and left_behind(out) == expected
