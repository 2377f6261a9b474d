"""The functions with hand-written gradients equal the plain formulas, forward and backward."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from model import functions, fused
from model.functions import rms_norm, rotate, swiglu
from model.qwen2 import plain_rms_norm, plain_rotate
from tests.triton_stand_in import replace_triton

EPS = 1e-6


def normal(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def angles(tokens, half, dtype=torch.float64):
    """Cosines and sines (tokens, 1, half) of some angles."""
    radians = torch.arange(tokens)[:, None, None] * torch.linspace(0.1, 2, half)
    return radians.cos().to(dtype), radians.sin().to(dtype)


def angles_of(x):
    """Angles of `x (5, heads, 8)`, at least in fp32, on its device."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return [table.to(x.device) for table in angles(5, 4, dtype)]


# name -> (fast function, plain formula, inputs of a dtype)
CASES = {
    "rms_norm": (
        lambda x, w: rms_norm(x, w, EPS),
        lambda x, w: plain_rms_norm(x, w, EPS),
        lambda dtype: (normal(5, 8, dtype=dtype), normal(8, dtype=dtype, seed=1)),
    ),
    "rotate": (
        lambda x: rotate(x, *angles_of(x)),
        lambda x: plain_rotate(x, *angles_of(x)),
        lambda dtype: (normal(5, 3, 8, dtype=dtype),),
    ),
    "swiglu": (
        swiglu,
        lambda gate, up: F.silu(gate) * up,
        # more tokens than BLOCK_TOKENS
        lambda dtype: (normal(130, 2, dtype=dtype), normal(130, 2, dtype=dtype, seed=1)),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_finite_differences(name):
    fast, _, inputs = CASES[name]
    assert gradcheck(fast, [x.requires_grad_() for x in inputs(torch.float64)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_equal_the_plain_formulas(name, dtype, device):
    fast, plain, inputs = CASES[name]
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 1e-2}
    results = []
    for formula in (fast, plain):
        leaves = [x.to(device).requires_grad_() for x in inputs(dtype)]
        y = formula(*leaves)
        results.append(
            [y, *torch.autograd.grad(y, leaves, normal(*y.shape, dtype=y.dtype, seed=2).to(device))]
        )
    assert results[0][0].dtype == (torch.float32 if name == "rotate" else dtype)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours.to(dtype), theirs.to(dtype), **close)


def test_the_norm_of_an_fp32_residual_is_rounded_to_the_weights_dtype():
    x, weight = normal(5, 8, dtype=torch.float32).requires_grad_(), torch.ones(8).bfloat16()
    y = rms_norm(x, weight, EPS)
    assert torch.equal(y, plain_rms_norm(x, weight.float(), EPS).bfloat16())
    y.sum().backward()
    assert x.grad.dtype == torch.float32


def test_a_frozen_weight_gets_no_gradient():
    x, weight = normal(5, 8).requires_grad_(), normal(8)
    rms_norm(x, weight, EPS).sum().backward()
    assert x.grad is not None and weight.grad is None


def test_squares_above_the_range_of_fp16_do_not_overflow():
    x = torch.full((1, 8), 3e4, dtype=torch.float16)
    y = rms_norm(x, torch.ones(8, dtype=torch.float16), EPS)
    torch.testing.assert_close(y, torch.ones_like(y))


def test_only_three_tensors_of_the_inputs_size_are_kept_for_the_backward_pass():
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    x, cos_sin = normal(5, 3, 8).requires_grad_(), angles(5, 4)
    with hooks:
        rms_norm(x, normal(8), EPS)
        rotate(x, *cos_sin)
        swiglu(x, x)
    assert sum(t.shape == x.shape for t in kept) == 3  # normalized x, gate and up


# The Triton kernels; `triton_stand_in.py` runs their own source.

KERNELS = ("normalize_kernel", "normalize_backward_kernel", "rotate_kernel", "swiglu_kernel",
           "swiglu_backward_kernel")  # fmt: skip
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CPU = torch.device("cpu")


@pytest.fixture
def triton(monkeypatch):
    if fused.triton is not None:
        pytest.skip("Triton is installed: fused_works compares the forms on the device")
    replace_triton(monkeypatch, fused, *KERNELS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_of_the_kernels_equal_the_plain_formulas(
    triton, monkeypatch, name, dtype
):
    monkeypatch.setattr(functions, "takes_kernels", lambda x: True)
    fast, plain, inputs = CASES[name]
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 1e-2}
    results = []
    for formula in (fast, plain):
        leaves = [x.requires_grad_() for x in inputs(dtype)]
        y = formula(*leaves)
        results.append([y, *torch.autograd.grad(y, leaves, normal(*y.shape, dtype=dtype, seed=2))])
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, theirs, **close)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_trial_on_a_device_accepts_the_kernels(triton, dtype):
    assert functions.differing_kernels(CPU, dtype) == []


@pytest.mark.parametrize("name", ["normalize", "normalize_backward", "rotate", "swiglu",
                                  "swiglu_backward"])  # fmt: skip
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_trial_on_a_device_names_a_kernel_that_differs(triton, monkeypatch, name, dtype):
    right = getattr(fused, name)

    def wrong(*arguments):
        found = right(*arguments)
        (found[-1] if isinstance(found, tuple) else found).mul_(1.03)
        return found

    monkeypatch.setattr(fused, name, wrong)
    assert name in functions.differing_kernels(CPU, dtype)


def test_nothing_but_a_gpu_takes_the_kernels(triton):
    assert not functions.takes_kernels(torch.zeros(2))
    assert not functions.takes_kernels(torch.zeros(2, device="meta"))
