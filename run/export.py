"""Merge an adapter into its base, as a checkpoint that needs no adapter.

python -m run.export --adapter out/qwen2-0.5b-instruct-gsm8k/best --out merged
"""

import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from data.chat import ChatFormat
from errors import BadCheckpoint, BadOption, listed, run_script
from lora.inject import merge, unwrapped_state
from lora.peft_format import read_adapter
from model.checkpoint import read_config, read_eos_ids, remarks
from model.load import load_model
from run.base import check_base_of_adapter, checkpoint_of_adapter, hash_base
from run.best import copy_tokenizer
from run.device import DTYPES
from run.folder import check_place
from run.options import option, parse

# Files of the base that belong to the merged checkpoint. Other files in the base's folder,
# such as other weights, are not copied.
COPIED = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja",
    "LICENSE", "NOTICE",
)  # fmt: skip


@dataclass(frozen=True)
class ExportConfig:
    """The options of the command line."""

    adapter: str = option("", "adapter folder, such as out/.../best")
    out: str = option("merged", "folder to write; it must not exist yet")
    model: str | None = option(None, "base model (default: the one the adapter names)")
    dtype: str = option(
        "bf16", "dtype of the merged weights; fp32 loses nothing", choices=tuple(DTYPES)
    )


def main(argv: list[str] | None = None) -> None:
    """Merge an adapter into its base and write a checkpoint that needs no adapter."""
    config = parse(ExportConfig, argv, "Merge an adapter into its base.")
    out = Path(config.out)
    if out.exists():
        raise BadOption(f"--out {out} exists already", "give a folder that does not exist")
    check_place(out)
    if not config.adapter:
        raise BadOption("--adapter is not given", "give an adapter's folder, such as out/.../best")
    checkpoint = checkpoint_of_adapter(config.adapter, config.model)
    files, given = hash_base(checkpoint.folder), config.model is not None
    check_base_of_adapter(checkpoint, files, Path(config.adapter), given=given)
    base = read_config(checkpoint.folder)
    for remark in remarks(checkpoint.folder, base):
        print(remark)
    try:
        adapter = Path(config.adapter)
        chat = ChatFormat.from_folder(checkpoint.folder, base.vocab_size, adapter=adapter)
    except BadCheckpoint as error:  # merging needs no chat
        print(f"the base's chat template and eos ids are kept as they are: {error.cause}")
        chat = None
    dtype = DTYPES[config.dtype]
    native = _saved_dtype(checkpoint.folder / "config.json") == str(dtype).removeprefix("torch.")
    model = load_model(checkpoint.folder, dtype=dtype if native else torch.float32)
    read_adapter(Path(config.adapter), model)
    lost = merge(model, dtype)  # a base of another dtype is rounded here for the first time
    state = {k: t.to(dtype).contiguous() for k, t in unwrapped_state(model).items()}
    if bad := [name for name, t in state.items() if not t.isfinite().all()]:
        raise BadOption(
            f"merged weights {listed(bad)} do not fit into {config.dtype}", "use --dtype bf16"
        )
    new = out.with_name(out.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    for pattern in COPIED:
        for file in filter(Path.is_file, checkpoint.folder.glob(pattern)):
            copy = new / file.relative_to(checkpoint.folder)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)
    _update_config(
        new / "config.json", str(dtype).removeprefix("torch."), tied=base.tie_word_embeddings
    )
    if chat:
        copy_tokenizer(checkpoint.folder, chat.template, new)
        eos_ids = chat.answer_ends(read_eos_ids(checkpoint.folder))
        _update(new / "generation_config.json", {"eos_token_id": list(eos_ids)})
    save_file(state, new / "model.safetensors", metadata={"format": "pt"})
    (new / "model.safetensors").chmod(0o644)  # safetensors makes it 0600
    os.rename(new, out)
    print(f"merged into {out}: rounding to {config.dtype} lost {lost:.1%} of the adapter's change")
    if lost > 0.01:
        print("  --dtype fp32 loses next to nothing, at twice the size")


def _saved_dtype(path: Path) -> str | None:
    """The dtype that `config.json` gives the weights, under either key."""
    config = json.loads(path.read_text("utf-8"))
    return config.get("dtype", config.get("torch_dtype"))


def _update_config(path: Path, dtype: str, *, tied: bool) -> None:
    """Write what describes the merged weights into `config.json`, under the keys that it uses."""
    config = json.loads(path.read_text("utf-8"))
    config["dtype" if "dtype" in config else "torch_dtype"] = dtype
    config["tie_word_embeddings"] = tied  # false for a base with an output embedding of its own
    config.pop("auto_map", None)  # names Python files, which are not copied
    path.write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def _update(path: Path, values: dict[str, Any]) -> None:
    """Write values into a JSON file, which may not exist yet."""
    config = json.loads(path.read_text("utf-8")) if path.exists() else {}
    path.write_text(json.dumps(config | values, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    sys.exit(run_script(main))
