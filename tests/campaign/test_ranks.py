"""Two ranks, of which one is lost."""

import pytest

from tests.test_faults import survive_lost_ranks

pytestmark = pytest.mark.campaign


def test_a_rank_killed_at_20_random_steps(two_ranks, tmp_path):
    met = survive_lost_ranks(two_ranks, tmp_path, range(20))
    print(f"{met} of 20 were met")
    assert met >= 18
