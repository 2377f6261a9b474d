"""Random rows of the tasks with choices, in the formats of their datasets on the Hub."""

import random
from pathlib import Path

from data.multiple_choice import CHOICE_TASKS
from tests import toys

WORDS = "the cat sat on a mat and Ice melts when heat is added to it because water boils".split()


def random_words(rng: random.Random, most: int = 8) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))


def arc_row(rng: random.Random, i: int) -> dict:
    """Three, four or five choices; labels by letter or by number."""
    n = rng.choice((3, 4, 4, 4, 5))
    labels = list(rng.choice(("ABCDE", "12345")))[:n]
    choices = {"text": [f"{random_words(rng)} {j}" for j in range(n)], "label": labels}
    return {"id": f"q{i}", "question": random_words(rng) + rng.choice(("?", "", " ", ": \n")),
            "choices": choices, "answerKey": rng.choice(labels)}  # fmt: skip


def mmlu_row(rng: random.Random, i: int) -> dict:
    subjects = ("abstract_algebra", "virology", "high_school_us_history")
    return {"question": f" {random_words(rng)} {i}?\n", "subject": subjects[i % 3],
            "choices": [random_words(rng, 3) for _ in range(4)],
            "answer": rng.randrange(4)}  # fmt: skip


def hellaswag_row(rng: random.Random, i: int) -> dict:
    """With WikiHow's markup, also at the end of the context."""
    marks = rng.choice(("", " [title] How", " [step]", "  then [substeps] ", " [open"))
    after = rng.choice(("", "THE Cat"))
    endings = [f"{random_words(rng)}. [step] {j}" for j in range(4)]
    return {"ind": i, "activity_label": "Making Tea", "ctx_a": f" {random_words(rng)}{marks}",
            "ctx_b": after, "ctx": "unused", "endings": endings,
            "label": str(rng.randrange(4))}  # fmt: skip


ROWS = {"arc-easy": arc_row, "arc-challenge": arc_row, "mmlu": mmlu_row, "hellaswag": hellaswag_row}


def rows_of(name: str, split: str, count: int = 12) -> list[dict]:
    rng = random.Random(f"{name} {split}")
    return [ROWS[name](rng, i) for i in range(count)]


def splits(name: str) -> dict[str, list[dict]]:
    """The rows of every split on the Hub; HellaSwag's test split has no labels."""
    found = {split: rows_of(name, split) for split in ("train", "validation", "test")}
    if name == "mmlu":
        found["test"].sort(key=lambda row: row["subject"])
        found["dev"] = rows_of(name, "dev", 15)
        found["auxiliary_train"] = [row | {"subject": ""} for row in found.pop("train")]
    if name == "hellaswag":
        found["test"] = [row | {"label": ""} for row in found["test"]]
    return found


def write_task(folder: Path, name: str) -> None:
    """Write the files of a task's repository."""
    place = folder / CHOICE_TASKS[name].folder
    place.mkdir(parents=True)
    for split, rows in splits(name).items():
        (place / f"{split}-00000-of-00001.parquet").write_bytes(toys.parquet(rows))
