"""Qwen2, Qwen2.5 and Qwen3 in their published sizes, and Qwen3's network against transformers.

Legend: T tokens, C hidden size, V vocabulary size.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import evaluate
import train
from benchmarks.sizes import SIZES
from data.chat import ChatFormat
from data.rows import Message
from errors import BadCheckpoint, BadData
from evaluation.generative import exact_text
from lora.inject import LoRAConfig, adapters, inject
from lora.peft_format import WEIGHTS, read_adapter, save_adapter
from model import checkpoint
from model.attention import FlatAttention, attend_each
from model.checkpoint import read_config
from model.generate import Decoding, generate
from model.load import load_model
from model.qwen2 import Qwen2, Qwen2Config
from run import export
from run.base import Base
from tests import toys
from tests.templates import QWEN3

NAMES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads", "vocab_size", "tie_word_embeddings")  # fmt: skip
PARAMETERS = {
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-1.5B": 1_543_714_304,
    "Qwen2.5-3B": 3_085_938_688,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-14B": 14_770_033_664,
    "Qwen2.5-32B": 32_763_876_352,
    "Qwen2.5-72B": 72_706_203_648,
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-1.7B": 1_720_574_976,
    "Qwen3-4B": 4_022_468_096,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-14B": 14_768_307_200,
    "Qwen3-32B": 32_762_123_264,
}


def write_config(folder: Path, sizes: Qwen2Config) -> dict:
    """A `config.json` of these sizes; returns it."""
    raw = {"model_type": "qwen3" if sizes.is_qwen3 else "qwen2"}
    raw |= {name: getattr(sizes, name) for name in NAMES}
    if sizes.is_qwen3:
        raw["head_dim"] = sizes.head_dim
    toys.write_json(folder / "config.json", raw)
    return raw


@pytest.fixture
def without_weights(monkeypatch):
    """`read_config` reads a folder that holds only a config."""
    monkeypatch.setattr(checkpoint, "has_own_head", lambda folder: False)


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_published_size_has_its_parameters_and_the_shapes_of_transformers(
    tmp_path, name, monkeypatch, without_weights
):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = SIZES[name]
    raw = write_config(tmp_path, sizes)
    with torch.device("meta"):
        whole = Qwen2(read_config(tmp_path))
        assert sum(p.numel() for p in whole.parameters()) == PARAMETERS[name]
        toys.write_json(tmp_path / "config.json", raw | {"num_hidden_layers": 1})
        ours = Qwen2(read_config(tmp_path))
        theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
        shapes = [{n: p.shape for n, p in m.named_parameters()} for m in (ours, theirs)]
        assert shapes[0] == shapes[1]
        each = lambda self, _, *qkv: attend_each(*qkv, self.lengths)  # noqa: E731
        monkeypatch.setattr(FlatAttention, "__call__", each)  # `meta` cannot try other kernels
        inject(ours, LoRAConfig(targets=("all-linear",), dropout=0.0))
        hidden = ours(torch.zeros(5, dtype=torch.int64), torch.arange(5), [3, 2])
    assert hidden.shape == (5, sizes.hidden_size)


# Qwen3


def write_qwen3(folder: Path, *, tied: bool) -> Path:
    """A tiny Qwen3 as transformers writes it, with random norms; query heads are wider than C."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=toys.TABLE, hidden_size=48, intermediate_size=80, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, tie_word_embeddings=tied,
        eos_token_id=toys.IM_END, bos_token_id=None,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    for name, p in model.named_parameters():
        p.data.normal_(1.0 if "norm" in name else 0.0, 0.2)
    model.save_pretrained(folder)
    toys.write_tokenizer(folder)
    toys.change_json(folder / "tokenizer_config.json", chat_template=QWEN3)
    return folder


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def qwen3(request, tmp_path_factory):
    """The folder of a tiny Qwen3; read-only."""
    return write_qwen3(tmp_path_factory.mktemp("qwen3") / "base", tied=request.param)


