"""Rows in no known format: what they are, and the remedy for each kind."""

import re

from data.turns import BadRow, from_json, is_blank

TOKEN_COLUMNS = ("input_ids", "token_ids", "tokens")
# Names that other people's questions and answers have; they are suggested, never guessed.
QUESTIONS = ("question", "prompt", "instruction", "query", "problem", "input", "user", "human",
             "text", "document")  # fmt: skip
ANSWERS = ("answer", "completion", "output", "response", "solution", "target", "assistant",
           "generated_solution", "chosen", "label", "summary")  # fmt: skip
PREFERENCE = re.compile(  # columns of DPO's data
    r"chosen(?:_.*)?|(?:.*_)?rejected(?:_.*)?|(?:non_|dis)?preferred_(?:output|response|answer)"
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
    if found := [name for name in row if PREFERENCE.fullmatch(name) and name in has]:
        raise BadRow(f"it is preference data ({', '.join(found)})", preference_remedy(row))
    if {"role", "content"} <= has or {"role", "text"} <= has or {"from", "value"} <= has:
        raise BadRow(
            "it is a single turn of a conversation",
            'write one row per conversation: {"messages": [{"role": "user", "content": "..."},'
            " ...]}",
        )


def preference_remedy(row: dict, without: str = "") -> str:
    """How to train on the preferred answers alone; `without` helps if the row has its own."""
    chosen, question = from_json(row.get("chosen")), suggested(row, QUESTIONS)
    if isinstance(chosen, list) and len(chosen) > 1:
        way = "give --columns messages=chosen"
    elif isinstance(chosen, str) and question:
        way = f"give --columns prompt={question},completion=chosen"
    elif is_blank(chosen) and without:
        way = without
    else:
        way = "write each conversation as messages, with the chosen answer as the last turn"
    return (
        "this is not a trainer for preference data (DPO, KTO): to fine-tune on the chosen answers,"
        f" {way}"
    )


def suggestion(row: dict) -> str:
    """What may help a row whose columns are in no format or incomplete; "" if nothing is known."""
    for name, value in row.items():
        value = from_json(value)
        if isinstance(value, list) and value and isinstance(value[0], dict):
            if {"role", "from"} & value[0].keys():
                return f"if {str(name)[:30]} holds the turns: --columns messages={str(name)[:30]}"
            if value[0].keys() & {*QUESTIONS, *ANSWERS, "messages", "conversations"}:
                return (
                    f"if {str(name)[:30]} holds rows, write them alone into a file; if it holds the"
                    " turns of one conversation, write these as messages"
                )
        if isinstance(value, list) and len(value) > 1 and all(isinstance(t, str) for t in value):
            return f"if {str(name)[:30]} holds the turns of a conversation, write them as messages"
    question, answer = suggested(row, QUESTIONS), suggested(row, ANSWERS)
    if question and answer:
        if "context" in row and row.get("context") is not None:
            return f"give --columns instruction={question},input=context,output={answer}"
        return f"give --columns question={question},answer={answer}"
    texts = [name for name, value in row.items() if isinstance(value, str) and not is_blank(value)]
    if set(texts) & {"text", "content"} and not answer:
        return (
            "texts without a question and an answer (continued pretraining) are not supported:"
            " write each row as a question and an answer, or as messages"
        )
    return ""


def suggested(row: dict, names: tuple[str, ...]) -> str | None:
    """The first of `names` that a row has as a column of text, in any case; None if it has none."""
    own = {str(n).casefold(): n for n, v in row.items() if isinstance(v, str) and not is_blank(v)}
    return next((own[name] for name in names if name in own), None)


def remedy_for_non_object(row: object) -> str:
    """What to do about a row that is not a JSON object; "" if nothing is known."""
    if isinstance(row, list) and row and isinstance(row[0], dict):
        return 'write each conversation as an object: {"messages": [...]}'
    if isinstance(row, str) and from_json(row) is not row:
        return "each row is JSON inside of a JSON text: write it with json.dumps once, not twice"
    if isinstance(row, str):
        return (
            "lists of texts (continued pretraining) are not supported: write each row as a question"
            " and an answer, or as messages"
        )
    return ""
