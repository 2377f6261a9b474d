"""`best/`: the adapter with the best validation, as a folder that PEFT loads."""

import os
import shutil
from dataclasses import asdict
from pathlib import Path

from torch import nn

from data.template import ChatTemplate
from errors import BadCheckpoint
from files import json_bytes, publish, read_json, sync_files, sync_folder
from lora.config import LoRAConfig
from lora.peft_format import WEIGHTS, save_adapter
from run.base import ORIGIN, Base
from run.card import adapter_card
from run.folder import Progress, Run, adapter_sha256

TEMPLATE = "chat_template.jinja"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
BOTH = "both.json"  # an ORIGIN with the hashes of the new adapter and of the one it replaces
ORIGINS = ("base_sha256", "data_content", "from_adapter_sha256")  # keys of ORIGIN


def publish_best(
    model: nn.Module, lora: LoRAConfig, base: Base, run: Run, progress: Progress
) -> None:
    """Write the model's adapters as they are now to `run.best`, with a model card.

    `best/` is whole at every instant: it is renamed into place the first time, and afterwards only
    its weights, its card and its origin change, each by a rename.
    """
    best, new = run.best, run.folder / "best.new"
    shutil.rmtree(new, ignore_errors=True)
    name = None if base.place else base.name  # a path tells others nothing, but about its owner
    save_adapter(model, new, lora, base=name, revision=base.commit)
    copy_tokenizer(base.folder, base.chat.template, new)
    count = run.validation_count() + 1  # this one is logged after the adapter is written
    reached = asdict(progress) | {"validation_count": count}
    card = adapter_card(name or base.place, lora, run, reached, new)
    (new / "README.md").write_text(card, "utf-8")
    origin = {name: run.identity[name] for name in ORIGINS if name in run.identity}
    hashes = [adapter_sha256(new), adapter_sha256(best)]
    (new / ORIGIN).write_bytes(json_bytes(origin | {"adapter_sha256": hashes[:1]}))
    if not best.exists():
        return publish(new, best)
    (new / BOTH).write_bytes(json_bytes(origin | {"adapter_sha256": hashes}))
    sync_files(new)
    for name in (BOTH, WEIGHTS, "README.md", ORIGIN):  # in between, either adapter is as written
        os.replace(new / name, best / name.replace(BOTH, ORIGIN))
    sync_folder(best)
    shutil.rmtree(new)


def copy_tokenizer(base: Path, template: ChatTemplate, folder: Path) -> None:
    """Write the base's tokenizer, and the chat template with the system prompt of the training.

    Newer software reads the template's own file, older software only `tokenizer_config.json`.
    """
    for name in TOKENIZER_FILES:
        if (base / name).exists():
            shutil.copyfile(base / name, folder / name)
    files = template.files()
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8", newline="\n")
    path = folder / "tokenizer_config.json"
    config = read_json(path, BadCheckpoint, "copy it again") if path.exists() else {}
    if config.get("chat_template", files[TEMPLATE]) != files[TEMPLATE]:
        config["chat_template"] = files[TEMPLATE]
        path.write_bytes(json_bytes(config))
