"""A conversation in the terminal: each answer is shown while it is generated.

The model sees the whole conversation, its own answers included, exactly as in an evaluation. Keys
and values of the earlier turns stay in a cache, so that each turn processes only what is new.
"""

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import replace

import torch

from data.chat import ChatFormat
from data.rows import Message
from evaluation.answers import SEED_STRIDE
from evaluation.measure import Models
from model.cache import KVCache
from model.generate import Decoding, decode
from model.qwen2 import Qwen2


class Conversation:
    """The turns so far, and a cache of the tokens that they became."""

    def __init__(self, model: Qwen2, chat: ChatFormat, decoding: Decoding):
        self.model, self.chat, self.decoding = model, chat, decoding
        self.messages: list[Message] = []
        self._cached: tuple[list[int], KVCache | None] = [], None  # tokens, and their cache

    def answer(self, question: str) -> Iterator[str]:
        """Yields the answer to the next question in pieces, each once its characters are complete.

        Joined, they are the text of the tokens that `generate` returns for the conversation so far.
        What was yielded becomes the model's turn, also if the iteration is given up before the end;
        a question without any answer is forgotten.
        """
        asked = [*self.messages, Message("user", question)]
        seed = self.decoding.seed + len(self.messages) // 2 * SEED_STRIDE  # of this turn
        prompt, tokens, shown = self.chat.prompt(asked), [], ""
        try:
            prefix = self._extend_cache(prompt[:-1])
            steps = decode(self.model, [prompt], replace(self.decoding, seed=seed), prefix=prefix)
            for ((_, token, _),) in steps:
                tokens += [] if token in self.decoding.eos_ids else [token]
                text = self.chat.decode(tokens)
                if not text.endswith("\ufffd"):  # a character may consist of several tokens
                    piece, shown = text[len(shown) :], text
                    yield piece
            text = self.chat.decode(tokens)
            piece, shown = text[len(shown) :], text
            yield piece  # an incomplete last character
        finally:
            if shown:
                self.messages = [*asked, Message("assistant", shown)]

    @torch.inference_mode()
    def _extend_cache(self, tokens: list[int]) -> KVCache | None:
        """A cache of exactly `tokens`; what they share with the former one is not processed again.

        The template may have changed earlier turns, and a text may be encoded into other tokens
        than it was generated from: only equal tokens at the beginning are shared.
        """
        before, prefix = self._cached
        pairs = enumerate(zip(before, tokens))
        shared = next((i for i, (a, b) in pairs if a != b), min(len(before), len(tokens)))
        if shared:
            prefix.lengths[0] = shared
        if len(tokens) > shared:
            cache = KVCache(self.model, 1, prefix=prefix if shared else None)
            cache.prefill([0], [tokens])
            prefix = cache
        self._cached = tokens, prefix
        return prefix


def talk(
    models: Models, chat: ChatFormat, decoding: Decoding, question: str | None, *, chatting: bool
) -> None:
    """Print each model's answer to `question`; if `chatting`, then talk with the last of them."""
    for name, context in models.contexts.items():
        conversation = Conversation(models.network, chat, decoding)
        with context():
            if question:
                print(f"\n{name}: ", end="", flush=True)
                show(conversation, question)
    if chatting:
        with context():
            converse(conversation, name)


def questions() -> Iterator[str]:
    """The lines typed at a prompt, or of a pipe, up to an empty one or the end of the input."""
    with contextlib.suppress(ImportError):  # arrow keys and history, where the system has them
        import readline  # noqa: F401
    with contextlib.suppress(AttributeError):
        sys.stdin.reconfigure(errors="replace")
    while True:
        print()
        try:
            text = input("> ").strip()
        except EOFError:
            return print()
        except KeyboardInterrupt:  # came too late for the answer
            continue
        if not sys.stdin.isatty():
            print(text)  # a terminal shows what is typed, a pipe does not
        if not text:
            return
        yield text


def converse(conversation: Conversation, name: str) -> None:
    """Answer questions until they end; Ctrl-C stops an answer, which stays as it is."""
    print(f"chat with the {name} model: Ctrl-C stops an answer, an empty line or Ctrl-D ends")
    for question in questions():
        show(conversation, question)


def show(conversation: Conversation, question: str) -> None:
    """Print the answer to `question` while it is generated."""
    answer = conversation.answer(question)
    try:
        with contextlib.closing(answer):
            for piece in answer:
                print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print(" [stopped]", end="")
    finally:  # an error begins on a line of its own
        print()
