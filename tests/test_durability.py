"""Tests that what is published survives a power cut: files, folders, and the way to them.

A rename may reach the disk before the bytes of the file that it names. So the order is checked:
write, fsync, rename, then fsync of each folder that got a new entry.
"""

import os
from pathlib import Path

import pytest

import train
from files import JsonLines, remove_folder, write_file, write_folder
from run import export
from run.checkpoint import save_checkpoint
from run.folder import Progress, Run
from tests import toys
from tests.disk import Disk

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux's /proc")
FILES = {"a": b"1" * 9000, "b": b"2"}


@pytest.fixture
def disk(tmp_path, monkeypatch):
    with Disk(tmp_path, monkeypatch) as disk:
        yield disk


def survives(disk: Disk, path) -> None:
    """Assert that `path`, all it holds and the way to it are on the disk, in the right order."""
    assert disk.faults == [] and disk.lost(path) == [] and disk.unreachable(path) == []


def test_the_disk_notices_each_step_that_is_left_out(disk, tmp_path):
    path, new = tmp_path / "f", tmp_path / "f.new"
    with new.open("wb") as file:
        file.write(b"1")
        assert disk.lost(new)
        file.flush()
        os.fsync(file.fileno())
        assert not disk.lost(new)
        file.write(b"2")
    os.replace(new, path)
    assert disk.faults and disk.lost(path) and disk.unreachable(path)


def test_a_file_is_synced_before_its_rename_and_its_folder_afterwards(disk, tmp_path):
    for data in (b"old", b"new, and longer"):
        write_file(tmp_path / "f", data)
        survives(disk, tmp_path / "f")
    once = [("open", "f.new"), ("fsync", "f.new"), ("rename", "f.new", "f"), ("fsync", ".")]
    assert disk.calls == once * 2


def test_a_folder_is_synced_whole_before_its_rename_and_all_folders_on_the_way_to_it(
    disk, tmp_path
):
    final = tmp_path / "new" / "folders" / "step-000001"
    write_folder(final, FILES)
    survives(disk, final)


def test_the_folder_that_is_replaced_is_removed_after_the_new_one_is_safe(
    disk, tmp_path, monkeypatch
):
    write_folder(tmp_path / "step", FILES)

    def remove(folder):
        survives(disk, tmp_path / "step")
        assert (tmp_path / "step" / "b").read_bytes() == b"3"
        remove_folder(folder)

    monkeypatch.setattr("files.remove_folder", remove)
    write_folder(tmp_path / "step", FILES | {"b": b"3"})
    assert [call[0] for call in disk.calls[-8:]].count("rename") >= 2


def test_a_log_is_on_the_disk_as_far_as_a_checkpoint_knows_it(disk, tmp_path):
    log = JsonLines(tmp_path / "m.jsonl")
    log.write(step=1)
    size = log.sync()
    log.write(step=2)
    (known,) = (v for v in disk.synced.values() if isinstance(v, bytes))
    assert known == b'{"step": 1}\n' and len(known) == size


def test_the_oldest_checkpoint_is_removed_after_the_newest_is_safe(disk, tmp_path, monkeypatch):
    _, state = toys.new_training()
    removed = []

    def remove(folder):
        survives(disk, Run(tmp_path / "run").checkpoints()[-1])
        removed.append(folder.name)
        remove_folder(folder)

    monkeypatch.setattr("run.checkpoint.remove_folder", remove)
    for step in range(1, 5):
        progress = Progress(cursor=step)
        save_checkpoint(Run(tmp_path / "run"), progress, **state)
        survives(disk, tmp_path / "run" / "checkpoints")
    assert removed == ["step-000001", "step-000002"]


def test_all_that_a_run_has_published_survives_at_every_moment(tiny, tmp_path, monkeypatch):
    out, published = tmp_path / "runs" / "run", []
    publish, save = train.publish_best, train.save_checkpoint

    def checked(function, *path):
        def call(*args):
            function(*args)
            survives(disk, out.joinpath(*path))
            survives(disk, out / "config.json")
            assert disk.unreachable(out / "metrics.jsonl") == []
            published.append(path)

        return call

    monkeypatch.setattr(train, "publish_best", checked(publish, "best"))
    monkeypatch.setattr(train, "save_checkpoint", checked(save, "checkpoints"))
    flags = [*tiny, *"--limit 40 --epochs 1 --batch-size 8 --save-every 0 --rank 2".split()]
    with Disk(tmp_path, monkeypatch) as disk:
        train.main([*flags, "--out", str(out)])
        for name in ("best", "checkpoints", "config.json", "metrics.jsonl", "audit.json",
                     "validation.jsonl"):  # fmt: skip
            survives(disk, out / name)
    assert published.count(("best",)) > 1 < published.count(("checkpoints",))


@pytest.mark.parametrize("form", [(), ("--portable",)], ids=["merged", "portable"])
def test_an_export_survives_with_the_new_folders_that_it_is_in(tuned, tmp_path, monkeypatch, form):
    out = tmp_path / "new" / "folders" / "export"
    with Disk(tmp_path, monkeypatch) as disk:
        export.main(["--adapter", str(tuned / "run/best"), "--out", str(out), *form])
        survives(disk, out)
