"""Laws of the network and its loading; the truth is transformers, or the plain way.

Legend: T tokens, C hidden size, V vocabulary.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from errors import BadCheckpoint
from model.checkpoint import find_checkpoint, read_config, read_eos_ids
from model.load import load_model
from model.qwen2 import Qwen2
from tests import toys

LENGTHS = (5, 1, 19, 8)
REAL_TOKENIZER = Path(__file__).parents[2] / "shared" / "qwen2-tokenizer"


def examples(lengths=LENGTHS, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(toys.TOKENS, (n,), generator=generator) for n in lengths]


def flat(model: Qwen2, rows: list[torch.Tensor]) -> torch.Tensor:
    """Hidden states (T, C) of the examples as one micro-batch."""
    lengths = [len(row) for row in rows]
    return model(torch.cat(rows), torch.cat([torch.arange(n) for n in lengths]), lengths)


def logits(model: Qwen2, row: torch.Tensor) -> torch.Tensor:
    return flat(model, [row]) @ model.head_weight.t()  # (T, V)


@pytest.fixture(scope="module")
def model(lively_checkpoint):
    return load_model(lively_checkpoint, dtype=torch.float32)


def theirs(folder: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


# The network


CHECKPOINTS = {
    "tied": {},
    "untied": {"tied": False},
    "tied, sharded": {"shards": 3},
    "untied, sharded, new config": {"tied": False, "shards": 2, "new_config": True},
    "tied, new config": {"new_config": True},
    "a group for each head": {"kv_heads": 4},
    "one group for all heads": {"kv_heads": 1},
    "bf16 weights": {"dtype": torch.bfloat16},
    "fp16 weights": {"dtype": torch.float16},
    "tied, with a superfluous head": {"lm_head_beside_tied": True},
}


@torch.no_grad()
@pytest.mark.parametrize("options", CHECKPOINTS.values(), ids=CHECKPOINTS.keys())
def test_logits_are_transformers(tmp_path, options):
    folder = toys.write_checkpoint(tmp_path / "checkpoint", std=0.1, **options)
    (row,) = examples([400])  # positions up to 256 would be exact in bf16
    ours = logits(load_model(folder, dtype=torch.float32), row)
    truth = theirs(folder)(row[None]).logits[0]
    assert truth.std() > 0.5, "logits near zero would agree with anything"
    torch.testing.assert_close(ours, truth, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("spelling", [
    {"rope_theta": 500.0},
    {"rope_theta": None, "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}},
    {"rope_theta": 500.0, "rope_scaling": {"type": "default"}},
    {},
])  # fmt: skip
def test_the_rotary_base_is_read_as_transformers_reads_it(tmp_path, spelling):
    folder = toys.write_checkpoint(tmp_path / "checkpoint", std=0.3)
    config = json.loads((folder / "config.json").read_text())
    del config["rope_theta"]
    toys.write_json(folder / "config.json", config | spelling)
    (row,) = examples([40])
    ours = logits(load_model(folder, dtype=torch.float32), row)
    torch.testing.assert_close(ours, theirs(folder)(row[None]).logits[0], atol=1e-5, rtol=0)


@torch.no_grad()
def test_one_flat_micro_batch_is_its_examples_one_by_one(model):
    rows = examples()
    one_by_one = torch.cat([flat(model, [row]) for row in rows])
    torch.testing.assert_close(flat(model, rows), one_by_one, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("changed", range(len(LENGTHS)))
def test_changing_one_example_leaves_the_others_bit_equal(model, changed):
    rows, others = examples(), examples(seed=1)
    before = flat(model, rows).split(LENGTHS)
    rows[changed] = others[changed]
    after = flat(model, rows).split(LENGTHS)
    same = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert same == [i != changed for i in range(len(LENGTHS))]


@torch.no_grad()
def test_a_later_token_changes_nothing_before_it(model):
    (row,) = examples([20])
    before = flat(model, [row])
    row[12] = (row[12] + 1) % toys.TOKENS
    after = flat(model, [row])
    assert torch.equal(before[:12], after[:12]) and not torch.equal(before[12], after[12])


@torch.no_grad()
def test_bf16_is_fp32_to_its_own_precision(checkpoint):
    (row,) = examples([300])  # beyond position 256 a bf16 angle would be wrong
    wide = flat(load_model(checkpoint, dtype=torch.float32), [row])
    half = flat(load_model(checkpoint, dtype=torch.bfloat16), [row])
    assert half.dtype == torch.bfloat16
    assert (half.float() - wide).norm() < 0.03 * wide.norm()


# Loading


def problem_of(folder: Path) -> str:
    with pytest.raises(BadCheckpoint) as caught:
        load_model(folder, dtype=torch.float32)
    assert caught.value.remedy
    return caught.value.cause


@pytest.fixture
def folder(checkpoint, tmp_path):
    """A copy of the tied checkpoint, to be broken."""
    return Path(shutil.copytree(checkpoint, tmp_path / "broken"))


def change_tensors(folder: Path, change) -> None:
    """Apply `change` to the dict of tensors in the folder's one file."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_every_tensor_is_in_the_model_frozen_and_as_the_file_has_it(checkpoint):
    model = load_model(checkpoint, dtype=torch.float32)
    tensors = load_file(checkpoint / "model.safetensors")
    state = model.state_dict()
    assert state.keys() == tensors.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in tensors.items())
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_everything_wrong_with_the_tensors_is_listed_at_once(folder):
    def spoil(tensors):
        del tensors["model.norm.weight"]
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(3, 4)
        tensors["model.layers.1.self_attn.q_proj.bias"] = torch.zeros(64, dtype=torch.int64)
        tensors["model.layers.7.extra"] = torch.zeros(1)
        tensors["lm_head.bias"] = torch.zeros(1)

    change_tensors(folder, spoil)
    cause = problem_of(folder)
    for part in (
        "model.norm.weight is missing",
        "model.layers.0.mlp.up_proj.weight is (3, 4), not (96, 64)",
        "model.layers.1.self_attn.q_proj.bias is I64",
        "model.layers.7.extra is not expected",
        "lm_head.bias is not expected",
    ):
        assert part in cause


