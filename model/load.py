"""From a folder or a Hub id to a frozen Qwen2 whose weights are mapped from its files.

The network is built on the meta device and the files' tensors are put into it, so there is never a
second copy. Files are checked against it first, and everything wrong is listed at once.
Formats: transformers' `config.json` (4.x and 5.x), safetensors, its shard index.
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
from model.qwen2 import Qwen2, Qwen2Config
from progress_bar import progress_bar

PATTERNS = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
            "chat_template.jinja", "*.safetensors", "*.safetensors.index.json"]  # fmt: skip
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SHIPPED = {"demo": Path(__file__).parent / "demo"}  # bases that lie in this repository
LARGEST = {"num_hidden_layers": 2**9}  # a layer is built before its weights are compared
REMEDY = "give a Qwen2 or Qwen2.5 checkpoint in the Hub's layout, such as Qwen/Qwen2-0.5B-Instruct"
COPY_AGAIN = "download or copy it again"


@dataclass(frozen=True)
class Checkpoint:
    """Where a base model lies: what the user called it, its folder, its commit if it has one."""

    name: str
    folder: Path
    commit: str | None


def find_checkpoint(name: str, revision: str | None = None) -> Checkpoint:
    """`name` is one of `SHIPPED`, a folder, or else a Hub id, whose files are then fetched."""
    if name in SHIPPED and revision is None:
        return Checkpoint(name, SHIPPED[name], None)
    folder = Path(name).expanduser()
    if os.path.isdir(folder):  # which is no error for a name too long to be one
        if revision is not None:
            raise BadCheckpoint(
                f"--revision {revision} makes no sense for the folder {name}", "leave it out"
            )
        return Checkpoint(name, folder, None)
    if os.path.exists(folder) or name.count("/") != 1 or name.startswith(("/", ".", "~")):
        raise BadCheckpoint(f"{name} is neither a folder nor a Hub id (owner/name)", REMEDY)
    folder = fetch(name, patterns=PATTERNS, revision=revision)
    return Checkpoint(name, folder, folder.name)


def read_config(folder: Path) -> Qwen2Config:
    """The sizes in `config.json`, in either spelling; BadCheckpoint if it is no Qwen2's."""
    raw = read_json(
        folder / "config.json", BadCheckpoint, REMEDY,
        missing=f"{folder} is no checkpoint: it has no config.json",
    )  # fmt: skip
    if raw.get("model_type") != "qwen2":
        raise BadCheckpoint(
            f"{folder} is a {raw.get('model_type', 'model of unknown type')}, not a qwen2", REMEDY
        )
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "vocab_size")  # fmt: skip
    values = {key: raw.get(key) for key in sizes}
    values["num_key_value_heads"] = raw.get("num_key_value_heads", values["num_attention_heads"])
    problems = [
        f"{k} is {v!r}"
        for k, v in values.items()
        if type(v) is not int or not 0 < v <= LARGEST.get(k, 2**24)
    ]
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        problems.append(f"rope_parameters is {rope!r}")
        rope = {}
    values["rope_theta"] = rope.get("rope_theta", raw.get("rope_theta", 1e4))
    values["rms_norm_eps"] = raw.get("rms_norm_eps", 1e-6)
    for key in ("rope_theta", "rms_norm_eps"):
        if type(values[key]) not in (int, float) or not 0 < values[key] < 1e30:
            problems.append(f"{key} is {values[key]!r}")
    values["tie_word_embeddings"] = raw.get("tie_word_embeddings", False)
    if type(values["tie_word_embeddings"]) is not bool:
        problems.append(f"tie_word_embeddings is {values['tie_word_embeddings']!r}")
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        problems.append(f"rope type {rope.get('rope_type', rope.get('type'))!r} is not supported")
    if raw.get("use_sliding_window"):
        problems.append("use_sliding_window is not supported")
    if raw.get("hidden_act", "silu") != "silu":
        problems.append(f"hidden_act {raw['hidden_act']!r} is not supported")
    if not problems:
        problems = _head_problems(values, raw)
    if problems:
        raise BadCheckpoint(f"{folder / 'config.json'}: {listed(problems)}", REMEDY)
    return Qwen2Config(**values)


