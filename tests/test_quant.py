"""Tests of a base held in 4 or 8 bits; the reference is a plain table of formulas.

Legend: T tokens; in, out features.
"""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

import evaluate
import train
from errors import BadCheckpoint, BadOption, BadRun
from lora import LoRAConfig, disabled, inject, save_adapter, trained_parameters
from model import load
from model.bitsandbytes import from_bitsandbytes
from model.load import load_model
from model.quant import NF4, QuantizedLinear, dequantize, quantize
from run import export
from run.base import Base
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
def test_a_quantized_layer_computes_with_its_dequantized_weight(kind, with_bias):
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


def test_a_product_keeps_no_dequantized_weight_for_the_backward_pass():
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
def test_only_the_layers_are_quantized_and_each_as_its_own_weight(tmp_path, kind):
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
def test_adapters_on_a_quantized_base_equal_those_on_its_dequantized_weights(tmp_path, kind, dora):
    folder = toys.write_checkpoint(tmp_path / "base")
    quantized = load_model(folder, dtype=torch.float32, base_precision=kind)
    plain, results = load_model(folder, dtype=torch.float32), []
    for name, module in quantized.named_modules():
        if isinstance(module, QuantizedLinear):
            plain.get_submodule(name).weight.copy_(module.weight)
    tokens, positions = torch.arange(12) * 7 % toys.TOKENS, torch.arange(12)
    for model in (quantized, plain):
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


def test_a_quantized_weight_cannot_be_merged_into(tmp_path):
    folder = toys.write_checkpoint(tmp_path / "base")
    model = load_model(folder, dtype=torch.float32, base_precision="nf4")
    inject(model, LoRAConfig(r=4, alpha=8))
    with pytest.raises(AssertionError, match="quantized"):
        model.model.layers[0].self_attn.q_proj.merge()


def test_no_weight_of_the_layers_is_whole_while_the_others_are_read(tmp_path, monkeypatch):
    """The largest sum of full-precision layer weights alive during loading is one weight."""
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


# Checkpoints that bitsandbytes has quantized


