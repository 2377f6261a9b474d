"""Confidence intervals of accuracies, and of the difference between two models.

Both models answer the same problems, so only those where they differ carry information about the
tuning: the problems it fixed and those it broke. All functions are pure and defined for any number
of problems. With none, an interval is the whole possible range, never NaN.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import comb, sqrt
from statistics import NormalDist, linear_regression

import numpy as np


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Confidence interval (low, high) of a proportion, in [0, 1]; (0, 1) if n is 0.

    Wilson (1927), "Probable inference, the law of succession, and statistical inference". Unlike
    p ± z·se, it keeps its coverage near 0 and 1, and for small n.
    """
    assert 0 <= successes <= n, f"{successes} successes out of {n}"
    assert 0 < confidence < 1, f"confidence {confidence}"
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    p, spread = successes / n, z * z / n
    middle = (p + spread / 2) / (1 + spread)
    half = sqrt(p * (1 - p) * spread + spread * spread / 4) / (1 + spread)
    high = 1.0 if successes == n else middle + half  # without rounding; low is exactly 0 anyway
    return middle - half, high


def mcnemar_p(fixed: int, broke: int) -> float:
    """Exact two-sided p-value of McNemar's test (McNemar, 1947); 1.0 if no problem changed.

    The null hypothesis is that a changed problem is equally likely to be fixed or broken. The
    binomial distribution, unlike chi-squared, is exact for any number of changed problems.
    """
    changed = fixed + broke
    tail = sum(comb(changed, k) for k in range(min(fixed, broke) + 1))
    return min(1.0, 2 * tail / 2**changed)  # Python integers: exact until this one division


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values of several tests, corrected for their number (Holm, 1979), in the same order.

    The smallest of m is multiplied by m, the next by m - 1, and so on; none is below a smaller one.
    With no real difference anywhere, the chance that any corrected value is below 5 % is at most
    5 %, however the tests depend on each other.
    """
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def bootstrap_interval(
    counts: Sequence[int],
    values: Sequence[float] = (1, -1, 0, 0),
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval (low, high) of a mean over problems (Efron, 1979).

    `counts[i]` problems have the value `values[i]`. The default is a paired difference: fixed,
    broke, both correct, both wrong. Only the number of resampled problems of each value matters,
    and these numbers are multinomial, so each resample takes one draw instead of n. The result
    depends on the seed and on numpy's version. It has no width if all problems have one value.
    """
    n = sum(counts)
    if n == 0:
        return float(min(values)), float(max(values))
    cells = np.random.default_rng(seed).multinomial(n, np.array(counts) / n, size=resamples)
    means = cells @ np.array(values, dtype=float) / n  # (resamples,)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


@dataclass(frozen=True)
class Paired:
    """The comparison of base and tuned on the same problems; points are percentage points.

    Without any problems, the difference is 0.0 and its interval is -100 to +100.
    """

    n: int
    fixed: int  # base wrong, tuned correct
    broke: int  # base correct, tuned wrong
    both_right: int
    both_wrong: int
    difference_points: float  # tuned minus base
    p_value: float  # McNemar, exact, two-sided
    low_points: float  # of the paired bootstrap
    high_points: float
    confidence: float


def paired(
    base: Sequence[bool],
    tuned: Sequence[bool],
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Paired:
    """Compare which problems two models solve; index i of both lists is the same problem."""
    assert len(base) == len(tuned), f"{len(base)} base outcomes, {len(tuned)} tuned outcomes"
    pairs = [(bool(b), bool(t)) for b, t in zip(base, tuned, strict=True)]
    cells = ((False, True), (True, False), (True, True), (False, False))
    fixed, broke, both_right, both_wrong = counts = [pairs.count(cell) for cell in cells]
    low, high = bootstrap_interval(counts, confidence=confidence, resamples=resamples, seed=seed)
    return Paired(
        n=len(pairs),
        fixed=fixed,
        broke=broke,
        both_right=both_right,
        both_wrong=both_wrong,
        difference_points=100 * (fixed - broke) / max(len(pairs), 1),
        p_value=mcnemar_p(fixed, broke),
        low_points=100 * low,
        high_points=100 * high,
        confidence=confidence,
    )


def in_words(result: Paired, tasks: int = 1) -> str:
    """The conclusion of a comparison, in one sentence.

    It is "better" or "worse" if the interval excludes 0 and McNemar's p is below 1 - confidence.
    The interval alone is too narrow if few problems changed: a single problem that was fixed is
    +100 points in every resample. If only one of the two conditions holds, the sentence includes p
    and the number of changed problems. `tasks` is the number of comparisons that the p-value has
    been corrected for.
    """
    if result.n == 0:
        return "no problems in common: nothing to compare"
    if result.fixed + result.broke == 0:  # the interval would have no width
        return f"+0.0 points: none of {result.n} answers changed between right and wrong"
    low, high = result.low_points, result.high_points
    excludes_zero = low > 0 or high < 0
    small_p = result.p_value < 1 - result.confidence
    if excludes_zero and small_p:
        verdict = "better" if low > 0 else "worse"
    else:
        verdict = "not distinguishable from no change at this size"
    if tasks > 1:
        verdict += f" (p = {result.p_value:.2g}, corrected for {tasks} comparisons)"
    elif excludes_zero != small_p:
        changed = result.fixed + result.broke
        verdict += f" ({changed} of {result.n} changed, exact p = {result.p_value:.2g})"
    return (
        f"{_signed(result.difference_points)} points, {100 * result.confidence:g} % between "
        f"{_signed(low)} and {_signed(high)}: {verdict}"
    )


def corrected(results: Sequence[Paired]) -> list[Paired]:
    """The comparisons of one table, with p-values corrected by `holm`."""
    p_values = holm([result.p_value for result in results])
    return [replace(result, p_value=p) for result, p in zip(results, p_values)]


def _signed(points: float) -> str:
    return f"{round(points, 1) + 0.0:+.1f}"  # + 0.0 turns -0.0 into 0.0


@dataclass(frozen=True)
class Trend:
    """Where a series of losses was heading: a straight line through its last values."""

    points: int  # values that the line is fitted to
    decrease: float  # of the line, from its first point to its last
    above_best: float  # the last value minus the lowest of the whole series
    threshold: float  # smaller changes do not count

    @property
    def direction(self) -> str:
        """`"rising"` above the best value, `"falling"`, or `"flat"`."""
        if self.above_best > self.threshold:
            return "rising"
        return "falling" if self.decrease > self.threshold else "flat"


def trend(losses: Sequence[float], floor: float = 0.0) -> Trend | None:
    """The trend of the last third of `losses`, at least four values; None if there are fewer.

    A change counts if it exceeds twice the standard error of the residuals of a least-squares line,
    0.5 % of the lowest loss, and `floor`.
    """
    if len(losses) < 4:
        return None
    last = losses[-max(4, len(losses) // 3) :]
    slope, start = linear_regression(range(len(last)), last)
    residuals = [loss - start - slope * i for i, loss in enumerate(last)]
    scatter = sqrt(sum(r * r for r in residuals) / (len(last) - 2))
    best = min(losses)
    return Trend(
        points=len(last),
        decrease=-slope * (len(last) - 1),
        above_best=last[-1] - best,
        threshold=max(2 * scatter, 0.005 * best, floor),
    )
