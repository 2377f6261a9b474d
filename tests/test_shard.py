"""Tests of a base spread over ranks, which are processes on this machine that talk with Gloo."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from errors import BadOption
from run.base import Base
from run.distributed import check_shard
from tests import shard_ranks, toys
from tests.evaluations import completions_of
from tests.toys import read_log

ROOT = Path(__file__).resolve().parents[1]
KINDS = [str(kind) for kind in shard_ranks.KINDS]


def start(command: list, ranks: int) -> list[subprocess.Popen]:
    world = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1",
             "MASTER_PORT": str(toys.free_port())}  # fmt: skip
    return [
        subprocess.Popen(
            [sys.executable, *map(str, command)], cwd=ROOT, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, env=os.environ | world | {"RANK": str(rank)},
        )
        for rank in range(ranks)
    ]  # fmt: skip


def finish(ranks: list[subprocess.Popen]) -> list[str]:
    outputs = [rank.communicate(timeout=240)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * len(ranks), "\n".join(outputs)
    return outputs


@pytest.fixture(scope="module", params=[2, 3])
def found(request, lively_checkpoint, tmp_path_factory):
    """What each of several ranks computed, by `tests/shard_ranks.py`."""
    folder = tmp_path_factory.mktemp("ranks")
    finish(start(["-m", "tests.shard_ranks", lively_checkpoint, folder], request.param))
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(request.param)]


@pytest.mark.parametrize("kind", KINDS)
def test_sharded_loss_and_gradients_are_the_plain_ones_whatever_each_rank_has_to_do(found, kind):
    """Of three ranks, the first has three micro-batches, the second one and the third none."""
    for rank in found:
        sharded, plain = rank[kind]["sharded"], rank[kind]["plain"]
        assert sharded["nats"] == pytest.approx(plain["nats"], rel=1e-6)
        assert any(plain["gradients"])
        assert sharded["gradients"] == pytest.approx(plain["gradients"], rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_sharded_answers_are_the_plain_ones_though_ranks_have_different_numbers(found, kind):
    assert [len(rank[kind]["sharded texts"]) for rank in found] == [3, 2, 1][: len(found)]
    for rank in found:
        assert rank[kind]["sharded texts"] == rank[kind]["plain texts"]


@pytest.mark.parametrize("kind", KINDS)
def test_each_rank_holds_its_part_of_the_layers_and_no_more(found, kind):
    owned = [rank[kind]["own bytes"] for rank in found]
    whole = found[0][kind]["all bytes"]
    assert whole <= sum(owned) and max(owned) <= 1.1 * whole / len(owned)  # parts are padded


def test_an_older_pytorch_shards_no_quantized_base(lively_checkpoint, monkeypatch):
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.12.1+cpu"))
    base = Base.find(str(lively_checkpoint), precision="fp32", device="cpu").held_in("nf4")
    with pytest.raises(BadOption, match=r"2\.12\.1\+cpu cannot shard a base in nf4"):
        base.load(shard=True)


def test_a_sharded_run_of_two_ranks_resumed_by_three_equals_one_rank(
    tmp_path, lively_checkpoint, arithmetic
):
    flags = ["--model", lively_checkpoint, "--data", arithmetic, "--precision", "fp32"]
    flags += ["--device", "cpu", "--limit", 40, "--batch-size", 2, "--evals-per-epoch", 2]
    flags += ["--epochs", 1, "--stop-on", "exact-match", "--exact-match-problems", 3]
    flags += ["--max-new-tokens", 6, "--schedule", "constant", "--warmup", 0]
    alone = [*flags, "--grad-accum", 6, "--out", tmp_path / "one"]
    train.main([*map(str, alone)])
    shared = ["train.py", *flags, "--shard", "--out", tmp_path / "shards"]
    finish(start([*shared, "--grad-accum", 3, "--max-steps", 2], 2))
    outputs = finish(start([*shared, "--grad-accum", 2], 3))
    assert "resuming" in outputs[0] and "ranks was 2, is 3" in outputs[0]
    one, shards = (read_log(tmp_path / name / "metrics.jsonl") for name in ("one", "shards"))
    for key in ("train_loss", "grad_norm", "train_token_accuracy"):
        series = [[line[key] for line in lines if key in line] for lines in (one, shards)]
        assert series[1] == pytest.approx(series[0], rel=1e-5) and len(series[0]) == 3
    for key in ("val_loss", "val_exact_match"):  # the shorter session ended with one more
        series = [{line["step"]: line[key] for line in lines if key in line}
                  for lines in (one, shards)]  # fmt: skip
        assert series[0].keys() <= series[1].keys()
        assert [series[1][s] for s in series[0]] == pytest.approx([*series[0].values()], rel=1e-5)


def test_shards_are_refused_where_they_cannot_work(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(BadOption, match="this is the only one"):
        check_shard({"--dora": False})
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_shard({"--dora": False})
    with pytest.raises(BadOption, match="does not work with --dora"):
        check_shard({"--dora": True})


def test_two_ranks_that_share_a_base_answer_as_one_does(tmp_path, tuned):
    answers = []
    for ranks in (1, 2):
        flags = ["evaluate.py", "--adapter", tuned / "run/best", "--data", tuned / "sums"]
        flags += ["--limit", 5, "--max-new-tokens", 8, "--out", tmp_path / str(ranks)]
        flags += ["--device", "cpu", "--precision", "fp32"]
        outputs = finish(start(flags + ["--shard"] * (ranks > 1), ranks))
        assert outputs[1:] == [""] * (ranks - 1), "the second rank prints nothing"
        answers.append(completions_of(tmp_path / str(ranks)))
    assert answers[0] == answers[1] and answers[0]


# Two nodes: two launchers on this machine, each with one rank


@pytest.mark.parametrize(("how", "shard"), [("killed", []), ("failed", ["--shard"])])
def test_a_rank_that_dies_ends_the_run_on_both_nodes_and_its_cause_is_printed_once(
    tmp_path, lively_checkpoint, arithmetic, how, shard
):
    port, outputs = toys.free_port(), []
    for node in range(2):
        launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes", 2]
        launch += ["--node-rank", node, "--nproc-per-node", 1]
        launch += ["--master-addr", "127.0.0.1", "--master-port", port]
        launch += [
            "-m",
            "tests.dying_rank",
            how,
            "--model",
            lively_checkpoint,
            "--data",
            arithmetic,
        ]
        launch += ["--device", "cpu", "--precision", "fp32", "--out", tmp_path / "run", *shard]
        outputs.append(
            subprocess.Popen(
                [*map(str, launch)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
        )  # fmt: skip
    dead = outputs[1].communicate(timeout=200)[0]
    survivor = outputs[0].communicate(timeout=30)[0]  # the other node ends within this time
    assert [node.returncode for node in outputs] == [1, 1], survivor + dead
    cause = "error: the root cause\n  its remedy" if how == "failed" else "Signal 9 (SIGKILL)"
    assert (survivor + dead).count(cause) == 1, survivor + dead
    assert survivor.count("rank 0 lost another rank and stops") == 1, survivor
