r"""Generated word problems in GSM8K's format: for the demo, and for experiments without a network.

    {"question": "Ann has 24 pens. She gives a third of them to Ben, and then she finds 5 more. How
                  many pens does Ann have now?",
     "answer": "Ann gives away 24/3 = <<24/3=8>>8 pens.\nShe keeps 24-8 = <<24-8=16>>16 pens.\nNow
                she has 16+5 = <<16+5=21>>21 pens.\n#### 21",
     "category": "fractions"}

There are eight kinds of stories (`KINDS`) with two to four steps, each worded in two ways. No two
problems, in training or test, are computed from the same numbers.
"""

import operator
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction

from data.rows import Message, Problem, Source

TRAIN, TEST = 2400, 200
SEED = 0

# fmt: off
NAMES = {"Ann": "she", "Ben": "he", "Cleo": "she", "Dan": "he", "Eva": "she", "Finn": "he",
         "Gus": "he", "Hal": "he", "Ida": "she", "Jon": "he", "Kim": "she", "Leo": "he",
         "Mia": "she", "Ned": "he", "Ola": "she", "Pat": "he", "Rosa": "she", "Sue": "she",
         "Tom": "he", "Una": "she"}
THINGS = ("pens", "books", "cups", "hats", "balls", "cards", "coins", "stamps", "shells", "toys",
          "kites", "rings", "maps", "lamps", "bells", "boxes")
DAILY = (("reads", "pages"), ("walks", "miles"), ("makes", "toys"))
FRUITS = ("apples", "pears", "plums", "eggs", "limes", "nuts", "figs", "melons")
DAYS = ("Monday", "Tuesday", "Friday", "Sunday")
OPERATORS: dict[str, Callable[[int, int], int | Fraction]] = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "/": Fraction}
PARTS = {2: "half", 3: "a third", 4: "a quarter", 5: "a fifth"}
# fmt: on


@dataclass(frozen=True)
class WorkedStep:
    """One sentence of a solution: `before`, an operation on two whole numbers, `after`."""

    before: str
    left: int
    operator: str  # + - * /
    right: int
    after: str

    @property
    def expression(self) -> str:
        """The step as in a solution, such as `3*4`."""
        return f"{self.left}{self.operator}{self.right}"

    @property
    def result(self) -> int:
        """Its value, a positive integer."""
        value = OPERATORS[self.operator](self.left, self.right)
        assert value == int(value) > 0, self
        return int(value)


@dataclass(frozen=True)
class Story:
    """A question, the numbers it is computed from, and the steps to its answer."""

    category: str
    numbers: tuple[int, ...]
    question: str
    steps: tuple[WorkedStep, ...]

    @property
    def key(self) -> tuple[int, ...]:
        """The numbers, sorted: no two problems of the demo have the same key."""
        return tuple(sorted(self.numbers))

    @property
    def answer(self) -> int:
        """The number that the last step gives."""
        return self.steps[-1].result

    def solution(self) -> str:
        """The solution as GSM8K writes it: each calculation is repeated inside <<...>>."""
        lines = [
            f"{s.before} {s.expression} = <<{s.expression}={s.result}>>{s.result} {s.after}."
            for s in self.steps
        ]
        return "\n".join([*lines, f"#### {self.answer}"])


def load(revision: str | None = None) -> Source:
    """The demo's problems, which never change; `revision` is ignored."""
    generated = stories(SEED)
    source = Source("demo")
    for split, problems, count in (("train", source.train, TRAIN), ("test", source.test, TEST)):
        for number in range(1, count + 1):
            s = next(generated)
            messages = (Message("user", s.question), Message("assistant", s.solution()))
            problems.append(Problem(f"{split}:{number}", messages, s.category))
    return source


def stories(seed: int) -> Iterator[Story]:
    """Yield stories endlessly, cycling through the kinds, no two with the same key."""
    rng = random.Random(seed)
    seen = set()
    while True:
        for kind in KINDS.values():
            story = kind(rng)
            while story.key in seen:
                story = kind(rng)
            seen.add(story.key)
            yield story


