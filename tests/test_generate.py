"""Tests of decoding; the reference is transformers, a full forward pass, or a prompt decoded alone.

Legend: T tokens, B sequences, C hidden size, V vocabulary size.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lora.inject import LoRAConfig, adapters, disabled, inject, merge
from model.attention import attend_example
from model.cache import AttentionAfter, KVCache, attend_each_after, attend_slots, shared_prefix
from model.generate import NOT_FINITE, Decoding, decode, generate, most_likely, sample
from model.load import load_model
from model.packed import PackedWeights, packing_works
from model.qwen2 import Qwen2
from tests import toys

LENGTHS = (5, 1, 19, 8)
ENDS = (7, 11, 60, 123, 200, 250)  # end tokens that end the sequences at different steps


def examples(lengths=LENGTHS, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(toys.TOKENS, (n,), generator=generator) for n in lengths]


def states(model: Qwen2, text: torch.Tensor) -> torch.Tensor:
    """Hidden states (T, C) of one text by the full forward pass."""
    device = model.head_weight.device
    return model(text.to(device), torch.arange(len(text), device=device), [len(text)])


def logits(model: Qwen2, text: torch.Tensor) -> torch.Tensor:
    return states(model, text) @ model.head_weight.t()  # (T, V)


@pytest.fixture(scope="module")
def model(lively_checkpoint, device):
    return load_model(lively_checkpoint, dtype=torch.float32, device=device)


def options(max_new_tokens: int = 24, eos_ids: tuple[int, ...] = (), **others) -> Decoding:
    """By default greedy, without end tokens."""
    return Decoding(max_new_tokens, eos_ids, vocab_size=toys.TOKENS, **others)


def answers(model, prompts, decoding=options(), **others):
    """The tokens of each answer of `generate`."""
    prompts = [prompt.tolist() for prompt in prompts]
    return [answer.tokens for answer in generate(model, prompts, decoding, **others)]


def test_greedy_text_of_128_tokens_equals_transformers(lively_checkpoint, model):
    from transformers import AutoModelForCausalLM

    prompts = examples([11, 30], seed=4)
    reference = AutoModelForCausalLM.from_pretrained(lively_checkpoint).eval()
    for prompt in prompts:
        whole = reference.generate(
            prompt[None], do_sample=False, max_new_tokens=128, min_new_tokens=128,
            repetition_penalty=1.0, suppress_tokens=list(range(toys.TOKENS, toys.TABLE)),
            eos_token_id=toys.TABLE + 1,
        )  # fmt: skip
        truth = whole[0, len(prompt) :].tolist()
        assert len(truth) == 128 and len(set(truth)) > 30
        assert answers(model, [prompt], options(128)) == [truth]


@torch.no_grad()
def test_cached_decoding_equals_the_full_forward_pass(model):
    prompts = examples()
    for prompt, answer in zip(prompts, answers(model, prompts), strict=True):
        whole = torch.cat([prompt, torch.tensor(answer)])
        picked = logits(model, whole)[len(prompt) - 1 : -1, : toys.TOKENS].argmax(dim=1)
        assert picked.tolist() == answer and len(set(answer)) > 5


@torch.inference_mode()
@pytest.mark.parametrize("shared", [0, 4], ids=["no shared prefix", "a shared prefix"])
def test_cached_hidden_states_equal_those_of_the_full_forward_pass(model, shared):
    (begin,) = examples([shared], seed=5)
    steps = 60
    texts = [torch.cat([begin, rest]) for rest in examples([steps + n for n in (6, 1, 3)])]
    prefix = None
    if shared:
        prefix = KVCache(model, 1)
        prefix.prefill([0], [begin.tolist()])
    cache = KVCache(model, 8, room=20, prefix=prefix)  # so that it grows, and has parts
    ends = [shared + n for n in (6, 1, 3)]  # of the prompts
    starts = [text[:n].tolist() for text, n in zip(texts, ends, strict=True)]
    hidden = torch.cat([cache.prefill([0, 1], starts[:2]), cache.prefill([2], starts[2:])])
    for _ in range(steps):
        truth = torch.stack([states(model, text[:end])[-1] for text, end in zip(texts, ends)])
        torch.testing.assert_close(hidden, truth, atol=5e-5, rtol=0)
        hidden = cache.advance([int(text[end]) for text, end in zip(texts, ends)])  # (B, C)
        ends = [end + 1 for end in ends]


def test_prompts_after_a_prefix_in_one_call_equal_one_call_each():
    generator = torch.Generator().manual_seed(0)
    lengths, shared = [3, 1, 9], 5
    q, k, v = (torch.randn(13, n, 8, generator=generator) for n in (4, 2, 2))
    keys, values = torch.randn(2, shared, 2, 8, generator=generator)
    one = AttentionAfter(shared, lengths, q.device)(0, keys, values, q, k, v)
    torch.testing.assert_close(one, attend_each_after(keys, values, q, k, v, lengths))


@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-6), (torch.bfloat16, 0.01)])
def test_attention_over_slots_equals_the_plain_formula(dtype, error):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 2, n, 64, generator=generator) for n in (7, 50, 50))
    k, v = k * 3, v.to(dtype)  # so that scores are large
    mask = torch.arange(50) >= torch.tensor([0, 20, 49])[:, None, None, None]  # (3, 1, 1, 50)
    scores = q.double() @ k.double().transpose(2, 3) / 8 + torch.where(mask, 0.0, -torch.inf)
    truth = scores.softmax(dim=-1) @ v.double()
    assert (attend_slots(q, k, v, mask).double() - truth).norm() < error * truth.norm()


@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-6), (torch.bfloat16, 0.01)])
def test_attention_of_an_examples_last_tokens_equals_that_of_the_whole_example(dtype, error):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(200, n, 16, generator=generator) for n in (14, 2, 2))
    whole = attend_example(q, k, v)
    found = attend_example(q[-150:], k, v.to(dtype))
    assert (found.float() - whole[-150:]).norm() < error * whole.norm()


GREEDY = options(40, ENDS)
SAMPLED = options(40, ENDS, temperature=0.8, top_k=40, top_p=0.95, seed=3)
both = pytest.mark.parametrize("decoding", [GREEDY, SAMPLED], ids=["greedy", "sampled"])


def one_by_one(model, prompts, decoding):
    """Each prompt's answer when it is decoded alone."""
    return [answers(model, [p], decoding, sequence_ids=[i])[0] for i, p in enumerate(prompts)]


