"""PEFT's adapter folder, written and read: `adapter_config.json` and `adapter_model.safetensors`.

Reading is strict. PEFT itself answers as the base model when a prefix is wrong, takes r = alpha = 8
when they are missing, and drops tensors it does not expect, each in silence; here each is an error.
Format: peft 0.21, `PeftModel.save_pretrained`.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from errors import BadAdapter, BadOption, TrainingFailed, listed
from hub import read_json
from lora.inject import LoRAConfig, inject, load_trained, target_names, trained_parameters

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."

# What PEFT's other features would change about the forward pass, with the value that means "not
# used". Fields that are absent are not used either.
UNUSED = {
    "fan_in_fan_out": (False,),
    "modules_to_save": (None, []),
    "layers_to_transform": (None, []),
    "layers_pattern": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "use_dora": (False,),
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
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),  # others change the base
}


def peft_key(name: str) -> str:
    """PEFT's key of one of our trained parameters."""
    return PREFIX + name + (".weight" if name.endswith(("lora_A", "lora_B")) else "")


def save_adapter(
    model: nn.Module, folder: Path, config: LoRAConfig, *, base: str, revision: str | None
) -> None:
    """Write the model's adapters into `folder` so that PEFT loads them onto `base`.

    TrainingFailed, and nothing written, if a number of theirs is not finite.
    """
    parameters = trained_parameters(model)
    tensors = {peft_key(n): p.detach().float().cpu().contiguous() for n, p in parameters.items()}
    if bad := [f"{key} holds NaN or infinity" for key, t in tensors.items() if not _finite(t)]:
        raise TrainingFailed(
            f"the adapter is not written to {folder}: {listed(bad)}",
            "lower --learning-rate, or use --precision fp32",
        )
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "r": config.r,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "bias": config.bias,
        "target_modules": sorted({n.split(".")[-2] for n in parameters if n.endswith("lora_A")}),
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": config.rslora,
        "use_dora": False,
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
    try:
        raw = read_json(path)
    except FileNotFoundError:
        raise BadAdapter(f"{folder} is no adapter: it has no {CONFIG}", remedy) from None
    except (OSError, ValueError) as error:
        raise BadAdapter(f"{path} cannot be read: {error}", remedy) from None
    problems = _config_problems(raw)
    if problems:
        raise BadAdapter(f"{path}: {listed(problems)}", "only plain LoRA adapters are supported")
    targets = raw["target_modules"]
    config = LoRAConfig(
        r=raw["r"],
        alpha=raw["lora_alpha"],
        dropout=raw.get("lora_dropout", 0.0),
        targets=(targets,) if isinstance(targets, str) else tuple(targets),
        bias=raw.get("bias", "none"),
        rslora=raw.get("use_rslora", False),
    )
    return config, raw.get("base_model_name_or_path"), raw.get("revision")


def _config_problems(raw: object) -> list[str]:
    if not isinstance(raw, dict) or raw.get("peft_type") != "LORA":
        return ["it is not a LoRA adapter's"]
    problems = []
    if not _is_int(raw.get("r")) or raw["r"] < 1:
        problems.append(f"r is {raw.get('r')!r}")
    alpha = raw.get("lora_alpha")
    if not (_is_int(alpha) or isinstance(alpha, float)) or not abs(alpha) < 1e30:
        problems.append(f"lora_alpha is {alpha!r}")
    rate = raw.get("lora_dropout", 0.0)
    if not isinstance(rate, int | float) or not 0 <= rate < 1:
        problems.append(f"lora_dropout is {rate!r}")
    targets = raw.get("target_modules")
    names = isinstance(targets, list) and targets and all(_is_name(t) for t in targets)
    if not names and targets != "all-linear":  # any other string is a regular expression: not run
        problems.append(f"target_modules is {targets!r}, not a list of module names")
    if raw.get("bias", "none") not in ("none", "all", "lora_only"):
        problems.append(f"bias is {raw['bias']!r}")
    if not isinstance(raw.get("use_rslora", False), bool):
        problems.append(f"use_rslora is {raw['use_rslora']!r}")
    problems += [f"{k} is {raw[k]!r}" for k, ok in UNUSED.items() if k in raw and raw[k] not in ok]
    return problems


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_name(value: object) -> bool:
    return isinstance(value, str) and value.replace("_", "a").isalnum()


def read_adapter(folder: Path, model: nn.Module) -> LoRAConfig:
    """Inject the adapter in `folder` into `model`; BadAdapter lists every key and shape that does
    not fit.
    """
    config, _, _ = read_adapter_config(folder)
    remedy = "give the base it was trained on with --model, or another adapter"
    try:
        targets = target_names(model, config.targets)
    except BadOption as error:
        raise BadAdapter(
            f"{folder / CONFIG}: target_modules: {error.cause.removeprefix('--targets: ')}", remedy
        ) from None
    tensors = _read_tensors(folder / WEIGHTS)
    sides = sum(sum(model.get_submodule(name).weight.shape) for name in targets)
    size = (folder / WEIGHTS).stat().st_size
    if config.r * sides > size:  # a number takes more than a byte: say so before there are as many
        raise BadAdapter(
            f"{folder}: rank {config.r} means {config.r * sides:,} numbers, and {WEIGHTS} has"
            f" {size:,} bytes",
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
