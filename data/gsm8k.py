r"""GSM8K: grade-school word problems with worked solutions.

    {"question": "Natalia sold clips to 48 of her friends in April, and then she sold half as many
                  clips in May. How many clips did Natalia sell altogether in April and May?",
     "answer": "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nNatalia sold 48+24 = <<48+24=72>>72
                clips altogether in April and May.\n#### 72"}

7,473 training rows and 1,319 test rows; every answer ends with `#### ` and a whole number.
Source: arXiv:2110.14168; openai/gsm8k on the Hub (MIT).
"""

from collections.abc import Callable

from data.rows import Message, Problem, Source, parse_row, read_problems
from errors import BadData
from hub import fetch

REPO = "openai/gsm8k"

# Two questions that an earlier tuning of this model failed: several steps, and units.
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
    """Both splits of the dataset's `main` configuration, at `revision`."""
    return load_configuration("gsm8k", "main", revision, parse_row)


def load_configuration(
    name: str,
    configuration: str,
    revision: str | None,
    parse: Callable[[object, str], Problem],
) -> Source:
    """Fetch and parse both splits of one of the dataset's configurations, as a source `name`."""
    patterns = [f"{configuration}/*.parquet"]
    folder = fetch(REPO, patterns=patterns, revision=revision, repo_type="dataset")
    source = Source(name, commit=folder.name)
    for split, problems in (("train", source.train), ("test", source.test)):
        files = sorted((folder / configuration).glob(f"{split}-*.parquet"))
        if not files:
            raise BadData(
                f"{REPO} holds no {configuration}/{split}-*.parquet", "try another --data-revision"
            )
        for file in files:
            good, bad = read_problems(file, parse)
            problems += good
            source.bad += bad
    return source
