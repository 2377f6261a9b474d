"""PEFT's adapter folder: `adapter_config.json` and `adapter_model.safetensors`.

Reading is strict. PEFT computes with the bare base model if the keys have a wrong prefix, assumes
r = alpha = 8 if they are missing, and ignores tensors it does not expect, all without an error.
Here each of these is an error. Format: peft 0.21, `PeftModel.save_pretrained`.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from errors import BadAdapter, BadOption, TrainingFailed, listed
from files import read_json
from lora.config import LoRAConfig, added_parameters, last_part
from lora.inject import inject, load_trained, trained_parameters

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
# Our options that select layers by name, and the fields that hold the same in PEFT's config.
FIELDS = {
    "--targets": "target_modules",
    "--rank": "rank_pattern",
    "--alpha": "alpha_pattern",
}

# Fields of other features that change the forward pass, with the values that mean "not used".
# An absent field is not used either.
UNUSED = {
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "modules_to_save": (None, []),
    "layers_to_transform": (None, []),
    "layers_pattern": (None, []),
    "exclude_modules": (None, []),
    "target_parameters": (None, []),
    "layer_replication": (None, []),
    "trainable_token_indices": (None,),
    "lora_bias": (False,),
    "alora_invocation_tokens": (None,),
    "use_qalora": (False,),
    "use_bdlora": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),  # the base is unchanged
}
# Initializations that subtract the initial adapter from the base, so that the trained adapter does
# not fit the published base. PEFT can convert them, given the adapter from before training.
CONVERTIBLE = ("pissa", "corda", "olora", "lora_ga")


def peft_key(name: str) -> str:
    """PEFT's key for one of our trained parameters."""
    return PREFIX + name + (".weight" if name.endswith(("lora_A", "lora_B")) else "")