@both
def test_the_other_prompts_and_their_order_do_not_change_a_text(model, decoding):
    prompts = examples((5, 1, 19, 8, 8, 2, 13), seed=2)
    alone = one_by_one(model, prompts, decoding)
    assert len({len(a) for a in alone}) > 3, "sequences must end at different steps"
    for batch_size in (1, 2, 5, 100):  # with fewer than seven, finished sequences are replaced
        assert answers(model, prompts, replace(decoding, batch_size=batch_size)) == alone
    backwards = answers(model, prompts[::-1], decoding, sequence_ids=list(range(7))[::-1])
    assert backwards[::-1] == alone


@both
def test_a_shared_prefix_and_equal_prompts_do_not_change_a_text(model, decoding):
    begin, *rests = examples([30, 3, 9, 1, 6], seed=6)
    prompts = [torch.cat([begin, rest]) for rest in rests for _ in range(3)]
    assert shared_prefix(model, [p.tolist() for p in prompts]).lengths == [len(begin)]
    alone = one_by_one(model, prompts, decoding)
    assert answers(model, prompts, decoding) == alone
    assert answers(model, prompts, replace(decoding, batch_size=8)) == alone


def test_a_shared_prefix_and_equal_prompts_are_computed_once(model, monkeypatch):
    begin, *rests = examples([40, 3, 9, 1], seed=6)
    prompts = [torch.cat([begin, rest]) for rest in rests for _ in range(4)]
    forward, computed = Qwen2.forward, []

    def counting(self, tokens, positions, lengths, cache=None):
        computed.append(len(tokens))
        return forward(self, tokens, positions, lengths, cache)

    monkeypatch.setattr(Qwen2, "forward", counting)
    answers(model, prompts, options(1, batch_size=48))
    assert computed == [40, 3 + 9 + 1]


def test_a_prompt_that_begins_another_shares_all_but_its_last_token(model):
    (text,) = examples([80])
    prompts = [text[:40], text, text[:41]]
    assert shared_prefix(model, [p.tolist() for p in prompts]).lengths == [39]
    alone = [answers(model, [p])[0] for p in prompts]
    assert answers(model, prompts) == alone
    assert shared_prefix(model, [text.tolist()] * 5) is None, "nothing would be saved"


