"""Every implementation of attention equals `plain_attention`, values and gradients."""

import pytest
import torch

from model import attention
from model.attention import (
    CAUSAL_FROM_TOP_LEFT,
    KERNELS,
    FlatAttention,
    attend_blockwise,
    attend_each,
    attend_efficient,
    attend_padded,
    attend_plainly,
    attend_sdpa,
    attend_varlen,
    kernel_error,
    working_kernel,
)
from model.qwen2 import plain_attention

LENGTHS = [5, 1, 9]


def inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = ((15, 4, 8), (15, 2, 8), (15, 2, 8))
    return [torch.randn(*shape, generator=generator, dtype=dtype) for shape in shapes]


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


def plain_by_example(q, k, v, offsets):
    bounds = zip(offsets.tolist(), offsets.tolist()[1:])
    return torch.cat([plain_attention(*(x[i:j] for x in (q, k, v))) for i, j in bounds])


def fake_efficient(
    query, key, value, bias, starts_q, starts_k, longest_q, longest_k,
    dropout_p, custom_mask_type, compute_log_sumexp,
):  # fmt: skip
    """What PyTorch's memory-efficient kernel does with examples in one sequence."""
    assert bias is None and starts_q is starts_k and longest_q == longest_k and dropout_p == 0
    assert custom_mask_type == CAUSAL_FROM_TOP_LEFT == 1 and compute_log_sumexp
    assert query.shape == key.shape == value.shape
    return plain_by_example(query[0], key[0], value[0], starts_q)[None], None, None, None, 0, 0


def fake_varlen(
    query, key, value, starts_q, starts_k, longest_q, longest_k,
    dropout_p, is_causal, return_debug_mask,
):  # fmt: skip
    """What PyTorch's flash kernel does with examples in one sequence."""
    assert starts_q is starts_k and starts_q.dtype == torch.int32 and longest_q == longest_k
    assert longest_q == starts_q.diff().max() and dropout_p == 0 and is_causal
    return plain_by_example(query, key, value, starts_q), None, None, None, None


@pytest.mark.parametrize("attend", [attend_padded, attend_plainly, attend_efficient, attend_varlen])
@pytest.mark.parametrize("lengths", [[5, 1, 9], [7], [1, 1], [2, 130]])
def test_values_and_gradients_of_all_examples_at_once_equal_the_plain_formulas(
    monkeypatch, attend, lengths
):
    monkeypatch.setattr(torch.ops.aten, "_efficient_attention_forward", fake_efficient)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", fake_varlen)
    generator = torch.Generator().manual_seed(0)
    qkv = [torch.randn(sum(lengths), n, 8, generator=generator).requires_grad_() for n in (4, 2, 2)]
    offsets = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    weights = torch.randn(sum(lengths), 4, 8, generator=generator)
    found = []
    for y in (plain_by_example(*qkv, offsets), attend(*qkv, offsets, max(lengths))):
        found.append([y, *torch.autograd.grad((y * weights).sum(), qkv)])
    for plain, at_once in zip(*found):
        torch.testing.assert_close(at_once, plain, rtol=2e-5, atol=2e-5)


def test_this_pytorch_accepts_the_arguments_of_the_memory_efficient_call():
    q, k, v = (x.to("meta", torch.float16).requires_grad_() for x in inputs())
    offsets = torch.empty(4, dtype=torch.int32, device="meta")
    y = attend_efficient(q, k, v, offsets, 9)
    shapes = [g.shape for g in torch.autograd.grad(y.sum(), (q, k, v))]
    assert y.shape == q.shape and shapes == [q.shape, k.shape, v.shape]


CPU, SHAPES = torch.device("cpu"), ((4, 8), (2, 8))


@pytest.fixture
def kernels(monkeypatch):
    """The table of kernels for a test to change; nothing has been tried yet."""
    table = dict(KERNELS)
    monkeypatch.setattr(attention, "KERNELS", table)
    working_kernel.cache_clear()
    yield table
    working_kernel.cache_clear()


def no_kernel(*_):
    raise RuntimeError("no kernel\nfor this GPU")


