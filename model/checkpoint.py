"""Finds a base checkpoint and reads its configuration.

Formats: the `config.json` of transformers 4 and 5, and `generation_config.json`. Every check
reports all the problems it finds, not the first.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errors import BadCheckpoint, listed
from hub import fetch
from model.foreign import (
    COPY_AGAIN,
    NEITHER,
    USE_QWEN2,
    read_object,
    refuse_config,
    refuse_files,
    refuse_folder,
    refuse_name,
)
from model.qwen2 import Qwen2Config
from model.tensor_files import has_own_head, tensor_files

SHIPPED = {"demo": Path(__file__).parent / "demo"}  # base models included in this repository
PATTERNS = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
            "chat_template.jinja", "additional_chat_templates/*.jinja", "*.safetensors",
            "*.safetensors.index.json"]  # fmt: skip
# Largest accepted sizes. Layers are built before the weights are checked: their number is limited.
MAX_LAYERS, MAX_SIZE = 2**9, 2**24

# Weight files that may be in a checkpoint's folder and are not read.
OTHER_WEIGHTS = ("*.safetensors", "*.bin", "*.pth", "*.gguf", "*.npz", "*.onnx")


@dataclass(frozen=True)
class Checkpoint:
    """A base model on this machine: the name the user gave, its folder, its Hub commit if any."""

    name: str
    folder: Path
    commit: str | None

    @property
    def public_name(self) -> str | None:
        """What others know it by: a Hub id, or the name of a base included in this repository; None
        for a folder, whose path says something about its owner alone.
        """
        return self.name if self.commit or self.name in SHIPPED else None


def find_checkpoint(name: str, revision: str | None = None) -> Checkpoint:
    """Locate the base model `name`: a key of `SHIPPED`, a folder, or a Hub id (downloaded).

    In a repository's folder of the Hub cache, the snapshot of `revision`, or of main, is used.
    Raises BadCheckpoint if `name` is none of these, HubError if the download fails.
    """
    if name in SHIPPED and revision is None:
        return Checkpoint(name, SHIPPED[name], None)
    folder = Path(name).expanduser()
    if os.path.isdir(folder):  # unlike Path.is_dir, also False for a name that is too long
        if is_cached_repository(folder):
            return Checkpoint(name, find_snapshot(folder, revision or "main"), None)
        if revision is not None:
            raise BadCheckpoint(
                f"--revision {revision} makes no sense for the folder {name}", "omit --revision"
            )
        return Checkpoint(name, folder, None)
    refuse_name(name)
    if os.path.exists(folder) or name.count("/") != 1 or name.startswith(("/", ".", "~")):
        raise BadCheckpoint(
            f"{name} is {NEITHER}", "check the path, or give a Hub id such as Qwen/Qwen2-0.5B"
        )

    def recognize(names: list[str]) -> list[str]:
        refuse_files(name, names)
        return PATTERNS

    folder = fetch(name, patterns=PATTERNS, choose=recognize, revision=revision)
    return Checkpoint(name, folder, folder.name)


def is_cached_repository(folder: Path) -> bool:
    """Whether this is a folder `models--owner--name` of the Hub's cache."""
    return (folder / "snapshots").is_dir() and not (folder / "config.json").exists()


def find_snapshot(folder: Path, revision: str) -> Path:
    """A snapshot in a repository's folder in the Hub cache; BadCheckpoint if it is not there."""
    snapshots = {path.name: path for path in sorted((folder / "snapshots").iterdir())}
    try:
        commit = (folder / "refs" / revision).read_text("utf-8", "replace")[:64].strip()
    except (OSError, ValueError):
        commit = revision  # which may be a commit itself
    if commit not in snapshots:
        remedy = f"give one of its snapshots: {listed(map(str, snapshots.values()), 3)}"
        raise BadCheckpoint(
            f"{folder} is a repository's folder in the Hub cache, without a snapshot of {revision}",
            remedy if snapshots else "download the repository again, or give its Hub id",
        )
    return snapshots[commit]


# config.json and generation_config.json


