r"""ChatML as token ids. Control tokens are inserted as ids, so no text can forge a turn.

    <|im_start|>system\n...<|im_end|>\n
    <|im_start|>user\n...<|im_end|>\n
    <|im_start|>assistant\n...<|im_end|>\n

Only the assistant's text is supervised, and the `<|im_end|>` that follows it: a model that never
learns to end its turn never stops. Which turns a conversation has, its system prompt included, is
decided by the checkpoint's chat template (see `template.py`).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from data.problems import Message
from data.template import CONFIG, COPY_AGAIN, END, START, ChatTemplate
from errors import BadCheckpoint, listed
from files import read_json

# All that a `tokenizer.json` may contain: Qwen2's components, and Qwen2's pre-tokenization pattern.
# An arbitrary pattern can take exponential time, and other components can crash the process.
COMPONENTS = ("NFC", "Sequence", "Split", "ByteLevel", "BPE")
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

Tools = Sequence[Mapping[str, Any]] | None  # descriptions, as a template takes them


@dataclass
class EncodedChat:
    """The token ids of a conversation, and a flag for each: whether it is supervised."""

    tokens: list[int]
    supervised_mask: list[bool]


class ChatFormat:
    """A tokenizer and a chat template, which together turn a conversation into token ids."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate):
        self.tokenizer, self.template = tokenizer, template
        self.start, self.end = _control_ids(tokenizer)
        tokenizer.add_special_tokens([START, END])  # some declare them as ordinary added tokens
        tokenizer.encode_special_tokens = True  # a control token inside a text is encoded as text
        tokenizer.no_padding()
        tokenizer.no_truncation()

    @classmethod
    def from_folder(
        cls,
        folder: Path,
        embedding_rows: int | None = None,
        *,
        system: str | None = None,
        chat_template: str | None = None,
        adapter: Path | None = None,
    ) -> "ChatFormat":
        """Read a checkpoint's `tokenizer.json` and chat template.

        Conversations without a system turn get the prompt `system`, or the template's own if it is
        None. A template in the file `chat_template`, or else in the folder `adapter`, is used
        instead of the checkpoint's. Raises BadCheckpoint for a template that does not write
        ChatML, and as `read_tokenizer` does.
        """
        tokenizer = read_tokenizer(folder, embedding_rows)
        _control_ids(tokenizer)  # without them, no template helps
        _check_added_tokens(folder, tokenizer)
        added = tokenizer.get_added_tokens_decoder().values()
        special = dict.fromkeys((START, END, *(token.content for token in added if token.special)))
        template = ChatTemplate.find(
            folder, system=system, file=chat_template, adapter=adapter, special=tuple(special)
        )
        return cls(tokenizer, template)

    @property
    def vocab_size(self) -> int:
        """How many tokens the tokenizer has; the embedding table is padded to more rows."""
        return self.tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def default_system(self) -> str | None:
        """The system prompt of conversations without one; None if they get no system turn."""
        return self.template.default_system

    def encode(self, messages: Sequence[Message], tools: Tools = None) -> EncodedChat:
        """Encode a whole conversation; supervised are the assistant's messages and their end
        tokens, except for messages that are only context.
        """
        return _join(self._pieces(self._turns(messages, tools)), self.plain)

    def encode_all(
        self, conversations: Sequence[tuple[Sequence[Message], Tools]]
    ) -> list[EncodedChat]:
        """`encode` each (messages, tools), but tokenize each distinct text once, on all cores."""
        chats = [list(self._pieces(self._turns(*chat))) for chat in conversations]
        distinct = dict.fromkeys(piece for pieces in chats for piece, _ in pieces)
        texts = [piece for piece in distinct if isinstance(piece, str)]
        encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        ids = {text: encoding.ids for text, encoding in zip(texts, encodings, strict=True)}
        return [_join(pieces, ids.__getitem__) for pieces in chats]

    def prompt(self, messages: Sequence[Message], tools: Tools = None) -> list[int]:
        """Token ids of a conversation, up to where the assistant's next message begins."""
        turns = _join(self._pieces(self.template.turns(messages, tools, prompt=True)), self.plain)
        return [*turns.tokens, self.start, *self.plain("assistant\n")]

    def answer_ends(self, eos_ids: tuple[int, ...]) -> tuple[int, ...]:
        """The tokens that end an answer: a checkpoint's `eos_ids`, and the end of a turn.

        A base model names only `<|endoftext|>`, but turns are trained to end with `<|im_end|>`.
        """
        return tuple(dict.fromkeys((*eos_ids, self.end)))

    def plain(self, text: str) -> list[int]:
        """Token ids of a text alone, without control tokens."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: list[int]) -> str:
        """The text of `tokens`, without control tokens."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def _turns(self, messages: Sequence[Message], tools: Tools) -> list[Message]:
        """The turns that the template writes; the assistant's are supervised as its messages are.

        The template writes one turn for each of them, in order.
        """
        flags = iter([message.supervised for message in messages if message.role == "assistant"])
        return [
            turn._replace(supervised=next(flags)) if turn.role == "assistant" else turn
            for turn in self.template.turns(messages, tools)
        ]

    def _pieces(self, turns: Iterable[Message]) -> Iterator[tuple[int | str, bool]]:
        """Control token ids and texts in order, each with whether it is supervised."""
        for role, content, supervised, *_ in turns:
            yield self.start, False
            if role == "assistant":
                yield "assistant\n", False
                yield content, supervised
                yield self.end, supervised
            else:
                yield f"{role}\n{content}", False
                yield self.end, False
            yield "\n", False


