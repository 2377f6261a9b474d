"""Tests of mixtures: which rows an epoch takes of each source, and what the audit reports."""

import json
import random
import shutil
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import train
from data.audit import audit_lines, audit_mixture
from data.batches import Schedule, SourceRows, shuffle
from data.chat import ChatFormat
from data.custom import load_path
from data.encode import encode_problems
from data.mixture import (
    EncodedSource,
    check_rounding,
    encode_mixture,
    load_mixture,
    mixture_identity,
    parse_spec,
    source_names,
)
from data.split import normalize, split_problems
from errors import BadOption, BadRun
from run.console import validation_line
from run.folder import default_folder
from tests import toys
from tests.campaign.harness import await_steps, finish, results, start
from tests.refusals import refused, training
from tests.toys import read_log, some_examples, write_lines

settings.register_profile("no deadline", deadline=None)  # a busy machine is no failure
settings.load_profile("no deadline")

# Weights

SPECS = {
    "gsm8k": ("gsm8k", 1), "gsm8k:2": ("gsm8k", 2), "a.jsonl:0.1": ("a.jsonl", 0.1),
    "a.jsonl:1e-3": ("a.jsonl", 0.001), "a:b.jsonl": ("a:b.jsonl", 1),
    "a:b.jsonl:3": ("a:b.jsonl", 3), "C:\\rows.jsonl": ("C:\\rows.jsonl", 1),
    "C:\\rows.jsonl:.5": ("C:\\rows.jsonl", 0.5), "odd:2:1": ("odd:2", 1),
    "a:": ("a:", 1), "7": ("7", 1), "org/name:1000": ("org/name", 1000),
}  # fmt: skip


@pytest.mark.parametrize("text", SPECS)
def test_only_a_number_after_the_last_colon_is_a_weight(text):
    assert parse_spec(text) == SPECS[text]


@pytest.mark.parametrize(
    "weight", "0 -1 -0.5 nan inf -inf 1e9 1000.5 1e-999999999 0.0000000000000000000001 0e5".split()
)
def test_a_weight_out_of_range_is_refused(weight):
    with pytest.raises(BadOption, match="a weight is a number above 0, at most 1000"):
        parse_spec(f"gsm8k:{weight}")


@pytest.mark.parametrize(
    "weight, count, is_fraction",
    [(1.0, 7, False), (3.0, 7, False), (0.5, 10, False), (0.1, 30, False), (1e-3, 2000, False),
     (0.07, 100, False), (0.5, 7, True), (0.1, 31, True), (0.333, 300, True)],
)  # fmt: skip
def test_a_run_from_before_rounding_is_refused_only_if_rounding_changes_its_schedule(
    weight, count, is_fraction
):
    audit = {"sources": {
        "a": {"weight": 1.0, "rows": {"train": 5}},
        "b": {"weight": weight, "rows": {"train": count}},
    }}  # fmt: skip
    with pytest.raises(BadRun, match="rows of b, which") if is_fraction else nullcontext():
        check_rounding(audit)


# What an epoch takes

SOURCES = st.lists(
    st.builds(SourceRows, st.integers(1, 30), st.integers(1, 70)), min_size=1, max_size=4
)


@st.composite
def schedules(draw) -> Schedule:
    sources = draw(SOURCES)
    return Schedule(
        some_examples(sum(s.available for s in sources)), batch_size=draw(st.integers(1, 5)),
        grad_accum=draw(st.integers(1, 3)), epochs=draw(st.integers(1, 6)),
        seed=draw(st.integers(0, 9)), sources=tuple(sources),
    )  # fmt: skip


def taken(schedule: Schedule) -> dict[int, list[int]]:
    """The row ids of each epoch, step by step."""
    rows = {epoch: [] for epoch in range(schedule.epochs)}
    for step in map(schedule.step, range(schedule.total_steps)):
        rows[step.epoch] += step.row_ids
    return rows


@given(schedules())
def test_each_epoch_takes_the_same_count_of_a_source_and_each_row_as_often_as_the_others(schedule):
    first, rows = 100, taken(schedule)  # some_examples begin at row 100
    for count, per_epoch in schedule.sources:
        own = range(first, first + count)
        so_far = Counter()
        for epoch in range(schedule.epochs):
            so_far.update(row for row in rows[epoch] if row in own)
            assert so_far.total() == (epoch + 1) * per_epoch
            assert max(so_far.values(), default=0) <= 1 + min(so_far[row] for row in own)
        first += count


