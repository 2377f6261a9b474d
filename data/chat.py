"""ChatML by token ids: control tokens are placed by hand, so no text can forge a turn.

    <|im_start|>system\n...<|im_end|>\n<|im_start|>user\n...<|im_end|>\n<|im_start|>assistant\n...<|im_end|>\n

Only what the assistant says is supervised, through its `<|im_end|>`: a model that never learns to
end its turn never stops. The default system prompt is the checkpoint's own, read off its chat
template.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from data.rows import Message
from errors import BadCheckpoint, listed
from files import read_json

START, END = "<|im_start|>", "<|im_end|>"
# What a `tokenizer.json` may ask for: Qwen2's own parts, and its own split into words. Others'
# expressions may run for ever, and others' parts take the whole process down when misused.
PARTS = ("NFC", "Sequence", "Split", "ByteLevel", "BPE")
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The literal system prompt of a template; its newline is a character, or still Jinja's escape.
DEFAULT_SYSTEM = re.compile(r"<\|im_start\|>system(?:\n|\\n)([^{}'\"]{1,2000}?)<\|im_end\|>")
LONGEST_TEMPLATE = 2**17  # characters that are read; published ones have some 5,000


@dataclass
class EncodedChat:
    """Token ids, and for each whether it is supervised."""

    tokens: list[int]
    supervised_mask: list[bool]


class ChatFormat:
    """A checkpoint's tokenizer and its default system prompt (None: no system turn is added)."""

    def __init__(self, tokenizer: Tokenizer, default_system: str | None):
        self.tokenizer, self.default_system = tokenizer, default_system
        ids = [tokenizer.token_to_id(token) for token in (START, END)]
        if None in ids:
            raise BadCheckpoint(
                f"the tokenizer has no {START} or {END}", "give a checkpoint that speaks ChatML"
            )
        self.start, self.end = ids
        tokenizer.encode_special_tokens = True  # control tokens inside a text stay text
        tokenizer.no_padding()
        tokenizer.no_truncation()

    @classmethod
    def from_folder(cls, folder: Path, table_rows: int | None = None) -> "ChatFormat":
        """Read `tokenizer.json` and the chat template; ids must fit the embedding table."""
        path = folder / "tokenizer.json"
        remedy = "give a checkpoint with a tokenizer.json of Qwen2's kind"
        if foreign := list(_foreign(read_json(path, BadCheckpoint, remedy))):
            raise BadCheckpoint(f"{path} is not Qwen2's: {listed(foreign, 1)}", remedy)
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise BadCheckpoint(f"{path} cannot be read: {str(error)[:100]}", remedy) from None
        chat = cls(tokenizer, read_default_system(folder))
        largest = max(tokenizer.get_vocab(with_added_tokens=True).values())
        if table_rows is not None and largest >= table_rows:
            raise BadCheckpoint(
                f"{path} has a token {largest}, and the embedding table {table_rows} rows",
                "give a checkpoint with its own tokenizer",
            )
        return chat

    @property
    def vocab_size(self) -> int:
        """Tokens with a meaning; the embedding table has more rows than that."""
        return self.tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, messages: tuple[Message, ...]) -> EncodedChat:
        """A whole conversation; every assistant turn and its end token are supervised."""
        return self._lay_out(messages, self._ids)

    def encode_all(self, conversations: list[tuple[Message, ...]]) -> list[EncodedChat]:
        """`encode` of each, sooner: every text once, on all cores."""
        texts: dict[str, list[int]] = {}
        for messages in conversations:  # only to learn which texts there are
            self._lay_out(messages, lambda text: texts.setdefault(text, []))
        found = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        texts = {text: encoding.ids for text, encoding in zip(texts, found, strict=True)}
        return [self._lay_out(messages, texts.__getitem__) for messages in conversations]

    def _lay_out(
        self, messages: tuple[Message, ...], ids: Callable[[str], list[int]]
    ) -> EncodedChat:
        out = EncodedChat([], [])
        for role, content in self._with_system(messages):
            if role == "assistant":
                self._add(out, [self.start, *ids("assistant\n")], False)
                self._add(out, [*ids(content), self.end], True)
            else:
                self._add(out, [self.start, *ids(f"{role}\n{content}"), self.end], False)
            self._add(out, ids("\n"), False)
        return out

    def prompt(self, messages: tuple[Message, ...]) -> list[int]:
        """What the model is given so that its next tokens are the next assistant turn."""
        return [*self.encode(messages).tokens, self.start, *self._ids("assistant\n")]

    def plain(self, text: str) -> list[int]:
        """Token ids of a text without any turns."""
        return self._ids(text)

    def decode(self, tokens: list[int]) -> str:
        """The text of `tokens`, control tokens left out."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def _with_system(self, messages: tuple[Message, ...]) -> tuple[Message, ...]:
        if self.default_system is None or messages[0].role == "system":
            return messages
        return (Message("system", self.default_system), *messages)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    @staticmethod
    def _add(out: EncodedChat, ids: list[int], supervised: bool) -> None:
        out.tokens += ids
        out.supervised_mask += [supervised] * len(ids)


def _foreign(value: object) -> Iterator[str]:
    """What the JSON of a tokenizer asks for that Qwen2's does not."""
    if isinstance(value, dict):
        if value.get("type", "BPE") not in PARTS:
            yield f"part {value['type']}"
        if value.get("Regex", WORDS) != WORDS:
            yield f"expression {value['Regex']}"
        value = [part for key, part in value.items() if key not in ("vocab", "merges")]
    if isinstance(value, list):
        for part in value:
            yield from _foreign(part)


def read_default_system(folder: Path) -> str | None:
    """The system prompt that the checkpoint's template inserts when a conversation has none."""
    template, path = None, folder / "chat_template.jinja"  # where transformers 5 keeps it
    try:
        if path.exists():
            with path.open() as file:
                template = file.read(LONGEST_TEMPLATE)
        elif (path := folder / "tokenizer_config.json").exists():
            template = read_json(path, BadCheckpoint, "copy it again").get("chat_template")
    except (OSError, ValueError) as error:
        raise BadCheckpoint(f"{path} cannot be read: {error}", "copy it again") from None
    if not isinstance(template, str):
        return None
    found = DEFAULT_SYSTEM.search(template, 0, LONGEST_TEMPLATE)
    return found.group(1) if found else None
