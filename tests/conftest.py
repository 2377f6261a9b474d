"""Fixtures shared by all tests. What is only read is written once per session."""

import shutil
import threading
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

import evaluate
from data import multiple_choice
from data.chat import ChatFormat
from data.multiple_choice import CHOICE_TASKS
from lora.inject import LoRAConfig, inject
from lora.peft_format import save_adapter
from model.load import load_model
from run.device import prepare
from tests import toys
from tests.campaign.harness import (
    SHORT,
    FileCalls,
    finish,
    results,
    resume_with_ranks,
    run,
    toy_flags,
)
from tests.choice_rows import write_task
from tests.evaluations import write_tuned
from tests.hub_stub import toy_hub
from tests.mutations import CPU, SMALL

torch.set_num_threads(1)  # the tensors are tiny: a second thread would only wait


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="of the tests marked `device`, such as cuda")


def pytest_collection_modifyitems(items):
    for item in items:
        if "device" in item.fixturenames:
            item.add_marker("device")


@pytest.fixture(scope="session")
def device(request):
    """The device that the laws of the network, its adapters and its training are tested on."""
    device = torch.device(request.config.getoption("--device"))
    prepare(device)
    return device


# Forks share tqdm's own lock: a fork killed while holding it would block the others.
tqdm.set_lock(threading.RLock())


# Bases, adapters and data


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A tied fp32 checkpoint in one file; read-only."""
    return toys.write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="session")
def lively_checkpoint(tmp_path_factory):
    """A checkpoint with larger weights, whose greedy text does not repeat one token; read-only."""
    return toys.write_checkpoint(tmp_path_factory.mktemp("lively") / "tiny", tied=False, std=0.3)


@pytest.fixture(scope="module")
def model(lively_checkpoint):
    """The network of that checkpoint in fp32; a test leaves it as it was."""
    return load_model(lively_checkpoint, dtype=torch.float32)


@pytest.fixture(scope="module")
def chat(lively_checkpoint):
    return ChatFormat.from_folder(lively_checkpoint)


@pytest.fixture
def at_home(tmp_path, monkeypatch):
    """A current folder with a base and small sums."""
    monkeypatch.chdir(tmp_path)
    toys.write_checkpoint(tmp_path / "base")
    toys.write_arithmetic(tmp_path / "sums", rows=30, test_rows=4)
    return tmp_path


@pytest.fixture(scope="session")
def arithmetic(tmp_path_factory):
    """A folder with train.jsonl and test.jsonl of small sums; read-only."""
    return toys.write_arithmetic(tmp_path_factory.mktemp("arithmetic"))


@pytest.fixture(scope="session")
def tuned(tmp_path_factory):
    """A folder with a base, data, and an adapter that changes the base's answers; read-only."""
    return write_tuned(tmp_path_factory.mktemp("tuned"))


@pytest.fixture
def base(checkpoint, tmp_path):
    """A copy of `checkpoint`, for a test that damages it."""
    return Path(shutil.copytree(checkpoint, tmp_path / "base"))


@pytest.fixture
def adapter(checkpoint, tmp_path):
    """An adapter of `checkpoint`, for a test that damages it."""
    return write_adapter(checkpoint, tmp_path / "adapter")


@pytest.fixture
def workspace(tmp_path, monkeypatch, checkpoint, arithmetic):
    """The working directory of a test: it holds `base`, its adapter `run/best`, and `data`."""
    shutil.copytree(checkpoint, tmp_path / "base")
    shutil.copytree(arithmetic, tmp_path / "data")
    write_adapter(checkpoint, tmp_path / "run" / "best")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_adapter(checkpoint: Path, folder: Path) -> Path:
    model, config = load_model(checkpoint, dtype=torch.float32), LoRAConfig(r=2)
    inject(model, config)
    save_adapter(model, folder, config, base="base", revision=None)
    return folder


@pytest.fixture
def hub(lively_checkpoint, tmp_path):
    """A running stub of the Hub with a toy checkpoint and a small gsm8k."""
    stub = toy_hub(lively_checkpoint, tmp_path)
    threading.Thread(target=stub.serve_forever, daemon=True).start()
    yield stub
    stub.over.set()
    stub.shutdown()
    stub.server_close()


@pytest.fixture
def choice_tasks(tmp_path, monkeypatch):
    """A folder with the files of the tasks with choices; `fetch` returns it instead of asking the
    Hub.
    """
    for name, task in CHOICE_TASKS.items():
        write_task(tmp_path / task.repo, name)

    def fetch(repo, *, patterns, revision, repo_type):
        return tmp_path / repo

    monkeypatch.setattr(multiple_choice, "fetch", fetch)
    return tmp_path


# Runs in forks, for tests of faults


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Options that name a tiny base and small sums, for runs in forks."""
    return toy_flags(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def short(tiny):
    """Options of a run of ten steps that saves after each."""
    return [*tiny, *SHORT, "--save-every", "0"]


@pytest.fixture(scope="session")
def finished(short, tmp_path_factory):
    """The folder of a `short` run that was never interrupted; read-only."""
    out = tmp_path_factory.mktemp("finished") / "run"
    finish(short, out)
    return out


@pytest.fixture(scope="session")
def evaluated_run(tiny, finished, tmp_path_factory):
    """A folder with a finished run that was evaluated, its base and its data; read-only."""
    folder = tmp_path_factory.mktemp("evaluated")
    for name, source in (("base", tiny[1]), ("data", tiny[3]), ("run", finished)):
        shutil.copytree(source, folder / name)
    flags = ["--adapter", folder / "run/best", "--model", folder / "base", *SMALL, *CPU]
    evaluate.main([str(flag) for flag in flags])
    return folder


@pytest.fixture(scope="session")
def expected(finished):
    """The results of a `short` run."""
    return results(finished)


@pytest.fixture
def half(short, tmp_path):
    """The folder of a `short` run that was killed after four steps, three of which were saved."""
    out = tmp_path / "half"
    assert run(short, out, fault=FileCalls(within="save_checkpoint", nth=4, at=0)).code == 137
    return out


@pytest.fixture(scope="session")
def two_ranks(tiny, tmp_path_factory):
    """(flags, results) of a short run on two ranks."""
    flags = [*tiny, *SHORT, "--grad-accum", 2, "--save-every", 0]
    out = tmp_path_factory.mktemp("ranks") / "run"
    resume_with_ranks(flags, out)
    return flags, results(out)
