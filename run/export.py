"""Adapters as others take them: `best/` as a folder to use or push, and a merged checkpoint.

python -m run.export --adapter out/qwen2-0.5b-instruct-gsm8k/best --out merged
"""

import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from errors import BadOption, listed, run_script
from files import sync_files, sync_folder
from lora.inject import LoRAConfig, merge, unwrapped_state
from lora.peft_format import WEIGHTS, read_adapter, read_adapter_config, save_adapter
from model.checkpoint import Checkpoint, find_checkpoint, read_config
from model.load import load_model
from run.checkpoint import check_place
from run.device import DTYPES
from run.options import option, parse

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
CARD = """---
base_model: {base}
library_name: peft
tags: [lora]
---
# LoRA adapter for {base}

Trained on {data}; best at step {step}, where the validation loss was {loss:.4f} nats a supervised
token.
{settings}

Load it with PEFT:

    model = AutoModelForCausalLM.from_pretrained("{base}")
    model = PeftModel.from_pretrained(model, "<this folder>")
"""


def publish_best(
    model: nn.Module,
    run: Path,
    config: LoRAConfig,
    *,
    checkpoint: Checkpoint,
    data: str,
    step: int,
    loss: float,
) -> None:
    """Make `run/best` the model's adapters as they are now.

    At every instant `best/` is whole: it is renamed into place the first time, and afterwards only
    its weights and card change, each by a rename.
    """
    best, beside = run / "best", run / "best.new"
    shutil.rmtree(beside, ignore_errors=True)
    save_adapter(model, beside, config, base=checkpoint.name, revision=checkpoint.commit)
    for name in TOKENIZER_FILES:
        if (checkpoint.folder / name).exists():
            shutil.copyfile(checkpoint.folder / name, beside / name)
    settings = f"Settings: {config}."
    if config.init == "pissa":
        settings += (
            "\nIt is stored as a plain adapter of twice that rank, for the base as published."
        )
    card = CARD.format(base=checkpoint.name, data=data, step=step, loss=loss, settings=settings)
    (beside / "README.md").write_text(card)
    sync_files(beside)
    if best.exists():
        for name in (WEIGHTS, "README.md"):
            os.replace(beside / name, best / name)
        sync_folder(best)
        shutil.rmtree(beside)
    else:
        os.rename(beside, best)
    sync_folder(run)


@dataclass(frozen=True)
class ExportConfig:
    """What one asks for: each field is an option of the command line."""

    adapter: str = option("", "folder of the adapter, such as out/.../best")
    out: str = option("merged", "folder to write, which must not exist")
    model: str | None = option(None, "base model (default: the one the adapter names)")
    dtype: str = option("bf16", "of the merged weights; fp32 loses nothing", choices=tuple(DTYPES))


def main(argv: list[str] | None = None) -> None:
    """Merge an adapter into its base and write a checkpoint that needs no adapter."""
    config = parse(ExportConfig, argv, "Merge an adapter into its base.")
    out = Path(config.out)
    if out.exists():
        raise BadOption(f"--out {out} exists already", "give a folder that does not exist")
    check_place(out)
    _, base, revision = read_adapter_config(Path(config.adapter))
    checkpoint = find_checkpoint(config.model or base or "", None if config.model else revision)
    read_config(checkpoint.folder)
    dtype = DTYPES[config.dtype]
    native = _saved_dtype(checkpoint.folder / "config.json") == str(dtype).removeprefix("torch.")
    model = load_model(checkpoint.folder, dtype=dtype if native else torch.float32)
    read_adapter(Path(config.adapter), model)
    lost = merge(model, dtype)  # a base of another dtype is rounded here for the first time
    state = {k: t.to(dtype).contiguous() for k, t in unwrapped_state(model).items()}
    if bad := [name for name, t in state.items() if not t.isfinite().all()]:
        raise BadOption(
            f"merged, {listed(bad)} would hold numbers that {config.dtype} cannot",
            "use --dtype bf16",
        )
    beside = out.with_name(out.name + ".new")
    shutil.rmtree(beside, ignore_errors=True)
    shutil.copytree(
        checkpoint.folder, beside, ignore=lambda _, names: [n for n in names if "safetensors" in n]
    )
    _set_dtype(beside / "config.json", str(dtype).removeprefix("torch."))
    save_file(state, beside / "model.safetensors", metadata={"format": "pt"})
    (beside / "model.safetensors").chmod(0o644)  # safetensors makes it 0600
    os.rename(beside, out)
    print(f"merged into {out}: rounding to {config.dtype} lost {lost:.1%} of the adapter's change")
    if lost > 0.01:
        print("  --dtype fp32 loses next to nothing, at twice the size")


def _saved_dtype(path: Path) -> str | None:
    """The dtype that `config.json` gives the weights, under either key."""
    config = json.loads(path.read_text())
    return config.get("dtype", config.get("torch_dtype"))


def _set_dtype(path: Path, dtype: str) -> None:
    """Let `config.json` name the dtype of the weights, under whichever key it uses."""
    config = json.loads(path.read_text())
    config["dtype" if "dtype" in config else "torch_dtype"] = dtype
    path.write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(run_script(main))