def purchase(rng: random.Random) -> Story:
    """Two kinds of things, each with its price. What do they cost together?"""
    (who, he), (one, other) = _person(rng), rng.sample(THINGS, 2)
    a, b = rng.randint(2, 9), rng.randint(2, 9)
    p, q = rng.randint(2, 12), rng.randint(2, 12)
    text = f"{who} buys {a} {one} for {p} dollars each and {b} {other} for {q} dollars each."
    if rng.random() < 0.5:
        text = (
            f"At the shop {who} takes {a} {one} at {p} dollars each"
            f" and {b} {other} at {q} dollars each."
        )
    return Story(
        "purchase", (a, p, b, q), f"{text} How many dollars does {he} pay in all?",
        (WorkedStep(f"The {one} cost", a, "*", p, "dollars"),
         WorkedStep(f"The {other} cost", b, "*", q, "dollars"),
         WorkedStep(f"In all {who} pays", a * p, "+", b * q, "dollars")),
    )  # fmt: skip


def change(rng: random.Random) -> Story:
    """Things bought with a sum of money. How much is left?"""
    (who, he), thing = _person(rng), rng.choice(THINGS)
    a, p = rng.randint(2, 9), rng.randint(2, 9)
    m = a * p + rng.randint(1, 60)
    text = f"{who} has {m} dollars. {he.title()} buys {a} {thing} for {p} dollars each."
    if rng.random() < 0.5:
        text = f"{who} pays for {a} {thing} at {p} dollars each. {he.title()} had {m} dollars."
    return Story(
        "change", (m, a, p), f"{text} How many dollars does {who} have left?",
        (WorkedStep(f"The {thing} cost", a, "*", p, "dollars"),
         WorkedStep(f"{who} has", m, "-", a * p, "dollars left")),
    )  # fmt: skip


def fractions(rng: random.Random) -> Story:
    """A fraction given away, and some found. How many are there now?"""
    ((who, he), (friend, _)), thing = _people(rng, 2), rng.choice(THINGS + FRUITS)
    d, part, m = rng.choice((2, 3, 4, 5)), rng.randint(2, 12), rng.randint(2, 40)
    n = d * part
    text = (
        f"{who} has {n} {thing}. {he.title()} gives {PARTS[d]} of them to {friend},"
        f" and then {he} finds {m} more."
    )
    if rng.random() < 0.5:
        text = f"From {n} {thing} {who} sells {PARTS[d]} to {friend}. Then {he} gets {m} more."
    return Story(
        "fractions", (n, d, m), f"{text} How many {thing} does {who} have now?",
        (WorkedStep(f"{who} gives away", n, "/", d, thing),
         WorkedStep(f"{he.title()} keeps", n, "-", part, thing),
         WorkedStep(f"Now {he} has", n - part, "+", m, thing)),
    )  # fmt: skip


def weeks(rng: random.Random) -> Story:
    """A number per day for some weeks, and some more. How many in all?"""
    (who, _), (verb, thing) = _person(rng), rng.choice(DAILY)
    w, a, m = rng.randint(2, 4), rng.randint(2, 9), rng.randint(2, 40)
    text = f"{who} {verb} {a} {thing} a day for {w} weeks, and {m} more {thing} on the last day."
    if rng.random() < 0.5:
        text = f"For {w} weeks {who} {verb} {a} {thing} each day, and then {m} {thing} more."
    return Story(
        "weeks", (w, a, m, 7), f"{text} How many {thing} is that in all?",
        (WorkedStep("There are", w, "*", 7, "days"),
         WorkedStep(f"{who} {verb}", 7 * w, "*", a, f"{thing} in these days"),
         WorkedStep("In all that is", 7 * w * a, "+", m, thing)),
    )  # fmt: skip


