"""Loads a checkpoint into a frozen Qwen2 without a second copy of the weights.

The network is built on the meta device, which allocates nothing. Then the tensors of the files,
memory-mapped, become its parameters. The checks of its files are in `tensor_files.py`.
"""

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from errors import BadCheckpoint, listed
from model.bitsandbytes import from_bitsandbytes, stored_kind, stored_parts
from model.checkpoint import read_config
from model.foreign import read_object
from model.quant import held, quantize_layers
from model.qwen2 import Qwen2
from model.shard import own_part, shard_layers
from model.tensor_files import find_tensors
from progress_bar import progress_bar


def load_model(
    folder: Path,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    base_precision: str | None = None,
    shard: bool = False,
) -> Qwen2:
    """The checkpoint in `folder`, frozen and in eval mode, in `dtype` on `device`.

    On a CPU, and in the dtype of the files, the weights stay mapped from the files. With
    `base_precision` nf4 or int8, each weight of the layers is quantized as soon as it is read; a
    checkpoint that bitsandbytes has quantized stays as it is. With `shard`, each rank keeps its
    part of each weight of the layers. Raises BadCheckpoint if the files do not fit the config or
    hold NaN or infinity.
    """
    with torch.device("meta"):  # shapes only, no memory
        model = Qwen2(read_config(folder))
    files = find_tensors(folder, model)  # file -> names, checked against the model
    parts = stored_parts(name for names in files.values() for name in names)
    if kind := stored_kind(read_object(folder / "config.json")) or base_precision:
        quantize_layers(model, kind, dtype, set(parts.values()))
    if shard:
        model.lockstep = shard_layers(model.requires_grad_(False), torch.device(device))
    parameters, packed = dict(model.named_parameters()), parts.keys() | parts.values()
    tensors: dict[str, Tensor] = {}
    stored: dict[str, Tensor] = {}  # as bitsandbytes has it
    faulty: dict[str, Tensor] = {}  # read at the end: then the host waits for a GPU once
    total = sum(map(len, files.values()))
    with progress_bar(total=total, desc="load weights", unit="tensor", leave=False) as bar:
        for path, names in files.items():
            with safe_open(path, framework="pt", device=str(device)) as file:
                for name in names:
                    tensor = file.get_tensor(name)
                    if name in packed:
                        stored[name] = tensor
                    else:
                        tensor = tensor.to(dtype)
                        for key, value in held(model, name, tensor).items():
                            tensors[key] = own_part(value, parameters[key])
                    faulty[name] = holds_nan_or_infinity(tensor)
                    bar.update()
    flags = torch.stack(list(faulty.values())).tolist()
    not_finite = [name for name, bad in zip(faulty, flags) if bad]
    if not_finite:
        raise not_finite_error(folder, dtype, not_finite)
    for name in set(parts.values()):
        for key, value in from_bitsandbytes(model, name, stored).items():
            tensors[key] = own_part(value, parameters[key])
    model.load_state_dict(tensors, strict=True, assign=True)
    model.requires_grad_(False).eval()
    if model.lockstep:
        model.lockstep.start()
    return model


def holds_nan_or_infinity(tensor: Tensor) -> Tensor:
    """Whether the tensor holds NaN or infinity: () bool, on its device."""
    # A NaN would be both the minimum and the maximum. Unlike tensor.isfinite(), these are scalars.
    return torch.stack(tensor.aminmax()).isfinite().logical_not().any()


def not_finite_error(folder: Path, dtype: torch.dtype, names: list[str]) -> BadCheckpoint:
    """The error for tensors `names` that are not finite in `dtype`."""
    problems = listed(f"{name} holds NaN or infinity" for name in names)
    return BadCheckpoint(
        f"{folder}, read as {str(dtype).removeprefix('torch.')}: {problems}",
        "download or copy it again, or try --precision bf16: fp16 cannot hold more than 65504",
    )
