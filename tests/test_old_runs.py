"""Tests of run folders that earlier versions wrote: resumed with today's options, or refused."""

import json
from pathlib import Path

import pytest

from tests import toys
from tests.campaign.harness import (
    SHORT,
    FileCalls,
    copy,
    finish,
    results,
    run,
)
from tests.refusals import snapshot

# Options of format 1 that today's --rank and --alpha replace, or that are gone, for --rank 2.
FORMAT_1 = {"r": 2, "rank": None, "alpha": 16.0, "alphas": None, "bias": "none", "init": "kaiming"}


def to_format_1(folder: Path, **options: object) -> Path:
    """Rewrite the config.json of a run as versions before format 2 wrote it."""
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("format") == 2
    config["options"] |= FORMAT_1 | options
    toys.write_json(folder / "config.json", config)
    return folder


def killed(flags: list, out: Path) -> Path:
    """The folder of a run that was killed in its second save."""
    assert run(flags, out, fault=FileCalls(within="save_checkpoint", nth=2, at=0)).code == 137
    return out


def test_a_run_of_format_1_resumes_with_todays_command_to_the_same_result(short, expected, half):
    finish(short, to_format_1(half))
    assert results(half) == expected
    assert json.loads((half / "config.json").read_text())["format"] == 2


def test_ranks_and_alphas_by_name_of_format_1_are_todays_rank_and_alpha(tiny, tmp_path):
    flags = [*tiny, *SHORT, "--save-every", 0, "--dora", "--rank", "3,q_proj=4,v_proj=1"]
    flags += ["--alpha", "16,k_proj=8"]
    finish(flags, tmp_path / "uninterrupted")
    old = {"r": 3, "rank": "q_proj=4,v_proj=1", "alphas": "k_proj=8.0"}
    out = to_format_1(killed(flags, tmp_path / "run"), **old)
    finish(flags, out)
    assert results(out) == results(tmp_path / "uninterrupted")


def test_other_ranks_than_those_of_a_run_of_format_1_are_refused_in_todays_words(short, half):
    ended = run([*short, "--rank", "3"], to_format_1(half))
    assert ended.code == 2 and "holds another run: rank was 2, is 3" in ended.two_line_error()


@pytest.mark.parametrize(
    "options, used",
    [
        ({"init": "pissa"}, "--init pissa"), ({"init": "gaussian"}, "--init gaussian"),
        ({"bias": "all"}, "--bias all"), ({"bias": "lora_only"}, "--bias lora_only"),
        ({"init": "pissa", "bias": "all"}, "--init pissa and --bias all"),
    ],
)  # fmt: skip
def test_a_run_that_used_a_removed_feature_is_refused_and_not_changed(short, half, options, used):
    before = snapshot(to_format_1(half, **options))
    ended = run(short, half)
    assert ended.code == 2 and f"this run was started with {used}," in ended.two_line_error()
    assert snapshot(half) == before


def weighted(tiny: list, weight: float) -> list:
    """Flags of a run that takes this multiple of the 35 training rows in each epoch."""
    model, (option, data), rest = tiny[:2], tiny[2:4], tiny[4:]
    return [*model, option, f"{data}:{weight}", *rest, *SHORT, "--save-every", 0]


def test_a_run_of_format_1_whose_weight_gives_a_fraction_of_a_row_is_refused(tiny, tmp_path):
    flags = weighted(tiny, 0.3)  # 10.5 rows
    out = killed(flags, tmp_path / "run")
    today = copy(out, tmp_path / "today")
    before = snapshot(to_format_1(out))
    ended = run(flags, out)
    assert ended.code == 2 and "takes 0.3 x 35 rows of" in ended.two_line_error()
    assert snapshot(out) == before
    finish(flags, today)  # a run of today rounds from its start


def test_a_run_of_format_1_whose_weight_gives_whole_rows_resumes_to_the_same_result(tiny, tmp_path):
    flags = weighted(tiny, 0.4)  # 14 rows
    finish(flags, tmp_path / "uninterrupted")
    out = to_format_1(killed(flags, tmp_path / "run"))
    finish(flags, out)
    assert results(out) == results(tmp_path / "uninterrupted")
