"""Tests of the intervals and paired tests; the reference is SciPy, an example or a plain loop."""

import itertools
from dataclasses import astuple
from math import comb, isfinite, sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.statistics import (
    bootstrap_interval,
    corrected,
    holm,
    in_words,
    mcnemar_p,
    paired,
    wilson_interval,
)
from evaluation.summary import sample_metrics
from tests.evaluations import completion, problem


def outcomes(*, fixed: int, broke: int, right: int, wrong: int) -> tuple[list[bool], list[bool]]:
    """Two lists of bools, base and tuned, with these numbers of problems in the four cells."""
    cells = [(0, 1)] * fixed + [(1, 0)] * broke + [(1, 1)] * right + [(0, 0)] * wrong
    return [bool(b) for b, _ in cells], [bool(t) for _, t in cells]


def test_wilson_interval_of_one_success_in_two_equals_the_worked_example():
    # p = 1/2, n = 2, z² = 3.8415: middle 1/2, half = z / (2 sqrt(n + z²)) = 1.95996 / 4.83384
    half = 1.959964 / (2 * sqrt(2 + 1.959964**2))
    assert wilson_interval(1, 2) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-6)


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95, 0.99])
@pytest.mark.parametrize("n", [1, 2, 7, 64, 1319])
def test_wilson_interval_equals_scipys(n, confidence):
    binomtest = pytest.importorskip("scipy.stats").binomtest
    for successes in {0, 1, n // 3, n // 2, n - 1, n}:
        low, high = wilson_interval(successes, n, confidence)
        theirs = binomtest(successes, n).proportion_ci(confidence, method="wilson")
        assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_wilson_interval_without_trials_is_the_whole_range():
    assert wilson_interval(0, 0) == (0.0, 1.0)


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.floats(0.01, 0.999))
def test_wilson_interval_contains_the_proportion_and_stays_within_zero_and_one(
    successes, failures, confidence
):
    n = successes + failures
    low, high = wilson_interval(successes, n, confidence)
    assert 0.0 <= low <= high <= 1.0
    assert n == 0 or low <= successes / n <= high
    assert (low == 0.0) == (successes == 0) and (high == 1.0) == (failures == 0)


def test_mcnemar_p_of_small_counts_equals_the_binomial_sum_by_hand():
    assert mcnemar_p(0, 0) == 1.0
    assert mcnemar_p(1, 0) == 1.0  # 2 · 1/2
    assert mcnemar_p(5, 0) == 2 / 32
    assert mcnemar_p(6, 1) == 2 * (1 + 7) / 128
    assert mcnemar_p(3, 3) == 1.0  # 2 · 42/64 is over 1


@pytest.mark.parametrize("fixed, broke", [(1, 3), (9, 2), (40, 41), (120, 80), (700, 619)])
def test_mcnemar_p_equals_scipys_binomial_test(fixed, broke):
    binomtest = pytest.importorskip("scipy.stats").binomtest
    assert mcnemar_p(fixed, broke) == pytest.approx(binomtest(fixed, fixed + broke).pvalue)
    assert mcnemar_p(fixed, broke) == mcnemar_p(broke, fixed)


def test_the_four_cells_are_counted_from_the_pairs():
    base, tuned = [True, True, False, False, False], [True, False, True, True, False]
    result = paired(base, tuned)
    cells = (result.both_right, result.broke, result.fixed, result.both_wrong)
    assert cells == (1, 1, 2, 1) and result.n == 5
    assert result.difference_points == 20.0


def test_outcomes_of_different_problems_are_refused():
    with pytest.raises(AssertionError, match="2 base outcomes, 1 tuned"):
        paired([True, False], [True])


def test_the_bootstrap_is_reproducible_from_its_seed():
    base, tuned = outcomes(fixed=90, broke=70, right=400, wrong=440)
    assert paired(base, tuned, seed=3) == paired(base, tuned, seed=3)
    low, other = paired(base, tuned, seed=3).low_points, paired(base, tuned, seed=4).low_points
    assert low != other and low == pytest.approx(other, abs=0.3)


def test_the_bootstrap_equals_a_plain_loop_over_resampled_problems():
    base, tuned = outcomes(fixed=40, broke=20, right=70, wrong=70)
    gains = np.array(tuned, dtype=int) - np.array(base, dtype=int)  # (200,) of -1, 0, 1
    rng = np.random.default_rng(11)
    plain = [rng.choice(gains, size=len(gains)).mean() for _ in range(10_000)]
    result = paired(base, tuned)
    expected = 100 * np.quantile(plain, [0.025, 0.975])
    assert (result.low_points, result.high_points) == pytest.approx(tuple(expected), abs=0.5)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holms_p_values_are_those_of_the_closed_test(p_values):
    # A hypothesis falls if each set of hypotheses that it is in does, by Bonferroni's test.
    indices = range(len(p_values))
    subsets = [s for n in indices for s in itertools.combinations(indices, n + 1)]
    closed = [
        min(1.0, max(len(s) * min(p_values[j] for j in s) for s in subsets if i in s))
        for i in indices
    ]
    assert holm(p_values) == pytest.approx(closed)