def test_each_prompt_may_have_its_own_limit(model):
    prompts, limits = examples((5, 1, 19, 8, 8, 2, 13), seed=2), [3, 9, 1, 30, 2, 12, 5]
    unlimited = answers(model, prompts, options(30))
    limited = answers(model, prompts, options(30, batch_size=4), limits=limits)
    assert limited == [text[:limit] for text, limit in zip(unlimited, limits, strict=True)]


def test_equal_prompts_get_different_samples_and_a_seed_reproduces_them(model):
    (prompt,) = examples([6])
    decoding = options(12, temperature=1.0, seed=1)
    first = answers(model, [prompt] * 4, decoding)
    assert len(set(map(tuple, first))) == 4
    assert answers(model, [prompt] * 4, decoding) == first
    assert answers(model, [prompt] * 4, replace(decoding, seed=2)) != first


def test_a_temperature_near_zero_is_greedy_and_a_high_one_is_not(model):
    prompts = examples()
    cold, hot = (answers(model, prompts, options(temperature=t)) for t in (1e-5, 3.0))
    assert cold == answers(model, prompts) != hot


def plain_distribution(logits: torch.Tensor, decoding: Decoding) -> dict[int, float]:
    """The probability of each allowed token: of the top k, the fewest that reach top_p."""
    p = torch.softmax(logits.double() / decoding.temperature, dim=0).tolist()
    kept, total = {}, 0.0
    for token in sorted(range(len(p)), key=lambda i: -p[i])[: decoding.top_k or len(p)]:
        if total >= decoding.top_p:
            break
        kept[token] = p[token]
        total += p[token]
    return {token: probability / total for token, probability in kept.items()}


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.2, 3), st.integers(0, 14), st.floats(0.05, 1))
def test_sampling_follows_the_plain_formula_of_top_k_and_top_p(seed, temperature, top_k, top_p):
    decoding = options(temperature=temperature, top_k=top_k, top_p=top_p)
    logits = 2 * torch.randn(12, generator=torch.Generator().manual_seed(seed))
    truth = plain_distribution(logits, decoding)
    n = 2000
    draws = (torch.arange(n).double() + 0.5) / n  # evenly spaced, so that frequencies are exact
    picked = sample(logits.expand(n, -1), decoding, draws).bincount(minlength=12) / n
    assert set(picked.nonzero().flatten().tolist()) <= set(truth)
    expected = torch.tensor([truth.get(token, 0.0) for token in range(12)])
    torch.testing.assert_close(picked, expected, atol=1.1 / n, rtol=0)


def plain_sample(logits: torch.Tensor, decoding: Decoding, draw: float) -> int:
    """The inverse CDF over the allowed tokens by id; tokens equal to the last allowed count too."""
    kept = plain_distribution(logits, decoding)
    least = min(logits[token].item() for token in kept)
    p = torch.softmax(logits.double() / decoding.temperature, dim=0).tolist()
    p = [x if logit.item() >= least else 0.0 for x, logit in zip(p, logits, strict=True)]
    reached, target = 0.0, draw * sum(p)
    for token, probability in enumerate(p):
        reached += probability
        if reached > target:
            return token
    raise AssertionError("no token reaches the draw")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("top_k", [0, 1, 40, 3000])
@pytest.mark.parametrize("top_p", [1.0, 0.02, 0.6, 0.999])
def test_a_draw_gives_the_token_of_the_plain_formula_without_sorting(dtype, top_k, top_p):
    generator = torch.Generator().manual_seed(0)
    steep = torch.tensor([[0.3], [1.0], [4.0]] * 4)  # so that a nucleus has few or many tokens
    logits = (steep * torch.randn(12, 5000, generator=generator)).to(dtype)  # bf16 has many ties
    draws = torch.rand(12, generator=generator)
    decoding = options(temperature=0.9, top_k=top_k, top_p=top_p)
    truth = [plain_sample(row, decoding, draw.item()) for row, draw in zip(logits, draws)]
    assert sample(logits, decoding, draws).tolist() == truth
    alone = [sample(logits[i : i + 1], decoding, draws[i : i + 1]).item() for i in range(12)]
    assert alone == truth


