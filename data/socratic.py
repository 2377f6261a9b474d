r"""GSM8K with a sub-question before each step: the problem is solved in a conversation.

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

The questions are those of `gsm8k.py`, with other answers: in a mixture of both, a problem is on the
same side of the split in each. Some rows have a sub-question without a step, repeated on the next
line with its step; the first is dropped.
"""  # noqa: E501

from data.gsm8k import load_configuration
from data.rows import Message, Problem, Source, parse_row

SEPARATOR = " ** "  # between a sub-question and its step


def load(revision: str | None = None) -> Source:
    """Both splits of the dataset's `socratic` configuration, at `revision`."""
    return load_configuration("gsm8k-socratic", "socratic", revision, parse_turns)


def parse_turns(row: object, id: str) -> Problem:
    """A row as a conversation of several turns; ValueError with the reason if it is not one."""
    plain = parse_row(row, id)
    *lines, last = plain.answer.split("\n")
    if not last.startswith("#### "):
        raise ValueError("its answer does not end with a line '#### N'")
    steps: list[list[str]] = []  # [sub-question, step]
    for line in lines:
        question, separator, step = line.partition(SEPARATOR)
        if separator:
            steps.append([question, step])
        elif steps:
            steps[-1][1] += "\n" + line  # the step continues on this line
        else:
            raise ValueError(
                f"its answer does not begin with a sub-question and {SEPARATOR.strip()}"
            )
    steps = [[question, step] for question, step in steps if question.strip() and step.strip()]
    if not steps:
        raise ValueError("its answer has no sub-question with a step")
    steps[0][0] = f"{plain.question}\n{steps[0][0]}"
    steps[-1][1] += "\n" + last
    messages = []
    for question, step in steps:
        messages += [Message("user", question), Message("assistant", step)]
    return Problem(id, tuple(messages), original_question=plain.question)
