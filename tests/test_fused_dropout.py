"""The Triton kernel of dropout computes what the plain form does, bit for bit.

`triton_stand_in.py` runs the kernel's own source.
"""

import pytest
import torch
from torch import nn

from lora import fused_dropout
from lora.dropout import KeyedDropout, fused_equals, fused_works, token_keys
from lora.layer import LoRALinear
from tests.triton_stand_in import replace_triton


@pytest.fixture
def triton(monkeypatch):
    if fused_dropout.triton is not None:
        pytest.skip("Triton is installed: fused_works compares the forms on the device")
    replace_triton(monkeypatch, fused_dropout, "drop")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels", [1, 7, 1024, 1030])
@pytest.mark.parametrize("p", [0.1, 0.999])
def test_the_kernel_gives_the_values_and_gradients_of_the_plain_form_bit_for_bit(
    triton, dtype, channels, p
):
    x = torch.randn(3, channels, generator=torch.Generator().manual_seed(0)).to(dtype)
    grad = torch.randn(3, channels, generator=torch.Generator().manual_seed(1)).to(dtype)
    layer = KeyedDropout(p, channels, layer=5)
    layer.keys = token_keys(7, 2, torch.tensor([4, 4, 9]), torch.tensor([0, 1, 0]))
    found = []
    for layer.fused in (False, True):
        y = layer(x.requires_grad_())
        found += [y, *torch.autograd.grad(y, x, grad)]
    as_bits = [t.detach().contiguous().view(torch.uint8) for t in found]
    assert torch.equal(as_bits[0], as_bits[2]) and torch.equal(as_bits[1], as_bits[3])
    assert channels < 1000 or 0 < (found[2] != 0).sum() < found[2].numel()


def test_nothing_but_a_gpu_takes_the_kernel(triton):
    assert not fused_works(torch.device("cpu")) and not fused_works(torch.device("meta"))


@pytest.mark.parametrize("fault", [None, "another scale", "zeros without a sign"])
def test_the_trial_on_a_device_accepts_the_kernel_and_no_other(triton, monkeypatch, fault):
    plainly = fused_dropout.apply

    def apply(x, keys, channel_keys, threshold, scale):
        if fault == "another scale":
            scale += 0.01
        y = plainly(x, keys, channel_keys, threshold, scale)
        return y + 0.0 if fault == "zeros without a sign" else y  # -0 + 0 is 0

    monkeypatch.setattr(fused_dropout, "apply", apply)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert fused_equals(torch.device("cpu"), dtype) == (fault is None)


def update(fused, dtype, p=0.3):
    """An adapted layer of 9 inputs and 6 outputs: x, its result, and the gradients of x, A and B;
    and how many tensors of x's size are kept for the backward pass.
    """
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(9, 6).to(dtype), r=2, alpha=4, dropout=p, index=1).train()
    nn.init.normal_(layer.lora_B)
    layer.base_layer.requires_grad_(False)
    layer.dropout.keys = token_keys(0, 0, torch.arange(5), torch.arange(5))
    layer.dropout.fused = fused
    x, kept = torch.randn(5, 9).to(dtype).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        y = layer(x)
    leaves = (x, layer.lora_A, layer.lora_B)
    return [y, *torch.autograd.grad(y.float().square().sum(), leaves)], kept.count(x.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_update_that_drops_its_input_again_for_the_gradients_has_those_of_the_formula(
    triton, dtype
):
    (ours, kept), (theirs, kept_by_autograd) = update(True, dtype), update(False, dtype)
    for a, b in zip(ours, theirs, strict=True):  # the scaling is a power of two: the same bits
        assert torch.equal(a, b) and b.any()
    assert kept == 1 < kept_by_autograd  # x, which is the input of other layers too
