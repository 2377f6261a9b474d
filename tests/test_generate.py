"""Laws of decoding: the truth is transformers, the full forward, or a prompt decoded alone.

Legend: T tokens, B rows, C hidden size, V vocabulary.
"""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lora.inject import LoRAConfig, adapters, disabled, inject, merge
from model.attention import attend_example
from model.cache import BLOCK, KVCache, advance, attend_slots, shared_prefix
from model.generate import Sampling, decode, generate, pick
from model.load import load_model
from model.packed import PackedWeights, packing_works
from model.qwen2 import Qwen2
from tests import toys

LENGTHS = (5, 1, 19, 8)
ENDS = (7, 11, 60, 123, 200, 250)  # end tokens for which rows end at different steps


def examples(lengths=LENGTHS, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(toys.TOKENS, (n,), generator=generator) for n in lengths]


def states(model: Qwen2, row: torch.Tensor) -> torch.Tensor:
    """Hidden states (T, C) of one text by the full forward."""
    return model(row, torch.arange(len(row)), [len(row)])


def logits(model: Qwen2, row: torch.Tensor) -> torch.Tensor:
    return states(model, row) @ model.head_weight.t()  # (T, V)


@pytest.fixture(scope="module")
def model(lively_checkpoint):
    return load_model(lively_checkpoint, dtype=torch.float32)


def answers(model, prompts, **options):
    """Token lists of `generate`, greedy and without end tokens unless told otherwise."""
    options = {"max_new_tokens": 24, "eos_ids": (), "vocabulary": toys.TOKENS} | options
    return [a.tokens for a in generate(model, [p.tolist() for p in prompts], **options)]


def test_greedy_text_of_128_tokens_is_transformers(lively_checkpoint, model):
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
        assert answers(model, [prompt], max_new_tokens=128) == [truth]


@torch.no_grad()
def test_cached_decoding_is_the_full_forward(model):
    prompts = examples()
    for prompt, answer in zip(prompts, answers(model, prompts), strict=True):
        whole = torch.cat([prompt, torch.tensor(answer)])
        picked = logits(model, whole)[len(prompt) - 1 : -1, : toys.TOKENS].argmax(dim=1)
        assert picked.tolist() == answer and len(set(answer)) > 5


@torch.inference_mode()
@pytest.mark.parametrize("shared", [0, 4], ids=["nothing shared", "a shared beginning"])
def test_cached_hidden_states_are_the_full_forwards(model, shared):
    (begin,) = examples([shared], seed=5)
    rows = [torch.cat([begin, row]) for row in examples([BLOCK + 21, BLOCK + 16, BLOCK + 16])]
    prefix = None
    if shared:
        prefix = KVCache(model, [0])
        prefix.prefill(model, [begin.tolist()])
    caches = [KVCache(model, [0, 1], prefix), KVCache(model, [2], prefix)]
    seen = [shared + n for n in (6, 1, 3)]
    starts = [row[:n].tolist() for row, n in zip(rows, seen, strict=True)]
    hidden = torch.cat([caches[0].prefill(model, starts[:2]), caches[1].prefill(model, starts[2:])])
    for step in range(BLOCK + 10):  # a cache grows on the way
        truth = torch.stack([states(model, row[: n + step])[-1] for row, n in zip(rows, seen)])
        torch.testing.assert_close(hidden, truth, atol=5e-5, rtol=0)
        tokens = torch.stack([row[n + step] for row, n in zip(rows, seen)])
        hidden = advance(model, caches, tokens)  # (B, C)


@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-6), (torch.bfloat16, 0.01)])
def test_attention_over_slots_is_the_plain_formula(dtype, error):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 2, n, 64, generator=generator) for n in (7, 50, 50))
    k, v = k * 3, v.to(dtype)  # so that scores are large
    seen = torch.arange(50) >= torch.tensor([0, 20, 49])[:, None, None, None]  # (3, 1, 1, 50)
    scores = q.double() @ k.double().transpose(2, 3) / 8 + torch.where(seen, 0.0, -torch.inf)
    truth = scores.softmax(dim=-1) @ v.double()
    assert (attend_slots(q, k, v, seen).double() - truth).norm() < error * truth.norm()


