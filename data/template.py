"""A checkpoint's chat template: found, rendered, and read back as turns.

A template is a program that writes a conversation as text, and only running it tells what it
writes. So it is run (see `sandbox.py`) on every conversation, and the ChatML in its output is read
back as turns, from which `ChatFormat` makes token ids. Whatever the template does is thus done
exactly: insert a default system prompt, strip texts, lay out tool calls. A layout other than ChatML
is refused, and so is a template that drops or changes a text.

While the template runs, the control tokens inside texts are replaced by words. The control tokens
in its output are therefore its own, and no text can forge a turn.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.rows import Message
from data.sandbox import DATE, Program, Unrenderable
from errors import BadCheckpoint, BadData
from files import read_json

START, END = "<|im_start|>", "<|im_end|>"
SPECIAL = (START, END, "<|endoftext|>")
# For a checkpoint without a template: its tokenizer has ChatML's tokens, so it was made for ChatML.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% endif %}"
)
# Put before a template, it gives this system turn to conversations that begin without one.
WITH_SYSTEM = (
    "{%- if messages[0]['role'] != 'system' %}{%- set messages ="
    " [{'role': 'system', 'content': 'PROMPT'}] + messages %}{%- endif %}"
)
THINKING = re.compile(r"<think>(.*?)</think>(.*)", re.DOTALL)  # before an answer: Qwen3
FILE, FOLDER, CONFIG = "chat_template.jinja", "additional_chat_templates", "tokenizer_config.json"
MAX_READ = 2**18  # characters of a file; the sandbox takes fewer
VARIABLES = ("bos_token", "eos_token", "pad_token", "unk_token")
COPY_AGAIN = "download or copy it again"
GIVE_A_FILE = "give a template that writes ChatML with --chat-template FILE"
GIVE_TOOLS = "give a template that lays out tool calls, as Qwen2.5's does: --chat-template FILE"
PROBE = (
    Message("system", " \nProbe one.\n "),
    Message("user", " \nProbe two.\n "),
    Message("assistant", " \nProbe three.\n "),
    Message("user", " \nProbe four.\n "),
)


@dataclass(frozen=True)
class TemplateSource:
    """A folder's template, and the one named tool_use for conversations with tools, if any.

    `variables` are the special tokens that they can name.
    """

    place: Path | None = None  # None: the folder has no template
    texts: Mapping[str, str] = field(default_factory=lambda: {"default": CHATML})
    variables: Mapping[str, str] = field(default_factory=dict)


def read_source(folder: Path) -> TemplateSource:
    """Find a folder's templates by transformers' rules: files go before `tokenizer_config.json`.

    Raises BadCheckpoint if they cannot be read, or if none of several is named default.
    """
    path = folder / CONFIG
    config = read_json(path, BadCheckpoint, COPY_AGAIN) if path.exists() else {}
    tokens = {name: config.get(name) for name in VARIABLES}
    tokens = {k: v.get("content") if isinstance(v, dict) else v for k, v in tokens.items()}
    variables = {name: token for name, token in tokens.items() if isinstance(token, str)}
    files = {"default": folder / FILE} if (folder / FILE).exists() else {}
    files |= {file.stem: file for file in sorted((folder / FOLDER).glob("*.jinja"))}
    texts = config.get("chat_template")
    if files:
        path = files.get("default", folder / FOLDER)
        texts = {name: read_text(file) for name, file in files.items()}
    elif texts is None:
        return TemplateSource(variables=variables)
    elif isinstance(texts, str):
        texts = {"default": texts}
    elif isinstance(texts, list) and all(isinstance(part, dict) for part in texts):
        texts = {str(part.get("name")): part.get("template") for part in texts}
    if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
        raise BadCheckpoint(f"{path}: chat_template is neither a text nor named texts", GIVE_A_FILE)
    if "default" not in texts:
        names = ", ".join(sorted(texts)) or "none at all"
        raise BadCheckpoint(f"{path} has no chat template named default: {names}", GIVE_A_FILE)
    return TemplateSource(
        path, {k: texts[k] for k in ("default", "tool_use") if k in texts}, variables
    )


def read_text(path: Path) -> str:
    """The text of a template's file; BadCheckpoint if it cannot be read."""
    try:
        with path.open(encoding="utf-8") as file:
            return file.read(MAX_READ)
    except (OSError, ValueError) as error:
        raise BadCheckpoint(f"{path} cannot be read: {error}", COPY_AGAIN) from None


