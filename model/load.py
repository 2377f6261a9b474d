"""Loads a checkpoint into a frozen Qwen2 without a second copy of the weights.

The network is built on the meta device, which allocates nothing. Then the tensors of the files,
memory-mapped, become its parameters. The checks of its files are in `tensor_files.py`.
"""

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from errors import BadCheckpoint, listed
from model.checkpoint import read_config
from model.qwen2 import Qwen2
from model.tensor_files import find_tensors
from progress_bar import progress_bar


def load_model(folder: Path, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> Qwen2:
    """The checkpoint in `folder`, frozen and in eval mode, in `dtype` on `device`.

    On a CPU, and in the dtype of the files, the weights stay mapped from the files. Raises
    BadCheckpoint if the files do not fit the config or hold NaN or infinity.
    """
    with torch.device("meta"):  # shapes only, no memory
        model = Qwen2(read_config(folder))
    files = find_tensors(folder, model)  # file -> names, checked against the model
    tensors: dict[str, Tensor] = {}
    faulty: list[Tensor] = []  # of each tensor, read at the end: then the host waits for a GPU once
    total = sum(map(len, files.values()))
    with progress_bar(total=total, desc="load weights", unit="tensor", leave=False) as bar:
        for path, names in files.items():
            with safe_open(path, framework="pt", device=str(device)) as file:
                for name in names:
                    tensors[name] = file.get_tensor(name).to(dtype)
                    faulty.append(holds_nan_or_infinity(tensors[name]))
                    bar.update()
    not_finite = [name for name, bad in zip(tensors, torch.stack(faulty).tolist()) if bad]
    if not_finite:
        raise not_finite_error(folder, dtype, not_finite)
    model.load_state_dict(tensors, strict=True, assign=True)
    return model.requires_grad_(False).eval()


def holds_nan_or_infinity(tensor: Tensor) -> Tensor:
    """Whether the tensor holds NaN or infinity: () bool, on its device."""
    # A NaN would be both the minimum and the maximum. Unlike tensor.isfinite(), these are scalars.
    return torch.stack(tensor.aminmax()).isfinite().logical_not().any()


def not_finite_error(folder: Path, dtype: torch.dtype, names: list[str]) -> BadCheckpoint:
    problems = listed(f"{name} holds NaN or infinity" for name in names)
    return BadCheckpoint(
        f"{folder}, read as {str(dtype).removeprefix('torch.')}: {problems}",
        "download or copy it again, or try --precision bf16: fp16 cannot hold more than 65504",
    )