def test_the_smallest_and_largest_draws_pick_the_first_and_the_last_allowed_token():
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0, -200.0]])
    for draw, token in ((0.0, 1), (1 - 2**-53, 3), (1.0, 3)):  # a draw may be rounded up to 1
        draws = torch.tensor([draw], dtype=torch.float64)
        assert sample(logits, options(temperature=1.0, top_k=3), draws).item() == token
    half = torch.tensor([0.5], dtype=torch.float64)  # where the second of two equal tokens begins
    assert sample(torch.zeros(1, 2), options(temperature=1.0), half).item() == 1


def test_bf16_logits_are_sampled_in_fp32():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, generator=generator).bfloat16().expand(500, -1)
    draws = (torch.arange(500).double() + 0.5) / 500
    decoding = options(temperature=0.7, top_p=0.9)
    assert torch.equal(sample(logits, decoding, draws), sample(logits.float(), decoding, draws))


@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (3, 1.0), (0, 0.9), (3, 0.9)])
def test_a_row_with_nan_is_reported_and_the_other_rows_are_sampled(top_k, top_p):
    logits = torch.zeros(3, 100)
    logits[1, 7], logits[2, 7] = torch.nan, torch.inf
    decoding = options(temperature=1.0, top_k=top_k, top_p=top_p)
    first, *others = sample(logits, decoding, torch.full((3,), 0.5)).tolist()
    assert first >= 0 and others == [NOT_FINITE, NOT_FINITE]


def test_where_rounded_logits_are_equal_fp32_decides():
    head = torch.zeros(40, 2).bfloat16()
    head[7], head[30] = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 2**-9])
    hidden = torch.ones(1, 2).bfloat16()
    logits = F.linear(hidden, head)  # both are 1 in bf16
    assert logits[0, 7] == logits[0, 30] and logits.argmax() == 7
    assert most_likely(logits, hidden, head).item() == 30
    head[30] = head[7]
    assert most_likely(F.linear(hidden, head), hidden, head).item() == 7, "the lowest of equal ones"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_picks_the_token_of_fp32_logits_of_the_same_hidden_states(dtype):
    generator = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(n, 64, generator=generator).to(dtype) for n in (3000, 500))
    logits, exact = F.linear(hidden, head), F.linear(hidden.float(), head.float())
    assert ((logits == logits.amax(dim=1, keepdim=True)).sum(dim=1) > 1).any(), "no ties"
    assert torch.equal(most_likely(logits, hidden, head), exact.argmax(dim=1))
    logits[5, 3] = torch.nan
    assert most_likely(logits, hidden, head)[5].item() == NOT_FINITE


@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_ids_beyond_the_tokenizer_are_never_picked(lively_checkpoint, temperature):
    model = load_model(lively_checkpoint, dtype=torch.float32)
    hidden = states(model, examples()[2]).abs().mean()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone(), requires_grad=False)
    model.lm_head.weight[toys.TOKENS :] *= 1e4
    likeliest = logits(model, examples()[2]).argmax(dim=1)
    assert hidden > 0 and (likeliest >= toys.TOKENS).any(), "unused ids must have large logits"
    texts = answers(model, examples(), options(temperature=temperature))
    assert max(token for text in texts for token in text) < toys.TOKENS


def test_an_answer_ends_at_an_end_token_or_is_cut_off_by_the_limit(model):
    prompts = [p.tolist() for p in examples()]
    endless = answers(model, examples())
    end = endless[0][9]
    ended = generate(model, prompts, options(24, (end, toys.IM_END)))
    for text, answer in zip(endless, ended, strict=True):
        length = text.index(end) if end in text else len(text)
        assert answer.tokens == text[:length]
        assert answer.cut_off == (end not in text)
    assert not ended[0].cut_off and ended[0].tokens


def test_a_limit_of_n_gives_n_tokens_and_a_limit_of_zero_none(model):
    texts = answers(model, examples())
    for limit in (1, 2, 17):
        assert answers(model, examples(), options(limit)) == [text[:limit] for text in texts]
    (empty,) = generate(model, [[1]], options(0))
    assert empty.tokens == [] and empty.cut_off
    assert generate(model, [], options(5)) == []


