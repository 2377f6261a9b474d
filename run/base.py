"""The base model of a run, before and after its weights are read.

base = Base.find("Qwen/Qwen2-0.5B-Instruct")    # everything but the weights
model = base.load()                              # frozen, on its device, in its precision
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from data.chat import ChatFormat
from files import hash_files
from model.checkpoint import find_checkpoint, read_config, read_eos_ids
from model.load import load_model
from model.qwen2 import Qwen2, Qwen2Config
from run.device import DTYPES, describe, pick_device, pick_precision, prepare_memory


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
        name: str,
        revision: str | None = None,
        *,
        precision: str = "auto",
        device: str | torch.device = "auto",
        system: str | None = None,
        chat_template: str | None = None,
        adapter: Path | None = None,
    ) -> "Base":
        """Find the checkpoint, fetching it if `name` is a Hub id, and read all but its weights.

        `system`, `chat_template` and `adapter` are those of `ChatFormat.from_folder`.

        Raises BadCheckpoint, HubError, or BadOption for a device that is not available.
        """
        device = pick_device(device) if isinstance(device, str) else device
        precision, reason = pick_precision(precision, device)
        checkpoint = find_checkpoint(name, revision)
        config = read_config(checkpoint.folder)
        chat = ChatFormat.from_folder(
            checkpoint.folder,
            config.vocab_size,
            system=system,
            chat_template=chat_template,
            adapter=adapter,
        )
        prepare_memory(device)  # before the first large tensor
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
        """For people: which base, where it is computed and how."""
        return [
            f"base {self.name} at {self.commit or self.folder}",
            f"device {describe(self.device)}; precision {self.precision}: {self.precision_reason}",
            *self.chat.template.lines(),
        ]
