"""Tests of other people's base models: each is read as by transformers, or refused for what it
is, with a remedy of its own.
"""

import contextlib
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from data.chat import ChatFormat
from data.rows import Message, Problem
from errors import BadCheckpoint, BadOption, UserError
from evaluation.choices import Question as ChoiceQuestion
from evaluation.choices import log_likelihoods
from evaluation.teacher_forced import teacher_forced_metrics
from lora import LoRAConfig, inject, save_adapter
from model.checkpoint import find_checkpoint, read_config, remarks
from model.foreign import FILES, STARTS, refuse_files
from model.generate import Decoding, generate
from model.load import load_model
from run import export
from run.base import Base
from run.device import check_trained
from run.folder import Progress
from tests import toys

TEXT = torch.randint(toys.TOKENS, (60,), generator=torch.Generator().manual_seed(0))
EMBEDDING = "model.embed_tokens.weight"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def logits(folder: Path) -> torch.Tensor:
    model = load_model(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(TEXT, torch.arange(len(TEXT)), [len(TEXT)]) @ model.head_weight.t()  # (T, V)


def transformers_logits(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(TEXT[None]).logits[0]


@pytest.fixture
def folder(checkpoint, tmp_path):
    """A copy of the tied checkpoint, to be made foreign."""
    return Path(shutil.copytree(checkpoint, tmp_path / "base"))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def refusal(name: str | Path) -> BadCheckpoint:
    with pytest.raises(BadCheckpoint) as caught:
        Base.find(str(name), precision="fp32", device="cpu").load()
    assert caught.value.exit_code == 2 and len(str(caught.value).splitlines()) == 2
    return caught.value


# Read as transformers reads them


READ = {
    "a window from a layer that is not there": {"use_sliding_window": True, "sliding_window": 8,
                                                "max_window_layers": 2},
    "a window of no size": {"use_sliding_window": True, "sliding_window": None,
                            "max_window_layers": 0},
    "a window, but all layers are full": {"use_sliding_window": True, "sliding_window": 8,
                                          "layer_types": ["full_attention"] * 2},
    "a window after as many layers as Qwen2 has by default": {"use_sliding_window": True,
                                                              "sliding_window": 8},
    "no key heads, which means as many as query heads": {},
    "rope_scaling of null next to rope_parameters": {
        "rope_scaling": None, "rope_theta": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "classes of remote code": {"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}},
}  # fmt: skip


@pytest.mark.parametrize("changes", READ.values(), ids=READ.keys())
def test_a_config_of_another_spelling_gives_the_logits_of_transformers(tmp_path, changes):
    folder = toys.write_checkpoint(tmp_path / "base", std=0.3, kv_heads=2 if changes else 4)
    toys.change_json(folder / "config.json", **changes or {"num_key_value_heads": None})
    torch.testing.assert_close(logits(folder), transformers_logits(folder), atol=1e-4, rtol=0)


HEADS = {
    "half the embedding": lambda table: table * 0.5,
    "one number of it differs": lambda table: table.index_fill(1, torch.tensor([3]), 0.7),
    "the embedding in bf16, which rounds it": lambda table: table.bfloat16(),
    "the embedding itself": lambda table: table.clone(),
}


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS.keys())
@pytest.mark.parametrize("shards", [1, 2])
def test_a_tied_config_with_a_head_of_its_own_is_used_as_by_transformers(tmp_path, head, shards):
    folder = toys.write_checkpoint(tmp_path / "base", std=0.3)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = head(tensors[EMBEDDING])
    (folder / "model.safetensors").unlink()
    toys.write_tensors(folder, tensors, shards)
    truth = transformers_logits(folder)
    torch.testing.assert_close(logits(folder), truth, atol=1e-4, rtol=0)
    own = not torch.equal(tensors["lm_head.weight"].float(), tensors[EMBEDDING])
    assert read_config(folder).tie_word_embeddings is not own
    assert any("own lm_head.weight" in line for line in remarks(folder, read_config(folder))) is own


def test_the_hub_caches_folder_of_a_repository_means_its_snapshot_of_main(folder, tmp_path):
    repository = tmp_path / "models--owner--name"
    for commit in ("aaaa", "bbbb"):
        shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("bbbb")
    assert find_checkpoint(str(repository)).folder == repository / "snapshots" / "bbbb"
    assert find_checkpoint(str(repository), "aaaa").folder == repository / "snapshots" / "aaaa"
    for ref in ("cccc", "../../..", ""):
        (repository / "refs" / "main").write_text(ref)
        found = refusal(repository)
        assert "without a snapshot of main" in found.cause and "snapshots/aaaa" in found.remedy


def test_a_head_size_of_null_is_absent_and_code_of_its_own_is_reported(folder):
    before = read_config(folder)
    toys.change_json(folder / "config.json", head_dim=None, auto_map={"AutoModel": "x.X"})
    assert read_config(folder) == before
    assert any("auto_map" in line for line in remarks(folder, before))


def test_weights_that_are_not_read_are_named(folder):
    assert remarks(folder, read_config(folder)) == []
    for name in ("pytorch_model.bin", "old.safetensors", "x-q4.gguf"):
        (folder / name).write_bytes(bytes(100))
    (line,) = remarks(folder, read_config(folder))
    assert "not read: old.safetensors; pytorch_model.bin; x-q4.gguf" in line
    lines = Base.find(str(folder), precision="fp32", device="cpu").lines()
    assert f"  {line}" in lines


# Which file a tensor is taken from


@pytest.fixture
def sharded(tmp_path):
    return toys.write_checkpoint(tmp_path / "sharded", shards=2)


def add_to_shard(path: Path, **tensors: torch.Tensor) -> None:
    save_file(load_file(path) | tensors, path, metadata={"format": "pt"})


def test_a_tensor_that_is_also_in_another_shard_is_refused_by_name(sharded):
    index = json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]
    other = next(shard for shard in index.values() if shard != index["model.norm.weight"])
    add_to_shard(sharded / other, **{"model.norm.weight": torch.zeros(64)})
    found = refusal(sharded)
    assert f"model.norm.weight is in {other}" in found.cause and "one place" in found.remedy


def test_a_tensor_that_the_index_does_not_list_is_refused_by_name(sharded):
    path = sharded / "model.safetensors.index.json"
    weight_map = json.loads(path.read_text())["weight_map"]
    del weight_map["model.norm.weight"]
    toys.change_json(path, weight_map=weight_map)
    assert "model.norm.weight is in" in refusal(sharded).cause


def test_a_tensor_that_is_not_where_the_index_says_is_refused_by_name(sharded):
    path = sharded / "model.safetensors.index.json"
    weight_map = json.loads(path.read_text())["weight_map"]
    there = weight_map["model.norm.weight"]
    other = next(shard for shard in weight_map.values() if shard != there)
    toys.change_json(path, weight_map=weight_map | {"model.norm.weight": other})
    cause = refusal(sharded).cause
    assert f"model.norm.weight is in {there}, and by the index in {other}" in cause
    assert f"model.norm.weight is not in {other}" in cause


def test_one_whole_file_next_to_an_index_of_others_is_refused(sharded, checkpoint):
    shutil.copy(checkpoint / "model.safetensors", sharded)
    found = refusal(sharded)
    assert "model.safetensors and shards" in found.cause and "remove one of them" in found.remedy


def test_an_index_of_the_one_whole_file_is_accepted(folder):
    names = load_file(folder / "model.safetensors").keys()
    index = {"weight_map": dict.fromkeys(names, "model.safetensors")}
    before = logits(folder)
    toys.write_json(folder / "model.safetensors.index.json", index)
    assert torch.equal(before, logits(folder))


# Refused for what they are: a change of a good checkpoint -> a part of the cause, of the remedy


def config(**changes: object) -> Callable[[Path], None]:
    return lambda folder: toys.change_json(folder / "config.json", **changes)


def files(*new: str, without: str = "") -> Callable[[Path], None]:
    """Remove the files that match `without`, then add files of a few bytes."""

    def change(folder: Path) -> None:
        for path in folder.glob(without) if without else ():
            path.unlink()
        for name in new:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(b"{}" if name.endswith(".json") else bytes(100))

    return change


def renamed(change: Callable[[str], str]) -> Callable[[Path], None]:
    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[change(name)] = tensors.pop(name)

    return lambda folder: change_tensors(folder, rename)


def tensors(**new: torch.Tensor) -> Callable[[Path], None]:
    new = {name.replace("__", "."): tensor for name, tensor in new.items()}
    return lambda folder: change_tensors(folder, lambda old: old.update(new))


def content(name: str, text: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(text)


W = "*.safetensors"
WINDOW = {"use_sliding_window": True, "sliding_window": 77}
BITSANDBYTES = {"quant_method": "bitsandbytes", "load_in_4bit": True}
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
REFUSED = {
    # Another architecture
    "llama": (config(model_type="llama", architectures=["LlamaForCausalLM"]),
              "is a llama, not a qwen2 or qwen3: another architecture (LlamaForCausalLM)",
              "use a Qwen2,"),
    "qwen2_moe": (config(model_type="qwen2_moe"), "is a qwen2_moe, not", "use a Qwen2,"),
    "qwen2_vl": (config(model_type="qwen2_vl"), "is a qwen2_vl, not", "use a Qwen2"),
    "gemma": (config(model_type="gemma2"), "is a gemma2, not", "use a Qwen2,"),
    "no type": (config(model_type=None), "has no model_type", 'add "model_type": "qwen2"'),
    "an encoder": (config(is_causal=False), "is_causal", "use a Qwen2,"),
    "a run": (config(options={}, identity={}), "is a run of train.py", "--adapter"),
    # Positions and windows
    "yarn": (config(rope_scaling={"type": "yarn", "factor": 4.0}), "'yarn'",
             "take rope_scaling out of config.json for texts within 32768 tokens"),
    "yarn of a shorter length": (
        config(rope_scaling={"rope_type": "yarn", "original_max_position_embeddings": 100}),
        "'yarn'", "within 100 tokens"),
    "yarn next to parameters": (
        config(rope_scaling={"type": "yarn"}, rope_parameters={"rope_type": "default"}), "'yarn'",
        "take rope_scaling out"),
    "dynamic": (config(rope_scaling={"type": "dynamic", "factor": 2.0}), "'dynamic'", "take rope"),
    "linear, new": (config(rope_parameters={"rope_type": "linear", "factor": 2.0}), "'linear'",
                    'rope_type to "default"'),
    "llama3": (config(rope_scaling={"rope_type": "llama3"}), "'llama3'", "use a Qwen2,"),
    "nested": (config(rope_parameters={"full_attention": {"rope_theta": 5.0}}), "differs between",
               "use a Qwen2,"),
    "a window": (config(**WINDOW, max_window_layers=1), "some layers slide", "within 77 tokens"),
    "a window by layer types": (
        config(**WINDOW, layer_types=["full_attention", "sliding_attention"]), "some layers slide",
        "take layer_types out"),
    # Quantized
    "bitsandbytes": (lambda f: (config(quantization_config=BITSANDBYTES)(f),
                                tensors(**{Q_PROJ + ".absmax": torch.zeros(1)})(f)),
                     "quantized (bitsandbytes, 4 bits)", "quantized from"),
    "bitsandbytes by name only": (config(quantization_config=BITSANDBYTES),
                                  "quantized (bitsandbytes, 4 bits)", "take quantization_config"),
    "gptq": (lambda f: (config(quantization_config={"quant_method": "gptq", "bits": 4})(f),
                        renamed(lambda n: n.replace("proj.weight", "proj.qweight"))(f)),
             "quantized (gptq, 4 bits)", "quantized from"),
    "awq without a word": (renamed(lambda n: n.replace("proj.weight", "proj.qweight")),
                           "qweight is not expected", "weights are quantized: give the checkpoint"),
    "mlx": (lambda f: (config(quantization={"group_size": 64, "bits": 4})(f),
                       tensors(model__layers__0__scales=torch.zeros(1))(f)),
            "quantized (mlx)", "quantized from"),
    "fp8": (tensors(**{Q_PROJ: torch.zeros(64, 64, dtype=torch.float8_e4m3fn)}), "is F8_E4M3",
            "quantized from"),
    "fp8 by config": (lambda f: (config(quantization_config={"quant_method": "fp8"})(f),
                                 tensors(**{Q_PROJ + "_scale_inv": torch.zeros(1)})(f)),
                      "quantized (fp8)", "quantized from"),
    "8 bits": (tensors(**{Q_PROJ: torch.zeros(64, 64, dtype=torch.int8)}), "is I8",
               "quantized from"),
    # Other files
    "bin": (files("pytorch_model.bin", without=W), "pytorch_model.bin, a pickle",
            "save_pretrained"),
    "bin shards": (files("pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json",
                         without=W), "a pickle", "save_pretrained"),
    "gguf": (files("q4.gguf", without="*"), "is in GGUF", "converted from"),
    "npz": (files("weights.npz", without=W), "older form of MLX", "converted from"),
    "pth": (files("consolidated.00.pth", without=W), "consolidated.00.pth, a pickle",
            "converted from"),
    "onnx": (files("onnx/model.onnx", without=W), "export for inference", "converted from"),
    "fsdp": (files("pytorch_model_fsdp_0/__0_0.distcp", without=W), "FSDP",
             "accelerate merge-weights"),
    "deepspeed": (files("zero_to_fp32.py", "latest", without=W), "DeepSpeed", "zero_to_fp32.py"),
    "no index": (files("model-00001-of-00002.safetensors", without=W), "no model.safetensors.index",
                 "copy model.safetensors.index.json"),
    "another name": (files("weights.safetensors", without=W), "but no model.safetensors",
                     "rename it to model.safetensors"),
    "no weights": (files(without=W), "no model.safetensors and no shard index", "whole checkpoint"),
    "slow tokenizer": (files("vocab.json", "merges.txt", without="tokenizer.json"),
                       "only a slow tokenizer", "AutoTokenizer"),
    "tiktoken": (files("qwen.tiktoken", without="tokenizer.json"), "the first Qwen",
                 "use a Qwen2,"),
    "sentencepiece": (files("tokenizer.model", without="tokenizer.json"), "tokenizer.model",
                      "use a Qwen2,"),
    "an adapter": (files("adapter_config.json", "adapter_model.safetensors", without="*"),
                   "is an adapter, not a base model", "--adapter"),
    "an adapter with the tokenizer": (files("adapter_config.json", without=W), "is an adapter",
                                      "--adapter"),
    "base and adapter": (files("adapter_config.json"), "a base model and an adapter",
                         "remove adapter_config.json"),
    "adapters inside": (files("checkpoint-40/adapter_config.json", without="*"),
                        "holds the adapter checkpoint-40", "checkpoint-40 itself with --adapter"),
    "a model inside": (files("checkpoint-9/config.json", without="*"), "it has no config.json",
                       "/checkpoint-9"),
    "a cache": (files("models--a--b/refs", "models--a--b/snapshots", without="*"), "Hub's cache",
                "models--a--b"),
    "no config": (files(without="config.json"), "holds model.safetensors, but it has no config",
                  "whole checkpoint again"),
    "links that lead nowhere": (
        lambda f: ((f / "config.json").unlink(), (f / "config.json").symlink_to("../../blobs/a")),
        "links to files that are not there: config.json", "cp -rL"),
    "nothing": (files(without="*"), "it has no config.json", "give a folder with config.json"),
    # Files that are something else
    "lfs weights": (content("model.safetensors", POINTER), "pointer of Git LFS", "git lfs pull"),
    "lfs config": (content("config.json", POINTER), "pointer of Git LFS", "git lfs pull"),
    "a web page": (content("config.json", b"<!DOCTYPE html>"), "web page", "download it again"),
    "empty": (content("model.safetensors", b""), "is empty", "download or copy"),
    "a renamed pickle": (lambda f: torch.save({}, f / "model.safetensors"),
                         "a pickle or an archive", "save_pretrained"),
    "a renamed gguf": (content("model.safetensors", b"GGUF" + bytes(60)), "is in GGUF",
                       "converted from"),
    # Tensors
    "wrapped": (renamed(lambda n: "_orig_mod." + n), "is not expected", "unwrap the model"),
    "without its head": (renamed(lambda n: n.removeprefix("model.")), "is not expected",
                         "AutoModelForCausalLM"),
    "unmerged": (renamed(lambda n: n.replace("q_proj.", "q_proj.base_layer.")), "is not expected",
                 "merge_and_unload"),
    "a classifier": (tensors(score__weight=torch.zeros(2, 64)), "score.weight is not expected",
                     "reward model or a classifier"),
    "untied": (config(tie_word_embeddings=False), "lm_head.weight is missing",
               '"tie_word_embeddings": true'),
    "resized": (config(vocab_size=400), f"{EMBEDDING} is (308, 64), not (400, 64)",
                "vocabulary was resized"),
    "fp64": (tensors(model__norm__weight=torch.ones(64, dtype=torch.float64)), "is F64",
             "dtype='bfloat16'"),
    "a vision-language model": (renamed(lambda n: n.replace("model.", "model.language_model.")),
                                "language_model", "vision-language model"),
    "a part of another model": (renamed(lambda n: "pi." + n), "pi.model.", "save that part"),
    "one shard of one": (lambda f: (f / "model.safetensors").rename(
                             f / "model-00001-of-00001.safetensors"), "no model", "rename it"),
    # Tokenizers
    "a token of the older file": (
        lambda f: (toys.change_json(f / "tokenizer_config.json", added_tokens_decoder=None),
                   (f / "added_tokens.json").write_text('{"<tool>": 300}')),
        "tokens that tokenizer.json does not have: <tool>", "save_pretrained"),
    "a token of the config alone": (
        lambda f: toys.change_json(f / "tokenizer_config.json",
                                   added_tokens_decoder={"300": {"content": "<tool>"}}),
        "tokens that tokenizer.json does not have: <tool>", "save_pretrained"),
    "a token under another id": (
        lambda f: toys.change_json(f / "tokenizer_config.json",
                                   added_tokens_decoder={"7": {"content": "<|im_end|>"}}),
        "tokens that tokenizer.json does not have: <|im_end|>", "save_pretrained"),
    "half of it": (lambda f: change_tensors(f, lambda t: t.pop("model.norm.weight")),
                   "model.norm.weight is missing", "with all its files"),
}  # fmt: skip


@pytest.mark.parametrize("change, cause, remedy", REFUSED.values(), ids=REFUSED.keys())
def test_a_foreign_base_is_refused_for_what_it_is(folder, change, cause, remedy):
    change(folder)
    found = refusal(folder)
    assert cause in found.cause and remedy in found.remedy, str(found)


NAMES = {
    "https://huggingface.co/Qwen/Qwen2-0.5B": "the Hub id: Qwen/Qwen2-0.5B",
    "http://hf.co/Qwen/Qwen2-0.5B/": "the Hub id: Qwen/Qwen2-0.5B",
    "huggingface.co/Qwen/Qwen2-0.5B.git": "the Hub id: Qwen/Qwen2-0.5B",
    "https://huggingface.co/Qwen/Qwen2-0.5B/tree/main": "the Hub id: Qwen/Qwen2-0.5B",
    "https://huggingface.co/Qwen/Qwen2-0.5B?library=x": "the Hub id: Qwen/Qwen2-0.5B",
    "https://huggingface.co/Qwen/Qwen2-0.5B/blob/main/config.json": "the Hub id: Qwen/Qwen2-0.5B",
    "https://huggingface.co/Qwen/Qwen2-0.5B/tree/v2": "Qwen/Qwen2-0.5B --revision v2",
    "hf://Qwen/Qwen2-0.5B": "the Hub id: Qwen/Qwen2-0.5B",
    "git@hf.co:Qwen/Qwen2-0.5B": "the Hub id: Qwen/Qwen2-0.5B",
    "https://huggingface.co/datasets/openai/gsm8k": "the Hub id of a base model",
    "https://modelscope.cn/models/Qwen/Qwen2": "download the checkpoint, and give its folder",
    "s3://bucket/model": "download the checkpoint, and give its folder",
    "file:///data/qwen2": "give the path: /data/qwen2",
    "models--Qwen--Qwen2-0.5B-Instruct": "give Qwen/Qwen2-0.5B-Instruct",
    "Qwen/Qwen2-0.5B/": "give Qwen/Qwen2-0.5B",
    "Qwen/Qwen2-0.5B@abc": "give Qwen/Qwen2-0.5B --revision abc",
    "hf.co/Qwen/Qwen2-0.5B-GGUF:Q4_K_M": "converted from",
    "qwen2:0.5b": "the Hub id of the original checkpoint",
}


@pytest.mark.parametrize("name, remedy", NAMES.items())
def test_a_name_in_another_form_is_answered_with_the_one_that_works(name, remedy):
    found = refusal(name)
    assert "neither a folder nor a Hub id" in found.cause and remedy in found.remedy


def test_a_file_is_answered_with_its_folder(folder):
    found = refusal(folder / "model.safetensors")
    assert "is a file" in found.cause and str(folder) in found.remedy


PUBLISHED = """.gitattributes LICENSE README.md config.json generation_config.json merges.txt
    model.safetensors tokenizer.json tokenizer_config.json vocab.json onnx/model.onnx""".split()


def test_a_published_repository_is_not_taken_for_another(folder):
    refuse_files("Qwen/Qwen2-0.5B-Instruct", PUBLISHED)
    sharded = {*PUBLISHED} - {"model.safetensors"} | {"model.safetensors.index.json"}
    refuse_files("Qwen/Qwen2-7B-Instruct", {*sharded, "model-00001-of-00004.safetensors"})


def test_a_repository_is_recognized_before_anything_is_downloaded():
    for names, cause in (
        ([".gitattributes", "README.md", "qwen2-0_5b-q4_k_m.gguf"], "is in GGUF"),
        (["adapter_config.json", "adapter_model.safetensors"], "is an adapter"),
        (["config.json", "pytorch_model.bin", "tokenizer.json"], "a pickle"),
    ):
        with pytest.raises(BadCheckpoint, match=cause):
            refuse_files("owner/name", names)


def test_every_cause_and_remedy_is_a_template_that_can_be_filled():
    about = {"place": "P", "file": "F", "inner": "I"}
    for text in [t for s in FILES for t in (s.cause, s.remedy)] + [r for _, r in STARTS.values()]:
        assert "{" not in text.format(**about)


def test_a_valid_file_is_read_whatever_its_first_bytes_are(folder):
    """The first bytes of safetensors are the header's length, such as 0x80 of a pickle."""
    weights = load_file(folder / "model.safetensors")
    for length in range(64):
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt" * length})
        if (folder / "model.safetensors").read_bytes()[0] == 0x80:
            break
    assert (folder / "model.safetensors").read_bytes()[0] == 0x80
    load_model(folder, dtype=torch.float32)


# The remedies that are commands


def run_command(remedy: str, where: Path) -> Path:
    """Run the Python of a remedy in `where`; returns the folder that it writes."""
    with contextlib.chdir(where):
        exec(re.search(r'python -c "(.*)"', remedy).group(1))
    return where / "NEW"


def test_a_pickled_checkpoint_is_converted_by_the_command_of_its_refusal(folder, tmp_path):
    before = logits(folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    new = run_command(refusal(folder).remedy, tmp_path)
    assert torch.equal(logits(new), before)
    assert ChatFormat.from_folder(new).plain("What is 2?")


def test_a_slow_tokenizer_is_converted_by_the_command_of_its_refusal(folder, tmp_path):
    before = ChatFormat.from_folder(folder).plain("What is 2 + 2?")
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    toys.write_json(folder / "vocab.json", model["vocab"])
    merges = [" ".join(pair) for pair in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    (folder / "tokenizer.json").unlink()
    new = run_command(refusal(folder).remedy, tmp_path)
    shutil.copy(new / "tokenizer.json", folder)
    assert ChatFormat.from_folder(folder).plain("What is 2 + 2?") == before


# Numbers that overflow


@pytest.fixture
def loud(lively_checkpoint, tmp_path):
    """Finite weights, but activations that fp16 cannot hold."""
    folder = Path(shutil.copytree(lively_checkpoint, tmp_path / "loud"))

    def amplify(weights):
        weights["model.layers.1.mlp.gate_proj.weight"] *= 300
        weights["model.layers.1.mlp.up_proj.weight"] *= 300
        weights["model.layers.1.mlp.down_proj.weight"] /= 90000

    change_tensors(folder, amplify)
    return folder


DECODING = {"max_new_tokens": 3, "eos_ids": (toys.IM_END,), "vocab_size": toys.TOKENS}
PROMPTS = [[5, 6, 7], [8, 9]]


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 2}])
def test_no_answer_is_made_of_logits_that_are_not_finite(loud, sampling):
    decoding = Decoding(**DECODING, **sampling)
    model = load_model(loud, dtype=torch.float16)
    with pytest.raises(BadOption, match="exceed 65504") as caught:
        generate(model, PROMPTS, decoding)
    assert "bf16 or fp32" in caught.value.remedy and caught.value.exit_code == 2
    assert all(a.tokens for a in generate(load_model(loud, dtype=torch.float32), PROMPTS, decoding))


def test_one_sequence_that_is_not_finite_is_enough(lively_checkpoint):
    model = load_model(lively_checkpoint, dtype=torch.float32)
    model.model.embed_tokens.weight.data[8] = torch.nan
    assert generate(model, PROMPTS[:1], Decoding(**DECODING))
    with pytest.raises(BadCheckpoint, match="not finite"):
        generate(model, PROMPTS, Decoding(**DECODING))


def test_no_choice_is_scored_by_logits_that_are_not_finite(loud):
    question = ChoiceQuestion("1", [5, 6, 7], [[8], [9, 10]])
    log_likelihoods(load_model(loud, dtype=torch.float32), [question])
    with pytest.raises(BadOption, match="exceed 65504"):
        log_likelihoods(load_model(loud, dtype=torch.float16), [question])


def test_no_loss_of_given_answers_is_made_of_logits_that_are_not_finite(loud):
    chat = ChatFormat.from_folder(loud)
    sums = [Problem("1", (Message("user", "What is 1 + 1?"), Message("assistant", "2")))]
    teacher_forced_metrics(load_model(loud, dtype=torch.float32), chat, sums, 2)
    with pytest.raises(BadOption, match="exceed 65504"):
        teacher_forced_metrics(load_model(loud, dtype=torch.float16), chat, sums, 2)


def test_a_run_without_a_step_or_a_best_adapter_has_failed():
    check_trained(Progress(step=1, best_loss=0.5, validations=1), "fp16")
    untrained = Progress(cursor=3, skipped=3, best_loss=0.5)
    only_before_the_first_step = Progress(step=3, best_loss=0.5, validations=0)
    for progress in (untrained, Progress(step=3), only_before_the_first_step):
        with pytest.raises(UserError) as caught:
            check_trained(progress, "fp16")
        assert caught.value.exit_code == 1 and "bf16 or fp32" in caught.value.remedy


# Export


def exported(base: Path, where: Path) -> Path:
    model = load_model(base, dtype=torch.float32)
    inject(model, LoRAConfig(r=2, alpha=4), seed=0)
    for layer in model.modules():
        if hasattr(layer, "lora_B"):
            torch.nn.init.normal_(layer.lora_B, std=0.1)
    save_adapter(model, where / "adapter", LoRAConfig(r=2, alpha=4), base=str(base), revision=None)
    with contextlib.redirect_stdout(io.StringIO()):
        paths = ["--adapter", str(where / "adapter"), "--out", str(where / "out")]
        export.main([*paths, "--dtype", "fp32"])
    return where / "out"


def test_an_export_holds_what_belongs_to_the_model_and_nothing_else_of_its_folder(folder, tmp_path):
    own = {path.name for path in folder.iterdir()} | {"merges.txt", "additional_chat_templates"}
    own.add("README.md")  # the export's own, not the base's
    files("merges.txt", "additional_chat_templates/tool.jinja")(folder)
    files(".git/config", "checkpoint-10/optimizer.pt", "pytorch_model.bin", "x.gguf", "x.py",
          "README.md", "old.safetensors", "training_args.bin")(folder)  # fmt: skip
    out = exported(folder, tmp_path)
    assert {path.name for path in out.iterdir()} == own
    assert [path.name for path in (out / "additional_chat_templates").iterdir()] == ["tool.jinja"]


def test_an_export_of_a_base_with_a_head_of_its_own_has_the_same_logits_elsewhere(tmp_path):
    folder = toys.write_checkpoint(tmp_path / "base", std=0.3)
    change_tensors(folder, lambda t: t.update({"lm_head.weight": t[EMBEDDING] * 0.5}))
    toys.change_json(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling_x.X"})
    out = exported(folder, tmp_path)
    config = json.loads((out / "config.json").read_text())
    assert config["tie_word_embeddings"] is False and "auto_map" not in config
    torch.testing.assert_close(logits(out), transformers_logits(out), atol=1e-4, rtol=0)
    assert not torch.allclose(logits(out), logits(folder), atol=1e-2)
