"""Tests of a base held in 4 or 8 bits; the reference is a plain table of formulas.

Legend: T tokens; in, out features.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora import LoRAConfig, disabled, inject, trained_parameters
from model.load import load_model
from model.quant import NF4, QuantizedLinear, dequantize, quantize
from tests import toys

KINDS = ("nf4", "int8")


def plain_quantized(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """What is left of each weight: the nearest multiple of its block's largest magnitude."""
    values = NF4.tolist() if kind == "nf4" else [code / 127 for code in range(-127, 128)]
    flat = weight.flatten().tolist()
    found = []
    for start in range(0, len(flat), 64):
        block = flat[start : start + 64]
        largest = max(map(abs, block))
        found += [min((abs(v * largest - x), v * largest) for v in values)[1] for x in block]
    return torch.tensor(found).view(weight.shape)


def a_weight(out: int = 6, size: int = 128) -> torch.Tensor:
    return torch.randn(out, size, generator=torch.Generator().manual_seed(0))


def layer_of(weight: torch.Tensor, kind: str, bias: torch.Tensor | None) -> QuantizedLinear:
    with torch.device("meta"):
        plain = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer = QuantizedLinear(plain, kind, 64, weight.dtype)
    codes, absmax = quantize(weight, kind)
    state = {"codes": codes, "absmax": absmax} | ({} if bias is None else {"bias": bias})
    layer.load_state_dict(state, assign=True, strict=True)
    return layer.requires_grad_(False)


@pytest.mark.parametrize("kind", KINDS)
def test_each_weight_becomes_the_nearest_value_of_the_table_times_its_blocks_largest(kind):
    weight = a_weight()
    found = dequantize(*quantize(weight, kind), torch.float32)
    torch.testing.assert_close(found, plain_quantized(weight, kind), rtol=1e-6, atol=1e-7)


def test_the_table_of_nf4_has_the_quantiles_of_a_normal_distribution():
    normal = torch.distributions.Normal(0, 1)
    offset = (1 - 1 / (2 * 15) + 1 - 1 / (2 * 16)) / 2  # QLoRA, as bitsandbytes computes it
    positive = normal.icdf(torch.linspace(offset, 0.5, 9)[:-1])
    negative = -normal.icdf(torch.linspace(offset, 0.5, 8)[:-1])
    values = torch.cat((positive, torch.zeros(1), negative)).sort().values
    torch.testing.assert_close(NF4, values / values.max(), rtol=0, atol=2e-6)


@pytest.mark.parametrize(("kind", "bits"), [("nf4", 4.5), ("int8", 8.5)])
def test_a_weight_takes_as_many_bits_as_documented(kind, bits):
    layer = layer_of(a_weight(), kind, None)
    assert 8 * sum(p.nbytes for p in layer.parameters()) == bits * a_weight().numel()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("with_bias", [True, False])
def test_a_quantised_layer_computes_with_its_dequantised_weight(kind, with_bias):
    bias = torch.arange(6.0) if with_bias else None
    layer, x = layer_of(a_weight(), kind, bias), torch.randn(5, 128, requires_grad=True)
    expected = F.linear(x, plain_quantized(a_weight(), kind), bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    ours, theirs = (torch.autograd.grad(y.square().sum(), x)[0] for y in (layer(x), expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_product_passes_gradcheck(kind):
    layer = layer_of(a_weight(3, 64).double(), kind, torch.arange(3.0).double())
    assert torch.autograd.gradcheck(layer, torch.randn(2, 64).double().requires_grad_())


def test_a_product_keeps_no_dequantised_weight_for_the_backward_pass():
    layer, x, kept = layer_of(a_weight(), "nf4", None), torch.randn(5, 128), []
    keep = lambda t: kept.append(t) or t  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        layer(x.requires_grad_())
    assert {t.dtype for t in kept} == {torch.uint8, torch.float32}
    assert sum(t.nbytes for t in kept) == sum(p.nbytes for p in layer.parameters())


def test_blocks_are_smaller_where_64_does_not_divide_a_weight():
    weight = a_weight(3, 40)  # 120 = 15 blocks of 8
    codes, absmax = quantize(weight, "nf4")
    assert (codes.shape, absmax.shape) == ((3, 20), (15,))
    assert (
        dequantize(codes, absmax, torch.float32) - weight
    ).abs().max() < 0.2 * weight.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_layers_are_quantised_and_each_as_its_own_weight(tmp_path, kind):
    folder = toys.write_checkpoint(tmp_path / "base", tied=False)
    plain = load_model(folder, dtype=torch.float32)
    model = load_model(folder, dtype=torch.float32, base_precision=kind)
    for name, module in plain.named_modules():
        found = model.get_submodule(name)
        if isinstance(module, nn.Linear) and name != "lm_head":
            assert isinstance(found, QuantizedLinear) and "weight" not in found.state_dict()
            expected = dequantize(*quantize(module.weight, kind), torch.float32)
            assert found.weight.equal(expected)
            assert module.bias is None or found.bias.equal(module.bias)
        else:
            assert type(found) is type(module)
            assert all(map(torch.equal, found.parameters(False), module.parameters(False)))


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_on_a_quantised_base_equal_those_on_its_dequantised_weights(tmp_path, kind, dora):
    folder = toys.write_checkpoint(tmp_path / "base")
    quantised = load_model(folder, dtype=torch.float32, base_precision=kind)
    plain, results = load_model(folder, dtype=torch.float32), []
    for name, module in quantised.named_modules():
        if isinstance(module, QuantizedLinear):
            plain.get_submodule(name).weight.copy_(module.weight)
    tokens, positions = torch.arange(12) * 7 % toys.TOKENS, torch.arange(12)
    for model in (quantised, plain):
        inject(model, LoRAConfig(r=4, alpha=8, targets=("all-linear",), dora=dora))
        generator = torch.Generator().manual_seed(1)
        for name, p in trained_parameters(model).items():
            if name.endswith("lora_B"):
                p.data.normal_(0, 0.1, generator=generator)
        hidden = model(tokens, positions, [12])
        hidden.square().mean().backward()
        grads = torch.cat([p.grad.flatten() for p in trained_parameters(model).values()])
        with disabled(model):
            results.append((hidden, grads, model(tokens, positions, [12])))
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_a_quantised_weight_cannot_be_merged_into(tmp_path):
    folder = toys.write_checkpoint(tmp_path / "base")
    model = load_model(folder, dtype=torch.float32, base_precision="nf4")
    inject(model, LoRAConfig(r=4, alpha=8))
    with pytest.raises(AssertionError, match="quantised"):
        model.model.layers[0].self_attn.q_proj.merge()


def test_no_weight_of_the_layers_is_whole_while_the_others_are_read(tmp_path, monkeypatch):
    """The largest sum of full-precision layer weights alive during loading is one weight."""
    from model import load

    folder = toys.write_checkpoint(tmp_path / "base")
    seen, real = [], load.held

    def spy(model, name, tensor):
        found = real(model, name, tensor)
        seen.append((name, [t.dtype for t in found.values()]))
        return found

    monkeypatch.setattr(load, "held", spy)
    load_model(folder, dtype=torch.bfloat16, base_precision="nf4")
    layers = [dtypes for name, dtypes in seen if name.endswith("proj.weight")]
    assert len(layers) == 14 and all(d == [torch.uint8, torch.float32] for d in layers)
