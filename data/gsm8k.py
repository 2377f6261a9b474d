r"""GSM8K: grade-school word problems with worked solutions.

    {"question": "Natalia sold clips to 48 of her friends in April, and then she sold half as many
                  clips in May. How many clips did Natalia sell altogether in April and May?",
     "answer": "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nNatalia sold 48+24 = <<48+24=72>>72
                clips altogether in April and May.\n#### 72"}

7,473 rows to learn and 1,319 to be tested on; every answer ends in `#### ` and a whole number.
Source: arXiv:2110.14168; openai/gsm8k on the Hub (MIT).
"""

from data.rows import Message, Problem, Source, read_problems
from errors import BadData
from hub import fetch

REPO = "openai/gsm8k"

# Reported as failures of an earlier tuning of this model: several steps, and units.
EXAMPLES = [
    Problem(f"example:{i}", (Message("user", question), Message("assistant", f"#### {answer}")))
    for i, (question, answer) in enumerate(
        (
            ("If a car travels 60 miles per hour, how far does it go in 1.5 hours?", 90),
            (
                "Ben's potato gun launches a potato 6 football fields. If a football field is"
                " 200 yards, how far does it go?",
                1200,
            ),
        ),
        start=1,
    )
]


def load(revision: str | None = None) -> Source:
    """Both splits of the Hub's `main` configuration, and the commit they are from."""
    folder = fetch(REPO, patterns=["main/*.parquet"], revision=revision, repo_type="dataset")
    source = Source("gsm8k", commit=folder.name)
    for split, problems in (("train", source.train), ("test", source.test)):
        files = sorted((folder / "main").glob(f"{split}-*.parquet"))
        if not files:
            raise BadData(f"{REPO} holds no main/{split}-*.parquet", "try another --data-revision")
        for file in files:
            good, bad = read_problems(file)
            problems += good
            source.bad += bad
    return source
