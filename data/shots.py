"""Few-shot examples: which solved problems are shown before each problem, as in the harness.

lm-evaluation-harness draws k training rows anew for each problem, from one generator with a fixed
seed, so the rows of a problem depend on its position alone. Problems that are themselves among the
training rows are never shown their own solution: one row more is drawn, and the problem is removed.
"""

import random

from data.problems import Problem

SHOTS_SEED = 1234  # the harness's default


def drawn_shots(
    train: list[Problem], problems: list[Problem], count: int, *, spare: bool = False
) -> list[list[Problem]]:
    """For each problem `count` rows of `train`: the harness's sampler `default`.

    `spare` draws one row more even if no problem is among the training rows, as the harness does
    for a task without a test split. All rows are used if there are too few.
    """
    rng, known = random.Random(SHOTS_SEED), {p.id for p in train}
    n = min(len(train), count + (spare or any(p.id in known for p in problems)))
    draws = ([train[i] for i in rng.sample(range(len(train)), n)] for _ in problems)
    return [[s for s in shots if s.id != p.id][:count] for p, shots in zip(problems, draws)]


def same_shots(train: list[Problem], problems: list[Problem], count: int) -> list[list[Problem]]:
    """For each problem the first `count` rows of `train` other than itself: `first_n`."""
    return [[s for s in train[: count + 1] if s.id != p.id][:count] for p in problems]
