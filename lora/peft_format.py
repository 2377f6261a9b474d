"""PEFT's adapter folder, written and read: `adapter_config.json` and `adapter_model.safetensors`.

Reading is strict. PEFT itself answers as the base model when a prefix is wrong, takes r = alpha = 8
when they are missing, and drops tensors it does not expect, each in silence; here each is an error.
Format: peft 0.21, `PeftModel.save_pretrained`.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from errors import BadAdapter, BadOption, TrainingFailed, listed
from files import read_json
from lora.init import plain_form, plain_growth
from lora.inject import (
    LoRAConfig,
    added_numbers,
    inject,
    load_trained,
    trained_parameters,
)
from lora.layer import LoRALinear

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
# PEFT's names of what our options say, and what each is refused for.
FIELDS = {
    "--targets": "target_modules",
    "--rank": "rank_pattern",
    "--alphas": "alpha_pattern",
    "--init pissa": "init_lora_weights",
}

# What PEFT's other features would change about the forward pass, with the value that means "not
# used". Fields that are absent are not used either.
UNUSED = {
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
    # PiSSA's change to the base can be found again; others change it beyond that
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva", "pissa"),
}


def peft_key(name: str) -> str:
    """PEFT's key of one of our trained parameters."""
    return PREFIX + name + (".weight" if name.endswith(("lora_A", "lora_B")) else "")


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What an adapter's file holds, by our names: what is trained, in a form the base can load."""
    tensors: dict[str, Tensor] = dict(trained_parameters(model))
    for name, layer in model.named_modules():
        if isinstance(layer, LoRALinear):
            tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"] = plain_form(layer)
    return tensors


def save_adapter(
    model: nn.Module, folder: Path, config: LoRAConfig, *, base: str, revision: str | None
) -> None:
    """Write the model's adapters into `folder` so that PEFT loads them onto `base`.

    PiSSA's are stored as plain ones of twice the rank, as `lora/init.py` explains.
    TrainingFailed, and nothing written, if a number of theirs is not finite.
    """
    parameters = stored_tensors(model)
    tensors = {peft_key(n): t.detach().float().cpu().contiguous() for n, t in parameters.items()}
    if bad := [f"{key} holds NaN or infinity" for key, t in tensors.items() if not _finite(t)]:
        raise TrainingFailed(
            f"the adapter is not written to {folder}: {listed(bad)}",
            "lower --learning-rate, or use --precision fp32",
        )
    layers = [n.removesuffix(".lora_A") for n in parameters if n.endswith(".lora_A")]
    if not any("." in target for target in config.targets):  # or not all that are called so
        layers = {name.rpartition(".")[2] for name in layers}
    more_rank, more_alpha = plain_growth(config.init, config.rslora)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "r": more_rank * config.r,
        "lora_alpha": more_alpha * config.alpha,
        "lora_dropout": config.dropout,
        "bias": config.bias,
        "target_modules": sorted(layers),
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": {end: more_rank * r for end, r in config.ranks.items()},
        "alpha_pattern": {end: more_alpha * alpha for end, alpha in config.alphas.items()},
        "use_rslora": config.rslora,
        "use_dora": config.dora,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / WEIGHTS).write_bytes(save(tensors, metadata={"format": "pt"}))
    (folder / CONFIG).write_text(json.dumps(settings, indent=2) + "\n")


def read_adapter_config(folder: Path) -> tuple[LoRAConfig, str | None, str | None]:
    """(settings, base model, base revision) of an adapter folder; BadAdapter if we cannot honour
    them.
    """
    path = folder / CONFIG
    remedy = "give the folder that holds adapter_config.json, such as out/.../best"
    raw = read_json(path, BadAdapter, remedy, missing=f"{folder} is no adapter: it has no {CONFIG}")
    problems = _config_problems(raw)
    if problems:
        raise BadAdapter(
            f"{path}: {listed(problems)}",
            "LoRA and DoRA adapters of linear layers are supported, not PEFT's other features",
        )
    targets = raw["target_modules"]
    config = LoRAConfig(
        r=raw["r"],
        alpha=raw["lora_alpha"],
        dropout=raw.get("lora_dropout", 0.0),
        targets=(targets,) if isinstance(targets, str) else tuple(targets),
        bias=raw.get("bias", "none"),
        rslora=raw.get("use_rslora", False),
        dora=raw.get("use_dora", False),
        init="pissa" if raw.get("init_lora_weights") == "pissa" else "kaiming",
        ranks=raw.get("rank_pattern") or {},
        alphas=raw.get("alpha_pattern") or {},
    )
    return config, raw.get("base_model_name_or_path"), raw.get("revision")