@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-6), (torch.bfloat16, 0.01)])
def test_an_examples_last_tokens_attend_as_in_the_whole(dtype, error):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(200, n, 16, generator=generator) for n in (14, 2, 2))
    whole = attend_example(q, k, v)
    found = attend_example(q[-150:], k, v.to(dtype))
    assert (found.float() - whole[-150:]).norm() < error * whole.norm()


WAYS = {"greedy": Sampling(), "sampled": Sampling(temperature=0.8, top_k=40, top_p=0.95, seed=3)}


@pytest.mark.parametrize("sampling", WAYS.values(), ids=WAYS.keys())
def test_company_and_order_do_not_change_a_rows_text(model, sampling):
    prompts = examples((5, 1, 19, 8, 8, 2, 13), seed=2)
    options = {"eos_ids": ENDS, "sampling": sampling, "max_new_tokens": 40}
    alone = [answers(model, [p], rows=[i], **options)[0] for i, p in enumerate(prompts)]
    assert len({len(a) for a in alone}) > 3, "rows must end at different steps"
    for at_once in (1, 2, 5, 100):  # with fewer than seven, rows that end are replaced
        assert answers(model, prompts, at_once=at_once, **options) == alone
    backwards = answers(model, prompts[::-1], rows=list(range(7))[::-1], **options)
    assert backwards[::-1] == alone


@pytest.mark.parametrize("sampling", WAYS.values(), ids=WAYS.keys())
def test_a_shared_beginning_and_equal_prompts_change_no_text(model, sampling):
    begin, *rest = examples([30, 3, 9, 1, 6], seed=6)
    prompts = [torch.cat([begin, row]) for row in rest for _ in range(3)]
    assert shared_prefix(model, [p.tolist() for p in prompts]).used == len(begin)
    options = {"sampling": sampling, "eos_ids": ENDS, "max_new_tokens": 40}
    alone = [answers(model, [p], rows=[i], **options)[0] for i, p in enumerate(prompts)]
    assert answers(model, prompts, **options) == alone
    assert answers(model, prompts, at_once=8, **options) == alone


def test_what_prompts_share_is_computed_once(model, monkeypatch):
    begin, *rest = examples([40, 3, 9, 1], seed=6)
    prompts = [torch.cat([begin, row]) for row in rest for _ in range(4)]
    forward, computed = Qwen2.forward, []

    def counting(self, tokens, positions, lengths, cache=None):
        computed.append(len(tokens))
        return forward(self, tokens, positions, lengths, cache)

    monkeypatch.setattr(Qwen2, "forward", counting)
    answers(model, prompts, max_new_tokens=1, at_once=48)
    assert computed == [40, 3 + 9 + 1]


def test_a_prompt_that_begins_another_shares_all_but_its_last_token(model):
    (row,) = examples([80])
    prompts = [row[:40], row, row[:41]]
    assert shared_prefix(model, [p.tolist() for p in prompts]).used == 39
    alone = [answers(model, [p])[0] for p in prompts]
    assert answers(model, prompts) == alone
    assert shared_prefix(model, [row.tolist()] * 5) is None, "nothing would be saved"


def test_each_prompt_may_have_its_own_limit(model):
    prompts, limits = examples((5, 1, 19, 8, 8, 2, 13), seed=2), [3, 9, 1, 30, 2, 12, 5]
    free = answers(model, prompts, max_new_tokens=30)
    found = answers(model, prompts, max_new_tokens=limits, at_once=4)
    assert found == [text[:limit] for text, limit in zip(free, limits, strict=True)]


def test_equal_prompts_draw_different_samples_and_a_seed_repeats_them(model):
    (prompt,) = examples([6])
    draw = {"sampling": Sampling(temperature=1.0, seed=1), "max_new_tokens": 12}
    first = answers(model, [prompt] * 4, **draw)
    assert len(set(map(tuple, first))) == 4
    assert answers(model, [prompt] * 4, **draw) == first
    assert answers(model, [prompt] * 4, **draw | {"sampling": Sampling(1.0, seed=2)}) != first


