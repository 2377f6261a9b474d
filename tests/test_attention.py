"""The one call that a GPU makes for all examples is held to the plain form, one call an example."""

import pytest
import torch
import torch.nn.functional as F

from model import attention
from model.attention import (
    FlatAttention,
    attend_by_products,
    attend_each,
    attend_one,
    attend_varlen,
    varlen_works,
)

LENGTHS = [5, 1, 9]


def slow_varlen(q, k, v, starts_q, starts_k, longest_q, longest_k, *, window_size, enable_gqa):
    """What `torch.nn.attention.varlen.varlen_attn` documents, token by token."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    assert window_size == (-1, 0) and longest_q == longest_k == max(LENGTHS)
    assert starts_q.dtype == starts_k.dtype == torch.int32 and enable_gqa
    out = torch.empty_like(q)
    for start, end in zip(starts_q.tolist(), starts_q.tolist()[1:]):
        for t in range(start, end):
            scores = torch.einsum("hd,shd->hs", q[t], k[start : t + 1]) / q.shape[-1] ** 0.5
            out[t] = torch.einsum("hs,shd->hd", scores.softmax(-1), v[start : t + 1])
    return out


def inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = ((15, 4, 8), (15, 2, 8), (15, 2, 8))
    return [torch.randn(*shape, generator=generator, dtype=dtype) for shape in shapes]


def test_the_call_for_all_examples_is_one_call_an_example(monkeypatch):
    monkeypatch.setattr(attention, "varlen_attn", slow_varlen)
    offsets = torch.tensor([0, 5, 6, 15], dtype=torch.int32)
    torch.testing.assert_close(
        attend_varlen(*inputs(), offsets, 9), attend_each(*inputs(), LENGTHS)
    )


def test_one_call_an_example_is_softmax_over_the_earlier_tokens():
    starts = torch.tensor([0, 5, 6, 15], dtype=torch.int32)
    slow = slow_varlen(*inputs(), starts, starts, 9, 9, window_size=(-1, 0), enable_gqa=True)
    torch.testing.assert_close(attend_each(*inputs(), LENGTHS), slow)


def test_this_pytorch_has_the_call_for_all_examples_as_it_is_made():
    q, k, v = (x.to("meta", torch.bfloat16).requires_grad_() for x in inputs())
    offsets = torch.empty(4, dtype=torch.int32, device="meta")
    y = attend_varlen(q, k, v, offsets, 9)
    shapes = [g.shape for g in torch.autograd.grad(y.sum(), (q, k, v))]
    assert y.shape == q.shape and shapes == [q.shape, k.shape, v.shape]
    with torch.inference_mode():
        assert attend_varlen(q, k, v, offsets, 9).shape == q.shape


@pytest.mark.parametrize("failure", [RuntimeError("no kernel"), TypeError("no such argument")])
def test_a_kernel_that_does_not_run_is_not_used_and_that_is_said(monkeypatch, capsys, failure):
    def fails(*args, **kwargs):
        raise failure

    monkeypatch.setattr(attention, "varlen_attn", fails)
    varlen_works.cache_clear()
    assert not varlen_works(torch.device("cpu"), torch.bfloat16, (4, 8), (2, 8))
    assert f"one call an example ({failure})" in capsys.readouterr().out


@pytest.mark.parametrize("causal", [True, False])
def test_a_kernel_is_used_only_if_it_agrees_with_the_plain_form(monkeypatch, causal):
    def kernel(q, k, v, *_, window_size, enable_gqa):
        both = zip(*(x.split([40, 3]) for x in (q, k, v)))
        each = [[x.transpose(0, 1)[None] for x in example] for example in both]
        how = {"is_causal": causal, "enable_gqa": enable_gqa}
        ys = [F.scaled_dot_product_attention(*example, **how)[0] for example in each]
        return torch.cat([y.transpose(0, 1) for y in ys])

    monkeypatch.setattr(attention, "varlen_attn", kernel)
    varlen_works.cache_clear()
    assert varlen_works(torch.device("cpu"), torch.bfloat16, (4, 8), (2, 8)) == causal


def test_fp32_takes_the_plain_form():
    varlen_works.cache_clear()
    assert not varlen_works(torch.device("cpu"), torch.float32, (4, 8), (2, 8))
    assert FlatAttention(LENGTHS, torch.device("cpu")).offsets is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_kernel_of_this_gpu_agrees_with_the_plain_form():
    varlen_works.cache_clear()
    assert varlen_works(torch.device("cuda", 0), torch.bfloat16, (14, 64), (2, 64))


@pytest.mark.parametrize("length", [1, 127, 128, 129, 300])
@pytest.mark.parametrize("heads", [(4, 2), (6, 2), (4, 4)])
def test_products_written_out_are_softmax_attention_and_its_gradients(length, heads):
    generator = torch.Generator().manual_seed(length)
    shapes = [(length, heads[0], 16), (length, heads[1], 16), (length, heads[1], 16)]
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    inputs = [x.requires_grad_() for x in inputs]
    weights = torch.randn(shapes[0], generator=generator, dtype=torch.float64)
    found = []
    for attend in (attend_one, attend_by_products):
        y = attend(*inputs)
        found.append([y, *torch.autograd.grad((y * weights).sum(), inputs)])
    for plain, written_out in zip(*found):
        torch.testing.assert_close(written_out, plain, rtol=2e-6, atol=2e-6)  # its sums are fp32


def test_large_scores_keep_their_digits_in_half_precision():
    q = torch.full((2, 1, 64), 8.0)
    k = torch.stack([torch.full((1, 64), 8.0), torch.full((1, 64), 8.03)])  # 4096 and 4111 / 8
    v = torch.tensor([0.0, 1.0]).view(2, 1, 1).expand(2, 1, 64).bfloat16()
    exact = torch.sigmoid(torch.tensor(64 * 8 * 0.03 / 8))
    assert abs(attend_by_products(q, k, v)[1, 0, 0].item() - exact) < 0.005
