"""Finds a base checkpoint, reads its configuration, and checks its files before they are loaded.

Formats: the `config.json` of transformers 4 and 5, `generation_config.json`, safetensors, and the
index file of a sharded checkpoint. Every check reports all the problems it finds, not the first.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from errors import BadCheckpoint, listed
from files import read_json
from hub import fetch
from model.qwen2 import Qwen2Config

SHIPPED = {"demo": Path(__file__).parent / "demo"}  # base models included in this repository
PATTERNS = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
            "chat_template.jinja", "additional_chat_templates/*.jinja", "*.safetensors",
            "*.safetensors.index.json"]  # fmt: skip
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Largest accepted sizes. Layers are built before the weights are checked, so few are allowed.
MAX_LAYERS, MAX_SIZE = 2**9, 2**24

USE_QWEN2 = "use a Qwen2 or Qwen2.5 checkpoint in the Hub's layout, e.g. Qwen/Qwen2-0.5B-Instruct"
COPY_AGAIN = "download or copy it again"


@dataclass(frozen=True)
class Checkpoint:
    """A base model on this machine: the name the user gave, its folder, its Hub commit if any."""

    name: str
    folder: Path
    commit: str | None


def find_checkpoint(name: str, revision: str | None = None) -> Checkpoint:
    """Locate the base model `name`: a key of `SHIPPED`, a folder, or a Hub id (downloaded).

    Raises BadCheckpoint if `name` is none of these, HubError if the download fails.
    """
    if name in SHIPPED and revision is None:
        return Checkpoint(name, SHIPPED[name], None)
    folder = Path(name).expanduser()
    if os.path.isdir(folder):  # unlike Path.is_dir, also False for a name that is too long
        if revision is not None:
            raise BadCheckpoint(
                f"--revision {revision} makes no sense for the folder {name}", "omit --revision"
            )
        return Checkpoint(name, folder, None)
    if os.path.exists(folder) or name.count("/") != 1 or name.startswith(("/", ".", "~")):
        raise BadCheckpoint(f"{name} is neither a folder nor a Hub id (owner/name)", USE_QWEN2)
    folder = fetch(name, patterns=PATTERNS, revision=revision)
    return Checkpoint(name, folder, folder.name)


# config.json and generation_config.json


def read_config(folder: Path) -> Qwen2Config:
    """Read `config.json`; raises BadCheckpoint if it does not describe a supported Qwen2."""
    path = folder / "config.json"
    missing = f"{folder} is not a checkpoint: it has no config.json"
    raw = read_json(path, BadCheckpoint, USE_QWEN2, missing=missing)
    if raw.get("model_type") != "qwen2":
        raise BadCheckpoint(
            f"{folder} is a {raw.get('model_type', 'model of unknown type')}, not a qwen2",
            USE_QWEN2,
        )
    # transformers 5 writes rope_parameters; transformers 4 writes rope_theta and rope_scaling.
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    is_dict = isinstance(rope, dict)
    problems = [] if is_dict else [f"rope_parameters is {rope!r}"]
    rope = rope if is_dict else {}
    heads = raw.get("num_attention_heads")
    sizes = {
        "hidden_size": raw.get("hidden_size"),
        "intermediate_size": raw.get("intermediate_size"),
        "num_hidden_layers": raw.get("num_hidden_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": raw.get("num_key_value_heads", heads),
        "vocab_size": raw.get("vocab_size"),
    }
    # The defaults are those of transformers' Qwen2Config.
    floats = {
        "rope_theta": rope.get("rope_theta", raw.get("rope_theta", 1e4)),
        "rms_norm_eps": raw.get("rms_norm_eps", 1e-6),
    }
    tied = raw.get("tie_word_embeddings", False)
    problems += _value_problems(sizes, floats, tied) + _unsupported(raw, rope)
    problems = problems or _head_problems(sizes, raw)
    if problems:
        raise BadCheckpoint(f"{path}: {listed(problems)}", USE_QWEN2)
    return Qwen2Config(**sizes, **floats, tie_word_embeddings=tied)


def _value_problems(sizes: dict, floats: dict, tied: object) -> list[str]:
    """Values of a wrong type or outside their range."""
    most = {"num_hidden_layers": MAX_LAYERS}
    wrong = {
        name: value
        for name, value in sizes.items()
        if type(value) is not int or not 0 < value <= most.get(name, MAX_SIZE)
    }
    wrong |= {
        name: value
        for name, value in floats.items()
        if type(value) not in (int, float) or not 0 < value < 1e30
    }
    if type(tied) is not bool:
        wrong["tie_word_embeddings"] = tied
    return [f"{name} is {value!r}" for name, value in wrong.items()]


def _unsupported(raw: dict, rope: dict) -> list[str]:
    """Variants of the architecture that `qwen2.py` does not implement."""
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    problems = []
    if rope_type != "default":
        problems.append(f"rope type {rope_type!r} is not supported")
    if raw.get("use_sliding_window"):
        problems.append("use_sliding_window is not supported")
    if raw.get("hidden_act", "silu") != "silu":
        problems.append(f"hidden_act {raw['hidden_act']!r} is not supported")
    return problems


def _head_problems(sizes: dict[str, int], raw: dict) -> list[str]:
    """Head counts that do not divide each other or the hidden size."""
    heads, groups = sizes["num_attention_heads"], sizes["num_key_value_heads"]
    hidden = sizes["hidden_size"]
    size = hidden // heads
    if hidden % heads or size % 2 or raw.get("head_dim", size) != size:
        return [f"hidden_size {hidden} does not divide into {heads} heads of even size"]
    if heads % groups:
        return [f"{heads} query heads do not divide among {groups} key/value heads"]
    return []


def read_eos_ids(folder: Path) -> tuple[int, ...]:
    """The token ids that end an answer: from `generation_config.json`, otherwise `config.json`."""
    for name in ("generation_config.json", "config.json"):
        if (folder / name).exists():
            eos = read_json(folder / name, BadCheckpoint, COPY_AGAIN).get("eos_token_id")
            ids = eos if isinstance(eos, list) else [eos]
            if ids and all(type(i) is int for i in ids):
                return tuple(ids)
    raise BadCheckpoint(f"{folder} has no eos_token_id", "add it to generation_config.json")


# The files of weights


def find_tensors(folder: Path, model: nn.Module) -> dict[Path, list[str]]:
    """The names of the tensors to load from each file, checked against `model`'s parameters.

    Reads only the files' headers. Raises BadCheckpoint that lists every missing, unexpected or
    damaged file and every tensor whose name, shape or dtype differs from the model's.
    """
    by_file = {path: _tensor_names(path) for path in _tensor_files(folder)}
    file_of = {name: path for path, names in by_file.items() for name in names}
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    # Some exporters also write the output embedding of a tied model.
    allowed = expected.keys() | {"lm_head.weight"} if model.config.tie_word_embeddings else expected
    problems = [f"{name} is missing" for name in expected if name not in file_of]
    problems += [f"{name} is not expected" for name in file_of if name not in allowed]
    for path, names in by_file.items():
        problems += _header_problems(path, {n: expected[n] for n in names if n in expected})
    if problems:
        raise BadCheckpoint(f"{folder} does not fit its config.json: {listed(problems)}", USE_QWEN2)
    to_load: dict[Path, list[str]] = {}
    for name in expected:
        to_load.setdefault(file_of[name], []).append(name)
    return to_load


def _tensor_files(folder: Path) -> list[Path]:
    """The checkpoint's safetensors files, sorted: the only one, or those of the shard index."""
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        raise BadCheckpoint(f"{folder} holds no model.safetensors and no shard index", USE_QWEN2)
    shards = read_json(index, BadCheckpoint, COPY_AGAIN).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(s, str) for s in shards.values()):
        raise BadCheckpoint(f"{index} has no weight_map", USE_QWEN2)
    names = sorted(set(shards.values()))
    # An index is not trusted: it must not name a file outside its folder.
    bad = [
        f"{name} is not a file of this folder"
        for name in names
        if os.path.basename(name) != name
        or not name.endswith(".safetensors")
        or not os.path.isfile(folder / name)
    ]
    if bad:
        raise BadCheckpoint(
            f"{index}: {listed(bad)}", "download or copy the whole checkpoint again"
        )
    return [folder / name for name in names]


def _tensor_names(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (OSError, SafetensorError) as error:
        raise BadCheckpoint(f"{path} is damaged: {error}", COPY_AGAIN) from None


def _header_problems(path: Path, expected: dict[str, tuple[int, ...]]) -> list[str]:
    """Shapes and dtypes in a file's header that differ from the `expected` shapes or `DTYPES`."""
    problems = []
    with safe_open(path, framework="pt") as file:
        for name, wanted in expected.items():
            header = file.get_slice(name)
            shape, dtype = tuple(header.get_shape()), header.get_dtype()
            if shape != wanted:
                problems.append(f"{name} is {shape}, not {wanted}")
            if dtype not in DTYPES:
                problems.append(f"{name} is {dtype}, not one of {', '.join(DTYPES)}")
    return problems
