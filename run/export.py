"""Write an adapter in a form that other programs read: merged, portable, or as GGUF.

    python -m run.export --adapter out/qwen2-0.5b-instruct-gsm8k/best --out merged
    python -m run.export --adapter out/.../best --portable --out portable
    python -m run.export --adapter out/.../best --gguf --out model.gguf

Every export is read again from the disk before it gets its final name: its tensors must be those
that were written, bit for bit, and its logits the adapter's, up to rounding.
"""

from errors import run_script  # first: from here on, Ctrl-C ends without a traceback

# isort: split
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor

from data.chat import ChatFormat, read_tokenizer
from errors import BadCheckpoint, BadOption, UserError, listed
from files import make_folder, publish
from lora.config import LoRAConfig
from lora.inject import bake_scale, merge, unwrapped_state
from lora.peft_format import inject_adapter, read_adapter, save_adapter
from model.bitsandbytes import stored_kind
from model.checkpoint import Checkpoint, read_config, read_eos_ids, remarks
from model.foreign import read_object
from model.load import load_model
from model.qwen2 import Qwen2
from run.base import check_base_of_adapter, checked_adapter, checkpoint_of_adapter, hash_base
from run.best import copy_tokenizer
from run.card import adapter_card, merged_card, readers
from run.device import DTYPES
from run.folder import Run, check_place
from run.gguf_file import gguf_package, read_gguf, write_gguf
from run.options import option, parse
from terminal import percent

# Files of the base that belong to the merged checkpoint. Other files in the base's folder,
# such as other weights, are not copied.
COPIED = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja",
    "LICENSE", "NOTICE",
)  # fmt: skip
SHARD_BYTES = 5 * 10**9  # larger checkpoints are split, as transformers does
PROBE = (3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8)  # token ids; every vocabulary has them
# Largest accepted difference of a logit, as a fraction of the largest logit. What rounding alone
# gives, at most, over 40 random adapters on networks with random weights of standard deviation 0.02
# to 0.3: 5e-6, 0.011 and 0.073, the largest where activations are rounded too. Of
# Qwen2.5-Coder-0.5B-Instruct (dequantised from Q4_K_M): 0.001 in fp16, 0.004 to 0.018 in bf16.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 0.0125, torch.bfloat16: 0.1}


class ExportFailed(UserError):
    """An export that does not compute what the adapter computes."""

    exit_code = 1


@dataclass(frozen=True)
class ExportConfig:
    """The options of the command line."""

    adapter: str = option("", "adapter folder, such as out/.../best", path="any")
    out: str = option("merged", "folder or .gguf file to write; it must not exist yet", path="new")
    model: str | None = option(None, "base model (default: the one the adapter names)", path="any")
    portable: bool = option(
        False, "an adapter with alpha = r and one rank, which all programs scale alike"
    )
    gguf: bool = option(False, "one merged GGUF file for llama.cpp; needs pip install gguf")
    dtype: str = option(
        "bf16", "dtype of the merged weights; fp32 loses nothing", choices=tuple(DTYPES)
    )


@dataclass(frozen=True)
class ExportInput:
    """What is exported: the base, and the settings of the adapter on it."""

    config: ExportConfig
    checkpoint: Checkpoint
    lora: LoRAConfig
    chat: ChatFormat | None  # None: the base's own chat format could not be read


