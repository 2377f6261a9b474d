"""Tests of the network and its loading; the reference is transformers, or the plain formulas.

Legend: T tokens, C hidden size, V vocabulary size.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from errors import BadCheckpoint
from model import attention, qwen2
from model.checkpoint import find_checkpoint, read_config, read_eos_ids, read_sampling
from model.load import load_model
from model.loss import linear_cross_entropy
from model.qwen2 import (
    Qwen2,
    plain_attention,
    plain_loss,
    plain_rms_norm,
    plain_rotate,
)
from tests import toys
from tests.published import REAL_TOKENIZER

LENGTHS = (5, 1, 19, 8)


def examples(lengths=LENGTHS, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(toys.TOKENS, (n,), generator=generator) for n in lengths]


def flat(model: Qwen2, texts: list[torch.Tensor]) -> torch.Tensor:
    """Hidden states (T, C) of the examples as one micro-batch."""
    device, lengths = model.head_weight.device, [len(text) for text in texts]
    positions = torch.cat([torch.arange(n) for n in lengths])
    return model(torch.cat(texts).to(device), positions.to(device), lengths)


def logits(model: Qwen2, text: torch.Tensor) -> torch.Tensor:
    return flat(model, [text]) @ model.head_weight.t()  # (T, V)


@pytest.fixture(scope="module")
def model(lively_checkpoint, device):
    return load_model(lively_checkpoint, dtype=torch.float32, device=device)


def transformers_model(folder: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


# The network


CHECKPOINTS = {
    "tied": {},
    "untied": {"tied": False},
    "tied, sharded": {"shards": 3},
    "untied, sharded, new config": {"tied": False, "shards": 2, "new_config": True},
    "tied, new config": {"new_config": True},
    "a key head for each query head": {"kv_heads": 4},
    "one key head for all query heads": {"kv_heads": 1},
    "bf16 weights": {"dtype": torch.bfloat16},
    "fp16 weights": {"dtype": torch.float16},
    "tied, with a redundant lm_head": {"lm_head_beside_tied": True},
}


@torch.no_grad()
@pytest.mark.parametrize("options", CHECKPOINTS.values(), ids=CHECKPOINTS.keys())
def test_logits_equal_transformers(tmp_path, options, device):
    folder = toys.write_checkpoint(tmp_path / "checkpoint", std=0.1, **options)
    (text,) = examples([400])  # beyond position 256, which bf16 angles would not survive
    ours = logits(load_model(folder, dtype=torch.float32, device=device), text).cpu()
    truth = transformers_model(folder)(text[None]).logits[0]
    assert truth.std() > 0.5, "logits near zero would agree with anything"
    torch.testing.assert_close(ours, truth, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("spelling", [
    {"rope_theta": 500.0},
    {"rope_theta": None, "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}},
    {"rope_theta": 500.0, "rope_scaling": {"type": "default"}},
    {},
])  # fmt: skip
def test_rope_theta_is_read_as_by_transformers(tmp_path, spelling):
    folder = toys.write_checkpoint(tmp_path / "checkpoint", std=0.3)
    config = json.loads((folder / "config.json").read_text())
    del config["rope_theta"]
    toys.write_json(folder / "config.json", config | spelling)
    (text,) = examples([40])
    ours = logits(load_model(folder, dtype=torch.float32), text)
    truth = transformers_model(folder)(text[None]).logits[0]
    torch.testing.assert_close(ours, truth, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_flat_micro_batch_equals_its_examples_one_by_one(model):
    texts = examples()
    one_by_one = torch.cat([flat(model, [text]) for text in texts])
    torch.testing.assert_close(flat(model, texts), one_by_one, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("changed", range(len(LENGTHS)))
def test_changing_one_example_leaves_the_others_bit_equal(model, changed):
    texts, others = examples(), examples(seed=1)
    before = flat(model, texts).split(LENGTHS)
    texts[changed] = others[changed]
    after = flat(model, texts).split(LENGTHS)
    same = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert same == [i != changed for i in range(len(LENGTHS))]


@torch.no_grad()
def test_a_token_does_not_change_the_hidden_states_before_it(model):
    (text,) = examples([20])
    before = flat(model, [text])
    text[12] = (text[12] + 1) % toys.TOKENS
    after = flat(model, [text])
    assert torch.equal(before[:12], after[:12]) and not torch.equal(before[12], after[12])


@torch.no_grad()
def test_bf16_hidden_states_equal_fp32_within_bf16_precision(checkpoint, device):
    (text,) = examples([300])  # beyond position 256 a bf16 angle would be wrong
    wide = flat(load_model(checkpoint, dtype=torch.float32), [text])
    half = flat(load_model(checkpoint, dtype=torch.bfloat16, device=device), [text]).cpu()
    assert half.dtype == torch.bfloat16
    assert (half.float() - wide).norm() < 0.03 * wide.norm()


def test_a_model_of_the_plain_formulas_has_the_same_loss_and_gradient(model, monkeypatch):
    texts = examples()
    targets = torch.cat(texts).roll(-1).to(model.head_weight.device)
    targets[::3] = -100

    def loss_and_gradient(loss):
        weight = model.model.embed_tokens.weight.requires_grad_()
        nats = loss(flat(model, texts), model.head_weight, targets)
        (gradient,) = torch.autograd.grad(nats, weight)
        weight.requires_grad_(False)
        return nats.detach(), gradient

    fast = loss_and_gradient(lambda *inputs: linear_cross_entropy(*inputs)[0])
    monkeypatch.setattr(qwen2, "rms_norm", plain_rms_norm)
    monkeypatch.setattr(qwen2, "rotate", plain_rotate)
    monkeypatch.setattr(qwen2, "swiglu", lambda gate, up: F.silu(gate) * up)
    monkeypatch.setattr(attention, "attend_example", plain_attention)
    torch.testing.assert_close(fast, loss_and_gradient(plain_loss), rtol=1e-4, atol=1e-4)


# Loading


def cause_of_refusal(folder: Path) -> str:
    with pytest.raises(BadCheckpoint) as caught:
        load_model(folder, dtype=torch.float32)
    assert caught.value.remedy
    return caught.value.cause


@pytest.fixture
def folder(checkpoint, tmp_path):
    """A copy of the tied checkpoint, for a test to damage."""
    return Path(shutil.copytree(checkpoint, tmp_path / "broken"))


def change_tensors(folder: Path, change) -> None:
    """Apply `change` to the dict of tensors in the folder's only file."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_every_tensor_is_loaded_unchanged_and_frozen(checkpoint):
    model = load_model(checkpoint, dtype=torch.float32)
    tensors = load_file(checkpoint / "model.safetensors")
    state = model.state_dict()
    assert state.keys() == tensors.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in tensors.items())
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_all_problems_of_the_tensors_are_listed(folder):
    def damage(tensors):
        del tensors["model.norm.weight"]
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(3, 4)
        tensors["model.layers.1.self_attn.q_proj.bias"] = torch.zeros(64, dtype=torch.int64)
        tensors["model.layers.7.extra"] = torch.zeros(1)
        tensors["lm_head.bias"] = torch.zeros(1)

    change_tensors(folder, damage)
    cause = cause_of_refusal(folder)
    for part in (
        "model.norm.weight is missing",
        "model.layers.0.mlp.up_proj.weight is (3, 4), not (96, 64)",
        "model.layers.1.self_attn.q_proj.bias is I64",
        "model.layers.7.extra is not expected",
        "lm_head.bias is not expected",
    ):
        assert part in cause