def test_a_temperature_near_zero_is_greedy_and_a_high_one_is_not(model):
    prompts = examples()
    cold, hot = (answers(model, prompts, sampling=Sampling(t)) for t in (1e-3, 3.0))
    assert cold == answers(model, prompts) != hot


def plain_distribution(row: torch.Tensor, sampling: Sampling) -> dict[int, float]:
    """Probabilities by token: keep the k likeliest, of these the fewest to reach top_p; rescale."""
    p = torch.softmax(row.double() / sampling.temperature, dim=0).tolist()
    kept, mass = {}, 0.0
    for token in sorted(range(len(p)), key=lambda i: -p[i])[: sampling.top_k or len(p)]:
        if mass >= sampling.top_p:
            break
        kept[token] = p[token]
        mass += p[token]
    return {token: share / sum(kept.values()) for token, share in kept.items()}


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.2, 3), st.integers(0, 14), st.floats(0.05, 1))
def test_sampling_is_top_k_and_top_p_by_the_plain_formula(seed, temperature, top_k, top_p):
    sampling = Sampling(temperature, top_k, top_p)
    row = 2 * torch.randn(12, generator=torch.Generator().manual_seed(seed))
    truth = plain_distribution(row, sampling)
    n = 2000
    noise = (torch.arange(n).double() + 0.5) / n  # every part of [0, 1) once: shares, not chances
    picked = pick(row.expand(n, -1), sampling, noise).bincount(minlength=12) / n
    assert set(picked.nonzero().flatten().tolist()) <= set(truth)
    expected = torch.tensor([truth.get(token, 0.0) for token in range(12)])
    torch.testing.assert_close(picked, expected, atol=1.1 / n, rtol=0)


def test_noise_at_the_ends_of_its_range_picks_the_first_and_the_last_allowed_token():
    row = torch.tensor([[0.0, 3.0, 1.0, 2.0, -200.0]])
    for noise, token in ((0.0, 1), (1 - 2**-53, 2)):
        ends = torch.tensor([noise], dtype=torch.float64)
        assert pick(row, Sampling(1.0, top_k=3), ends).item() == token
    half = torch.tensor([0.5], dtype=torch.float64)  # where the second of two equal shares begins
    assert pick(torch.zeros(1, 2), Sampling(1.0), half).item() == 1


def test_bf16_logits_are_sampled_in_fp32():
    row = torch.randn(200, generator=torch.Generator().manual_seed(0)).bfloat16().expand(500, -1)
    noise, sampling = (torch.arange(500).double() + 0.5) / 500, Sampling(0.7, top_p=0.9)
    assert torch.equal(pick(row, sampling, noise), pick(row.float(), sampling, noise))


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(2.0)], ids=["greedy", "sampled"])
def test_unused_rows_of_the_table_are_never_picked(lively_checkpoint, sampling):
    model = load_model(lively_checkpoint, dtype=torch.float32)
    hidden = states(model, examples()[2]).abs().mean()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone(), requires_grad=False)
    model.lm_head.weight[toys.TOKENS :] *= 1e4
    loudest = logits(model, examples()[2]).argmax(dim=1)
    assert hidden > 0 and (loudest >= toys.TOKENS).any(), "the unused rows must be tempting"
    texts = answers(model, examples(), sampling=sampling)
    assert max(token for text in texts for token in text) < toys.TOKENS


def test_an_end_token_ends_a_row_and_the_limit_cuts_it_off(model):
    prompts = [p.tolist() for p in examples()]
    free = answers(model, examples())
    end = free[0][9]
    ended = generate(
        model, prompts, max_new_tokens=24, eos_ids=(end, toys.IM_END), vocabulary=toys.TOKENS
    )
    for text, answer in zip(free, ended, strict=True):
        stops = text.index(end) if end in text else len(text)
        assert answer.tokens == text[:stops]
        assert answer.cut_off == (end not in text)
    assert not ended[0].cut_off and ended[0].tokens


