"""The base model of a run, before and after its weights are read.

base = Base.find("Qwen/Qwen2-0.5B-Instruct")    # everything but the weights
model = base.load()                              # frozen, on its device, in its precision
"""

import functools
import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from data.chat import ChatFormat
from errors import (
    BadAdapter,
    BadOption,
    HubError,
    TrainingFailed,
    is_out_of_memory,
    plain,
)
from files import HashedFiles, read_json
from hub import check_blobs
from lora.peft_folder import AdapterFolder
from lora.peft_format import read_adapter_config
from model.bitsandbytes import stored_kind
from model.checkpoint import (
    SHIPPED,
    Checkpoint,
    find_checkpoint,
    read_config,
    read_eos_ids,
    remarks,
)
from model.foreign import read_object
from model.load import load_model
from model.qwen2 import Qwen2, Qwen2Config
from run.device import (
    DTYPES,
    describe,
    pick_device,
    pick_precision,
    prepare,
    session_facts,
)
from run.folder import Run

# Parts of the names of quantized checkpoints, which adapters of other trainers often name.
QUANTIZED = ("4bit", "8bit", "int4", "int8", "gptq", "awq", "gguf")
ORIGIN = "origin.json"  # in the folder of an adapter: what it was trained on
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
    base_precision: str | None = None  # nf4 or int8: how the layers' weights are held in memory

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

    def held_in(self, kind: str | None) -> "Base":
        """The same base with its layers in nf4 or int8; BadOption if it is stored in another."""
        stored = stored_kind(read_object(self.folder / "config.json"))
        if kind and stored not in (kind, None):
            raise BadOption(
                f"--base-precision {kind}: {self.name} is stored in {stored}",
                "omit it, or give the checkpoint that this one was quantized from with --model",
            )
        return replace(self, base_precision=stored or kind)

    def load(self, *, shard: bool = False) -> Qwen2:
        """The frozen model in eval mode, with `shard` this rank's part of it; BadOption if it does
        not fit into the device's memory, or if this PyTorch cannot shard a quantized one.
        """
        if shard and self.base_precision and torch.__version__ < (2, 13):  # codes are integers
            raise BadOption(
                f"PyTorch {torch.__version__} cannot shard a base in {self.base_precision}",
                "install PyTorch 2.13, or omit --shard or --base-precision",
            )
        try:
            return load_model(
                self.folder, dtype=DTYPES[self.precision], device=self.device,
                base_precision=self.base_precision, shard=shard,
            )  # fmt: skip
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise BadOption(
                f"the weights of {self.name} in {self.precision} do not fit into the memory of"
                f" {describe(self.device)}",
                "use a smaller base, a smaller --precision, --base-precision nf4, or --device cpu",
            ) from error

    @property
    def place(self) -> str | None:
        """The absolute path of a base that is a folder; None if its name is known elsewhere too: a
        Hub id, or a base included in this repository.
        """
        return None if self.commit or self.name in SHIPPED else str(self.folder.absolute())

    @functools.cached_property
    def hashing(self) -> Future[HashedFiles]:
        """The result of `hash_base`, from a thread that a script which is interrupted leaves."""
        future: Future[HashedFiles] = Future()

        def hash_files() -> None:
            try:
                future.set_result(hash_base(self.folder))
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=hash_files, daemon=True).start()
        return future

    def start_hashing(self) -> None:
        """Start `hashing` in the background, while other things are done."""
        _ = self.hashing

    def facts(self) -> dict[str, Any]:
        """What a run's config.json says about the base, and about where this session runs."""
        return {"base": self.name, "base_folder": self.place} | session_facts(self.device)

    def identity(self) -> dict[str, Any]:
        """What it is, by content, and how it will be computed; waits for `hashing`."""
        identity = {
            "base_commit": self.commit,
            "base_sha256": self.hashing.result().sha256,
            # What a Qwen2 does not have is left out, as in runs from before Qwen3.
            "base_sizes": {k: v for k, v in asdict(self.config).items() if v is not None},
            "precision": self.precision,
        }
        if self.base_precision:
            identity["base_precision"] = self.base_precision
        template = self.chat.template.fingerprint()
        return identity | ({"chat_template_sha256": template} if template else {})

    def check_unchanged(self) -> None:
        """Raise TrainingFailed if the files, which stay mapped, hold something else by now."""
        if self.hashing.result().changed():
            raise TrainingFailed(
                f"the files of the base in {self.folder} were changed during the run, so it may"
                " have computed with a mixture of two bases",
                "restore them and rerun the command with --fresh, or in another --out",
            )

    def lines(self) -> list[str]:
        """For people: which base, how it was understood, and where and how it is computed."""
        return [
            f"base {self.name} at {self.commit or self.folder}",
            *(f"  {remark}" for remark in remarks(self.folder, self.config)),
            *self.chat.template.lines(),
            f"device {describe(self.device)}; precision {self.precision}: {self.precision_reason}"
            + f"; layers of the base in {self.base_precision}" * bool(self.base_precision),
        ]