def wages(rng: random.Random) -> Story:
    """Hours on two days at a wage, and something spent. How much is left?"""
    (who, he), (one, other) = _person(rng), rng.sample(DAYS, 2)
    a, b, p = rng.randint(2, 6), rng.randint(2, 6), rng.randint(2, 12)
    s = rng.randint(1, (a + b) * p - 1)
    text = (
        f"{who} earns {p} dollars an hour. {he.title()} works {a} hours on {one}"
        f" and {b} hours on {other}, and spends {s} dollars."
    )
    if rng.random() < 0.5:
        text = (
            f"{who} works {a} hours on {one} and {b} hours on {other} for {p} dollars an hour."
            f" {he.title()} spends {s} dollars."
        )
    return Story(
        "wages", (a, b, p, s), f"{text} How many dollars does {who} keep?",
        (WorkedStep(f"{who} works", a, "+", b, "hours"),
         WorkedStep(f"{he.title()} earns", a + b, "*", p, "dollars"),
         WorkedStep(f"{who} keeps", (a + b) * p, "-", s, "dollars")),
    )  # fmt: skip


def comparison(rng: random.Random) -> Story:
    """Three people, one with a multiple, one with fewer. How many in all?"""
    (who, _), (friend, _), (third, _) = _people(rng, 3)
    thing = rng.choice(THINGS + FRUITS)
    n, k = rng.randint(3, 12), rng.randint(2, 5)
    m = rng.randint(1, n * k - 1)
    text = (
        f"{who} has {n} {thing}. {friend} has {k} times as many,"
        f" and {third} has {m} fewer than {friend}."
    )
    if rng.random() < 0.5:
        text = (
            f"{friend} has {k} times as many {thing} as {who}, who has {n}."
            f" {third} has {m} fewer than {friend}."
        )
    x, y = n * k, n * k - m
    return Story(
        "comparison", (n, k, m), f"{text} How many {thing} do the three have in all?",
        (WorkedStep(f"{friend} has", k, "*", n, thing),
         WorkedStep(f"{third} has", x, "-", m, thing),
         WorkedStep(f"{who} and {friend} have", n, "+", x, thing),
         WorkedStep("In all they have", n + x, "+", y, thing)),
    )  # fmt: skip


def sharing(rng: random.Random) -> Story:
    """What two people have, shared equally. How much does each get?"""
    (who, _), (friend, _) = _people(rng, 2)
    thing, k, each = rng.choice(FRUITS), rng.randint(3, 9), rng.randint(2, 12)
    a = rng.randint(1, k * each - 1)
    b = k * each - a
    text = (
        f"{who} picks {a} {thing} and {friend} picks {b}."
        f" They share them equally among {k} friends."
    )
    if rng.random() < 0.5:
        text = f"{k} friends share equally the {thing} that {who} and {friend} have, {a} and {b}."
    return Story(
        "sharing", (a, b, k), f"{text} How many {thing} does each of the friends get?",
        (WorkedStep("Together they have", a, "+", b, thing),
         WorkedStep("Each of the friends gets", a + b, "/", k, thing)),
    )  # fmt: skip


def dozens(rng: random.Random) -> Story:
    """Some dozens and some more, minus what was eaten. How many are left?"""
    (who, he), fruit = _person(rng), rng.choice(FRUITS)
    k, p = rng.randint(2, 9), rng.randint(1, 60)
    eaten = rng.randint(1, min(60, 12 * k - 1))
    text = f"{who} buys {k} dozen {fruit} and finds {p} more. {he.title()} eats {eaten} of them."
    if rng.random() < 0.5:
        text = f"There are {k} dozen {fruit} in a box and {p} in a bag. {who} eats {eaten}."
    return Story(
        "dozens", (k, p, eaten, 12), f"{text} How many {fruit} are left?",
        (WorkedStep(f"{k} dozen are", k, "*", 12, fruit),
         WorkedStep("With the others there are", 12 * k, "+", p, fruit),
         WorkedStep("There are", 12 * k + p, "-", eaten, f"{fruit} left")),
    )  # fmt: skip


KINDS: dict[str, Callable[[random.Random], Story]] = {
    "purchase": purchase, "change": change, "fractions": fractions, "weeks": weeks,
    "wages": wages, "comparison": comparison, "sharing": sharing, "dozens": dozens,
}  # fmt: skip


def _people(rng: random.Random, count: int) -> list[tuple[str, str]]:
    return rng.sample(sorted(NAMES.items()), count)


def _person(rng: random.Random) -> tuple[str, str]:
    return _people(rng, 1)[0]