def test_a_limit_of_n_gives_n_tokens_and_a_limit_of_none_gives_none(model):
    free = answers(model, examples())
    for limit in (1, 2, 17):
        assert answers(model, examples(), max_new_tokens=limit) == [text[:limit] for text in free]
    (none,) = generate(model, [[1]], max_new_tokens=0, eos_ids=(), vocabulary=toys.TOKENS)
    assert none.tokens == [] and none.cut_off
    assert generate(model, [], max_new_tokens=5, eos_ids=(), vocabulary=toys.TOKENS) == []


def test_finished_rows_leave_at_once_and_waiting_ones_take_their_places(model, monkeypatch):
    prompts, sizes = examples((5, 1, 19, 8, 8, 2, 13), seed=2), []
    forward = Qwen2.forward

    def counting(self, tokens, positions, lengths, cache=None):
        if positions.min() > 0:  # no prompt
            sizes.append(len(lengths))
        return forward(self, tokens, positions, lengths, cache)

    monkeypatch.setattr(Qwen2, "forward", counting)
    limits = [2, 9, 4, 4, 3, 6, 3]
    answers(model, prompts, max_new_tokens=limits, at_once=7)
    # One prompt comes in with each step; row i gets its tokens in the steps from i on.
    live = [sum(i < step < i + n for i, n in enumerate(limits)) for step in range(1, 11)]
    assert sizes == [n for n in live if n]
    sizes.clear()
    answers(model, prompts, max_new_tokens=limits, at_once=2)
    assert set(sizes) == {1, 2} and sum(sizes) == sum(limits) - len(limits)


def test_a_row_ends_where_its_caller_says_so_with_the_token_that_ended_it(model):
    free = answers(model, examples())
    asked = []

    def stopped(answer):
        asked.append(list(answer))
        return answer == free[2][:7]

    prompts = [p.tolist() for p in examples()]
    ended = generate(
        model, prompts, max_new_tokens=24, eos_ids=(), vocabulary=toys.TOKENS, stopped=stopped
    )
    assert [a.tokens for a in ended] == [*free[:2], free[2][:7], free[3]]
    assert [a.cut_off for a in ended] == [True, True, False, True]
    assert free[0][:1] in asked and free[0] in asked and free[2][:8] not in asked


def test_each_step_yields_the_live_rows_and_their_tokens_end_tokens_included(model):
    prompts, end = [p.tolist() for p in examples()], answers(model, examples())[0][3]
    steps = list(decode(model, prompts, max_new_tokens=8, eos_ids=(end,), vocabulary=toys.TOKENS))
    ended = set()
    for step in steps:
        assert [row for row, _, _ in step] == [row for row in range(4) if row not in ended]
        assert all(done == (token == end) for _, token, done in step)
        ended |= {row for row, _, done in step if done}
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


needs_packing = pytest.mark.skipif(not packing_works(), reason="no bf16 kernel that packs")


@needs_packing
@pytest.mark.parametrize("rows", [1, 7, 33, 300])
def test_packed_products_are_the_plain_ones_bit_for_bit(bf16, rows):
    (row,) = examples([rows])
    with torch.inference_mode():
        plain = states(bf16, row)
        weights = PackedWeights(bf16, bf16.head_weight[: toys.TOKENS])
        with weights.used():
            assert torch.equal(states(bf16, row), plain)
        head = F.linear(plain, bf16.head_weight[: toys.TOKENS])
        assert torch.equal(weights.logits(plain), head)


@needs_packing
def test_decoding_sees_adapters_switched_off_and_merged(bf16):
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


def test_between_steps_the_model_is_itself(bf16):
    steps = decode(bf16, [[1, 2]], max_new_tokens=5, eos_ids=(), vocabulary=toys.TOKENS)
    next(steps)
    assert not any("forward" in vars(module) for module in bf16.modules())
    row = torch.tensor([3, 4])
    states(bf16, row).float().sum().backward()
    assert all(layer.lora_A.grad is not None for layer in adapters(bf16))


def test_weights_that_no_kernel_packs_stay_as_they_are(model):
    assert not PackedWeights(model, model.head_weight).layers