def test_an_untied_checkpoint_without_lm_head_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["tie_word_embeddings"]  # the default in transformers' Qwen2 is untied
    for untied in (config, config | {"tie_word_embeddings": False}):
        toys.write_json(folder / "config.json", untied)
        assert "lm_head.weight is missing" in cause_of_refusal(folder)


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "..", "sub/x.safetensors",
                                   "absent.safetensors", "config.json",
                                   "n" * 300 + ".safetensors"])  # fmt: skip
def test_a_shard_that_is_not_a_tensor_file_of_the_folder_is_refused(tmp_path, checkpoint, shard):
    shutil.copy(checkpoint / "model.safetensors", tmp_path / "model.safetensors")
    folder = toys.write_checkpoint(tmp_path / "sharded", shards=2)
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    toys.change_json(index, weight_map=weight_map | {"model.norm.weight": shard})
    assert f"{shard} is not a file of this folder" in cause_of_refusal(folder)


def test_all_invalid_shards_are_listed(tmp_path):
    folder = toys.write_checkpoint(tmp_path / "sharded", shards=2)
    shards = {"model.norm.weight": "../outside.safetensors", "lm_head.weight": "gone.safetensors"}
    toys.change_json(folder / "model.safetensors.index.json", weight_map=shards)
    cause = cause_of_refusal(folder)
    assert "../outside.safetensors is not a file" in cause and "gone.safetensors is not" in cause


@pytest.mark.parametrize("weight_map", [None, [], {"model.norm.weight": 3}, "x"])
def test_a_shard_index_without_a_weight_map_is_refused(tmp_path, weight_map):
    folder = toys.write_checkpoint(tmp_path / "sharded", shards=2)
    toys.change_json(folder / "model.safetensors.index.json", weight_map=weight_map)
    assert "has no weight_map" in cause_of_refusal(folder)