@given(schedules())
def test_epochs_have_equally_many_steps_and_follow_one_another_without_a_gap(schedule):
    size, start = schedule.examples_per_step, 0
    for epoch, rows in taken(schedule).items():
        assert schedule.epoch_start(epoch) == start == epoch * schedule.steps_per_epoch
        for step in range(-(-len(rows) // size)):
            assert schedule.place(start + step) == (epoch, step)
            assert epoch <= schedule.epochs_in(start + step) < epoch + 1
        start += -(-len(rows) // size)
    assert schedule.total_steps == start and schedule.epochs_in(start) == schedule.epochs


def test_a_schedule_of_very_many_epochs_costs_no_more_than_one_of_few():
    sources = (SourceRows(7, 3), SourceRows(5, 10))
    schedule = Schedule(some_examples(12), 2, 1, epochs=10**15, seed=0, sources=sources)
    assert schedule.total_steps == 10**15 * 7
    assert schedule.step(schedule.total_steps - 1).epoch == 10**15 - 1


def test_sources_are_shuffled_together_and_again_in_each_epoch():
    sources = (SourceRows(30, 30), SourceRows(60, 30))
    rows = taken(Schedule(some_examples(90), 4, 1, epochs=4, seed=0, sources=sources))
    halves = [{row for row in rows[epoch] if row >= 130} for epoch in range(4)]
    assert halves[0] | halves[1] == halves[2] | halves[3] == set(range(130, 190))
    assert len({frozenset(half) for half in halves}) == 4  # each pass has its own shuffle
    assert all(min(rows[e].index(r) for r in halves[e]) < 10 for e in range(4))
    assert rows[0] != rows[2]


@given(st.integers(1, 40), st.integers(0, 9), st.integers(1, 4))
def test_a_single_source_is_one_shuffle_per_epoch(count, seed, per_step):
    examples = some_examples(count)
    schedule = Schedule(
        examples, per_step, 1, epochs=3, seed=seed, sources=(SourceRows(count, count),)
    )
    for index in range(schedule.total_steps):
        epoch, place = divmod(index, -(-count // per_step))
        order = shuffle(count, seed, epoch)[place * per_step : (place + 1) * per_step]
        assert schedule.step(index).row_ids == [examples[i].row_id for i in order]
        assert schedule.epochs_in(index) == index / -(-count // per_step)


# The order in old runs. It must never change, or a saved run would resume with other rows.
ORDER = {
    0: [111, 110, 112, 102, 112, 100, 101, 104, 108, 107, 111, 105, 103, 110],
    1: [109, 104, 100, 112, 110, 112, 101, 102, 105, 111, 110, 111, 106, 103],
}  # fmt: skip


def test_the_rows_of_a_mixture_are_those_of_earlier_versions():
    sources = (SourceRows(6, 6), SourceRows(4, 2), SourceRows(3, 6))
    schedule = Schedule(some_examples(13), 5, 1, epochs=2, seed=3, sources=sources)
    assert taken(schedule) == ORDER


# From files to examples


@pytest.fixture
def sources(tmp_path) -> list[Path]:
    """Two folders that share some questions, and whose files have the same names."""
    toys.write_arithmetic(tmp_path / "a", rows=200, test_rows=20, seed=1)
    toys.write_arithmetic(tmp_path / "b", rows=100, test_rows=20, seed=2)
    return [tmp_path / "a", tmp_path / "b"]


def encoded(specs: list, checkpoint: Path, **options) -> list[EncodedSource]:
    chat = ChatFormat.from_folder(checkpoint)
    values = {"limit": None, "validation_share": 0.1, "max_length": 2048} | options
    return encode_mixture(load_mixture([str(s) for s in specs]), chat, **values)


def test_a_single_source_is_split_and_encoded_as_without_a_mixture(sources, checkpoint):
    (part,) = encoded(sources[:1], checkpoint, limit=50)
    problems = load_path(sources[0]).train[:50]
    for examples, rows in zip((part.train, part.validation), split_problems(problems, 0.1)):
        chosen = [problems[row] for row in rows]
        plain, _ = encode_problems(chosen, rows, ChatFormat.from_folder(checkpoint), 2048)
        assert [e.row_id for e in examples] == rows
        assert all((a.tokens == b.tokens).all() for a, b in zip(examples, plain, strict=True))
    assert [p.id for p in part.held_out] == [problems[e.row_id].id for e in part.validation]


def test_row_ids_and_ids_differ_between_sources(sources, checkpoint):
    parts = encoded(sources, checkpoint)
    rows = [e.row_id for part in parts for e in (*part.train, *part.validation)]
    assert sorted(rows) == list(range(300))
    assert min(e.row_id for e in parts[1].train + parts[1].validation) == 200
    ids = [p.id for part in parts for p in (*part.train_problems, *part.held_out)]
    assert len(set(ids)) == 300 and f"{sources[1]}/train.jsonl:1" in ids
    tests = [p.id for part in parts for p in part.test_problems]
    assert len(set(tests)) == len(tests) and f"{sources[1]}/test.jsonl:1" in tests


def test_rows_beyond_the_limit_are_no_part_of_what_a_run_is_of(sources):
    (part,) = load_mixture([str(sources[0])])
    cut = replace(part, source=replace(part.source, train=part.source.train[:10]))
    assert mixture_identity([cut], 10) == mixture_identity([part], 10)
    assert mixture_identity([part], 10) != mixture_identity([part], 11)


@pytest.mark.parametrize("share", [0.02, 0.1, 0.5])
def test_a_question_is_on_one_side_in_all_sources(sources, checkpoint, share):
    rows = (sources[0] / "train.jsonl").read_bytes().splitlines()[:5]
    few = write_lines(sources[0] / "few.jsonl", rows)  # at least one of them is held out
    parts = encoded([*sources, few], checkpoint, validation_share=share)
    trained = {normalize(p.question) for part in parts for p in part.train_problems}
    held_out = [normalize(p.question) for part in parts for p in part.held_out]
    assert len(set(held_out)) < len(held_out)  # some are in two sources
    assert not trained & set(held_out) and all(part.validation for part in parts)


def test_the_audit_has_the_statistics_of_each_source_in_80_columns(sources, checkpoint):
    parts = encoded([sources[0], f"{sources[1]}:0.5"], checkpoint)
    found = audit_mixture(parts)
    assert set(found.sources) == set(map(str, sources))
    for key in ("train", "validation", "test"):
        assert found.rows[key] == sum(own["rows"][key] for own in found.sources.values())
    assert found.sources[str(sources[1])]["rows_per_epoch"] == len(parts[1].train) // 2
    lines = audit_lines(found)
    assert max(map(len, lines)) <= 80 and any("(x 0.5)" in line for line in lines)
    assert audit_mixture(parts[:1]).sources == {}


def test_source_names_are_read_from_a_list_or_from_the_single_string_of_old_runs():
    assert source_names("gsm8k") == source_names(["gsm8k:2"]) == ["gsm8k"]
    config = train.TrainConfig(model="x/Qwen2", data=("org/Rows:2", "b/mine.jsonl:0.5"))
    assert default_folder(config.model, source_names(config.data)) == Path("out/qwen2-rows-mine")
    assert default_folder("x/Qwen2", ["gsm8k"]) == Path("out/qwen2-gsm8k")


# Whole runs

LONG = "--batch-size 2 --grad-accum 2 --epochs 3 --rank 2 --evals-per-epoch 2 --limit 24".split()


@pytest.fixture
def mixed(tiny, sources) -> list[str]:
    """Options of a run on two sources, of which the second has weight 0.5."""
    rest = [flag for flag in tiny if flag != "--data"]
    rest.remove(tiny[tiny.index("--data") + 1])
    return [*rest, *LONG, "--data", str(sources[0]), f"{sources[1]}:0.5"]


def watched(log: Path):
    """Not a fault: it records the index and row ids of each step in `log`."""

    def fault():
        whole = Schedule.step

        def step(schedule, index, halved=0):
            found = whole(schedule, index, halved)
            with log.open("a") as file:
                file.write(json.dumps([index, found.row_ids]) + "\n")
            return found

        Schedule.step = step

    return fault


def test_a_killed_and_resumed_mixture_takes_each_row_as_often_as_it_should_and_ends_the_same(
    mixed, sources, checkpoint, tmp_path
):
    finish([*mixed, "--save-every", 0], tmp_path / "whole")
    log, out, rng = tmp_path / "rows", tmp_path / "killed", random.Random(0)
    for steps in sorted(rng.sample(range(1, 20), 3)):
        child = start([*mixed, "--save-every", 0.02], out, fault=watched(log))
        await_steps(child, out, steps)
        child.send(9)
        assert child.wait().code == 137
    assert start([*mixed, "--save-every", 0.02], out, fault=watched(log)).wait().code == 0
    assert results(out) == results(tmp_path / "whole")
    steps = dict(json.loads(line) for line in log.read_text().splitlines())
    counts = Counter(row for rows in steps.values() for row in rows)
    for part, per_epoch in zip(encoded(sources, checkpoint, limit=24), (1, 0.5)):
        own = [counts[e.row_id] for e in part.train]
        assert sum(own) == 3 * round(per_epoch * len(own)) and max(own) - min(own) <= 1
        assert not any(counts[e.row_id] for e in part.validation)


def test_the_log_has_the_loss_of_each_source_and_their_mean_weighted_by_tokens(
    mixed, sources, checkpoint, tmp_path
):
    out = tmp_path / "run"
    said = finish(mixed, out)
    parts = encoded(sources, checkpoint, limit=24)
    supervised = {p.name: sum(e.supervised_count for e in p.validation) for p in parts}
    lines = [line for line in read_log(out / "metrics.jsonl") if "val_loss" in line]
    assert len(lines) == 7
    for line in lines:
        own = line["val_loss_by_source"]
        mean = sum(own[name] * n for name, n in supervised.items()) / sum(supervised.values())
        assert line["val_loss"] == pytest.approx(mean, rel=1e-12)
        assert f"{own[str(sources[1])]:.4f}  " in said.err + said.out
    held_out = [json.loads(line) for line in (out / "validation.jsonl").read_text().splitlines()]
    assert Counter(row["id"].startswith(str(sources[1])) for row in held_out) == {
        bool(i): len(part.validation) for i, part in enumerate(parts)
    }
    identity = json.loads((out / "config.json").read_text())["identity"]
    assert identity["data_sha256"].keys() == identity["data_commit"].keys() == supervised.keys()


def test_a_validation_of_several_sources_has_at_most_80_columns():
    found = {"val_loss": 123.4567, "val_token_accuracy": 1.0, "val_exact_match": 1.0}
    found["val_loss_by_source"] = {"x/" * 50: 1.0, "gsm8k": 12345.0}
    assert max(map(len, validation_line(99999, found, True).splitlines())) <= 80


def test_a_run_whose_saved_data_option_is_a_single_string_resumes(finished, short, tmp_path):
    out = tmp_path / "old"
    shutil.copytree(finished, out)
    config = json.loads((out / "config.json").read_text())
    (config["options"]["data"],) = config["options"]["data"]
    del config["options"]["columns"]
    toys.write_json(out / "config.json", config)
    ended = finish(short, out)
    assert ": all 10 steps done" in ended.out
    assert set(config["identity"]["data_sha256"]) <= set("0123456789abcdef")


def test_two_ranks_together_take_the_rows_that_one_rank_takes():
    sources = (SourceRows(20, 20), SourceRows(10, 5))
    whole = Schedule(some_examples(30), 4, 1, epochs=2, seed=0, sources=sources)
    parts = [Schedule(some_examples(30), 2, 1, epochs=2, seed=0, rank=r, ranks=2, sources=sources)
             for r in range(2)]  # fmt: skip
    assert whole.total_steps == parts[0].total_steps
    for index in range(whole.total_steps):
        steps = [p.step(index) for p in parts]
        assert steps[0].row_ids == steps[1].row_ids == whole.step(index).row_ids
        mine = [e.row_id for s in steps for batch in s.micro_batches for e in batch]
        assert sorted(mine) == sorted(whole.step(index).row_ids)


REFUSED = {
    "--data data:0": "--data data:0: a weight is a number above 0",
    "--data data demo:nan": "--data demo:nan: a weight is a number above 0",
    "--data data demo data": "--data names data more than once",
    "--data data none.jsonl": "--data none.jsonl is neither a task",
    "--data data demo --data-revision main": "--data-revision main belongs to one source",
    "--data data demo:0.0001": "demo: an epoch at weight 0.0001 takes none of its",
    "--data demo data/test.jsonl:2 --max-length 5": "demo: 0 rows to train on and 0 to validate",
    "--data data empty.jsonl": "empty.jsonl has no rows",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_an_impossible_mixture_is_refused_before_anything_starts(
    workspace, capsys, flags
):  # fmt: skip
    (workspace / "empty.jsonl").write_text("")
    assert REFUSED[flags] in refused(train.main, training(flags), capsys)
