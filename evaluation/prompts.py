"""How a problem is asked: as the model was trained, or as lm-evaluation-harness asks it.

    chat               the checkpoint's chat template; the answer ends with the turn
    few-shot           k solved problems, then `Question: ...\\nAnswer:`, as plain text (gsm8k)
    chain-of-thought   `Q: ...\\nA: Let's think step by step.`, as plain text (gsm8k_cot_zeroshot)

A plain-text answer has no end token of its own: it ends where the model begins the next question.
"""

from data.chat import ChatFormat
from data.rows import Problem

STOPS = {
    "chat": (),
    "few-shot": ("Question:", "</s>", "<|im_end|>"),
    "chain-of-thought": ("Q:", "</s>", "<|im_end|>"),
}


def prompt_tokens(
    problem: Problem, chat: ChatFormat, prompt: str, shots: list[Problem]
) -> list[int]:
    """Token ids after which the model's next tokens are its answer to `problem`."""
    if prompt == "chat":
        return chat.prompt(problem.messages[:-1])
    if prompt == "chain-of-thought":
        return chat.plain(f"Q: {problem.question}\nA: Let's think step by step.")
    solved = [f"Question: {shot.question}\nAnswer: {shot.answer}" for shot in shots]
    return chat.plain("\n\n".join([*solved, f"Question: {problem.question}\nAnswer:"]))


def before_stop(text: str, prompt: str) -> str:
    """`text` up to the first of the prompt's stops."""
    places = [at for at in (text.find(stop) for stop in STOPS[prompt]) if at >= 0]
    return text[: min(places)] if places else text