def from_bottom_right(q, k, v, offsets, longest):
    """A wrong kernel: a query also sees the token after it."""
    return attend_plainly(q, k.roll(-1, 0), v.roll(-1, 0), offsets, longest)


def wrong_gradient(*qkv_offsets_longest):
    y = attend_plainly(*qkv_offsets_longest)
    return y.detach() + 1.1 * (y - y.detach())


@pytest.mark.parametrize("broken", [no_kernel, from_bottom_right, wrong_gradient])
@pytest.mark.parametrize("working", range(4))
def test_the_first_kernel_that_agrees_is_chosen_and_the_reasons_are_printed_by_rank_0(
    monkeypatch, capsys, kernels, broken, working
):
    names = list(kernels)
    for i, name in enumerate(names):
        kernels[name] = attend_padded if i == working else broken
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        assert not capsys.readouterr().out
        working_kernel.cache_clear()
        chosen = working_kernel(CPU, torch.float32, *SHAPES)
    assert chosen == (attend_padded if working < 3 else attend_plainly)
    first, *reasons = capsys.readouterr().out.splitlines()
    names.append("the plain formula, one example at a time")
    assert first == f"attention in float32: {names[working]}"
    assert [line.split(":")[0] for line in reasons] == [f"  not {n}" for n in names[:working]]
    why = "no kernel" if broken is no_kernel else "differs by "
    assert all(why in line and "for this GPU" not in line for line in reasons)


def test_each_kernel_is_tried_once_for_each_dtype_and_shape(kernels):
    tried = []
    for name in kernels:
        kernels[name] = lambda q, *_: tried.append((q.dtype, q.shape[1:])) or no_kernel()
    for dtype, heads in 2 * [(torch.float16, 4), (torch.float32, 4), (torch.float32, 2)]:
        working_kernel(CPU, dtype, (heads, 8), (2, 8))
    assert len(tried) == 3 * len(kernels) and len(set(tried)) == 3


def test_a_flat_micro_batch_on_a_gpu_is_one_call_a_layer(kernels):
    calls = []
    kernels["one variable-length call"] = no_kernel
    kernels["one call of the memory-efficient kernel"] = lambda *args: (
        calls.append(args[3:]) or attend_plainly(*args)
    )
    flat = FlatAttention(LENGTHS, CPU)
    flat.offsets = torch.tensor([0, 5, 6, 15], dtype=torch.int32)  # as on a GPU
    qkv = [x.float() for x in inputs()]
    torch.testing.assert_close(flat(0, *qkv), attend_each(*qkv, LENGTHS))
    assert len(calls) == 2 and calls[-1] == (flat.offsets, 9)  # the first is the trial


def test_running_out_of_memory_does_not_change_the_choice(kernels):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    kernels["one variable-length call"] = full
    with pytest.raises(torch.OutOfMemoryError):
        working_kernel(CPU, torch.float32, *SHAPES)


def test_a_device_without_the_variable_length_kernel_uses_the_next(capsys, kernels):
    assert working_kernel(CPU, torch.bfloat16, *SHAPES) is attend_padded  # no CUDA here either
    assert "not one variable-length call: " in capsys.readouterr().out


def test_a_cpu_uses_one_call_per_example():
    assert FlatAttention(LENGTHS, CPU).offsets is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("attend", [attend_varlen, attend_efficient, attend_padded])
def test_the_kernels_of_this_gpu_agree_with_the_plain_formula(attend, dtype):
    major, _ = torch.cuda.get_device_capability()
    if attend is attend_varlen and (dtype == torch.float32 or major < 8):
        pytest.skip("the variable-length kernel needs half precision and an Ampere GPU")
    error = kernel_error(attend, torch.device("cuda", 0), dtype, (14, 64), (2, 64))
    assert error < (1e-3 if dtype == torch.float32 else 0.02)


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


def test_the_explicit_formula_allocates_on_the_device_of_its_inputs():
    q, k, v = (x.to("meta").requires_grad_() for x in inputs(torch.float32))
    y = attend_blockwise(q, k, v)
    assert {g.device.type for g in torch.autograd.grad(y.sum(), (q, k, v))} == {"meta"}


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