def bitsandbytes_checkpoint(folder, kind: str, nested: bool = False):
    """The toy checkpoint with its layers in bitsandbytes' format, written by the plain formulas;
    returns (folder, the weight that each name stands for).
    """
    toys.write_checkpoint(folder)
    tensors, meaning = load_file(folder / "model.safetensors"), {}
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        shape = tensors[name].shape
        if kind == "int8":
            codes = torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
            rows = torch.rand(shape[0], generator=generator)
            place, form = name.removesuffix("weight"), torch.zeros((), dtype=torch.uint8)
            tensors |= {name: codes, f"{place}SCB": rows, f"{place}weight_format": form}
            meaning[name] = codes.float() * rows[:, None] / 127
            continue
        codes = torch.randint(16, (shape.numel(),), generator=generator)
        scales = torch.rand(shape.numel() // 64, generator=generator)  # (b,)
        state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": list(shape)}
        if nested:
            table = torch.linspace(-1, 1, 256)
            inner = torch.randint(256, scales.shape, generator=generator)
            outer = torch.rand(-(-len(scales) // 256), generator=generator)
            scales = table[inner] * outer[torch.arange(len(scales)) // 256] + 0.5
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.5}
            tensors |= {f"{name}.absmax": inner.to(torch.uint8), f"{name}.nested_absmax": outer,
                        f"{name}.nested_quant_map": table}  # fmt: skip
        else:
            tensors[f"{name}.absmax"] = scales
        packed = (codes[0::2] * 16 + codes[1::2]).to(torch.uint8)
        text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        tensors |= {name: packed[:, None], f"{name}.quant_map": NF4.clone(),
                    f"{name}.quant_state.bitsandbytes__nf4": text}  # fmt: skip
        meaning[name] = (NF4[codes] * scales.repeat_interleave(64)).view(shape)
    save_file(tensors, folder / "model.safetensors")
    bits = {"load_in_8bit": True} if kind == "int8" else {"load_in_4bit": True}
    method = {"quant_method": "bitsandbytes", "bnb_4bit_quant_type": "nf4"} | bits
    toys.change_json(folder / "config.json", quantization_config=method)
    return folder, meaning


@pytest.mark.parametrize(("kind", "nested"), [("nf4", False), ("nf4", True), ("int8", False)])
def test_a_checkpoint_that_bitsandbytes_quantized_has_the_weights_it_stands_for(
    tmp_path, kind, nested
):
    folder, meaning = bitsandbytes_checkpoint(tmp_path / "base", kind, nested)
    model = load_model(folder, dtype=torch.float32)
    assert len(meaning) == 14
    for name, weight in meaning.items():
        layer = model.get_submodule(name.removesuffix(".weight"))
        assert isinstance(layer, QuantizedLinear)
        torch.testing.assert_close(layer.weight, weight, rtol=1e-6, atol=1e-7)
    base = Base.find(str(folder), precision="fp32", device="cpu")
    assert base.held_in(None).base_precision == base.held_in(kind).base_precision == kind
    with pytest.raises(BadOption, match=f"is stored in {kind}"):
        base.held_in("int8" if kind == "nf4" else "nf4")


@pytest.mark.parametrize("lost", ["absmax", "quant_state.bitsandbytes__nf4", "nested_absmax"])
def test_a_checkpoint_of_bitsandbytes_without_one_of_its_parts_is_refused(tmp_path, lost):
    folder, _ = bitsandbytes_checkpoint(tmp_path / "base", "nf4", nested=True)
    tensors = load_file(folder / "model.safetensors")
    del tensors[f"model.layers.0.mlp.up_proj.weight.{lost}"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(BadCheckpoint, match="up_proj.weight is not nf4 of bitsandbytes"):
        load_model(folder, dtype=torch.float32)


@pytest.mark.parametrize("nested", [False, True])
def test_codes_and_values_are_those_of_bitsandbytes(nested):
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = a_weight(48, 128)
    codes, absmax = quantize(weight, "nf4")
    theirs, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=nested)
    assert theirs.flatten().equal(codes.flatten())
    if not nested:
        assert state.absmax.equal(absmax)
        ours = dequantize(codes, absmax, weight.dtype)
        return torch.testing.assert_close(functional.dequantize_4bit(theirs, state), ours)
    with torch.device("meta"):
        model = nn.Sequential(QuantizedLinear(nn.Linear(128, 48), "nf4", 64, torch.float32))
    parts = {f"0.weight.{part}": t for part, t in state.as_dict(packed=True).items()}
    found = from_bitsandbytes(model, "0.weight", parts | {"0.weight": theirs})
    ours = dequantize(found["0.codes"], found["0.absmax"], weight.dtype)
    torch.testing.assert_close(functional.dequantize_4bit(theirs, state), ours)


# Runs


def test_a_run_on_a_quantized_base_is_evaluated_on_it_and_exported_for_the_whole_one(
    tmp_path, lively_checkpoint, arithmetic, capsys
):
    flags = ["--model", lively_checkpoint, "--data", arithmetic, "--out", tmp_path / "run",
             "--precision", "fp32", "--device", "cpu", "--limit", 30]  # fmt: skip
    train.main([*map(str, flags), "--max-steps", "1", "--base-precision", "nf4"])
    assert "layers of the base in nf4" in capsys.readouterr().out
    with pytest.raises(BadRun, match="base_precision was nf4, is None"):
        train.main([*map(str, flags), "--max-steps", "2"])
    best = tmp_path / "run" / "best"
    assert "The layers of the base were held in nf4" in (best / "README.md").read_text()
    for asked, held in (None, "nf4"), ("full", None), ("int8", "int8"):
        config = evaluate.EvalConfig(str(best), precision="fp32", base_precision=asked)
        assert evaluate.find_base(config).base_precision == held
    capsys.readouterr()
    export.main(["--adapter", str(best), "--out", str(tmp_path / "merged"), "--dtype", "fp32"])
    assert "trained on the base in nf4, exported for the base in full" in capsys.readouterr().out


def test_an_adapter_is_not_merged_into_stored_codes(tmp_path):
    folder, _ = bitsandbytes_checkpoint(tmp_path / "base", "nf4")
    model, config, adapter = load_model(folder, dtype=torch.float32), LoRAConfig(), tmp_path / "a"
    inject(model, config)
    save_adapter(model, adapter, config, base=str(folder), revision=None)
    with pytest.raises(BadOption, match="cannot hold an adapter's change"):
        export.main(["--adapter", str(adapter), "--out", str(tmp_path / "merged")])
