"""Shared by all tests: one thread, and what is only read, written once a session."""

import threading

import pytest
import torch
from tqdm import tqdm

from tests import toys
from tests.campaign.harness import (
    SHORT,
    FileCalls,
    finish,
    go_on_with_ranks,
    left_behind,
    run,
    toy_flags,
)
from tests.evaluations import write_tuned

torch.set_num_threads(1)  # the tensors are tiny: a second thread only waits
# tqdm's own lock is shared with forks: one that is killed while it holds it would stop the others.
tqdm.set_lock(threading.RLock())


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A tied fp32 checkpoint in one file; not to be changed."""
    return toys.write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="session")
def lively_checkpoint(tmp_path_factory):
    """One with larger weights, whose greedy text is not one repeated token; not to be changed."""
    return toys.write_checkpoint(tmp_path_factory.mktemp("lively") / "tiny", tied=False, std=0.3)


@pytest.fixture(scope="session")
def arithmetic(tmp_path_factory):
    """A folder with train.jsonl and test.jsonl of small sums."""
    return toys.write_arithmetic(tmp_path_factory.mktemp("arithmetic"))


@pytest.fixture(scope="session")
def tuned(tmp_path_factory):
    """A folder with a base, data, and an adapter that changes its answers; not to be changed."""
    return write_tuned(tmp_path_factory.mktemp("tuned"))


# Runs in forks, for the laws of what may happen to them


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Options that name a tiny base and small sums, for runs in forks."""
    return toy_flags(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def short(tiny):
    """Options of a run of ten steps that is saved after each."""
    return [*tiny, *SHORT, "--save-every", "0"]


@pytest.fixture(scope="session")
def whole(short, tmp_path_factory):
    """The folder of such a run that nothing has happened to; not to be changed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    finish(short, out)
    return out


@pytest.fixture(scope="session")
def expected(whole):
    """What such a run comes to."""
    return left_behind(whole)


@pytest.fixture
def half(short, tmp_path):
    """The folder of a run that was killed after four steps, of which three were saved."""
    out = tmp_path / "half"
    assert run(short, out, fault=FileCalls(within="save_checkpoint", nth=5, at=0)).code == 137
    return out


@pytest.fixture(scope="session")
def two_ranks(tiny, tmp_path_factory):
    """(flags, what is left behind) of a short run on two ranks."""
    flags = [*tiny, *SHORT, "--grad-accum", 2, "--save-every", 0]
    out = tmp_path_factory.mktemp("ranks") / "run"
    go_on_with_ranks(flags, out)
    return flags, left_behind(out)