def test_an_untied_checkpoint_needs_its_head(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["tie_word_embeddings"]  # which means untied, in transformers' Qwen2
    for untied in (config, config | {"tie_word_embeddings": False}):
        toys.write_json(folder / "config.json", untied)
        assert "lm_head.weight is missing" in problem_of(folder)


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "..", "sub/x.safetensors",
                                   "absent.safetensors", "config.json",
                                   "n" * 300 + ".safetensors"])  # fmt: skip
def test_a_shard_that_is_no_tensor_file_of_the_folder_is_refused(tmp_path, checkpoint, shard):
    shutil.copy(checkpoint / "model.safetensors", tmp_path / "model.safetensors")
    folder = toys.write_checkpoint(tmp_path / "sharded", shards=2)
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    toys.change_json(index, weight_map=weight_map | {"model.norm.weight": shard})
    assert f"{shard} is not a file of this folder" in problem_of(folder)


def test_every_wrong_shard_is_listed(tmp_path):
    folder = toys.write_checkpoint(tmp_path / "sharded", shards=2)
    shards = {"model.norm.weight": "../outside.safetensors", "lm_head.weight": "gone.safetensors"}
    toys.change_json(folder / "model.safetensors.index.json", weight_map=shards)
    cause = problem_of(folder)
    assert "../outside.safetensors is not a file" in cause and "gone.safetensors is not" in cause


@pytest.mark.parametrize("weight_map", [None, [], {"model.norm.weight": 3}, "x"])
def test_a_shard_index_without_a_map_is_refused(tmp_path, weight_map):
    folder = toys.write_checkpoint(tmp_path / "sharded", shards=2)
    toys.change_json(folder / "model.safetensors.index.json", weight_map=weight_map)
    assert "has no weight_map" in problem_of(folder)


def test_a_damaged_file_is_refused(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    assert "is damaged" in problem_of(folder)


def test_a_folder_without_weights_or_config_is_refused(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    assert "no model.safetensors" in problem_of(folder)
    assert "it has no config.json" in problem_of(tmp_path)


NOT_OURS = {
    "is a llama, not a qwen2": {"model_type": "llama"},
    "use_sliding_window is not supported": {"use_sliding_window": True},
    "rope type 'yarn' is not supported": {"rope_scaling": {"type": "yarn", "factor": 4.0}},
    "rope type 'linear' is not": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e6}},
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


@pytest.mark.parametrize("cause, changes", NOT_OURS.items(), ids=NOT_OURS.keys())
def test_a_config_that_is_not_qwen2s_is_refused(folder, cause, changes):
    toys.change_json(folder / "config.json", **changes)
    assert cause in problem_of(folder)


def test_everything_wrong_with_a_config_is_listed_at_once(folder):
    yarn = {"type": "yarn", "factor": 4.0}
    toys.change_json(
        folder / "config.json", hidden_size=0, use_sliding_window=True, rope_scaling=yarn
    )
    cause = problem_of(folder)
    assert "hidden_size" in cause and "use_sliding_window" in cause and "yarn" in cause


@pytest.mark.parametrize("text", ["", "[]", "{", '"qwen2"', "\udcff"])
def test_a_config_that_is_no_json_object_is_refused(folder, text):
    (folder / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    assert "config.json" in problem_of(folder)


def test_both_spellings_of_a_config_are_one(tmp_path):
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


def test_the_end_tokens_are_those_of_the_generation_config_or_else_of_the_config(folder):
    assert read_eos_ids(folder) == (toys.IM_END, toys.ENDOFTEXT)
    (folder / "generation_config.json").unlink()
    assert read_eos_ids(folder) == (toys.IM_END,)
    toys.change_json(folder / "config.json", eos_token_id=None)
    with pytest.raises(BadCheckpoint, match="eos_token_id"):
        read_eos_ids(folder)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of mappings")
@pytest.mark.parametrize("shards", [1, 3])
def test_weights_are_mapped_from_their_files_and_not_copied(tmp_path, shards):
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


@pytest.mark.skipif(not REAL_TOKENIZER.exists(), reason="needs ../shared")
def test_the_toy_tokenizer_is_built_like_the_real_one(checkpoint):
    folders = (checkpoint, REAL_TOKENIZER)
    toy, real = (json.loads((f / "tokenizer.json").read_text()) for f in folders)
    assert toy["pre_tokenizer"]["pretokenizers"][0] == real["pre_tokenizer"]["pretokenizers"][0]
    assert toy["normalizer"] == real["normalizer"]
    added = [[token["content"] for token in t["added_tokens"]] for t in (toy, real)]
    assert added[0] == added[1] == list(toys.SPECIAL)
    configs = (json.loads((f / "tokenizer_config.json").read_text()) for f in folders)
    assert len({config["chat_template"] for config in configs}) == 1