def _head_problems(values: dict, raw: dict) -> list[str]:
    heads, groups, hidden = (
        values[k] for k in ("num_attention_heads", "num_key_value_heads", "hidden_size")
    )
    if (
        hidden % heads
        or (hidden // heads) % 2
        or raw.get("head_dim", hidden // heads) != hidden // heads
    ):
        return [f"hidden_size {hidden} does not divide into {heads} heads of even size"]
    if heads % groups:
        return [f"{heads} query heads do not divide among {groups} key/value heads"]
    return []


def read_eos_ids(folder: Path) -> tuple[int, ...]:
    """The ids that end an answer, from `generation_config.json`, or else from `config.json`."""
    for name in ("generation_config.json", "config.json"):
        if (folder / name).exists():
            eos = read_json(folder / name, BadCheckpoint, COPY_AGAIN).get("eos_token_id")
            ids = eos if isinstance(eos, list) else [eos]
            if ids and all(type(i) is int for i in ids):
                return tuple(ids)
    raise BadCheckpoint(f"{folder} names no eos_token_id", "add it to generation_config.json")


def load_model(folder: Path, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> Qwen2:
    """The checkpoint in `folder`, frozen, in eval mode; copied only to change dtype or device."""
    config = read_config(folder)
    with torch.device("meta"):
        model = Qwen2(config)
    files = _tensor_files(folder)
    _check_files(folder, files, model)
    expected = model.state_dict().keys()
    not_finite = []
    by_file: dict[Path, list[str]] = {}
    for name in expected:
        by_file.setdefault(files[name], []).append(name)
    bar = progress_bar(total=len(expected), desc="load weights", unit="tensor", leave=False)
    with bar:
        for path, names in by_file.items():
            with safe_open(path, framework="pt", device=str(device)) as file:
                for name in names:
                    parent, _, last = name.rpartition(".")
                    tensor = nn.Parameter(file.get_tensor(name).to(dtype), requires_grad=False)
                    setattr(model.get_submodule(parent), last, tensor)
                    # Least and largest tell: NaN is both, and they take no memory to find.
                    if not torch.stack(tensor.aminmax()).isfinite().all():
                        not_finite.append(f"{name} holds NaN or infinity")
                    bar.update()
    if not_finite:
        in_dtype = str(dtype).removeprefix("torch.")
        raise BadCheckpoint(
            f"{folder}, read as {in_dtype}: {listed(not_finite)}",
            "download or copy it again, or try --precision bf16: fp16 holds nothing above 65504",
        )
    return model.eval()


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Which file of the folder holds each tensor, by the files' own headers."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists():
        names = {"model.safetensors"}
    elif index.exists():
        shards = read_json(index, BadCheckpoint, COPY_AGAIN).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(s, str) for s in shards.values()):
            raise BadCheckpoint(f"{index} has no weight_map", REMEDY)
        names = set(shards.values())
    else:
        raise BadCheckpoint(f"{folder} holds no model.safetensors and no shard index", REMEDY)
    outside = {n for n in names if os.path.basename(n) != n or not n.endswith(".safetensors")}
    missing = {n for n in names if not os.path.isfile(folder / n)}  # False for what is no name
    if bad := sorted(outside | missing):
        raise BadCheckpoint(
            f"{index}: {listed([f'{n} is not a file of this folder' for n in bad])}",
            "download or copy the whole checkpoint again",
        )
    files = {}
    for name in sorted(names):
        try:
            with safe_open(folder / name, framework="pt") as file:
                files |= dict.fromkeys(file.keys(), folder / name)
        except (OSError, SafetensorError) as error:
            raise BadCheckpoint(
                f"{folder / name} is damaged: {error}", "download or copy it again"
            ) from None
    return files


def _check_files(folder: Path, files: dict[str, Path], model: Qwen2) -> None:
    """Names, shapes, dtypes against the network's; BadCheckpoint lists all that differs."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    # Some exporters write the head of a tied model as well.
    allowed = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    problems = [f"{name} is missing" for name in expected if name not in files]
    problems += [
        f"{name} is not expected" for name in files if name not in expected.keys() | allowed
    ]
    for path in sorted(set(files.values())):
        with safe_open(path, framework="pt") as file:
            for name in (n for n in file.keys() if n in expected):
                header = file.get_slice(name)
                shape, dtype = tuple(header.get_shape()), header.get_dtype()
                if shape != expected[name]:
                    problems.append(f"{name} is {shape}, not {expected[name]}")
                if dtype not in DTYPES:
                    problems.append(f"{name} is {dtype}, not one of {', '.join(DTYPES)}")
    if problems:
        raise BadCheckpoint(f"{folder} does not fit its config.json: {listed(problems)}", REMEDY)
