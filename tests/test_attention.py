"""Every implementation of attention equals `plain_attention`, values and gradients."""

import inspect
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from model import attention
from model.attention import (
    FlatAttention,
    attend_blockwise,
    attend_each,
    attend_sdpa,
    attend_varlen,
    varlen_kernel,
    varlen_works,
)
from model.qwen2 import plain_attention

LENGTHS = [5, 1, 9]
WINDOW = {"window_size": (-1, 0), "enable_gqa": True}


def fake_varlen(q, k, v, starts_q, starts_k, longest_q, longest_k, *, window_size, enable_gqa):
    """What `torch.nn.attention.varlen.varlen_attn` documents, by the plain formula."""
    assert window_size == (-1, 0) and longest_q == longest_k == max(LENGTHS) and enable_gqa
    assert starts_q.dtype == starts_k.dtype == torch.int32
    bounds = zip(starts_q.tolist(), starts_q.tolist()[1:])
    return torch.cat([plain_attention(*(x[i:j] for x in (q, k, v))) for i, j in bounds])


def inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = ((15, 4, 8), (15, 2, 8), (15, 2, 8))
    return [torch.randn(*shape, generator=generator, dtype=dtype) for shape in shapes]


def test_one_call_for_all_examples_equals_one_call_per_example(monkeypatch):
    monkeypatch.setattr(attention, "varlen_kernel", lambda: partial(fake_varlen, **WINDOW))
    offsets = torch.tensor([0, 5, 6, 15], dtype=torch.int32)
    one_call = attend_varlen(*inputs(), offsets, 9)
    torch.testing.assert_close(one_call, attend_each(*inputs(), LENGTHS))


def test_one_call_per_example_equals_the_plain_formula():
    examples = zip(*(x.split(LENGTHS) for x in inputs()))
    plain = torch.cat([plain_attention(*example) for example in examples])
    torch.testing.assert_close(attend_each(*inputs(), LENGTHS), plain)


def test_the_plain_formula_is_softmax_over_the_earlier_tokens_of_the_query_heads_group():
    q, k, v = inputs()
    t, head = 7, 3  # the last of 4 query heads, which uses the last of 2 key heads
    scores = torch.stack([q[t, head] @ k[s, 1] for s in range(t + 1)]) / 8**0.5
    expected = sum(p * v[s, 1] for s, p in enumerate(scores.exp() / scores.exp().sum()))
    torch.testing.assert_close(plain_attention(q, k, v)[t, head], expected)


def test_this_pytorch_accepts_the_arguments_of_the_variable_length_call():
    q, k, v = (x.to("meta", torch.bfloat16).requires_grad_() for x in inputs())
    offsets = torch.empty(4, dtype=torch.int32, device="meta")
    y = attend_varlen(q, k, v, offsets, 9)
    shapes = [g.shape for g in torch.autograd.grad(y.sum(), (q, k, v))]
    assert y.shape == q.shape and shapes == [q.shape, k.shape, v.shape]
    with torch.inference_mode():
        assert attend_varlen(q, k, v, offsets, 9).shape == q.shape


@pytest.mark.parametrize("failure", [RuntimeError("no kernel"), TypeError("no such argument")])
def test_a_kernel_that_fails_is_not_used_and_the_reason_is_printed(monkeypatch, capsys, failure):
    def fails(*args, **kwargs):
        raise failure

    monkeypatch.setattr(attention, "varlen_kernel", lambda: fails)
    varlen_works.cache_clear()
    assert not varlen_works(torch.device("cpu"), torch.bfloat16, (4, 8), (2, 8))
    assert f"one call per example ({failure})" in capsys.readouterr().out


@pytest.mark.parametrize("causal", [True, False])
def test_a_kernel_is_used_only_if_its_results_agree(monkeypatch, causal):
    def kernel(q, k, v, *_, window_size, enable_gqa):
        both = zip(*(x.split([40, 3]) for x in (q, k, v)))
        each = [[x.transpose(0, 1)[None] for x in example] for example in both]
        options = {"is_causal": causal, "enable_gqa": enable_gqa}
        ys = [F.scaled_dot_product_attention(*example, **options)[0] for example in each]
        return torch.cat([y.transpose(0, 1) for y in ys])

    monkeypatch.setattr(attention, "varlen_kernel", lambda: partial(kernel, **WINDOW))
    varlen_works.cache_clear()
    assert varlen_works(torch.device("cpu"), torch.bfloat16, (4, 8), (2, 8)) == causal