class ChatTemplate:
    """A chat template that writes ChatML.

    `default_system` is the system prompt of a conversation without one: the given `system`, or what
    the template inserts. None: such a conversation gets no system turn.
    """

    def __init__(
        self, source: TemplateSource, *, system: str | None = None, special: Sequence[str] = SPECIAL
    ):
        """Try it on a probe conversation. `special`: the control tokens of the tokenizer.

        Raises BadCheckpoint that names what is odd about the template.
        """
        self.source, self.system, self.special = source, system, tuple(special)
        self.origin = "the checkpoint's"
        self._programs: dict[str, Program] = {}
        try:
            for name, text in source.texts.items():
                self._programs[name] = Program(text)
            first, *_ = self._write(self._complete(PROBE[1:2]), prompt=True)
            self.default_system = first.content if first.role == "system" else None
            self._turns(PROBE[1:2], prompt=True)
            self._turns(PROBE[1:3])
            self.strips = self._turns(PROBE, prompt=True) != PROBE
        except Unrenderable as odd:
            raise BadCheckpoint(
                f"the chat template in {source.place} cannot be used: it {odd}", self._remedy()
            ) from None

    @classmethod
    def find(
        cls,
        folder: Path,
        *,
        system: str | None = None,
        file: str | None = None,
        adapter: Path | None = None,
        special: Sequence[str] = SPECIAL,
    ) -> "ChatTemplate":
        """The template in `file`; else of the adapter's folder, if it has one; else of `folder`."""
        source, origin = read_source(folder), "the checkpoint's"
        if file is not None:
            source = TemplateSource(
                Path(file), {"default": read_text(Path(file))}, source.variables
            )
            origin = "given by --chat-template:"
        elif adapter is not None:
            own = read_source(adapter)
            if own.place and own.texts != source.texts:
                source, origin = own, "not the checkpoint's but the adapter's"
        template = cls(source, system=system, special=special)
        template.origin = origin
        return template

    def turns(
        self,
        messages: Sequence[Message | Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        prompt: bool = False,
    ) -> tuple[Message, ...]:
        """A conversation as the complete turns that the template writes.

        A message is a Message, or a mapping as transformers' `apply_chat_template` takes it. With
        `prompt`, an answer is to follow. Raises BadData if the template does not write ChatML here,
        or drops or changes a text.
        """
        try:
            return self._turns(messages, tools, prompt=prompt)
        except Unrenderable as odd:
            roles = ", ".join(str(_mapping(message).get("role")) for message in messages)
            raise BadData(
                f"the chat template in {self.source.place} cannot lay out a conversation of {roles}"
                f"{' with tools' if tools else ''}: it {odd}",
                f"leave that row out, or {GIVE_TOOLS if tools or 'tool' in roles else GIVE_A_FILE}",
            ) from None

    def lines(self) -> list[str]:
        """For people: which template it is, and which system prompt."""
        place = self.source.place
        template = f"{self.origin} {place}" if place else "none, so turns are written as ChatML"
        strips = "; it strips white space around texts" if self.strips else ""
        prompt = "none" if self.default_system is None else repr(self.default_system)
        given = " (--system)" if self.system is not None else ""
        return [f"chat template: {template}{strips}", f"system prompt: {prompt[:1000]}{given}"]

    def files(self) -> dict[str, str]:
        """The template for other software, by file name, with `system` as its default prompt.

        In the folder of an adapter or a merged model, they make all software, `evaluate.py`
        included, use the prompts of the training.
        """
        system, head = self.system, ""
        if system is not None:
            system = system.encode("unicode_escape").decode().replace("'", "\\'")
            head = WITH_SYSTEM.replace("PROMPT", system)
        path = {"default": FILE, "tool_use": f"{FOLDER}/tool_use.jinja"}
        return {path[name]: head + text for name, text in self.source.texts.items()}

    def fingerprint(self) -> str | None:
        """SHA-256 of the template and its system prompt; None if both are the checkpoint's."""
        if self.system is None and self.origin == "the checkpoint's":
            return None
        return hashlib.sha256(repr(sorted(self.files().items())).encode()).hexdigest()

    def _remedy(self) -> str:
        """What helps where the probe conversation failed."""
        if self.system is None and "default" in self._programs:
            try:  # is the template odd only where there is no system turn?
                self._turns(PROBE[:3])
                self._turns(PROBE, prompt=True)
                return "give the system prompt with --system TEXT"
            except Unrenderable:
                pass
        return GIVE_A_FILE

    def _complete(self, messages: Sequence[Message | Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The messages as mappings, begun with the given system prompt if they have none."""
        wanted = [_mapping(message) for message in messages]
        if self.system is not None and wanted[0].get("role") != "system":
            wanted.insert(0, {"role": "system", "content": self.system})
        return wanted

    def _turns(
        self, messages: Sequence[Any], tools: Sequence[Any] | None = None, *, prompt: bool = False
    ) -> tuple[Message, ...]:
        wanted = self._complete(messages)
        turns = self._write(wanted, tools, prompt=prompt)
        if not tools and all(_is_plain(message) for message in wanted):
            self._check(turns, [Message(**message) for message in wanted])
        else:
            _check_tools(turns, wanted, tools or ())
        return tuple(turns)

    def _write(self, messages: Any, tools: Any = None, *, prompt: bool) -> list[Message]:
        """Render the template, and read the turns."""
        role, texts = messages[-1].get("role"), [*_texts(messages), *_texts(tools)]
        whole = "\n".join(texts)
        words: dict[str, str] = {}
        if any(token in whole for token in self.special):
            word = hashlib.sha256(whole.encode()).hexdigest()  # which no text contains
            words = {token: f"{word}x{number}x" for number, token in enumerate(self.special)}
            messages, tools = _replaced(messages, words), _replaced(tools, words)
        name = "default" if tools is None or "tool_use" not in self._programs else "tool_use"
        variables = {
            **self.source.variables, "messages": messages, "tools": tools, "documents": None,
            "add_generation_prompt": prompt,
        }  # fmt: skip
        text = self._programs[name].render(len(whole), variables)
        others = [token for token in self.special if token not in (START, END)]
        if found := [token for token in (DATE, *others) if token in text]:
            written = "today's date, which no rerun could repeat" if DATE in found else found[0]
            raise Unrenderable(f"writes {written}")
        turns, rest = _read_turns(text, texts)
        turns += _last_turn(rest, role, prompt)
        words = {word: token for token, word in words.items()}
        return [Message(turn.role, _replaced(turn.content, words)) for turn in turns]

    def _check(self, turns: list[Message], wanted: list[Message]) -> None:
        """Raise Unrenderable unless the turns are those of a conversation without tools."""
        if wanted[0].role != "system" or not wanted[0].content.strip():
            # What stands for an empty system turn, or for none, is the template's choice.
            system = next((turn.content for turn in turns[:1] if turn.role == "system"), None)
            if wanted[0].role != "system" and system != self.default_system:
                raise Unrenderable("inserts different system prompts into conversations")
            turns = turns[system is not None :]
            wanted = wanted[wanted[0].role == "system" :]
        written = ", ".join(turn.role for turn in turns)
        if written != ", ".join(turn.role for turn in wanted):
            raise Unrenderable(f"writes turns of {written or 'nobody'}")
        for turn, (role, text, *_) in zip(turns, wanted, strict=True):
            answer = _answer(turn.content) if role == "assistant" else turn.content
            if answer not in (text, text.strip(), _answer(text).lstrip("\n")):
                changed = f"{text[:60]!r} becomes {turn.content[:60]!r}"
                raise Unrenderable(f"changes a text of the {role}: {changed}")


def _answer(text: str) -> str:
    """An answer without an empty thinking block before it, which Qwen3's template adds to the last
    one; a thinking block with text is laid out as the template does it.
    """
    found = THINKING.fullmatch(text)
    if not found:
        return text
    thoughts, answer = found[1].strip("\n"), found[2].lstrip("\n")
    return f"<think>\n{thoughts}\n</think>\n\n{answer}" if thoughts else answer


def _is_plain(message: Mapping[str, Any]) -> bool:
    text = message.get("content")
    return message.keys() == {"role", "content"} and message["role"] != "tool" and type(text) is str


def _mapping(message: Message | Mapping[str, Any]) -> dict[str, Any]:
    """A message as transformers passes it on: without what is None.

    Templates write the arguments of a tool call as JSON; arguments that are JSON in a text, as in
    OpenAI's form, are parsed first, as vLLM does.
    """
    if isinstance(message, Message):
        extra = message.extra or {}
        # A turn that only calls tools has no content; templates distinguish that from an empty one.
        content = message.content if message.content or not extra else None
        message = {"role": message.role, "content": content, **extra}
    found = {key: value for key, value in message.items() if value is not None}
    if isinstance(calls := found.get("tool_calls"), list):
        found["tool_calls"] = [_parsed(call) for call in calls]
    return found


def _parsed(call: Any) -> Any:
    if not isinstance(call, Mapping):
        return call
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _parsed(call["function"])}
    try:
        return {**call, "arguments": json.loads(call["arguments"])}
    except (KeyError, TypeError, ValueError, RecursionError):
        return call  # no JSON in a text


def _texts(value: Any) -> Iterator[str]:
    """Every text in a JSON value, keys of objects included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        parts = [*value, *value.values()] if isinstance(value, Mapping) else value
        for part in parts:
            yield from _texts(part)


def _replaced(value: Any, words: Mapping[str, str]) -> Any:
    """A JSON value with words replaced in every text."""
    if isinstance(value, str):
        for word, other in words.items():
            value = value.replace(word, other)
    elif isinstance(value, Mapping):
        value = {_replaced(key, words): _replaced(part, words) for key, part in value.items()}
    elif isinstance(value, (list, tuple)):
        value = [_replaced(part, words) for part in value]
    return value


def _read_turns(text: str, texts: Sequence[str]) -> tuple[list[Message], str | None]:
    """Read ChatML: the turns, and what follows the last `<|im_start|>` if that turn has no end.

    The `texts` of the conversation only serve to recognize what the template writes around them.
    """
    first, *pieces = text.split(START)
    if first or not pieces:
        raise Unrenderable(f"begins a conversation with {first[:60]!r}")
    turns: list[Message] = []
    for piece in pieces:
        head, end, after = piece.partition(END)
        role, newline, body = head.partition("\n")
        is_last = len(turns) == len(pieces) - 1
        if is_last and not end:
            return turns, piece
        if not newline or not role.isidentifier():
            raise Unrenderable(f"begins a turn with {(START + head)[:60]!r}")
        if not end:
            both = [form for text in texts if text.strip() for form in (text.strip(), text)]
            known = [form for form in both if form in body]
            after = body.rpartition(known[-1])[2] if known else body
        if after != "\n" and (after or not is_last):
            raise Unrenderable(f"ends a turn of the {role} with {(end + after)[:60]!r}")
        turns.append(Message(role, body))
    return turns, None


def _last_turn(rest: str | None, role: str, prompt: bool) -> list[Message]:
    """The last turn, if the template left it open; Unrenderable if its output ends oddly."""
    if rest is None and prompt:
        raise Unrenderable("does not begin an answer when asked to (add_generation_prompt)")
    if rest is None or rest == "assistant\n" and (prompt or role != "assistant"):
        return []  # some templates begin the answer even without add_generation_prompt
    found, newline, body = rest.partition("\n")
    if prompt or found != role or not newline:
        raise Unrenderable(f"begins an answer with {(START + rest)[:60]!r}")
    return [Message(role, body)]  # as in Qwen1.5: training ends it, or no answer would ever end


def _check_tools(turns: list[Message], wanted: list[dict], tools: Sequence[Any]) -> None:
    """Raise Unrenderable if a text of a conversation with tools is missing or in a wrong turn."""
    answers = [turn.content for turn in turns if turn.role == "assistant"]
    count = sum(message.get("role") == "assistant" for message in wanted)
    if len(answers) != count:
        raise Unrenderable(f"writes {len(answers)} turns of the assistant, not {count}")
    whole = "\n".join(turn.content for turn in turns)
    needed = [(text, whole) for tool in tools for text in _texts(_named(tool))]
    for message in wanted:
        place = answers.pop(0) if message.get("role") == "assistant" else whole
        kept = {k: v for k, v in message.items() if k not in ("role", "name", "tool_call_id")}
        needed += [(text, place) for c in kept.pop("tool_calls", ()) for text in _texts(_named(c))]
        needed += [(text, place) for part in kept.values() for text in _texts(part)]
    for text, place in needed:
        if text.strip() not in place and json.dumps(text, ensure_ascii=False)[1:-1] not in place:
            raise Unrenderable(f"leaves out {text[:60]!r}")


def _named(call: Any) -> Any:
    """The name and the arguments of a tool or a call: what a template has to write of it."""
    call = call.get("function", call) if isinstance(call, Mapping) else call
    return [call.get("name"), call.get("arguments")] if isinstance(call, Mapping) else call
