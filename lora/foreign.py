"""What a path is if it is not the folder of a PEFT adapter, and what its owner can do about it.

People give the folder around the adapter, one of its files, an archive, a Hub id, a whole model, or
an adapter in another program's form. Each of these is recognized by its files, which are not opened
beyond their first bytes, and is answered with its own remedy.
"""

import json
import os
from pathlib import Path

from errors import BadAdapter, listed

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MLX_WEIGHTS = ("adapters.safetensors", "adapters.npz")
FOLDER = f"give the folder that holds {CONFIG}, such as out/.../best"
CONVERT_PICKLE = (
    "a pickle can run code, so it is not opened; if you trust it, convert it with PEFT:"
    " AutoPeftModelForCausalLM.from_pretrained('{}').save_pretrained('NEW'), and give NEW"
)
FUSE_MLX = (
    "merge it where it was trained, mlx_lm.fuse --model BASE --adapter-path {} --save-path MERGED,"
    " and give MERGED with --model"
)


def check_folder(folder: Path) -> None:
    """Raise BadAdapter if `folder` lacks one of PEFT's two files, and say what it is instead."""
    if not os.path.exists(folder):  # unlike Path.exists, also False for a name that is too long
        raise _not_found(folder)
    if not folder.is_dir():
        raise _file(folder)
    if not (folder / CONFIG).exists():
        raise _without_config(folder)
    if not (folder / WEIGHTS).exists():
        raise _without_weights(folder)


def mlx_adapter(folder: Path) -> BadAdapter:
    """The refusal of an adapter that mlx-lm has saved."""
    return BadAdapter(f"{folder} is an adapter of mlx-lm, not of PEFT", FUSE_MLX.format(folder))


def is_lfs_pointer(data: bytes) -> bool:
    """Whether `data` is the placeholder that git leaves where Git LFS is not installed."""
    return data.startswith(b"version https://git-lfs")


def _not_found(folder: Path) -> BadAdapter:
    cause = f"{folder} is not an adapter folder: it does not exist"
    parts = folder.parts
    if parts and parts[0] in ("http:", "https:"):
        repo = "/".join(parts[2:4])  # of https://huggingface.co/owner/name/tree/main
    elif len(parts) == 2 and parts[0] not in ("/", ".", "..", "~") and not Path(parts[0]).exists():
        repo = "/".join(parts)
    else:
        return BadAdapter(cause, f"check the path; {FOLDER}")
    local = repo.rpartition("/")[2]
    return BadAdapter(
        cause,
        f"check the path; if it is on the Hub, fetch it with hf download {repo} --local-dir"
        f" {local}, and give the folder {local}",
    )


def _file(path: Path) -> BadAdapter:
    cause, name = f"{path} is a file, not an adapter folder", path.name.lower()
    if name in (CONFIG, WEIGHTS):
        return BadAdapter(cause, f"give the folder that it is in: {path.parent}")
    if name.endswith(PICKLES):
        return BadAdapter(f"{cause}, and a pickle", CONVERT_PICKLE.format(path.parent))
    with path.open("rb") as file:
        is_zip = file.read(4) == b"PK\3\4"
    if name.endswith(ARCHIVES) or is_zip:
        return BadAdapter(f"{cause}: it is an archive", f"unpack it, and {FOLDER}")
    if name.endswith(".gguf"):
        return BadAdapter(f"{cause}: it is a GGUF file", "give the PEFT folder it was made from")
    return BadAdapter(cause, FOLDER)


def _without_config(folder: Path) -> BadAdapter:
    cause = f"{folder} is not an adapter folder: it has no {CONFIG}"
    if inside := _adapters_inside(folder):
        names = [str(found.relative_to(folder)) for found in inside]
        return BadAdapter(
            f"{cause}, but folders inside it have one: {listed(names)}", f"give {inside[-1]}"
        )
    if any((folder / name).exists() for name in MLX_WEIGHTS):
        return mlx_adapter(folder)
    if any((folder / name).exists() for name in (WEIGHTS, "adapter_model.bin")):
        return BadAdapter(
            f"{cause}, and its tensors alone do not say how to scale them",
            f"copy {CONFIG} from where the adapter was saved",
        )
    if _is_model(folder):
        return BadAdapter(
            f"{cause}; it is a whole model",
            f"give it with --model {folder}; an adapter merged into it needs no --adapter any more",
        )
    return BadAdapter(cause, FOLDER)


def _without_weights(folder: Path) -> BadAdapter:
    if any((folder / name).exists() for name in MLX_WEIGHTS):
        return mlx_adapter(folder)
    cause = f"{folder / WEIGHTS} cannot be read: it does not exist"
    if (folder / "adapter_model.bin").exists():
        return BadAdapter(
            f"{folder} holds its tensors as a pickle, adapter_model.bin",
            CONVERT_PICKLE.format(folder),
        )
    if shards := sorted(folder.glob("adapter_model-*-of-*.safetensors")):
        return BadAdapter(
            f"{cause}; its tensors are split into {len(shards)} files",
            f"join them: load each with safetensors.torch.load_file, and save all with save_file"
            f" as {WEIGHTS}",
        )
    if inside := _adapters_inside(folder):
        return BadAdapter(cause, f"give a complete adapter, such as {inside[-1]}")
    if any(folder.glob("*.gguf")):
        return BadAdapter(f"{cause}; it was converted to GGUF", "give the PEFT folder before that")
    return BadAdapter(cause, "copy the whole folder again, or train the adapter again")


def _adapters_inside(folder: Path) -> list[Path]:
    """Adapter folders one or two levels down, such as a trainer's checkpoints, newest last."""
    for pattern in ("*", "*/*"):
        if found := [path.parent for path in folder.glob(f"{pattern}/{CONFIG}")]:
            return sorted(found, key=_by_number)
    return []


def _by_number(folder: Path) -> tuple[int, str]:
    """A sort key by which checkpoint-40 comes after checkpoint-5."""
    digits = folder.name[len(folder.name.rstrip("0123456789")) :]
    return int(digits[-18:] or -1), str(folder)


def _is_model(folder: Path) -> bool:
    try:
        config = json.loads((folder / "config.json").read_bytes()[: 2**20])
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and "model_type" in config
