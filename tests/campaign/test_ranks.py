"""The long form of tests/test_faults.py: a rank that is killed."""

import pytest

from tests.campaign.harness import check_lost_ranks

pytestmark = pytest.mark.campaign


def test_a_rank_killed_at_20_random_steps_stops_the_other_and_both_can_be_resumed(
    two_ranks, tmp_path
):
    interrupted = check_lost_ranks(two_ranks, tmp_path, range(20))
    print(f"{interrupted} of 20 runs were interrupted")
    assert interrupted >= 18
