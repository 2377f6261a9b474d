"""The long form of tests/test_faults.py: full disks, damaged files."""

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
    check_invariants,
    copy,
    count_detected_flips,
    count_fault_points,
    cut_sizes,
    disk_full,
    finish,
    flip_bit,
    results,
    run,
    start,
)

pytestmark = pytest.mark.campaign


@pytest.mark.parametrize(
    "within, nth",
    [("write_start", 1), ("save_checkpoint", 3), ("publish_best", 1), ("publish_best", 2),
     ("write_report", 1)],
)  # fmt: skip
def test_a_disk_full_at_any_file_call_is_reported_and_the_run_can_be_resumed(
    short, expected, tmp_path, within, nth
):
    points = count_fault_points(short, tmp_path / "counted", within, nth)
    codes = []
    for at in range(points):
        out = tmp_path / "run"
        ended = run(short, out, fault=FileCalls(at, disk_full, within=within, nth=nth))
        codes.append(ended.code)
        if ended.code != 0:  # 0: only a removal failed, which the next session repeats
            assert ended.code == 1 and "the disk is full" in ended.two_line_error(), (
                f"fault point {at}"
            )
        check_invariants(out)
        finish(short, out)
        assert results(out) == expected, f"fault point {at}"
        shutil.rmtree(out)
    print(f"{within} {nth}: {points} fault points, {codes.count(1)} reported")
    assert codes.count(1) > 0.7 * points


def test_a_disk_full_at_any_line_of_the_log_is_reported(short, expected, tmp_path):
    for at in range(0, 200, 5):
        out = tmp_path / "run"
        ended = run(short, out, fault=FileCalls(at, disk_full))
        assert ended.code == 1 and "the disk is full" in ended.two_line_error(), f"fault point {at}"
        finish(short, out)
        assert results(out) == expected, f"fault point {at}"
        shutil.rmtree(out)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 70 MiB, which is just large enough for a run."""
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


def test_a_real_disk_that_fills_up_is_reported_and_the_run_can_be_resumed(
    short, expected, small_disk, tmp_path
):
    out, log = small_disk / "run", tmp_path / "log"
    child = start(short, out, log=log)
    await_steps(child, out, 3)
    child.send(signal.SIGSTOP)
    filler = fill(small_disk)
    child.send(signal.SIGCONT)
    ended = child.wait()
    assert ended.code == 1 and "No space left on device" in ended.two_line_error()
    check_invariants(out)
    again = run(short, out, log=log)  # while it is still full
    assert again.code == 1 and "No space left on device" in again.two_line_error()
    filler.unlink()
    assert run(short, out, log=log).code == 0 and results(out) == expected


def test_a_real_disk_too_full_or_read_only_at_the_start_is_refused(short, small_disk, tmp_path):
    (small_disk / "filler").write_bytes(bytes(10 << 20))
    ended = run(short, small_disk / "run", log=tmp_path / "log")
    assert ended.code == 2 and ended.seconds < 5 and "bytes free" in ended.two_line_error()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    ended = run(short, small_disk / "run", log=tmp_path / "log")
    assert ended.code == 2 and "cannot be written" in ended.two_line_error()
    assert [p.name for p in small_disk.iterdir()] == ["filler"]


def test_200_of_200_flipped_bits_are_detected(finished, tmp_path):
    folder = copy(max((finished / "checkpoints").iterdir()), tmp_path / "step-000010")
    assert count_detected_flips(folder, range(200)) == 200


def test_every_flipped_bit_of_a_manifest_is_detected(finished, tmp_path):
    folder = copy(max((finished / "checkpoints").iterdir()), tmp_path / "step-000010")
    (folder / "manifest.json").rename(tmp_path / "manifest.json")
    data = (tmp_path / "manifest.json").read_bytes()
    for bit in range(8 * len(data)):
        (folder / "manifest.json").write_bytes(flip_bit(data, bit))
        assert damage(folder), f"bit {bit}"


@pytest.mark.parametrize("name", ["manifest.json", "progress.json", "state.safetensors"])
def test_damage_to_a_file_of_the_newest_checkpoint_costs_only_that_checkpoint(
    short, expected, half, tmp_path, name
):
    newest = max((half / "checkpoints").glob("step-??????")).name
    data = (half / "checkpoints" / newest / name).read_bytes()
    damaged = [data[:size] for size in cut_sizes(len(data))]
    damaged += [flip_bit(data, 8 * i + 2) for i in (9, len(data) // 2)]
    for content in damaged:
        out = copy(half, tmp_path / "run")
        (out / "checkpoints" / newest / name).write_bytes(content)
        ended = run(short, out)
        assert ended.code == 0 and f"{newest} is damaged (" in ended.out
        assert results(out) == expected


def test_an_evaluation_can_read_the_best_adapter_of_a_running_training(
    short, expected, tiny, tmp_path
):
    out = tmp_path / "run"
    child = start(short, out)
    await_steps(child, out, 8)
    child.send(signal.SIGSTOP)
    flags = ["--adapter", out / "best", "--limit", 2, "--max-new-tokens", 2, "--device", "cpu"]
    started = time.monotonic()
    assert run_script(lambda: evaluate.main([str(f) for f in flags])) == 0
    print(f"{time.monotonic() - started:.1f} s")
    child.send(signal.SIGCONT)
    assert child.wait().code == 0 and results(out) == expected