def test_a_damaged_file_is_refused(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    assert "is damaged" in cause_of_refusal(folder)


def test_a_folder_without_weights_or_config_is_refused(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    assert "no model.safetensors" in cause_of_refusal(folder)
    assert "it has no config.json" in cause_of_refusal(tmp_path)


UNSUPPORTED = {
    "is a llama, not a qwen2": {"model_type": "llama"},
    "use_sliding_window is not supported": {"use_sliding_window": True, "max_window_layers": 1},
    "rope_scaling of type 'yarn' is not supported": {
        "rope_scaling": {"type": "yarn", "factor": 4.0}
    },
    "rope_parameters of type 'linear' is not": {
        "rope_parameters": {"rope_type": "linear", "rope_theta": 1e6}
    },
    "hidden_act 'gelu' is not supported": {"hidden_act": "gelu"},
    "hidden_size is None": {"hidden_size": None},
    "num_hidden_layers is -1": {"num_hidden_layers": -1},
    "vocab_size is '308'": {"vocab_size": "308"},
    "rms_norm_eps is 0": {"rms_norm_eps": 0},
    "rope_theta is 'big'": {"rope_theta": "big"},
    "does not divide into 5 heads": {"num_attention_heads": 5},
    "4 query heads do not divide among 3": {"num_key_value_heads": 3},
    "64 does not divide into 4 heads": {"head_dim": 32},
    "rope_parameters is 'default'": {"rope_parameters": "default"},
    "tie_word_embeddings is 'no'": {"tie_word_embeddings": "no"},
}


@pytest.mark.parametrize("cause, changes", UNSUPPORTED.items(), ids=UNSUPPORTED.keys())
def test_an_unsupported_config_is_refused(folder, cause, changes):
    toys.change_json(folder / "config.json", **changes)
    assert cause in cause_of_refusal(folder)


def test_all_problems_of_a_config_are_listed(folder):
    yarn = {"type": "yarn", "factor": 4.0}
    toys.change_json(
        folder / "config.json",
        hidden_size=0,
        use_sliding_window=True,
        max_window_layers=0,
        rope_scaling=yarn,
    )
    cause = cause_of_refusal(folder)
    assert "hidden_size" in cause and "use_sliding_window" in cause and "yarn" in cause


@pytest.mark.parametrize("text", ["", "[]", "{", '"qwen2"', "\udcff"])
def test_a_config_that_is_not_a_json_object_is_refused(folder, text):
    (folder / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    assert "config.json" in cause_of_refusal(folder)


def test_an_epsilon_that_a_config_omits_is_the_default_of_transformers(folder):
    path = folder / "config.json"
    config = json.loads(path.read_text("utf-8"))
    del config["rms_norm_eps"]
    path.write_text(json.dumps(config), "utf-8")
    transformers = pytest.importorskip("transformers")
    assert read_config(folder).rms_norm_eps == transformers.Qwen2Config().rms_norm_eps


def test_the_configs_of_transformers_4_and_5_are_read_alike(tmp_path):
    old = toys.write_checkpoint(tmp_path / "old")
    new = toys.write_checkpoint(tmp_path / "new", new_config=True)
    assert read_config(old) == read_config(new)


def test_a_name_that_is_neither_a_folder_nor_a_hub_id_is_refused(checkpoint, tmp_path):
    for name in ("nowhere", "a/b/c", "./x/y", "/x", str(checkpoint / "config.json")):
        with pytest.raises(BadCheckpoint, match="neither a folder nor a Hub id"):
            find_checkpoint(name)
    with pytest.raises(BadCheckpoint, match="--revision"):
        find_checkpoint(str(checkpoint), "main")
    assert find_checkpoint(str(checkpoint)).folder == checkpoint


def test_end_tokens_come_from_the_generation_config_or_otherwise_from_the_config(folder):
    assert read_eos_ids(folder) == (toys.IM_END, toys.ENDOFTEXT)
    (folder / "generation_config.json").unlink()
    assert read_eos_ids(folder) == (toys.IM_END,)
    toys.change_json(folder / "config.json", eos_token_id=None)
    with pytest.raises(BadCheckpoint, match="eos_token_id"):
        read_eos_ids(folder)


def test_recommended_sampling_comes_from_the_generation_config(folder):
    path = folder / "generation_config.json"
    recommended = {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.1}
    assert read_sampling(folder) == recommended
    toys.change_json(path, top_p="most")  # a value of another type is no recommendation
    assert "top_p" not in read_sampling(folder)
    toys.change_json(path, do_sample=False)
    assert read_sampling(folder) == {}
    path.unlink()
    assert read_sampling(folder) == {}


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc/self/maps")
@pytest.mark.parametrize("shards", [1, 3])
def test_weights_are_memory_mapped_and_not_copied(tmp_path, shards):
    folder = toys.write_checkpoint(tmp_path / "checkpoint", shards=shards)
    model = load_model(folder, dtype=torch.float32)
    mapped = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if str(folder) in line:
            start, stop = (int(end, 16) for end in line.split()[0].split("-"))
            mapped.append(range(start, stop))
    assert len(mapped) >= shards
    outside = [n for n, p in model.named_parameters() if not any(p.data_ptr() in m for m in mapped)]
    assert not outside


def test_the_toy_tokenizer_has_the_pipeline_of_the_real_one(checkpoint):
    folders = (checkpoint, REAL_TOKENIZER)
    toy, real = (json.loads((f / "tokenizer.json").read_text()) for f in folders)
    assert toy["pre_tokenizer"]["pretokenizers"][0] == real["pre_tokenizer"]["pretokenizers"][0]
    assert toy["normalizer"] == real["normalizer"]
    added = [[token["content"] for token in t["added_tokens"]] for t in (toy, real)]
    assert added[0] == added[1] == list(toys.SPECIAL)
    configs = (json.loads((f / "tokenizer_config.json").read_text()) for f in folders)
    assert len({config["chat_template"] for config in configs}) == 1