def save_adapter(
    model: nn.Module, folder: Path, config: LoRAConfig, *, base: str, revision: str | None
) -> None:
    """Write the adapters of `model` to `folder`, in the form that PEFT loads onto `base`.

    Args:
        folder: is created if needed; existing files of the same names are replaced.
        config: the settings that the adapters were injected with.
        base, revision: Hub id or folder of the base model, and its commit if known.

    Raises TrainingFailed, and writes nothing, if a parameter holds NaN or infinity.
    """
    parameters = trained_parameters(model)
    tensors = {peft_key(n): p.detach().float().cpu().contiguous() for n, p in parameters.items()}
    if bad := [f"{key} holds NaN or infinity" for key, t in tensors.items() if not _finite(t)]:
        raise TrainingFailed(
            f"the adapter is not written to {folder}: {listed(bad)}",
            "lower --learning-rate, or use --precision fp32",
        )
    layers = {n.removesuffix(".lora_A") for n in parameters if n.endswith(".lora_A")}
    if not any("." in target for target in config.targets):  # every layer of these names is adapted
        layers = {last_part(name) for name in layers}
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "r": config.r,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "bias": "none",
        "target_modules": sorted(layers),
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": config.ranks,
        "alpha_pattern": config.alphas,
        "use_rslora": config.rslora,
        "use_dora": config.dora,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / WEIGHTS).write_bytes(save(tensors, metadata={"format": "pt"}))
    (folder / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", "utf-8")


def read_adapter(folder: Path, model: nn.Module, *, dropout: float | None = None) -> LoRAConfig:
    """Inject the adapter in `folder` into `model`; returns its settings.

    `dropout` replaces the adapter's own, to continue training at another rate.
    Raises BadAdapter, listing every tensor that is missing, not expected, or of the wrong shape.
    """
    config, _, _ = read_adapter_config(folder)
    if dropout is not None:
        config = replace(config, dropout=dropout)
    remedy = "give the base it was trained on with --model, or another adapter"
    try:
        parameters = added_parameters(model, config)
    except BadOption as error:
        cause = error.cause
        for option, name in FIELDS.items():
            cause = cause.replace(option, name)
        raise BadAdapter(f"{folder / CONFIG}: {cause}", remedy) from None
    tensors = _read_tensors(folder / WEIGHTS)
    # Every parameter takes more than a byte: refuse a config that would exhaust the memory.
    if parameters > (size := (folder / WEIGHTS).stat().st_size):
        rank = max([config.r, *config.ranks.values()])
        raise BadAdapter(
            f"{folder}: rank {rank} means {parameters:,} parameters, but {WEIGHTS} has only"
            f" {size:,} bytes",
            remedy,
        )
    inject(model, config)
    expected = {peft_key(name): (name, p) for name, p in trained_parameters(model).items()}
    problems = [f"{key} is missing" for key in expected if key not in tensors]
    problems += [f"{key} is not expected" for key in tensors if key not in expected]
    for key in expected.keys() & tensors.keys():
        shape, expected_shape = tuple(tensors[key].shape), tuple(expected[key][1].shape)
        if shape != expected_shape:
            problems.append(f"{key} is {shape}, not {expected_shape}")
        elif not _finite(tensors[key]):
            problems.append(f"{key} holds NaN or infinity")
    if problems:
        raise BadAdapter(f"{folder} does not fit its base: {listed(sorted(problems))}", remedy)
    load_trained(model, {expected[key][0]: tensor for key, tensor in tensors.items()})
    return config


def read_adapter_config(folder: Path) -> tuple[LoRAConfig, str | None, str | None]:
    """(settings, base model, base revision) of an adapter folder.

    Raises BadAdapter, listing every setting that is malformed or not supported.
    """
    path = folder / CONFIG
    remedy = "give the folder that holds adapter_config.json, such as out/.../best"
    missing = f"{folder} is not an adapter folder: it has no {CONFIG}"
    raw = read_json(path, BadAdapter, remedy, missing=missing)
    if problems := _config_problems(raw):
        raise BadAdapter(f"{path}: {listed(problems)}", _config_remedy(raw))
    targets = raw["target_modules"]
    config = LoRAConfig(
        r=raw["r"],
        alpha=raw["lora_alpha"],
        dropout=raw.get("lora_dropout", 0.0),
        targets=(targets,) if isinstance(targets, str) else tuple(targets),
        rslora=raw.get("use_rslora", False),
        dora=raw.get("use_dora", False),
        ranks=raw.get("rank_pattern") or {},
        alphas=raw.get("alpha_pattern") or {},
    )
    return config, raw.get("base_model_name_or_path"), raw.get("revision")


def _config_problems(raw: dict[str, Any]) -> list[str]:
    if raw.get("peft_type") != "LORA":
        return [f"peft_type is {raw.get('peft_type')!r}, not 'LORA'"]
    problems = []
    if not _is_rank(raw.get("r")):
        problems.append(f"r is {raw.get('r')!r}")
    if not _is_alpha(raw.get("lora_alpha")):
        problems.append(f"lora_alpha is {raw.get('lora_alpha')!r}")
    problems += [
        f"{field} is {raw[field]!r}, not an object of numbers by module name"
        for field, is_number in (("rank_pattern", _is_rank), ("alpha_pattern", _is_alpha))
        if raw.get(field) is not None and not _is_pattern(raw[field], is_number)
    ]
    dropout = raw.get("lora_dropout", 0.0)
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        problems.append(f"lora_dropout is {dropout!r}")
    targets = raw.get("target_modules")
    are_names = isinstance(targets, list) and targets and all(_is_name(t) for t in targets)
    if not are_names and targets != "all-linear":  # any other string is a regular expression
        problems.append(f"target_modules is {targets!r}, not a list of module names")
    for field in ("use_rslora", "use_dora"):
        if not isinstance(raw.get(field, False), bool):
            problems.append(f"{field} is {raw[field]!r}")
    problems += [f"{k} is {raw[k]!r}" for k, ok in UNUSED.items() if k in raw and raw[k] not in ok]
    return problems


def _config_remedy(raw: dict[str, Any]) -> str:
    if str(raw.get("init_lora_weights")).startswith(CONVERTIBLE):
        return (
            "convert it to a plain adapter with PEFT: save_pretrained(FOLDER,"
            " path_initial_model_for_weight_conversion=FOLDER_OF_THE_INITIAL_ADAPTER)"
        )
    return "supported are LoRA and DoRA on linear layers, without trained biases or other features"


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_alpha(value: object) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) < 1e30


def _is_pattern(value: object, is_number: Callable[[object], bool]) -> bool:
    """Whether `value` maps keys to numbers. A key that is a regular expression matches no layer
    later, because it is never run: one could take minutes.
    """
    return isinstance(value, dict) and all(map(is_number, value.values()))


def _is_name(value: object) -> bool:
    parts = value.split(".") if isinstance(value, str) else [""]
    return all(part.replace("_", "a").isalnum() for part in parts)


def _finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())


def _read_tensors(path: Path) -> dict[str, Tensor]:
    remedy = "the file is missing or damaged: copy or train the adapter again"
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except (OSError, SafetensorError) as error:
        raise BadAdapter(f"{path} cannot be read: {error}", remedy) from None
    if bad := [key for key, t in tensors.items() if not t.dtype.is_floating_point]:
        raise BadAdapter(f"{path}: {listed(bad)} are not floating-point tensors", remedy)
    return {key: tensor.to(torch.float32) for key, tensor in tensors.items()}
