"""The tensors in `adapter_model.safetensors`: which layer and which of its matrices each one is.

PEFT writes `base_model.model.LAYER.lora_A.weight`. A state dict that was saved by hand also has the
adapter's name after `lora_A`, and the names that compilers and parallel trainers give to their
wrappers. These are left out, so that a layer is found by its own name. A key in which there is no
such matrix is kept under its name in the base, to be compared with the base's tensor.
"""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from errors import BadAdapter, listed
from lora.foreign import is_lfs_pointer
from lora.peft_settings import Fault

PREFIX = "base_model.model."
WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
MOST_PARTS = 32  # of a key that can be a layer's
MATRICES = ("lora_A", "lora_B", "lora_magnitude_vector")
DAMAGED = "the file is damaged: copy or train the adapter again"
RESAVE = "save it again with PEFT's save_pretrained"
ONE_ADAPTER = "save one of them: model.save_pretrained(FOLDER, selected_adapters=['NAME'])"
GATHER = (
    "it was saved from sharded parameters (DeepSpeed ZeRO-3): save it again with"
    " stage3_gather_16bit_weights_on_model_save, or gather it with zero_to_fp32.py"
)


@dataclass
class LayerTensors:
    """The tensors of one adapted layer."""

    path: str  # the layer's name in the model that was trained
    keys: dict[str, str] = field(default_factory=dict)  # one of MATRICES -> key in the file


@dataclass(frozen=True)
class Tensors:
    """The tensors of the file, their keys sorted by what they are."""

    values: dict[str, Tensor]  # by key
    layers: dict[str, LayerTensors]  # by the layer's bare name
    others: dict[str, str]  # key -> bare name of the base's tensor that it would be
    problems: list[Fault]

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self.values[key].shape)

    @cached_property
    def ranks(self) -> dict[str, int]:
        """Rank by bare name: the number of rows of A, for the layers that have an A."""
        shapes = {
            name: self.shape(layer.keys["lora_A"])
            for name, layer in self.layers.items()
            if "lora_A" in layer.keys
        }
        return {name: shape[0] for name, shape in shapes.items() if len(shape) == 2 and shape[0]}

    @cached_property
    def endings(self) -> set[str]:
        """All endings of the layers' paths, in whole dotted parts: a.b.c, b.c and c of a.b.c."""
        paths = [layer.path.split(".") for layer in self.layers.values()]
        return {".".join(parts[i:]) for parts in paths for i in range(len(parts))}


def parse_tensors(path: Path, data: bytes) -> dict[str, Tensor]:
    """The tensors in `data`, the content of `path`; BadAdapter if it cannot be read."""
    try:
        return load(data)
    # The last three: a dtype that PyTorch does not have, and sizes that it cannot hold.
    except (SafetensorError, KeyError, RuntimeError, TypeError) as error:
        if is_lfs_pointer(data):
            raise BadAdapter(
                f"{path} is only the pointer that git leaves in place of a large file",
                "install Git LFS and run git lfs pull, or fetch the folder with hf download",
            ) from None
        raise BadAdapter(f"{path} cannot be read: {error}", DAMAGED) from None


def sort_keys(values: dict[str, Tensor]) -> Tensors:
    """Which tensor belongs to which layer, and everything wrong with the keys themselves."""
    layers: dict[str, LayerTensors] = {}
    others: dict[str, str] = {}
    adapters: set[str] = set()
    problems = []
    for key, tensor in sorted(values.items()):
        parts = [part for part in key.split(".") if part not in WRAPPERS]
        place = next((i for i, part in enumerate(parts) if part in MATRICES), len(parts))
        adapter = _adapter_name(parts[place:])
        if adapter is None or len(parts) > MOST_PARTS:
            others[key] = bare(_without_peft(parts))
            continue
        adapters.add(adapter)
        layer = layers.setdefault(bare(parts[:place]), LayerTensors(_path(parts[:place])))
        first = layer.keys.setdefault(parts[place], key)
        if first != key and len(adapters) == 1:
            problems.append(Fault(f"{first} and {key} are the same matrix", RESAVE))
        if 0 in tensor.shape:
            problems.append(Fault(f"{key} is empty", GATHER))
        elif not tensor.is_floating_point():
            problems.append(Fault(f"{key} is not a floating-point tensor", DAMAGED))
    if len(adapters) > 1:
        names = listed(sorted(name or "one without a name" for name in adapters))
        problems.append(Fault(f"it holds {len(adapters)} adapters: {names}", ONE_ADAPTER))
    return Tensors(values, layers, others, problems)


def bare(name: str | list[str]) -> str:
    """`name` without its leading `base_model` and `model` parts: `layers.0.self_attn.q_proj`."""
    parts = name.split(".") if isinstance(name, str) else name
    start = next((i for i, part in enumerate(parts) if part not in ("base_model", "model")), 0)
    return ".".join(parts[start:])


def same_values(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two tensors of one shape are equal, or one is the other rounded to its dtype."""
    theirs = theirs.to(ours.device)
    return torch.equal(ours, theirs.to(ours.dtype)) or torch.equal(ours.to(theirs.dtype), theirs)


def _adapter_name(parts: list[str]) -> str | None:
    """The adapter's name in `lora_A.NAME.weight`, "" without one; None if it is another tensor."""
    matrix, tail = parts[:1], parts[1:]
    if matrix == ["lora_magnitude_vector"] and tail[-1:] != ["weight"]:
        tail = [*tail, "weight"]  # a file's magnitudes, and an older PEFT's, are no module
    if not matrix or not 1 <= len(tail) <= 2 or tail[-1] != "weight":
        return None
    return "" if len(tail) == 1 else tail[0]


def _path(parts: list[str]) -> str:
    """The layer's name without PEFT's prefix, which may be there twice, or not at all."""
    name = ".".join(parts)
    while name.startswith(PREFIX):
        name = name.removeprefix(PREFIX)
    return name


def _without_peft(parts: list[str]) -> list[str]:
    """The name of a base's tensor without the parts that PEFT inserts around its module."""
    if "modules_to_save" in parts:
        place = parts.index("modules_to_save")
        has_name = len(parts) > place + 2  # modules_to_save.NAME.weight
        parts = parts[:place] + parts[place + 1 + has_name :]
    return [part for part in parts if part not in ("base_layer", "original_module")]
