"""The long form of tests/test_hostile.py: 5,000 mutations of weights, of a base and an adapter."""

import pytest

from tests.hostile import load_mutated

pytestmark = pytest.mark.campaign


def test_5000_random_mutations_of_weights_are_refused_or_loaded_without_a_crash(base, adapter):
    outcomes = load_mutated(base, adapter, range(5000))
    assert sum(outcomes.values()) == 10_000 and outcomes["loaded"] > 100
