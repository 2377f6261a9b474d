"""Rows in no known format: what they are, and the remedy for each kind."""

from data.turns import BadRow, from_json, is_blank

TOKEN_COLUMNS = ("input_ids", "token_ids", "tokens")
# Names that other people's questions and answers have; they are suggested, never guessed.
QUESTIONS = ("question", "prompt", "instruction", "query", "problem", "input", "user", "human")
ANSWERS = ("answer", "completion", "output", "response", "solution", "target", "assistant",
           "generated_solution", "chosen")  # fmt: skip
PREFERENCE_REMEDY = (
    "this is not a trainer for preference data (DPO, KTO): to fine-tune on the chosen answers,"
)


def way_in(row: dict, found: list[str]) -> str:
    """How to read a column that is refused next to a question and an answer."""
    name, *others = found
    answer = next((n for n in ANSWERS if isinstance(row.get(n), str)), None)
    question = next((n for n in QUESTIONS if n != name and isinstance(row.get(n), str)), None)
    if others or not answer or not question:
        return ""
    if name in ("context", "passage", "input"):
        return (f"to put it after the {question}: --columns"
                f" instruction={question},input={name},output={answer}; ")  # fmt: skip
    if name == "instruction":
        return (f"to put it before the {question}: --columns"
                f" instruction={name},input={question},output={answer}; ")  # fmt: skip
    return ""


def refuse_other_data(row: dict) -> None:
    """Raise BadRow for a row that is complete in no format, if it is of another well-known kind."""
    has = {name for name, value in row.items() if not is_blank(value)}
    lists = {name: row[name] for name in TOKEN_COLUMNS if isinstance(row.get(name), list)}
    if tokens := [name for name, ids in lists.items() if all(isinstance(i, int) for i in ids)]:
        raise BadRow(
            f"it holds token ids ({tokens[0]})",
            "give the texts: the tokenizer and the template of the base make the token ids",
        )
    if {"chosen", "rejected"} & has:
        turns = isinstance(row.get("chosen"), list)
        way = "messages=chosen" if turns else f"prompt={suggested(row, QUESTIONS) or 'prompt'},"
        way += "" if turns else "completion=chosen"
        raise BadRow("it is preference data (chosen, rejected)",
                     f"{PREFERENCE_REMEDY} give --columns {way}")  # fmt: skip
    if {"role", "content"} <= has or {"from", "value"} <= has:
        raise BadRow(
            "it is a single turn of a conversation",
            'write one row per conversation: {"messages": [{"role": "user", "content": "..."},'
            " ...]}",
        )


def suggestion(row: dict) -> str:
    """What may help a row whose columns are in no format or incomplete; "" if nothing is known."""
    for name, value in row.items():
        value = from_json(value)
        if isinstance(value, list) and value and isinstance(value[0], dict):
            if {"role", "from"} & value[0].keys():
                return f"if {str(name)[:30]} holds the turns: --columns messages={str(name)[:30]}"
            if value[0].keys() & {*QUESTIONS, *ANSWERS, "messages", "conversations"}:
                return f"write the rows in {str(name)[:30]} alone into a file"
    question, answer = suggested(row, QUESTIONS), suggested(row, ANSWERS)
    if question and answer:
        if "context" in row and row.get("context") is not None:
            return f"give --columns instruction={question},input=context,output={answer}"
        return f"give --columns question={question},answer={answer}"
    texts = [name for name, value in row.items() if isinstance(value, str) and not is_blank(value)]
    if set(texts) & {"text", "content"} and not (question or answer):
        return (
            "texts without a question and an answer (continued pretraining) are not supported:"
            " write each row as a question and an answer, or as messages"
        )
    return ""


def suggested(row: dict, names: tuple[str, ...]) -> str | None:
    """The first of these columns that holds a text in `row`; None if none does."""
    return next((n for n in names if isinstance(row.get(n), str) and not is_blank(row[n])), None)


def remedy_for_non_object(row: object) -> str:
    """What to do about a row that is not a JSON object; "" if nothing is known."""
    if isinstance(row, list) and row and isinstance(row[0], dict):
        return 'write each conversation as an object: {"messages": [...]}'
    if isinstance(row, str):
        return (
            "lists of texts (continued pretraining) are not supported: write each row as a question"
            " and an answer, or as messages"
        )
    return ""
