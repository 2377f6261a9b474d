"""The long form of tests/test_evaluation_faults.py: more kills, a million completions."""

import pytest

from tests.test_evaluation import trained  # noqa: F401  # a fixture
from tests.test_evaluation_faults import killed_and_whole_are_equal, survive_completions

pytestmark = pytest.mark.campaign


def test_an_evaluation_killed_200_times_is_the_whole_one(trained, tmp_path):  # noqa: F811
    killed_and_whole_are_equal(trained, tmp_path, rows=320, kills=200)


@pytest.mark.parametrize("part", range(10))
def test_a_million_random_completions_are_scored_without_an_exception(part):
    survive_completions(range(part * 100_000, (part + 1) * 100_000))