def test_two_tasks_need_more_evidence_than_one():
    result = paired(*outcomes(fixed=25, broke=11, right=32, wrong=32))  # exact p = 0.029
    assert in_words(result).endswith(": better")
    (one, other) = corrected([result, result])
    assert one.p_value == other.p_value == 2 * result.p_value
    words = "not distinguishable from no change at this size (p = 0.058, corrected for 2"
    assert words in in_words(one, 2) and corrected([result]) == [result]


def test_the_interval_of_pass_at_k_equals_a_plain_loop_over_resampled_problems():
    completions, golds = {}, []
    for i in range(60):
        golds.append(problem(f"Question {i}", "#### 7", str(i)))
        samples = [f"#### {7 if (i * 5 + s * s) % (s + 3) < 2 else 8}" for s in range(4)]
        completions[str(i)] = [completion(text, str(i), s) for s, text in enumerate(samples)]
    found = sample_metrics(golds, completions)
    rng = np.random.default_rng(5)
    for k in (1, 2, 4):
        correct = [sum("7" in c.text for c in completions[p.id]) for p in golds]
        shares = np.array([1 - comb(4 - c, k) / comb(4, k) for c in correct])
        plain = [rng.choice(shares, size=60).mean() for _ in range(10_000)]
        expected = np.quantile(plain, [0.025, 0.975])
        assert found["pass_intervals"][f"pass@{k}"] == pytest.approx(tuple(expected), abs=0.01)
        assert found["pass"][f"pass@{k}"] == pytest.approx(shares.mean())


def test_the_bootstrap_has_the_width_of_the_normal_approximation():
    # Variance of one pair's gain: (fixed + broke)/n - ((fixed - broke)/n)² = 0.2 - 0.02².
    low, high = bootstrap_interval(
        (1100, 900, 4000, 4000), confidence=0.95, resamples=10_000, seed=0
    )
    assert (high - low) == pytest.approx(2 * 1.96 * sqrt((0.2 - 0.02**2) / 10_000), rel=0.03)
    assert (high + low) / 2 == pytest.approx(0.02, abs=0.0005)


def test_higher_confidence_gives_a_wider_interval():
    cells = outcomes(fixed=30, broke=20, right=30, wrong=20)
    narrow, wide = paired(*cells, confidence=0.8), paired(*cells, confidence=0.99)
    assert wide.low_points < narrow.low_points < narrow.high_points < wide.high_points


def test_without_problems_there_is_nothing_to_compare():
    result = paired([], [])
    assert astuple(result) == (0, 0, 0, 0, 0, 0.0, 1.0, -100.0, 100.0, 0.95)
    assert in_words(result) == "no problems in common: nothing to compare"


@pytest.mark.parametrize("right, wrong", [(1, 0), (0, 1), (500, 0), (0, 500), (250, 250)])
def test_two_models_that_always_agree_have_no_difference(right, wrong):
    result = paired(*outcomes(fixed=0, broke=0, right=right, wrong=wrong))
    assert (result.low_points, result.high_points, result.p_value) == (0.0, 0.0, 1.0)
    n = right + wrong
    assert in_words(result) == f"+0.0 points: none of {n} answers changed between right and wrong"


def test_no_number_is_printed_as_minus_zero():
    words = in_words(paired(*outcomes(fixed=0, broke=1, right=2500, wrong=2500)))
    assert words.startswith("+0.0 points, 95 % between -0.1 and +0.0:")


def test_one_problem_proves_nothing():
    assert in_words(paired([False], [True])) == (
        "+100.0 points, 95 % between +100.0 and +100.0: "
        "not distinguishable from no change at this size (1 of 1 changed, exact p = 1)"
    )


def test_a_difference_within_the_noise_is_reported_as_not_distinguishable():
    words = in_words(paired(*outcomes(fixed=60, broke=50, right=400, wrong=490)))
    assert words.startswith("+1.0 points, 95 % between -")
    assert words.endswith("not distinguishable from no change at this size")


def test_a_clear_difference_is_better_and_the_reverse_is_worse():
    base, tuned = outcomes(fixed=150, broke=60, right=400, wrong=390)
    better, worse = in_words(paired(base, tuned)), in_words(paired(tuned, base))
    assert better.startswith("+9.0 points, 95 % between +") and better.endswith(": better")
    assert worse.startswith("-9.0 points, 95 % between -") and worse.endswith(": worse")


def test_an_interval_that_excludes_zero_is_not_enough_without_mcnemar():
    result = paired(*outcomes(fixed=4, broke=0, right=3, wrong=3))
    assert result.low_points > 0 and result.p_value == 0.125
    assert in_words(result).endswith("(4 of 10 changed, exact p = 0.12)")


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=40), st.integers(0, 2**32))
def test_all_results_are_finite_and_the_difference_is_that_of_the_accuracies(pairs, seed):
    base, tuned = [b for b, _ in pairs], [t for _, t in pairs]
    result = paired(base, tuned, seed=seed, resamples=200)
    assert all(isfinite(figure) for figure in astuple(result)) and in_words(result)
    assert 0 <= result.p_value <= 1 and -100 <= result.low_points <= result.high_points <= 100
    if pairs:
        points = 100 * (sum(tuned) - sum(base)) / len(pairs)
        assert result.difference_points == pytest.approx(points)
