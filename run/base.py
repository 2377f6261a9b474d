"""The base model of a run, before and after its weights are read.

base = Base.find("Qwen/Qwen2-0.5B-Instruct")    # everything but the weights
model = base.load()                              # frozen, on its device, in its precision
"""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from data.chat import ChatFormat
from errors import BadAdapter, HubError
from files import hash_files
from lora.peft_format import read_adapter_config
from model.checkpoint import (
    SHIPPED,
    Checkpoint,
    find_checkpoint,
    read_config,
    read_eos_ids,
    remarks,
)
from model.load import load_model
from model.qwen2 import Qwen2, Qwen2Config
from run.device import DTYPES, describe, pick_device, pick_precision, prepare

# Parts of the names of quantized checkpoints, which adapters of other trainers often name.
QUANTIZED = ("4bit", "8bit", "int4", "int8", "gptq", "awq", "gguf")
GIVE_MODEL = "give yours with --model"


@dataclass(frozen=True)
class Base:
    """What `--model` found, and how it will be computed."""

    name: str  # as the user gave it
    commit: str | None  # of a Hub repository
    folder: Path
    config: Qwen2Config
    chat: ChatFormat
    eos_ids: tuple[int, ...]  # the tokens that end an answer
    device: torch.device
    precision: str  # a key of DTYPES
    precision_reason: str

    @classmethod
    def find(
        cls,
        name: str | Checkpoint,
        revision: str | None = None,
        *,
        precision: str = "auto",
        device: str | torch.device = "auto",
        system: str | None = None,
        chat_template: str | None = None,
        adapter: Path | None = None,
    ) -> "Base":
        """Find the checkpoint, fetching it if `name` is a Hub id, and read all but its weights.

        A `name` that is a Checkpoint has been found already, as by `checkpoint_of_adapter`.

        `system`, `chat_template` and `adapter` are those of `ChatFormat.from_folder`.

        Raises BadCheckpoint, HubError, or BadOption for a device that is not available.
        """
        device = pick_device(device) if isinstance(device, str) else device
        precision, reason = pick_precision(precision, device)
        checkpoint = find_checkpoint(name, revision) if isinstance(name, str) else name
        config = read_config(checkpoint.folder)
        chat = ChatFormat.from_folder(
            checkpoint.folder,
            config.vocab_size,
            system=system,
            chat_template=chat_template,
            adapter=adapter,
        )
        prepare(device)  # before the first large tensor
        return cls(
            name=checkpoint.name,
            commit=checkpoint.commit,
            folder=checkpoint.folder,
            config=config,
            chat=chat,
            eos_ids=chat.answer_ends(read_eos_ids(checkpoint.folder)),
            device=device,
            precision=precision,
            precision_reason=reason,
        )

    def load(self) -> Qwen2:
        """The frozen model in eval mode."""
        return load_model(self.folder, dtype=DTYPES[self.precision], device=self.device)

    def fingerprint(self) -> str | None:
        """SHA-256 of every file that a run reads of a base without a commit; None with one."""
        if self.commit:
            return None
        patterns = ("*.safetensors", "*config.json", "tokenizer.json", "chat_template.jinja",
                    "additional_chat_templates/*.jinja")  # fmt: skip
        return hash_files([path for pattern in patterns for path in self.folder.glob(pattern)])

    def lines(self) -> list[str]:
        """For people: which base, how it was understood, and where and how it is computed."""
        return [
            f"base {self.name} at {self.commit or self.folder}",
            *(f"  {remark}" for remark in remarks(self.folder, self.config)),
            *self.chat.template.lines(),
            f"device {describe(self.device)}; precision {self.precision}: {self.precision_reason}",
        ]


def checkpoint_of_adapter(
    adapter: str | Path, name: str | None = None, revision: str | None = None
) -> Checkpoint:
    """Locate the base to put an adapter on: `name`, or else the base that the adapter names.

    The adapter's own revision counts only for its own base, and only on the Hub.
    Raises BadAdapter if the adapter cannot be read, or if its base is not named, not on this
    machine, or quantized; BadCheckpoint and HubError as `find_checkpoint` does.
    """
    if name:
        return find_checkpoint(name, revision)
    _, base, adapters_revision = read_adapter_config(Path(adapter))
    if base is None:
        raise BadAdapter(f"the adapter {adapter} names no base model", "give it with --model")
    if base in SHIPPED or os.path.isdir(Path(base).expanduser()):
        return find_checkpoint(base, revision)
    cause = f"the adapter {adapter} names {base} as its base"
    is_hub_id = base.count("/") == 1 and not base.startswith(("/", ".", "~")) and "\\" not in base
    if not is_hub_id or os.path.exists(base):
        raise BadAdapter(f"{cause}, which is not a folder on this machine", GIVE_MODEL)
    if any(part in base.lower() for part in QUANTIZED):
        raise BadAdapter(
            f"{cause}, which is quantized", "give the base it was quantized from with --model"
        )
    try:
        return find_checkpoint(base, revision or adapters_revision)
    except HubError as error:
        raise HubError(f"{cause}: {error.cause}", f"{error.remedy}; or {GIVE_MODEL}") from error