def read_tokenizer(folder: Path, embedding_rows: int | None = None) -> Tokenizer:
    """A checkpoint's `tokenizer.json`.

    Raises BadCheckpoint for one that is not of Qwen2's kind, or that has an id outside the
    embedding table of `embedding_rows` rows.
    """
    path = folder / "tokenizer.json"
    remedy = "use a checkpoint with a tokenizer.json of Qwen2's kind"
    if foreign := list(_foreign(read_json(path, BadCheckpoint, remedy))):
        raise BadCheckpoint(f"{path} is not a Qwen2 tokenizer: {listed(foreign, 1)}", remedy)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise BadCheckpoint(f"{path} cannot be read: {str(error)[:100]}", remedy) from None
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values())
    if embedding_rows is not None and largest >= embedding_rows:
        raise BadCheckpoint(
            f"{path} has a token {largest}, but the embedding table has only {embedding_rows} rows",
            "use the tokenizer that belongs to the checkpoint",
        )
    return tokenizer


def _check_added_tokens(folder: Path, tokenizer: Tokenizer) -> None:
    """Raise BadCheckpoint if `tokenizer_config.json` adds tokens that `tokenizer.json` lacks.

    transformers adds them, so the model was trained with one id where there would be several here.
    """
    path = folder / CONFIG
    declared = read_json(path, BadCheckpoint, COPY_AGAIN) if path.exists() else {}
    declared = declared.get("added_tokens_decoder")
    if declared is None and (path := folder / "added_tokens.json").exists():  # an older form
        encoder = read_json(path, BadCheckpoint, COPY_AGAIN)
        declared = {str(number): {"content": token} for token, number in encoder.items()}
    entries = declared.items() if isinstance(declared, dict) else ()
    contents = {n: entry.get("content") for n, entry in entries if isinstance(entry, dict)}
    tokens = {n: content for n, content in contents.items() if isinstance(content, str)}
    added = {str(i): token.content for i, token in tokenizer.get_added_tokens_decoder().items()}
    lacking = [token for number, token in tokens.items() if added.get(number) != token]
    if lacking:
        raise BadCheckpoint(
            f"{path} adds tokens that tokenizer.json does not have: {listed(lacking, 3)}",
            "write both files again with transformers: AutoTokenizer.from_pretrained"
            f"('{folder}').save_pretrained('{folder}')",
        )


def _control_ids(tokenizer: Tokenizer) -> tuple[int, int]:
    start, end = (tokenizer.token_to_id(token) for token in (START, END))
    if start is None or end is None:
        raise BadCheckpoint(
            f"the tokenizer has no {START} or {END}", "use a checkpoint with a ChatML tokenizer"
        )
    return start, end


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
        # transformers 5 writes a template that adds nothing where it writes a new tokenizer.json.
        adds_nothing = (
            value.get("type") == "TemplateProcessing" and value.get("special_tokens") == {}
        )
        if value.get("type", "BPE") not in COMPONENTS and not adds_nothing:
            yield f"part {value['type']}"
        if value.get("dropout"):
            yield f"random merges (dropout {value['dropout']})"
        if value.get("Regex", WORDS) != WORDS:
            yield f"pattern {value['Regex']}"
        value = [part for key, part in value.items() if key not in ("vocab", "merges")]
    if isinstance(value, list):
        for part in value:
            yield from _foreign(part)
