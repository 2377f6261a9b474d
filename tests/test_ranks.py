"""Ranks: how a step's rows are dealt to them, and how often they exchange something."""

import contextlib
import copy
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import train
from data.batches import deal
from run import distributed
from run.folder import Progress
from run.stopping import Notice, Stop, StopRequested

LENGTHS = st.lists(st.integers(1, 2000), min_size=1, max_size=60)


def gsm8k_like(count, seed):
    """Lengths with the mean (212 tokens) and spread of GSM8K's rows."""
    return np.random.default_rng(seed).lognormal(5.31, 0.30, count).astype(int).tolist()


def imbalance(lengths, dealt):
    """The tokens of the slowest rank over their mean."""
    tokens = [sum(lengths[i] for i in rows) for rows in dealt]
    return max(tokens) / (sum(tokens) / len(tokens))


def test_8_ranks_have_nearly_equal_tokens_which_rows_dealt_by_count_have_not():
    steps = [gsm8k_like(8 * 16, seed) for seed in range(30)]
    found = [imbalance(lengths, deal(lengths, 8)) for lengths in steps]
    by_count = [imbalance(n, [range(r, len(n), 8) for r in range(8)]) for n in steps]
    assert np.mean(found) <= 1.02 < 1.08 < np.mean(by_count)


@given(LENGTHS, st.integers(1, 9))
def test_each_row_is_dealt_once_and_no_rank_takes_more_than_its_share(lengths, ranks):
    dealt = deal(lengths, ranks)
    assert sorted(sum(dealt, [])) == list(range(len(lengths)))
    assert max(map(len, dealt)) <= -(-len(lengths) // ranks)
    assert all(rows == sorted(rows) for rows in dealt)
    assert len(lengths) < ranks or all(dealt), "a rank without rows, though there are enough"


@given(LENGTHS)
def test_one_rank_takes_all_rows_in_their_order(lengths):
    assert deal(lengths, 1) == [list(range(len(lengths)))]


def test_a_step_exchanges_two_messages_gradients_and_sums(
    tmp_path, checkpoint, arithmetic, monkeypatch
):
    """In a world of one process that believes to be two: what it sends is counted."""
    sent, steps = [], 3
    monkeypatch.setattr(dist, "all_reduce", lambda x, **_: sent.append(x.numel()))
    monkeypatch.setattr(dist, "barrier", lambda: sent.append("barrier"))
    monkeypatch.setattr(distributed, "join", lambda device: distributed.World(0, 2, device))
    monkeypatch.setattr(train, "validate", lambda *_: {"val_loss": 1.0, "val_token_accuracy": 0.5})
    flags = [*map(str, ("--model", checkpoint, "--data", arithmetic, "--out", tmp_path / "run"))]
    train.main([*flags, "--precision", "fp32", "--device", "cpu", "--max-steps", str(steps)])
    before, after = sent.index("barrier"), len(sent) - 1
    messages = sent[before + 1 : after]
    weights = load_file(tmp_path / "run" / "best" / "adapter_model.safetensors")
    gradients = sum(tensor.numel() for tensor in weights.values())
    flags = 2  # whether a rank has given up the step, for lack of memory or time
    assert messages == [gradients + flags, 4] * steps


def test_ranks_wait_for_each_other_longer_than_a_validation_takes(monkeypatch):
    joined = {}
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(dist, "init_process_group", lambda *a, **k: joined.update(k, backend=a[0]))
    monkeypatch.setattr(dist, "rendezvous", lambda *a, **k: iter([("store", 1, 2)]))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(distributed.atexit, "register", lambda function: None)
    for kind, backend in (("cpu", "gloo"), ("cuda", "nccl")):
        device = torch.device(kind, 1) if kind == "cuda" else torch.device(kind)
        world = distributed.join(device)
        assert (world.rank, world.size, world.device, world.notice.store) == (1, 2, device, "store")
        assert joined["backend"] == backend and joined["timeout"].total_seconds() >= 3600
    assert joined["device_id"] == torch.device("cuda", 1)


def test_a_rank_asks_for_stop_requests_of_others_at_most_once_a_second(monkeypatch):
    asked, clock = [], [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    notice = Notice(SimpleNamespace(check=lambda keys: asked.append(keys) or True))
    stop = Stop(notice=notice)
    for clock[0], is_due in ((5.0, True), (5.5, False), (5.9, False), (6.0, True), (6.9, False)):
        with pytest.raises(StopRequested) if is_due else contextlib.nullcontext():
            stop.poll()
    assert asked == [["stop"]] * 2


def test_what_each_rank_has_measured_of_a_validation_is_kept_for_all_of_them():
    ranks = [Progress(), Progress()]
    for session in (1, 2):
        for rank, progress in enumerate(ranks):
            progress.part_of_validation("rows", 4, rank, 2).extend([[rank, session]] * (rank + 1))
        measured = [copy.deepcopy(progress.validating) for progress in ranks]
        for progress in ranks:
            progress.merge_validating(copy.deepcopy(measured))
        assert ranks[0] == ranks[1]
    assert ranks[0].part_of_validation("rows", 4, 0, 2) == [[0, 1], [0, 2]]
    assert ranks[0].part_of_validation("rows", 4, 1, 2) == [[1, 1], [1, 1], [1, 2], [1, 2]]
    assert ranks[0].part_of_validation("rows", 4, 0, 3) == []


def test_only_the_first_rank_replaces_the_report_of_a_finished_run(
    tmp_path, checkpoint, arithmetic, monkeypatch
):
    flags = [*map(str, ("--model", checkpoint, "--data", arithmetic, "--out", tmp_path / "run"))]
    flags += ["--precision", "fp32", "--device", "cpu", "--max-steps", "1"]
    train.main([*flags, "--batch-size", "16"])
    page = (tmp_path / "run" / "report.html").read_bytes()
    monkeypatch.setattr(dist, "all_reduce", lambda x, **_: None)
    monkeypatch.setattr(dist, "barrier", lambda: None)
    monkeypatch.setattr(distributed, "join", lambda device: distributed.World(1, 2, device))
    assert train.main([*flags, "--batch-size", "8", "--price-per-hour", "2"]) == 0
    assert (tmp_path / "run" / "report.html").read_bytes() == page
