r"""GSM8K with a question before each step: a conversation in which the problem is solved in turns.

    {"question": "A robe takes 2 bolts of blue fiber and half that much white fiber.  How many bolts
                  in total does it take?",
     "answer": "How many bolts of white fiber does it take? ** It takes 2/2=<<2/2=1>>1 bolt of white
                fiber\nHow many bolts in total does it take? ** So the total amount of fabric is
                2+1=<<2+1=3>>3 bolts of fabric\n#### 3"}

becomes

    user       A robe takes 2 bolts ... in total does it take?\nHow many bolts of white fiber does it take?
    assistant  It takes 2/2=<<2/2=1>>1 bolt of white fiber
    user       How many bolts in total does it take?
    assistant  So the total amount of fabric is 2+1=<<2+1=3>>3 bolts of fabric\n#### 3

The rows are those of `gsm8k.py` with other answers, and have the same question here too: in a
mixture a problem is on one side of the split in both. Some rows have a sub-question without a step,
which is asked again below; it is left out.
"""  # noqa: E501

from data.gsm8k import REPO
from data.rows import Message, Problem, Source, parse_row, read_problems
from errors import BadData
from hub import fetch

BETWEEN = " ** "  # a sub-question and its step


def load(revision: str | None = None) -> Source:
    """Both splits of the Hub's `socratic` configuration, and the commit they are from."""
    folder = fetch(REPO, patterns=["socratic/*.parquet"], revision=revision, repo_type="dataset")
    source = Source("gsm8k-socratic", commit=folder.name)
    for split, problems in (("train", source.train), ("test", source.test)):
        files = sorted((folder / "socratic").glob(f"{split}-*.parquet"))
        if not files:
            raise BadData(
                f"{REPO} holds no socratic/{split}-*.parquet", "try another --data-revision"
            )
        for file in files:
            good, bad = read_problems(file, parse_turns)
            problems += good
            source.bad += bad
    return source


def parse_turns(row: object, id: str) -> Problem:
    """A row as the conversation above; ValueError with the reason if it has not that form."""
    whole = parse_row(row, id)
    *lines, last = whole.answer.split("\n")
    if not last.startswith("#### "):
        raise ValueError("its answer does not end with a line '#### N'")
    pairs: list[list[str]] = []  # [sub-question, step]
    for line in lines:
        asked, between, step = line.partition(BETWEEN)
        if between:
            pairs.append([asked, step])
        elif pairs:
            pairs[-1][1] += "\n" + line  # a step of several lines
        else:
            raise ValueError(f"its answer does not begin with a sub-question and {BETWEEN.strip()}")
    pairs = [[asked, step] for asked, step in pairs if asked.strip() and step.strip()]
    if not pairs:
        raise ValueError("its answer has no sub-question with a step")
    pairs[0][0] = f"{whole.question}\n{pairs[0][0]}"
    pairs[-1][1] += "\n" + last
    roles = ("user", "assistant")
    messages = (Message(role, text) for pair in pairs for role, text in zip(roles, pair))
    return Problem(id, tuple(messages), stem=whole.question)