def main(argv: list[str] | None = None) -> None:
    """Write the adapter in the form that was asked for; it counts once it has been read again."""
    # 1. What is asked for.
    config = parse(ExportConfig, argv, "Export an adapter for other programs.")
    out = Path(config.out)
    check(config, out)
    checkpoint = checkpoint_of_adapter(config.adapter, config.model)
    files, given = hash_base(checkpoint.folder), config.model is not None
    check_base_of_adapter(checkpoint, files, Path(config.adapter), given=given)
    adapter = checked_adapter(config.adapter)
    base = read_config(checkpoint.folder)
    for remark in remarks(checkpoint.folder, base):
        print(remark)
    try:
        chat = ChatFormat.from_folder(checkpoint.folder, base.vocab_size, adapter=adapter.folder)
    except BadCheckpoint as error:  # merging needs no chat
        if config.gguf:
            read_tokenizer(checkpoint.folder, base.vocab_size)  # GGUF says that it is Qwen2's
        print(f"the base's chat template and eos ids are kept as they are: {error.cause}")
        chat = None

    if not config.portable and stored_kind(read_object(checkpoint.folder / "config.json")):
        raise BadOption(
            f"quantized weights, as in {checkpoint.folder}, cannot hold an adapter's change",
            "give the checkpoint that they were quantized from with --model",
        )

    # 2. The model with its adapters, and what it computes.
    dtype = DTYPES[config.dtype]
    native = _saved_dtype(checkpoint.folder / "config.json") == str(dtype).removeprefix("torch.")
    model = load_model(checkpoint.folder, dtype=dtype if native else torch.float32)
    source = ExportInput(config, checkpoint, inject_adapter(adapter, model), chat)
    expected = probe(model)  # (T, V)
    if kind := Run.of_adapter(config.adapter).identity.get("base_precision"):
        held = load_model(checkpoint.folder, dtype=expected.dtype, base_precision=kind)
        inject_adapter(adapter, held)
        apart = (expected.float() - probe(held).float()).abs().max().item()
        print(
            f"trained on the base in {kind}, exported for the base in full precision: logits of"
            f" {len(PROBE)} tokens differ by at most {apart:.2g}"
        )
        del held

    # 3. The export, under another name; compared; renamed.
    new = out.with_name(out.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    make_folder(new)
    try:
        if config.portable:
            said, tensors = write_portable(source, model, new), model.state_dict()
            dtype = expected.dtype  # the scaling is now applied elsewhere, and rounded there
        else:
            said, tensors = write_merged(source, model, new)
            del model
        written = new
        if config.gguf:
            write_gguf(new, new / out.name)
            written = new / out.name
        again = reload(source, written, expected.dtype)
        check_tensors(tensors, again.state_dict())
        print(compared(expected, probe(again), dtype))
        publish(written, out)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    print(f"{'portable adapter' if config.portable else 'merged'} in {out}: {said}")


def check(config: ExportConfig, out: Path) -> None:
    """Raise BadOption or BadRun for options that contradict each other, and for a bad --out."""
    if out.exists():
        raise BadOption(f"--out {out} exists already", "give a name that does not exist")
    check_place(out)
    if not config.adapter:
        raise BadOption("--adapter is not given", "give an adapter's folder, such as out/.../best")
    if config.portable and config.gguf:
        raise BadOption("--portable writes an adapter, --gguf a merged file", "give one of them")
    if config.gguf:
        gguf_package()
        if out.suffix != ".gguf":
            raise BadOption(f"--out {out}: --gguf writes one file", f"give --out {out}.gguf")


def write_portable(source: ExportInput, model: Qwen2, folder: Path) -> str:
    """Write the adapter with its scaling in B; returns which programs read it."""
    if source.lora.dora:
        raise BadOption(
            f"{source.config.adapter} is a DoRA adapter: few programs read its magnitudes",
            "leave out --portable: the merged model needs no adapter",
        )
    lora, checkpoint = bake_scale(model, source.lora), source.checkpoint
    save_adapter(model, folder, lora, base=checkpoint.public_name, revision=checkpoint.commit)
    if source.chat:
        copy_tokenizer(checkpoint.folder, source.chat.template, folder)
    run = Run.of_adapter(source.config.adapter)
    name = checkpoint.public_name or checkpoint.folder.name
    card = adapter_card(name, lora, run, run.progress(), Path(source.config.adapter))
    (folder / "README.md").write_text(card, "utf-8")
    return f"read as it is by {readers(lora)}"


def write_merged(source: ExportInput, model: Qwen2, folder: Path) -> tuple[str, dict[str, Tensor]]:
    """Merge, and write the checkpoint; returns how much of the change was lost, and the tensors."""
    config, base = source.config, source.checkpoint.folder
    dtype = DTYPES[config.dtype]
    lost = merge(model, dtype)  # a base of another dtype is rounded here for the first time
    state = {k: t.to(dtype).contiguous() for k, t in unwrapped_state(model).items()}
    if bad := [name for name, t in state.items() if not t.isfinite().all()]:
        raise BadOption(
            f"merged weights {listed(bad)} do not fit into {config.dtype}", "use --dtype bf16"
        )
    for pattern in COPIED:
        for file in filter(Path.is_file, base.glob(pattern)):
            copy = folder / file.relative_to(base)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)
    dtype_name, tied = str(dtype).removeprefix("torch."), model.config.tie_word_embeddings
    _update_config(folder / "config.json", dtype_name, tied=tied)
    if source.chat:
        copy_tokenizer(base, source.chat.template, folder)
        eos_ids = source.chat.answer_ends(read_eos_ids(base))
        _update(folder / "generation_config.json", {"eos_token_id": list(eos_ids)})
    save_weights(state, folder)
    adapter, run = Path(config.adapter), Run.of_adapter(config.adapter)
    name = source.checkpoint.public_name or base.name
    card = merged_card(name, source.lora, run, run.progress(), adapter)
    (folder / "README.md").write_text(card, "utf-8")
    hint = "\n  --dtype fp32 loses next to nothing, at twice the size" if lost > 0.01 else ""
    return f"rounding to {config.dtype} lost {percent(lost)} of the adapter's change{hint}", state


