"""Which file of a checkpoint each tensor is taken from, checked before any tensor is read.

Formats: safetensors, and the index file of a sharded checkpoint. Only the headers of files are
read, except to compare the two embeddings.
"""

import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from errors import BadCheckpoint, listed
from model.bitsandbytes import stored_kind, stored_parts
from model.foreign import COPY_AGAIN, read_object, refuse_content, tensor_remedy
from model.qwen2 import Qwen2

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
INDEX = "model.safetensors.index.json"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
WHOLE = "download or copy the whole checkpoint again"


def find_tensors(folder: Path, model: Qwen2) -> dict[Path, list[str]]:
    """The names of the tensors to load from each file, checked against `model`'s parameters.

    Reads only the files' headers. Raises BadCheckpoint that lists every missing, unexpected or
    damaged file and every tensor whose name, shape or dtype differs from the model's.
    """
    file_of = tensor_files(folder)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    # Some exporters also write the output embedding of a tied model.
    allowed = expected.keys() | {HEAD} if model.config.tie_word_embeddings else expected
    parts = stored_parts(file_of) if stored_kind(read_object(folder / "config.json")) else {}
    packed = parts.keys() | parts.values()  # bitsandbytes.py checks these
    problems = [f"{name} is not expected" for name in file_of if name not in {*allowed, *packed}]
    problems += [f"{name} is missing" for name in expected if name not in file_of]
    to_load: dict[Path, list[str]] = {}
    for name in (expected.keys() | parts) & file_of.keys():
        to_load.setdefault(file_of[name], []).append(name)
    for path, names in to_load.items():
        problems += _header_problems(path, {n: expected[n] for n in names if n not in packed})
    if problems:
        raise BadCheckpoint(
            f"{folder} does not fit its config.json: {listed(problems)}",
            tensor_remedy(folder, problems),
        )
    return to_load


def tensor_files(folder: Path) -> dict[str, Path]:
    """The file of every tensor, by name: `model.safetensors`, or what the shard index says.

    Raises BadCheckpoint where the files and the index disagree, so that no tensor is taken from a
    file that may be the wrong one.
    """
    single, index = folder / "model.safetensors", folder / INDEX
    if not index.exists():
        if not single.exists():
            raise BadCheckpoint(f"{folder} holds no model.safetensors and no shard index", WHOLE)
        return dict.fromkeys(_tensor_names(single), single)
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(s, str) for s in weight_map.values()):
        raise BadCheckpoint(f"{index} has no weight_map", "copy it again from its source")
    shards = sorted(set(weight_map.values()))
    # An index is not trusted: it must not name a file outside its folder.
    bad = [
        f"{name} is not a file of this folder"
        for name in shards
        if os.path.basename(name) != name
        or not name.endswith(".safetensors")
        or not os.path.isfile(folder / name)
    ]
    if bad:
        raise BadCheckpoint(f"{index}: {listed(bad)}", WHOLE)
    if single.exists() and single.name not in shards:
        raise BadCheckpoint(
            f"{folder} holds model.safetensors and shards of an index, which may differ",
            f"remove one of them: model.safetensors, or {INDEX} with its shards",
        )
    found = {name: _tensor_names(folder / name) for name in shards}
    problems = [
        f"{tensor} is in {shard}, and by the index in {weight_map.get(tensor, 'no file')}"
        for shard, tensors in found.items()
        for tensor in tensors
        if weight_map.get(tensor) != shard
    ]
    problems += [
        f"{tensor} is not in {shard}, where the index says"
        for tensor, shard in weight_map.items()
        if tensor not in found[shard]
    ]
    if problems:
        raise BadCheckpoint(
            f"{index} does not fit its shards: {listed(problems)}",
            "copy the index and all its shards from one place, into an empty folder",
        )
    return {tensor: folder / shard for tensor, shard in weight_map.items()}


def has_own_head(folder: Path) -> bool:
    """Whether the checkpoint holds an output embedding that differs from its input embedding."""
    file_of = tensor_files(folder)
    if not {HEAD, EMBEDDING} <= file_of.keys():
        return False
    tensors = []
    for name in (HEAD, EMBEDDING):
        with safe_open(file_of[name], framework="pt") as file:
            tensors.append(file.get_tensor(name))
    head, embedding = tensors
    if head.shape != embedding.shape or head.dtype not in DTYPES.values():
        return True  # the loader names what is wrong with it
    if head.dtype != embedding.dtype:
        head, embedding = head.float(), embedding.float()
    return not torch.equal(head, embedding)


def _tensor_names(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (OSError, SafetensorError) as error:
        refuse_content(path)
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
