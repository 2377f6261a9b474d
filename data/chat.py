r"""ChatML as token ids. Control tokens are inserted as ids, so no text can forge a turn.

    <|im_start|>system\n...<|im_end|>\n
    <|im_start|>user\n...<|im_end|>\n
    <|im_start|>assistant\n...<|im_end|>\n

Only the assistant's text is supervised, and the `<|im_end|>` that follows it: a model that never
learns to end its turn never stops. The default system prompt is read from the checkpoint's chat
template.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from data.rows import Message
from errors import BadCheckpoint, listed
from files import read_json

START, END = "<|im_start|>", "<|im_end|>"
# All that a `tokenizer.json` may contain: Qwen2's components, and Qwen2's pre-tokenization pattern.
# An arbitrary pattern can take exponential time, and other components can crash the process.
COMPONENTS = ("NFC", "Sequence", "Split", "ByteLevel", "BPE")
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# A literal system prompt in a template, where a newline may still be written as Jinja's escape.
DEFAULT_SYSTEM = re.compile(r"<\|im_start\|>system(?:\n|\\n)([^{}'\"]{1,2000}?)<\|im_end\|>")
MAX_TEMPLATE = 2**17  # characters of a template that are searched; published ones have about 5,000


@dataclass
class EncodedChat:
    """The token ids of a conversation, and a flag for each: whether it is supervised."""

    tokens: list[int]
    supervised_mask: list[bool]


class ChatFormat:
    """A tokenizer, and the system prompt of conversations without one (None: they get none)."""

    def __init__(self, tokenizer: Tokenizer, default_system: str | None):
        self.tokenizer, self.default_system = tokenizer, default_system
        ids = [tokenizer.token_to_id(token) for token in (START, END)]
        if None in ids:
            raise BadCheckpoint(
                f"the tokenizer has no {START} or {END}", "use a checkpoint with a ChatML tokenizer"
            )
        self.start, self.end = ids
        tokenizer.encode_special_tokens = True  # a control token inside a text is encoded as text
        tokenizer.no_padding()
        tokenizer.no_truncation()

    @classmethod
    def from_folder(cls, folder: Path, embedding_rows: int | None = None) -> "ChatFormat":
        """Read a checkpoint's `tokenizer.json` and chat template.

        Raises BadCheckpoint for a tokenizer that is not of Qwen2's kind, or that has an id outside
        the embedding table of `embedding_rows` rows.
        """
        path = folder / "tokenizer.json"
        remedy = "use a checkpoint with a tokenizer.json of Qwen2's kind"
        if foreign := list(_foreign(read_json(path, BadCheckpoint, remedy))):
            raise BadCheckpoint(f"{path} is not a Qwen2 tokenizer: {listed(foreign, 1)}", remedy)
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise BadCheckpoint(f"{path} cannot be read: {str(error)[:100]}", remedy) from None
        chat = cls(tokenizer, read_default_system(folder))
        largest = max(tokenizer.get_vocab(with_added_tokens=True).values())
        if embedding_rows is not None and largest >= embedding_rows:
            raise BadCheckpoint(
                f"{path} has a token {largest}, but the embedding table has only"
                f" {embedding_rows} rows",
                "use the tokenizer that belongs to the checkpoint",
            )
        return chat

    @property
    def vocab_size(self) -> int:
        """How many tokens the tokenizer has; the embedding table is padded to more rows."""
        return self.tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, messages: tuple[Message, ...]) -> EncodedChat:
        """Encode a whole conversation; supervised are the assistant's messages and end tokens.

        Messages that are not to be supervised are context.
        """
        return _join(self._pieces(messages), self.plain)

    def encode_all(self, conversations: list[tuple[Message, ...]]) -> list[EncodedChat]:
        """`encode` each conversation, but tokenize each distinct text once, on all cores."""
        conversations = [list(self._pieces(messages)) for messages in conversations]
        pieces = dict.fromkeys(piece for pieces in conversations for piece, _ in pieces)
        texts = [piece for piece in pieces if isinstance(piece, str)]
        encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        ids = {text: encoding.ids for text, encoding in zip(texts, encodings, strict=True)}
        return [_join(pieces, ids.__getitem__) for pieces in conversations]

    def prompt(self, messages: tuple[Message, ...]) -> list[int]:
        """Token ids of a conversation, up to where the assistant's next message begins."""
        return [*self.encode(messages).tokens, self.start, *self.plain("assistant\n")]

    def plain(self, text: str) -> list[int]:
        """Token ids of a text alone, without control tokens."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: list[int]) -> str:
        """The text of `tokens`, without control tokens."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def _pieces(self, messages: tuple[Message, ...]) -> Iterator[tuple[int | str, bool]]:
        """Control token ids and texts in order, each with whether it is supervised."""
        if self.default_system is not None and messages[0].role != "system":
            messages = (Message("system", self.default_system), *messages)
        for role, content, supervised, *_ in messages:
            yield self.start, False
            if role == "assistant":
                yield "assistant\n", False
                yield content, supervised
                yield self.end, supervised
            else:
                yield f"{role}\n{content}", False
                yield self.end, False
            yield "\n", False


def _join(
    pieces: Iterable[tuple[int | str, bool]], tokenize: Callable[[str], list[int]]
) -> EncodedChat:
    chat = EncodedChat([], [])
    for piece, supervised in pieces:
        ids = [piece] if isinstance(piece, int) else tokenize(piece)
        chat.tokens += ids
        chat.supervised_mask += [supervised] * len(ids)
    return chat


def _foreign(value: object) -> Iterator[str]:
    """Yield the components and patterns in a tokenizer's JSON that Qwen2's does not have."""
    if isinstance(value, dict):
        if value.get("type", "BPE") not in COMPONENTS:
            yield f"part {value['type']}"
        if value.get("Regex", WORDS) != WORDS:
            yield f"pattern {value['Regex']}"
        value = [part for key, part in value.items() if key not in ("vocab", "merges")]
    if isinstance(value, list):
        for part in value:
            yield from _foreign(part)


def read_default_system(folder: Path) -> str | None:
    """The system prompt that a checkpoint's template inserts if a conversation has none."""
    template, path = None, folder / "chat_template.jinja"  # the file that transformers 5 writes
    try:
        if path.exists():
            with path.open() as file:
                template = file.read(MAX_TEMPLATE)
        elif (path := folder / "tokenizer_config.json").exists():
            template = read_json(path, BadCheckpoint, "copy it again").get("chat_template")
    except (OSError, ValueError) as error:
        raise BadCheckpoint(f"{path} cannot be read: {error}", "copy it again") from None
    if not isinstance(template, str):
        return None
    found = DEFAULT_SYSTEM.search(template, 0, MAX_TEMPLATE)
    return found.group(1) if found else None