def save_weights(state: dict[str, Tensor], folder: Path) -> None:
    """Write `model.safetensors`, or above `SHARD_BYTES` several files and their index."""
    split = split_torch_state_dict_into_shards(state, max_shard_size=SHARD_BYTES)
    for name, keys in split.filename_to_tensors.items():
        save_file({key: state[key] for key in keys}, folder / name, metadata={"format": "pt"})
        (folder / name).chmod(0o644)  # safetensors makes it 0600
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        _update(folder / "model.safetensors.index.json", index)


def reload(source: ExportInput, path: Path, dtype: torch.dtype) -> Qwen2:
    """The model that was written, as it is on the disk, to compute in `dtype`."""
    if source.config.gguf:
        return read_gguf(path, read_config(path.parent), dtype)
    if not source.config.portable:
        return load_model(path, dtype=dtype)
    model = load_model(source.checkpoint.folder, dtype=dtype)
    read_adapter(path, model)
    return model


@torch.no_grad()
def probe(model: Qwen2) -> Tensor:
    """Logits (T, V) for the tokens of `PROBE`, in the dtype of the model."""
    tokens = torch.tensor(PROBE)
    hidden = model.eval()(tokens, torch.arange(len(PROBE)), [len(PROBE)])  # (T, C)
    return hidden @ model.head_weight.t()  # (T, V)


def check_tensors(written: dict[str, Tensor], read: dict[str, Tensor]) -> None:
    """Raise ExportFailed unless the tensors that were read are those that were written."""
    wrong = [name for name, tensor in read.items()
             if not torch.equal(tensor, written[name].to(tensor.dtype))]  # fmt: skip
    if wrong:
        raise ExportFailed(
            f"read again from the disk, {listed(wrong)} is not what was written: nothing was kept",
            "check the disk, and report this as a bug",
        )


def compared(expected: Tensor, found: Tensor, dtype: torch.dtype) -> str:
    """The largest difference of the logits, for people; ExportFailed if rounding to `dtype` does
    not explain it.
    """
    difference = (expected.float() - found.float()).abs().max().item()
    largest = expected.float().abs().max().item()
    text = f"logits of {len(PROBE)} tokens differ from the adapter's by at most {difference:.2g}"
    if not difference <= TOLERANCE[dtype] * largest:  # `not <=`, so that NaN fails
        raise ExportFailed(
            f"read again from the disk, {text}, more than rounding does (largest logit"
            f" {largest:.3g}): nothing was kept",
            "use --dtype fp32; if that fails too, report this as a bug",
        )
    return f"read again: all tensors are as written;\n  {text}, of {largest:.3g}"


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
