"""A problem of several assistant turns is asked turn by turn, and hears the model's own answers.

The gold answers to earlier turns are never shown: a model that goes wrong has to live with it. Each
turn is a problem of one answer, so that whatever answers those answers these.
"""

from data.rows import Message, Problem

STRIDE = 2**40  # between the turns' seeds: each turn draws its own random numbers


def turns(problem: Problem, prompt: str) -> int:
    """How many answers are asked for; one if the prompt is plain text, which has no turns."""
    return sum(m.role == "assistant" for m in problem.messages) if prompt == "chat" else 1


def next_turn(problem: Problem, said: list[str]) -> Problem:
    """`problem` up to the turn after `said`, the model's own answers, in the place of gold ones."""
    places = [i for i, m in enumerate(problem.messages) if m.role == "assistant"]
    messages = list(problem.messages[: places[len(said)] + 1])
    for place, text in zip(places, said):
        messages[place] = Message("assistant", text)
    return Problem(problem.id, tuple(messages))