def their_logits(model, text: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(text[None]).logits[0]  # (T, V)


def our_logits(model: Qwen2, text: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(text, torch.arange(len(text)), [len(text)]) @ model.head_weight.t()


def transformers_model(folder: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


TEXT = torch.arange(400) * 7 % toys.TOKENS


def test_logits_of_a_qwen3_equal_transformers(qwen3):
    truth = their_logits(transformers_model(qwen3), TEXT)
    assert truth.std() > 0.5, "logits near zero would agree with anything"
    ours = our_logits(load_model(qwen3, dtype=torch.float32), TEXT)
    torch.testing.assert_close(ours, truth, atol=2e-5, rtol=0)


def test_a_qwen3_decodes_with_a_cache_what_it_predicts_without_one(qwen3):
    model = load_model(qwen3, dtype=torch.float32)
    prompts = [TEXT[:9].tolist(), TEXT[20:25].tolist()]
    answers = generate(model, prompts, Decoding(6, (), toys.TABLE, batch_size=2))
    for prompt, answer in zip(prompts, answers, strict=True):
        expected = list(prompt)
        for _ in range(6):
            expected.append(our_logits(model, torch.tensor(expected))[-1].argmax().item())
        assert prompt + answer.tokens == expected


@pytest.mark.parametrize("flags", [("--dtype", "fp32"), ("--portable",), ("--gguf",)])
@pytest.mark.parametrize("targets", ["attention", "all-linear"])
def test_adapters_of_a_qwen3_are_pefts_and_every_export_of_them_computes_the_same(
    qwen3, tmp_path, targets, flags
):
    from peft import PeftModel

    if "--gguf" in flags:
        pytest.importorskip("gguf")
    lora = LoRAConfig(r=3, dropout=0.0, targets=(targets,))
    model = load_model(qwen3, dtype=torch.float32)
    inject(model, lora)
    for layer in adapters(model):
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    save_adapter(model, tmp_path / "adapter", lora, base=str(qwen3), revision=None)
    expected = our_logits(model, TEXT)
    theirs = PeftModel.from_pretrained(transformers_model(qwen3), tmp_path / "adapter").eval()
    torch.testing.assert_close(their_logits(theirs, TEXT), expected, atol=1e-4, rtol=0)
    again = load_model(qwen3, dtype=torch.float32)
    read_adapter(tmp_path / "adapter", again)
    assert torch.equal(our_logits(again, TEXT), expected)
    # Compares the logits of what it wrote with the adapter's, and fails if they differ.
    out = tmp_path / ("out.gguf" if "--gguf" in flags else "out")
    export.main(["--adapter", str(tmp_path / "adapter"), "--out", str(out), *flags])
    if "--dtype" in flags:
        torch.testing.assert_close(
            their_logits(transformers_model(out), TEXT), expected, atol=1e-4, rtol=0
        )


def test_a_qwen3_trains_and_is_evaluated_by_the_same_commands(tmp_path, arithmetic, capsys):
    base, out = write_qwen3(tmp_path / "base", tied=True), tmp_path / "run"
    flags = ["--model", base, "--data", arithmetic, "--device", "cpu", "--precision", "fp32"]
    asked = [*flags, "--out", out, "--max-steps", "3", "--dora", "--checkpoint-activations",
             "--targets", "all-linear", "--learning-rate", "1e-2"]  # fmt: skip
    assert train.main([str(flag) for flag in asked]) == 0
    tensors = load_file(out / "best" / WEIGHTS)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    assert tensors[name].shape == (128, 8) and tensors[name].any()
    asked = [*flags[2:], "--adapter", out / "best", "--limit", "4", "--max-new-tokens", "4",
             "--out", tmp_path / "evaluation"]  # fmt: skip
    evaluate.main([str(flag) for flag in asked])
    assert "answers correct" in capsys.readouterr().out
    sizes = json.loads((out / "config.json").read_text())["identity"]["base_sizes"]
    assert sizes["head_dim"] == 32


@pytest.mark.parametrize("changes, said", [
    ({"attention_bias": True}, "attention_bias is not supported"),
    ({"head_dim": 31}, "head_dim is 31, not even"),
    ({"head_dim": "32"}, "head_dim is '32'"),
    ({"num_key_value_heads": 3}, "4 query heads do not divide among 3"),
    ({"use_sliding_window": True, "layer_types": None, "max_window_layers": 1},
     "use_sliding_window is not supported"),
    ({"model_type": "qwen3_moe"}, "is a qwen3_moe, not a qwen2 or qwen3"),
])  # fmt: skip
def test_a_qwen3_that_is_not_dense_or_is_another_variant_is_refused(
    tmp_path, changes, said, without_weights
):
    write_config(tmp_path, replace(SIZES["Qwen3-0.6B"], head_dim=32))
    toys.change_json(tmp_path / "config.json", num_attention_heads=4, num_key_value_heads=2)
    assert read_config(tmp_path).head_size == 32
    toys.change_json(tmp_path / "config.json", **changes)
    with pytest.raises(BadCheckpoint) as refused:
        read_config(tmp_path)
    assert said in refused.value.cause


def test_the_identity_of_a_qwen2_has_no_size_that_only_a_qwen3_has(tmp_path):
    folder = toys.write_checkpoint(tmp_path / "base")
    base = Base.find(str(folder), precision="fp32", device="cpu")
    assert "head_dim" not in base.identity()["base_sizes"]


# Its thinking block


@pytest.fixture
def thinking(qwen3):
    return ChatFormat.from_folder(qwen3)


def test_the_last_answer_of_a_qwen3_is_trained_with_an_empty_thinking_block(thinking):
    chat = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    encoded = thinking.encode([Message(*turn) for turn in chat])
    supervised = [t for t, flag in zip(encoded.tokens, encoded.supervised_mask) if flag]
    assert thinking.decode(supervised) == "b<think>\n\n</think>\n\nd"
    prompt = thinking.prompt([Message("user", "a")])
    assert thinking.decode(prompt).endswith("assistant\n")  # the model writes the block


def test_thoughts_in_a_row_are_trained_and_a_row_that_would_lose_them_is_refused(thinking):
    thought = Message("assistant", "<think>\nhm\n</think>\n\nb")
    encoded = thinking.encode([Message("user", "a"), thought])
    assert thought.content in thinking.decode(encoded.tokens)
    with pytest.raises(BadData, match="changes a text of the assistant"):
        thinking.encode([Message("user", "a"), thought, Message("user", "c"), thought])


def test_an_answer_is_compared_without_its_thoughts():
    assert exact_text("<think>\n\n</think>\n\nyes", "yes")
    assert not exact_text("<think>\nyes\n</think>\n\nno", "yes")
