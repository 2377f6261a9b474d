"""PEFT's adapter folder, `adapter_config.json` and `adapter_model.safetensors`: writing, reading.

Reading is strict. PEFT computes with the bare base model if the keys have a wrong prefix, assumes
r = alpha = 8 if they are missing, and ignores tensors it does not expect, all without an error.
Here each of these is an error. What other programs save under the same names is read if its meaning
is clear, and otherwise refused with a remedy; `docs/formats.md` lists both.
Format: peft 0.21, `PeftModel.save_pretrained`.
"""

import json
from dataclasses import replace
from pathlib import Path

from safetensors.torch import save
from torch import Tensor, nn

from errors import TrainingFailed, listed, plain
from lora.config import LoRAConfig, last_part
from lora.foreign import CONFIG, WEIGHTS
from lora.inject import inject, load_trained, trained_parameters
from lora.layer import LoRALinear
from lora.peft_folder import INCOMPLETE, OTHER_BASE, AdapterFolder, peft_key
from lora.peft_settings import Fault, refuse

NOT_FINITE = "train the adapter again, or give an earlier checkpoint of it"


def save_adapter(
    model: nn.Module, folder: Path, config: LoRAConfig, *, base: str | None, revision: str | None
) -> None:
    """Write the adapters of `model` to `folder`, in the form that PEFT loads onto `base`.

    Args:
        folder: is created if needed; existing files of the same names are replaced.
        config: the settings that the adapters were injected with.
        base, revision: Hub id of the base model, and its commit; None where there is none.

    Raises TrainingFailed, and writes nothing, if a parameter holds NaN or infinity.
    """
    parameters = trained_parameters(model)
    tensors = {peft_key(n): p.detach().float().cpu().contiguous() for n, p in parameters.items()}
    if bad := [f"{key} holds NaN or infinity" for key, t in tensors.items() if not _finite(t)]:
        raise TrainingFailed(
            f"the adapter was not written to {folder}: {listed(bad)}",
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
        "bias": "none",
        "target_modules": _target_modules(model),
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
    """`inject_adapter` of the adapter in `folder`."""
    return inject_adapter(AdapterFolder.read(folder), model, dropout=dropout)


def inject_adapter(
    adapter: AdapterFolder, model: nn.Module, *, dropout: float | None = None
) -> LoRAConfig:
    """Inject the adapter into `model`; returns its settings.

    `dropout` replaces the adapter's own, to continue training at another rate. Prints a line about
    anything that is ignored, or is read although PEFT would write it differently.

    Raises BadAdapter, listing every tensor that is missing, not expected, or of the wrong shape;
    `model` is then unchanged.
    """
    config = adapter.config if dropout is None else replace(adapter.config, dropout=dropout)
    problems, names = adapter.problems(model), adapter.names_in(model)
    parameters = {
        key: f"{names[name]}.{matrix}"
        for name, layer in adapter.tensors.layers.items() if name in names
        for matrix, key in layer.keys.items()
    }  # fmt: skip
    tensors = {name: adapter.tensors.values[key].float() for key, name in parameters.items()}
    problems += [
        Fault(f"{key} holds NaN or infinity", NOT_FINITE)
        for key, name in parameters.items() if not _finite(tensors[name])
    ]  # fmt: skip
    differing, ignored = adapter.compare_others(model)
    _refuse_all(adapter.folder, problems + differing)
    inject(model, replace(config, targets=tuple(names.values())))
    load_trained(model, tensors)

    notes = [f"{listed(ignored, 2)}: equal to the base's own, so not used"] if ignored else []
    if unusual := [key for key, name in parameters.items() if key != peft_key(name)]:
        usual = peft_key(parameters[unusual[0]])
        notes.append(f"{unusual[0]} is read as {usual}, and others likewise")
    if not config.dora and not any(t.any() for name, t in tensors.items() if "lora_B" in name):
        notes.append("every matrix B is zero, so it computes what its base computes")
    for note in notes:
        print(plain(f"adapter {adapter.folder}: {note}"), flush=True)
    return config


def check_adapter(adapter: AdapterFolder, model: nn.Module) -> None:
    """Raise BadAdapter if the adapter does not fit `model`, which may be on the meta device.

    Everything is checked except the values of the tensors.
    """
    _refuse_all(adapter.folder, adapter.problems(model))


def read_adapter_config(folder: Path) -> tuple[LoRAConfig, str | None, str | None]:
    """(settings, base model, base revision) of an adapter folder.

    Raises BadAdapter, listing every setting that is malformed, not supported, or contradicts the
    names of the tensors.
    """
    adapter = AdapterFolder.read(folder)
    return adapter.config, adapter.settings.base, adapter.settings.revision


def _refuse_all(folder: Path, problems: list[Fault]) -> None:
    if problems:
        is_other = any(problem.remedy in (OTHER_BASE, INCOMPLETE) for problem in problems)
        refuse(f"{folder} does not fit its base" if is_other else folder, problems)


def _target_modules(model: nn.Module) -> list[str]:
    """What PEFT's `target_modules` must be to select the adapted layers and no others.

    PEFT selects by name endings. The last part of a name is enough if every linear layer with that
    last part is adapted; otherwise the full names are written.
    """
    adapted = {name for name, m in model.named_modules() if isinstance(m, LoRALinear)}
    not_adapted = {
        last_part(name)
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and not name.endswith(".base_layer")
    }
    return sorted({n if last_part(n) in not_adapted else last_part(n) for n in adapted})


def _finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())