def read_config(folder: Path) -> Qwen2Config:
    """Read `config.json`; raises BadCheckpoint if it describes no supported Qwen2 or Qwen3.

    As in transformers 5, a checkpoint whose embeddings are tied by its config is not tied if it
    holds an `lm_head.weight` that differs from the embedding.
    """
    refuse_folder(folder)
    path = folder / "config.json"
    missing = f"{folder} is not a checkpoint: it has no config.json"
    layout = "give a folder with config.json, model.safetensors and tokenizer.json, or a Hub id"
    raw = read_object(path, COPY_AGAIN if path.exists() else layout, missing=missing)
    refuse_config(folder, raw)
    # transformers 5 writes rope_parameters; transformers 4 writes rope_theta and rope_scaling.
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    is_dict = isinstance(rope, dict)
    problems = [] if is_dict else [(f"rope_parameters is {rope!r}", WRONG_VALUE)]
    rope = rope if is_dict else {}
    heads = raw.get("num_attention_heads")
    sizes: dict[str, Any] = {
        "hidden_size": raw.get("hidden_size"),
        "intermediate_size": raw.get("intermediate_size"),
        "num_hidden_layers": raw.get("num_hidden_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": raw.get("num_key_value_heads") or heads,
        "vocab_size": raw.get("vocab_size"),
    }
    # The defaults are those of transformers' Qwen2Config and Qwen3Config.
    if raw["model_type"] == "qwen3":
        sizes["head_dim"] = raw.get("head_dim", 128)
    floats: dict[str, Any] = {
        "rope_theta": rope.get("rope_theta", raw.get("rope_theta", 1e4)),
        "rms_norm_eps": raw.get("rms_norm_eps", 1e-6),
    }
    tied = raw.get("tie_word_embeddings", False)
    wrong = _value_problems(sizes, floats, tied) or _head_problems(sizes, raw)
    problems += [(problem, WRONG_VALUE) for problem in wrong] + _unsupported(raw, rope)
    if problems:
        causes, remedies = zip(*problems)
        raise BadCheckpoint(f"{path}: {listed(causes)}", "; ".join(dict.fromkeys(remedies)))
    tied = tied and not has_own_head(folder)
    return Qwen2Config(**sizes, **floats, tie_word_embeddings=tied)


WRONG_VALUE = "copy config.json again from where the weights are from"


def _value_problems(sizes: dict[str, Any], floats: dict[str, Any], tied: object) -> list[str]:
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


def _unsupported(raw: dict[str, Any], rope: dict[str, Any]) -> list[tuple[str, str]]:
    """(cause, remedy) of each variant of the architecture that `qwen2.py` does not implement."""
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    longest = rope.get("original_max_position_embeddings") or raw.get("max_position_embeddings")
    key = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    problems = []
    if rope_type in ("yarn", "dynamic", "linear"):
        remedy = f"take {key} out of config.json for texts within {longest} tokens"
        if key == "rope_parameters":
            remedy = f'set its rope_type to "default" for texts within {longest} tokens'
        problems.append((f"{key} of type {rope_type!r} is not supported", remedy))
    elif rope_type != "default":
        problems.append((f"{key} of type {rope_type!r} is not supported", USE_QWEN2))
    elif any(isinstance(value, dict) for value in rope.values()):
        problems.append((f"{key} differs between layers", USE_QWEN2))
    if _slides(raw):
        problems.append(
            (
                "use_sliding_window is not supported: some layers slide",
                'set "use_sliding_window": false and take layer_types out of config.json, for'
                f" texts within {raw.get('sliding_window', 4096)} tokens",
            )
        )
    if raw.get("attention_bias", False) and raw["model_type"] == "qwen3":
        problems.append(("attention_bias is not supported", USE_QWEN2))
    if raw.get("hidden_act", "silu") != "silu":
        problems.append((f"hidden_act {raw['hidden_act']!r} is not supported", USE_QWEN2))
    return problems


def _slides(raw: dict[str, Any]) -> bool:
    """Whether a layer attends to a sliding window only; the defaults are those of transformers."""
    if raw.get("layer_types") is not None:
        return set(raw["layer_types"]) != {"full_attention"}
    if not raw.get("use_sliding_window") or raw.get("sliding_window", 4096) is None:
        return False
    first, layers = raw.get("max_window_layers", 28), raw.get("num_hidden_layers")
    return not (type(first) is type(layers) is int and first >= layers)


def _head_problems(sizes: dict[str, int], raw: dict) -> list[str]:
    """Head counts that do not divide each other or the hidden size."""
    heads, groups = sizes["num_attention_heads"], sizes["num_key_value_heads"]
    hidden = sizes["hidden_size"]
    size = sizes.get("head_dim", hidden // heads)
    if "head_dim" in sizes:
        if size % 2:
            return [f"head_dim is {size}, not even"]
    elif hidden % heads or size % 2 or (raw.get("head_dim") or size) != size:
        return [f"hidden_size {hidden} does not divide into {heads} heads of even size"]
    if heads % groups:
        return [f"{heads} query heads do not divide among {groups} key/value heads"]
    return []


def read_eos_ids(folder: Path) -> tuple[int, ...]:
    """The token ids that end an answer: from `generation_config.json`, otherwise `config.json`."""
    for name in ("generation_config.json", "config.json"):
        if (folder / name).exists():
            eos = read_object(folder / name).get("eos_token_id")
            ids = eos if isinstance(eos, list) else [eos]
            if ids and all(type(i) is int for i in ids):
                return tuple(ids)
    raise BadCheckpoint(f"{folder} has no eos_token_id", "add it to generation_config.json")


def read_sampling(folder: Path) -> dict[str, float]:
    """The sampling options that `generation_config.json` recommends; empty if it has none."""
    path = folder / "generation_config.json"
    raw = read_object(path) if path.exists() else {}
    names = ("temperature", "top_k", "top_p", "repetition_penalty") if raw.get("do_sample") else ()
    return {name: raw[name] for name in names if type(raw.get(name)) in (int, float)}


def remarks(folder: Path, config: Qwen2Config) -> list[str]:
    """What a user should know about how the checkpoint in `folder` is read, one line each."""
    lines = []
    raw = read_object(folder / "config.json")
    if raw.get("tie_word_embeddings") and not config.tie_word_embeddings:
        lines.append(
            "the output embedding is the checkpoint's own lm_head.weight, although its config.json"
            " says that it is tied to the input embedding"
        )
    if raw.get("auto_map"):
        lines.append(
            f"its own code (auto_map) is not run: it is read as a plain {raw['model_type']}"
        )
    used = {path.name for path in tensor_files(folder).values()}
    others = {path.name for pattern in OTHER_WEIGHTS for path in folder.glob(pattern)} - used
    if others:
        lines.append(f"other weights in its folder are not read: {listed(sorted(others), 3)}")
    return lines
