"""`best/`: the adapter with the best validation, as a folder that PEFT loads."""

import os
import shutil

from torch import nn

from files import sync_files, sync_folder
from lora.config import LoRAConfig
from lora.peft_format import WEIGHTS, save_adapter
from run.base import Base
from run.folder import Progress, Run

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
CARD = """---
base_model: {base}
library_name: peft
tags: [lora]
---
# LoRA adapter for {base}

Trained on {data}; best at step {step}, with a validation loss of {loss:.4f} nats per supervised
token.
Settings: {lora}.

Load it with PEFT:

    model = AutoModelForCausalLM.from_pretrained("{base}")
    model = PeftModel.from_pretrained(model, "<this folder>")
"""


def publish_best(
    model: nn.Module, lora: LoRAConfig, base: Base, run: Run, progress: Progress
) -> None:
    """Write the model's adapters as they are now to `run.best`, with a model card.

    `best/` is whole at every instant: it is renamed into place the first time, and afterwards only
    its weights and its card change, each by a rename.
    """
    best, new = run.best, run.folder / "best.new"
    shutil.rmtree(new, ignore_errors=True)
    save_adapter(model, new, lora, base=base.name, revision=base.commit)
    for name in TOKENIZER_FILES:
        if (base.folder / name).exists():
            shutil.copyfile(base.folder / name, new / name)
    card = CARD.format(
        base=base.name,
        data=", ".join(run.options.get("data", [])),
        step=progress.step,
        loss=progress.best_loss,
        lora=lora,
    )
    (new / "README.md").write_text(card)
    sync_files(new)
    if best.exists():
        for name in (WEIGHTS, "README.md"):
            os.replace(new / name, best / name)
        sync_folder(best)
        shutil.rmtree(new)
    else:
        os.rename(new, best)
    sync_folder(run.folder)