def test_finished_sequences_are_removed_and_replaced_by_waiting_ones(model, monkeypatch):
    prompts, sizes = examples((5, 1, 19, 8, 8, 2, 13), seed=2), []
    forward = Qwen2.forward

    def counting(self, tokens, positions, lengths, cache=None):
        if positions.min() > 0:  # a decoding step, not a prefill
            sizes.append(len(lengths))
        return forward(self, tokens, positions, lengths, cache)

    monkeypatch.setattr(Qwen2, "forward", counting)
    limits = [2, 9, 4, 4, 3, 6, 3]
    answers(model, prompts, options(batch_size=7), limits=limits)
    # One prompt joins in each step, so that sequence i gets its tokens in the steps from i on.
    live = [sum(i < step < i + n for i, n in enumerate(limits)) for step in range(1, 11)]
    assert sizes == [n for n in live if n]
    sizes.clear()
    answers(model, prompts, options(batch_size=2), limits=limits)
    assert set(sizes) == {1, 2} and sum(sizes) == sum(limits) - len(limits)


def test_an_answer_ends_with_the_token_at_which_stopped_returns_true(model):
    texts = answers(model, examples())
    calls = []

    def stopped(answer):
        calls.append(list(answer))
        return answer == texts[2][:7]

    ended = generate(model, [p.tolist() for p in examples()], options(), stopped=stopped)
    assert [a.tokens for a in ended] == [*texts[:2], texts[2][:7], texts[3]]
    assert [a.cut_off for a in ended] == [True, True, False, True]
    assert texts[0][:1] in calls and texts[0] in calls and texts[2][:8] not in calls


def test_each_step_yields_a_token_of_each_live_sequence_end_tokens_included(model):
    prompts, end = [p.tolist() for p in examples()], answers(model, examples())[0][3]
    steps = list(decode(model, prompts, options(8, (end,))))
    ended = set()
    for step in steps:
        assert [i for i, _, _ in step] == [i for i in range(4) if i not in ended]
        assert all(done == (token == end) for _, token, done in step)
        ended |= {i for i, _, done in step if done}
    assert 0 in ended and len(steps) <= 8


# Packed weights


@pytest.fixture
def bf16(tmp_path):
    folder = toys.write_checkpoint(tmp_path / "bf16", std=0.3, dtype=torch.bfloat16)
    model = load_model(folder, dtype=torch.bfloat16)
    inject(model, LoRAConfig())
    for i, layer in enumerate(adapters(model)):
        layer.lora_B.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(i))
    return model.eval()


needs_packing = pytest.mark.skipif(not packing_works(), reason="no packed bf16 kernel")


@needs_packing
@pytest.mark.parametrize("tokens", [1, 7, 33, 300])
def test_packed_products_equal_plain_ones_bit_for_bit(bf16, tokens):
    (text,) = examples([tokens])
    with torch.inference_mode():
        plain = states(bf16, text)
        weights = PackedWeights(bf16, bf16.head_weight[: toys.TOKENS])
        with weights.active():
            assert torch.equal(states(bf16, text), plain)
        head = F.linear(plain, bf16.head_weight[: toys.TOKENS])
        assert torch.equal(weights.logits(plain), head)


@needs_packing
def test_decoding_respects_disabled_and_merged_adapters(bf16):
    prompts = examples()
    adapted = answers(bf16, prompts)
    with disabled(bf16):
        base = answers(bf16, prompts)
    merge(bf16)
    assert base != adapted
    weights = [layer.base_layer.weight for layer in adapters(bf16)]
    packed = PackedWeights(bf16, bf16.head_weight).layers
    assert all(any(module.weight is w for module in packed) for w in weights)
    assert answers(bf16, prompts) != base
    with disabled(bf16):
        assert answers(bf16, prompts) == base


def test_between_steps_the_model_is_unpatched_and_trainable(bf16):
    steps = decode(bf16, [[1, 2]], options(5))
    next(steps)
    assert not any("forward" in vars(module) for module in bf16.modules())
    states(bf16, torch.tensor([3, 4])).float().sum().backward()
    assert all(layer.lora_A.grad is not None for layer in adapters(bf16))


def test_fp32_weights_are_not_packed(model):
    assert not PackedWeights(model, model.head_weight).layers