def of_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False): ...
def of_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1)): ...
def of_2_12(query, key, value, a, b, c, d, *, window_size=(-1, -1), enable_gqa=False): ...


@pytest.mark.parametrize(
    "kernel, arguments",
    [(of_2_10, {"is_causal": True}), (of_2_11, {"window_size": (-1, 0)}), (of_2_12, WINDOW)],
)
def test_the_kernel_of_each_pytorch_is_called_with_the_arguments_it_has(
    monkeypatch, kernel, arguments
):
    module = SimpleNamespace(varlen_attn=kernel)
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", module)
    varlen_kernel.cache_clear()
    assert varlen_kernel().keywords == arguments
    inspect.signature(kernel).bind(*range(7), **arguments)
    varlen_kernel.cache_clear()


def test_a_pytorch_without_the_kernel_uses_one_call_per_example(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)
    varlen_kernel.cache_clear()
    varlen_works.cache_clear()
    assert not varlen_works(torch.device("cpu"), torch.bfloat16, (4, 8), (2, 8))
    assert "one call per example" in capsys.readouterr().out


def test_fp32_uses_one_call_per_example():
    varlen_works.cache_clear()
    assert not varlen_works(torch.device("cpu"), torch.float32, (4, 8), (2, 8))
    assert FlatAttention(LENGTHS, torch.device("cpu")).offsets is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_kernel_of_this_gpu_agrees_with_one_call_per_example():
    varlen_works.cache_clear()
    assert varlen_works(torch.device("cuda", 0), torch.bfloat16, (14, 64), (2, 64))


@pytest.mark.parametrize("length", [1, 127, 128, 129, 300])
@pytest.mark.parametrize("heads", [(4, 2), (6, 2), (4, 4)])
def test_values_and_gradients_of_one_example_equal_the_plain_formulas(length, heads):
    generator = torch.Generator().manual_seed(length)
    shapes = [(length, heads[0], 16), (length, heads[1], 16), (length, heads[1], 16)]
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    inputs = [x.requires_grad_() for x in inputs]
    weights = torch.randn(shapes[0], generator=generator, dtype=torch.float64)
    found = []
    for attend in (plain_attention, attend_sdpa, attend_blockwise):
        y = attend(*inputs)
        found.append([y, *torch.autograd.grad((y * weights).sum(), inputs)])
    for plain, sdpa, blockwise in zip(*found):
        torch.testing.assert_close(sdpa, plain)
        torch.testing.assert_close(blockwise, plain, rtol=2e-6, atol=2e-6)  # sums in fp32


def test_large_scores_keep_their_digits_in_half_precision():
    q = torch.full((2, 1, 64), 8.0)
    k = torch.stack([torch.full((1, 64), 8.0), torch.full((1, 64), 8.03)])  # 4096 and 4111 / 8
    v = torch.tensor([0.0, 1.0]).view(2, 1, 1).expand(2, 1, 64).bfloat16()
    exact = torch.sigmoid(torch.tensor(64 * 8 * 0.03 / 8))
    assert abs(attend_blockwise(q, k, v)[1, 0, 0].item() - exact) < 0.005


@pytest.mark.parametrize(
    "dtype, error", [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)]
)
def test_the_implementation_of_this_device_equals_the_plain_formula(device, dtype, error):
    lengths = [1, 2, 127, 128, 129, 3]
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(lengths), heads, 64) for heads in (14, 2, 2)]
    inputs = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    exact = [x.double().requires_grad_() for x in inputs]
    leaves = [x.to(device).requires_grad_() for x in inputs]
    examples = zip(*(x.split(lengths) for x in exact))
    plain = torch.cat([plain_attention(*example) for example in examples])
    y = FlatAttention(lengths, device)(0, *leaves)
    expected = [plain, *torch.autograd.grad(plain.square().sum(), exact)]
    for ours, truth in zip([y, *torch.autograd.grad(y.square().sum(), leaves)], expected):
        assert (ours.double().cpu() - truth).norm() < error * truth.norm()