def _config_problems(raw: object) -> list[str]:
    if not isinstance(raw, dict) or raw.get("peft_type") != "LORA":
        return ["it is not a LoRA adapter's"]
    problems = []
    if not _is_rank(raw.get("r")):
        problems.append(f"r is {raw.get('r')!r}")
    if not _is_alpha(raw.get("lora_alpha")):
        problems.append(f"lora_alpha is {raw.get('lora_alpha')!r}")
    problems += [
        f"{name} is {raw[name]!r}, not numbers by the names of modules"
        for name, is_number in (("rank_pattern", _is_rank), ("alpha_pattern", _is_alpha))
        if raw.get(name) is not None and not _is_pattern(raw[name], is_number)
    ]
    rate = raw.get("lora_dropout", 0.0)
    if not isinstance(rate, int | float) or not 0 <= rate < 1:
        problems.append(f"lora_dropout is {rate!r}")
    targets = raw.get("target_modules")
    names = isinstance(targets, list) and targets and all(_is_name(t) for t in targets)
    if not names and targets != "all-linear":  # any other string is a regular expression: not run
        problems.append(f"target_modules is {targets!r}, not a list of module names")
    if raw.get("bias", "none") not in ("none", "all", "lora_only"):
        problems.append(f"bias is {raw['bias']!r}")
    for name in ("use_rslora", "use_dora"):
        if not isinstance(raw.get(name, False), bool):
            problems.append(f"{name} is {raw[name]!r}")
    if raw.get("init_lora_weights") == "pissa" and not problems:
        alphas = [raw["lora_alpha"], *(raw.get("alpha_pattern") or {}).values()]
        problems += [f"lora_alpha is {a!r}, with PiSSA" for a in alphas if a <= 0]
    problems += [f"{k} is {raw[k]!r}" for k, ok in UNUSED.items() if k in raw and raw[k] not in ok]
    return problems


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_alpha(value: object) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) < 1e30


def _is_pattern(value: object, is_number: Callable[[object], bool]) -> bool:
    """Whether `value` has a number for each name; an expression, as PEFT has it, matches none."""
    return isinstance(value, dict) and all(map(is_number, value.values()))


def _is_name(value: object) -> bool:
    parts = value.split(".") if isinstance(value, str) else [""]
    return all(part.replace("_", "a").isalnum() for part in parts)


def read_adapter(folder: Path, model: nn.Module, *, dropout: float | None = None) -> LoRAConfig:
    """Inject the adapter in `folder` into `model`; BadAdapter lists every key and shape that does
    not fit. `dropout` is for training it on, at another rate than it was.
    """
    config, _, _ = read_adapter_config(folder)
    if dropout is not None:
        config = replace(config, dropout=dropout)
    remedy = "give the base it was trained on with --model, or another adapter"
    try:
        numbers = added_numbers(model, config)
    except BadOption as error:
        option, _, cause = error.cause.partition(": ")
        raise BadAdapter(f"{folder / CONFIG}: {FIELDS[option]}: {cause}", remedy) from None
    tensors = _read_tensors(folder / WEIGHTS)
    size = (folder / WEIGHTS).stat().st_size
    if numbers > size:  # a number takes more than a byte: say so before there are as many
        raise BadAdapter(
            f"{folder}: rank {config.r} means {numbers:,} numbers, and {WEIGHTS} has {size:,}"
            " bytes",
            remedy,
        )
    inject(model, config)
    expected = {peft_key(name): (name, p) for name, p in trained_parameters(model).items()}
    problems = [f"{key} is missing" for key in expected if key not in tensors]
    problems += [f"{key} is not expected" for key in tensors if key not in expected]
    for key in expected.keys() & tensors.keys():
        have, want = tuple(tensors[key].shape), tuple(expected[key][1].shape)
        if have != want:
            problems.append(f"{key} is {have}, not {want}")
        elif not _finite(tensors[key]):
            problems.append(f"{key} holds NaN or infinity")
    if problems:
        raise BadAdapter(f"{folder} does not fit its base: {listed(sorted(problems))}", remedy)
    load_trained(model, {expected[key][0]: tensor for key, tensor in tensors.items()})
    return config


def _finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())


def _read_tensors(path: Path) -> dict[str, Tensor]:
    remedy = "the file is missing or damaged: copy or train the adapter again"
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except (OSError, SafetensorError) as error:
        raise BadAdapter(f"{path} cannot be read: {error}", remedy) from None
    if bad := [k for k, t in tensors.items() if not t.dtype.is_floating_point]:
        raise BadAdapter(f"{path}: {listed(bad)} hold no floating-point numbers", remedy)
    return {key: tensor.to(torch.float32) for key, tensor in tensors.items()}