def checkpoint_of_adapter(
    adapter: str | Path, name: str | None = None, revision: str | None = None
) -> Checkpoint:
    """Locate the base to put an adapter on: `name`, or else the one that it was trained on.

    A folder is known by the adapter's run alone, and is never asked of the Hub. Otherwise the
    adapter names its base.
    The adapter's own revision counts only for its own base, and only on the Hub.
    Raises BadAdapter if the adapter cannot be read, or if its base is not named, not on this
    machine, or quantized; BadCheckpoint and HubError as `find_checkpoint` does.
    """
    if name:
        return find_checkpoint(name, revision)
    _, base, adapters_revision = read_adapter_config(Path(adapter))
    if base is None and (place := _folder_in_run(adapter)):
        return find_checkpoint(place)
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


def _folder_in_run(adapter: str | Path) -> str | None:
    """The folder of the base, as the adapter's run recorded it; BadAdapter if it is not there."""
    run = Run.of_adapter(adapter)
    recorded, given = run.config.get("base_folder"), run.options.get("model")
    if recorded is None:
        return None
    for place in (recorded, given):  # `given` may be relative, in a project that was moved
        if isinstance(place, str) and os.path.isdir(os.path.expanduser(place)):
            return place
    raise BadAdapter(
        f"the adapter {adapter} was trained on the folder {recorded}, which is not there",
        GIVE_MODEL,
    )


def checked_adapter(folder: str | Path) -> AdapterFolder:
    """The adapter in `folder`; BadAdapter if it is not what its own folder says was written."""
    adapter, path = AdapterFolder.read(Path(folder)), Path(folder) / ORIGIN
    origin = read_json(path, BadAdapter, f"delete {path}") if path.exists() else {}
    written = origin.get("adapter_sha256", [adapter.sha256])
    if not isinstance(written, list) or adapter.sha256 not in written:
        raise BadAdapter(
            f"the adapter in {folder} is not as it was written: its hash is {adapter.sha256[:12]}",
            f"copy it again; if you changed it yourself, delete {path}",
        )
    return adapter


def hash_base(folder: Path) -> HashedFiles:
    """Every file of a base that a run reads, and their hash.

    Raises HubError if a file is in the Hub's cache and is not what was downloaded.
    """
    patterns = ("*.safetensors", "*config.json", "tokenizer.json", "chat_template.jinja",
                "additional_chat_templates/*.jinja")  # fmt: skip
    paths = [path for pattern in patterns for path in folder.glob(pattern)]
    with ThreadPoolExecutor(1) as pool:
        checking = pool.submit(check_blobs, paths)
        files = HashedFiles(paths)
        checking.result()
    return files


def check_base_of_adapter(
    base: "Base | Checkpoint", files: HashedFiles, adapter: Path, *, given: bool
) -> None:
    """Raise BadAdapter if the adapter was trained on a base with other contents than `files`.

    The adapter's own folder records what it was trained on, or else the run that it is in. If the
    base was `given` explicitly, the difference is only printed.
    """
    path = adapter / ORIGIN
    if path.exists():
        origin = read_json(path, BadAdapter, f"delete {path}")
    else:
        origin = Run.of_adapter(adapter).identity
    trained_on = origin.get("base_sha256")
    if not isinstance(trained_on, str) or trained_on == files.sha256:
        return
    cause = f"the adapter in {adapter} was trained on another base than is in {base.folder}"
    if not given:
        raise BadAdapter(
            f"{cause}: its hash is {files.sha256[:12]}, not {trained_on[:12]}",
            f"give the right base with --model, or --model {base.folder} to use this one anyway",
        )
    print(plain(f"{cause}: used anyway, since --model names it"))
