"""Tests of `evaluate.py --chat`: a conversation is what `generate` makes of the same turns."""

import io
import sys
from dataclasses import replace

import pytest

import evaluate
from data.rows import Message, Problem
from evaluation import chat as chat_module
from evaluation.answers import SEED_STRIDE, GenerationSettings, answers
from evaluation.chat import Conversation, questions, show
from model.cache import KVCache
from model.generate import Decoding, generate
from tests import toys
from tests.evaluations import COMMON

QUESTIONS = ("What is 3 + 4?", "And \u20ac5 \U0001f600?", "Why?")
GREEDY = Decoding(24, (toys.IM_END,), vocab_size=toys.TOKENS, seed=3)
SAMPLED = replace(GREEDY, temperature=1.0, top_k=50)


def generated(model, chat, messages, decoding, turn) -> list[int]:
    decoding = replace(decoding, seed=decoding.seed + turn * SEED_STRIDE)
    return generate(model, [chat.prompt(messages)], decoding)[0].tokens


@pytest.fixture
def decoded(monkeypatch):
    """The tokens of each call of `decode` by a conversation."""
    calls, decode = [], chat_module.decode

    def spy(*args, **options):
        calls.append([])
        for step in decode(*args, **options):
            calls[-1] += [token for _, token, _ in step if token != toys.IM_END]
            yield step

    monkeypatch.setattr(chat_module, "decode", spy)
    return calls


@pytest.mark.parametrize("decoding", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_each_turn_has_the_tokens_that_generate_returns_for_the_same_conversation(
    model, chat, decoding, decoded
):
    conversation, messages = Conversation(model, chat, decoding), []
    for turn, question in enumerate(QUESTIONS):
        messages.append(Message("user", question))
        expected = generated(model, chat, messages, decoding, turn)
        pieces = list(conversation.answer(question))
        assert decoded[turn] == expected and len(set(expected)) > 5
        assert "".join(pieces) == chat.decode(expected)
        messages.append(Message("assistant", chat.decode(expected)))
        assert conversation.messages == messages


def test_a_conversation_equals_that_of_an_evaluation(model, chat):
    turns = [
        Message(role, text) for q in QUESTIONS for role, text in (("user", q), ("assistant", ""))
    ]
    settings = GenerationSettings(SAMPLED)
    (theirs,) = answers(model, chat, [Problem("p", tuple(turns))], settings)
    conversation = Conversation(model, chat, SAMPLED)
    assert ["".join(conversation.answer(question)) for question in QUESTIONS] == theirs.turns


def test_a_character_of_several_tokens_is_shown_once_it_is_complete(model, chat, monkeypatch):
    euro, smile = chat.plain("\u20ac"), chat.plain("\U0001f600")
    assert len(euro) == 3 and len(smile) == 4
    tokens = [*chat.plain("a"), *euro, *smile, *smile[:2]]  # cut off within a character
    steps = [[(0, token, False)] for token in tokens]
    monkeypatch.setattr(chat_module, "decode", lambda *_, **__: iter(steps))
    pieces = list(Conversation(model, chat, GREEDY).answer("?"))
    assert [piece for piece in pieces if piece][:3] == ["a", "\u20ac", "\U0001f600"]
    assert "".join(pieces) == chat.decode(tokens) and pieces[-1].endswith("\ufffd")


def test_a_turn_processes_only_the_tokens_that_are_new(model, chat, monkeypatch):
    processed, prefill = [], KVCache.prefill

    def spy(cache, sequences, prompts):
        processed.append(sum(len(prompt) - cache.shared for prompt in prompts))
        return prefill(cache, sequences, prompts)

    monkeypatch.setattr(KVCache, "prefill", spy)
    conversation, before = Conversation(model, chat, GREEDY), 0
    for question in QUESTIONS:
        processed.clear()
        prompt = chat.prompt([*conversation.messages, Message("user", question)])
        list(conversation.answer(question))
        # The last three tokens of an unfinished prompt may be others in the next one.
        assert before - 3 <= len(prompt) - sum(processed) <= before and before >= 0
        before = len(prompt)


def test_a_changed_history_is_processed_again(model, chat, decoded):
    conversation = Conversation(model, chat, GREEDY)
    list(conversation.answer(QUESTIONS[0]))
    conversation.messages[0] = Message("user", "What is 3 - 4?")
    list(conversation.answer(QUESTIONS[1]))
    assert decoded[1] == generated(model, chat, conversation.messages[:3], GREEDY, 1)


def test_ctrl_c_stops_an_answer_which_stays_in_the_history(model, chat, monkeypatch, capsys):
    conversation, decode = Conversation(model, chat, GREEDY), chat_module.decode
    after = 9  # tokens

    def interrupted(*args, **options):
        for count, step in enumerate(decode(*args, **options)):
            if count == after:
                raise KeyboardInterrupt
            yield step

    monkeypatch.setattr(chat_module, "decode", interrupted)
    show(conversation, QUESTIONS[0])
    question, answer = conversation.messages
    assert answer.content and capsys.readouterr().out == answer.content + " [stopped]\n"
    after = 0
    show(conversation, QUESTIONS[1])
    assert conversation.messages == [question, answer]
    monkeypatch.undo()
    expected = generated(model, chat, [question, answer, Message("user", "Why?")], GREEDY, 1)
    assert "".join(conversation.answer("Why?")) == chat.decode(expected)


def test_ctrl_c_at_the_prompt_asks_again(monkeypatch):
    typed = iter([KeyboardInterrupt, "Why?", EOFError])

    def type_next(prompt):
        if isinstance(what := next(typed), str):
            return what
        raise what

    monkeypatch.setattr("builtins.input", type_next)
    assert list(questions()) == ["Why?"]


@pytest.mark.parametrize("end", ["", "\n", "\nnot asked\n"], ids=["pipe", "empty", "more"])
def test_a_pipe_is_a_conversation_with_the_tuned_model_or_with_the_base(
    tuned, monkeypatch, capsys, end
):
    said = []
    for model in (["--adapter", tuned / "run/best"], ["--model", tuned / "base"]):
        monkeypatch.setattr(sys, "stdin", io.StringIO("What is 3 + 4?\nWhy?\n" + end))
        evaluate.main([*map(str, model), "--chat", *COMMON])
        said.append(capsys.readouterr().out)
        assert said[-1].count("\n> ") == 3 and "not asked" not in said[-1]
        assert "\n> What is 3 + 4?\n" in said[-1] and "\n> Why?\n" in said[-1]
    assert "chat with the tuned model" in said[0] and "chat with the base model" in said[1]
    first, second = (text.partition("\n> ")[2] for text in said)
    assert first != second
