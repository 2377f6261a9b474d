"""Checkpoints that bitsandbytes has quantized to nf4 or int8, read as they are stored.

Formats: `quantization_config` in `config.json`, and the tensors of bitsandbytes 0.50: in 4 bits
those of `QuantState.as_dict`, in 8 bits those of `Linear8bitLt`. The codes are as in `quant.py`.
"""

import json
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from errors import BadCheckpoint
from model.quant import QuantizedLinear

# The tensors that it adds for X.weight: X.weight.absmax and others in 4 bits, X.SCB in 8 bits.
PARTS = re.compile(
    r"^(.+\.)(weight\.(?:nested_)?(?:absmax|quant_map)|weight\.quant_state\.bitsandbytes__nf4"
    r"|SCB|weight_format)$"
)


def stored_kind(config: dict[str, Any]) -> str | None:
    """nf4 or int8 if this `config.json` says that bitsandbytes stored the weights so, else None."""
    found = config.get("quantization_config")
    if not isinstance(found, dict) or found.get("quant_method") != "bitsandbytes":
        return None
    is_nf4 = found.get("load_in_4bit") and found.get("bnb_4bit_quant_type") == "nf4"
    return "nf4" if is_nf4 else "int8" if found.get("load_in_8bit") else None


def stored_parts(names: Iterable[str]) -> dict[str, str]:
    """The tensors that bitsandbytes added -> the weight that each belongs to."""
    return {m[0]: f"{m[1]}weight" for m in map(PARTS.match, names) if m}


def from_bitsandbytes(model: nn.Module, name: str, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Codes and absmax of the weight `name`, by name, from what bitsandbytes stored.

    With double quantization the scales are codes themselves, which are resolved here. Raises
    BadCheckpoint if a part is missing or does not have the shape of the others.
    """
    place = name.removesuffix("weight")
    layer = model.get_submodule(place[:-1])
    assert isinstance(layer, QuantizedLinear)
    try:
        if layer.kind == "int8":
            scales = parts[f"{place}SCB"].float()
        else:
            scales = parts[f"{name}.absmax"]
            if (outer := parts.get(f"{name}.nested_absmax")) is not None:
                state = bytes(parts[f"{name}.quant_state.bitsandbytes__nf4"].tolist())
                state = json.loads(state)
                values = parts[f"{name}.nested_quant_map"][scales.int()]  # (b,)
                outer = outer.repeat_interleave(state["nested_blocksize"])[: len(values)]  # (b,)
                scales = values * outer + state["nested_offset"]
        codes = parts[name].view(layer.codes.shape)
        kinds = (codes.dtype, scales.dtype, *scales.shape)
        if kinds != (layer.codes.dtype, torch.float32, len(layer.absmax)):
            raise ValueError(f"its codes are {kinds[0]}, its scales {kinds[1:]}")
    except (LookupError, TypeError, ValueError, RuntimeError) as error:
        raise BadCheckpoint(
            f"{name} is not {layer.kind} of bitsandbytes in blocks of {layer.block}: {error}",
            "give the checkpoint that it was quantized from, with --base-precision",
        ) from error
    return {f"{place}codes": codes, f"{place}absmax": scales}
