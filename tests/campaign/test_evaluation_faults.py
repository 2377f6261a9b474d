"""The long form of tests/test_evaluation_faults.py: more kills, a million completions."""

import pytest

from tests.evaluations import (
    assert_killed_equals_whole,
    assert_random_completions_are_judged,
)

pytestmark = pytest.mark.campaign


def test_an_evaluation_killed_200_times_equals_a_whole_one(tuned, tmp_path):
    assert_killed_equals_whole(tuned, tmp_path, rows=1000, kills=200)


@pytest.mark.parametrize("part", range(10))
def test_a_million_random_completions_are_scored_without_an_exception(part):
    assert_random_completions_are_judged(range(part * 100_000, (part + 1) * 100_000))
