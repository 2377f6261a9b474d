"""The long form of tests/test_hostile.py: 5,000 mutations of weights, of a base and an adapter."""

import pytest

from tests.test_hostile import adapter, base, survive_mutations  # noqa: F401  # fixtures

pytestmark = pytest.mark.campaign


def test_5000_random_mutations_of_weights_are_refused_or_loaded_and_never_crash(base, adapter):  # noqa: F811
    outcomes = survive_mutations(base, adapter, range(5000))
    assert sum(outcomes.values()) == 10_000 and outcomes["loaded"] > 100
