"""Shared by all tests: one thread, and checkpoints that are only read, written once a session."""

import pytest
import torch

from tests import toys

torch.set_num_threads(1)  # the tensors are tiny: a second thread only waits


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
