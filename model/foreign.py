"""Base models that cannot be read as they are: how each is recognized, and its remedy.

Four tables map a sign to a cause and a remedy: the name that was given, the files of a folder or
Hub repository, the first bytes of a file, and the names of tensors. `config.json` has its own
checks at the end. Everything recognized here raises BadCheckpoint; `docs/formats.md` lists it.
"""

import fnmatch
import os
import re
from collections.abc import Iterable
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from errors import BadCheckpoint, listed
from files import read_json
from model.bitsandbytes import stored_kind

MOST_FILES = 10_000  # entries of a folder that are looked at
LONGEST_NAME = 300  # characters of a name that is matched with the patterns below

USE_QWEN2 = (
    "use a Qwen2, Qwen2.5 or dense Qwen3 checkpoint in the Hub's layout, e.g."
    " Qwen/Qwen2-0.5B-Instruct"
)
COPY_AGAIN = "download or copy it again"
# With transformers, which reads many forms; what it writes is read here.
RESAVE = (
    'convert it with transformers: python -c "from transformers import AutoModelForCausalLM as M,'
    " AutoTokenizer as T; M.from_pretrained('{place}', dtype='auto').save_pretrained('NEW');"
    " T.from_pretrained('{place}').save_pretrained('NEW')\", then give NEW"
)
RESAVE_TOKENIZER = (
    'write tokenizer.json with transformers: python -c "from transformers import AutoTokenizer;'
    " AutoTokenizer.from_pretrained('{place}').save_pretrained('NEW')\", then copy it from NEW"
)
UNQUANTIZED = (
    "give the checkpoint that it was quantized from with --model, in bf16, fp16 or fp32: its name"
    " has no -4bit, -GPTQ, -AWQ, -FP8 or the like, as Qwen/Qwen2-0.5B-Instruct"
)
ORIGINAL = "give the checkpoint that it was converted from: a folder or Hub id with safetensors"

# Names


NEITHER = "neither a folder nor a Hub id (owner/name)"
# A pattern that the whole name matches -> what the name is, remedy; {1} is the first group.
HUB = r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co|hf-mirror\.com)/"
ID = r"([\w.-]+/[\w.-]+?)"
NAMES = {
    HUB + r"(?:datasets|spaces)/.*": (
        "a URL, but not of a model",
        "give the Hub id of a base model",
    ),
    HUB + ID + r"(?:\.git)?/?(?:[?#].*)?": ("a URL", "give the Hub id: {1}"),
    HUB + ID + r"/(?:tree|blob|resolve|raw|commit)/main\b.*": ("a URL", "give the Hub id: {1}"),
    HUB + ID + r"/(?:tree|blob|resolve|raw|commit)/([^/?#]+).*": (
        "a URL",
        "give the Hub id and the revision: {1} --revision {2}",
    ),
    HUB + ID + r":.*": ("a name of one GGUF file", ORIGINAL),
    r"hf://(?:models/)?" + ID + r"/?": ("a URL", "give the Hub id: {1}"),
    r"git@[\w.-]+:" + ID + r"(?:\.git)?": ("an address for git", "give the Hub id: {1}"),
    r"file://(.*)": ("a URL", "give the path: {1}"),
    r"\w[\w+.-]*://.*": ("a URL", "download the checkpoint, and give its folder"),
    r"models--([\w.]+(?:-[\w.]+)*)--([\w.-]+)": ("a name in the Hub's cache", "give {1}/{2}"),
    ID + "/": ("a Hub id with a slash at its end", "give {1}"),
    ID + r"@([\w.-]+)": ("a Hub id and a revision", "give {1} --revision {2}"),
    r"[\w./-]+:[\w.-]+": ("a name in Ollama's form", "give the Hub id of the original checkpoint"),
}  # fmt: skip
PATTERNS = {re.compile(pattern, re.ASCII): known for pattern, known in NAMES.items()}


def refuse_name(name: str) -> None:
    """Raise BadCheckpoint if `name`, which is no folder, has the form of something recognized."""
    for pattern, (what, remedy) in PATTERNS.items():
        if len(name) <= LONGEST_NAME and (found := pattern.fullmatch(name)):
            raise BadCheckpoint(
                f"{name} is {what}, {NEITHER}", remedy.format(name, *found.groups())
            )
    path = Path(name).expanduser()
    if os.path.isfile(path):
        if path.name not in (*WEIGHTS, *TOKENIZER):  # which only their folder's files explain
            refuse_files(name, [path.name])
        raise BadCheckpoint(f"{name} is a file, {NEITHER}", f"give its folder: {path.parent}")


# Files


class Sign(NamedTuple):
    """Files that show what a folder is, if it has none of the files in `lacks`."""

    lacks: tuple[str, ...]
    holds: str  # patterns of paths within the folder; those without / are of files directly in it
    cause: str  # {place} is the folder or repository, {file} the file found, {inner} its folder
    remedy: str


CONFIG, TOKENIZER = ("config.json",), ("tokenizer.json",)
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
ADAPTER = "adapter_config.json"
GIVE_ADAPTER = (
    "give the base that it was trained on with --model, and {place}/{inner} itself with --adapter,"
    " or with --from-adapter in train.py"
)
NO_INDEX = "{place} has shards, such as {file}, but no model.safetensors.index.json"
NO_TOKENIZER = "{place} has no tokenizer.json, but {file}: "
PICKLED = "{place} has its weights in {file}, a pickle, which may run code when it is read"
FILES = (
    Sign(WEIGHTS, ADAPTER, "{place} is an adapter, not a base model: it holds {file}",
         GIVE_ADAPTER.replace("/{inner}", "")),
    Sign(WEIGHTS, "*.gguf", "{place} is in GGUF, a format for inference: {file}", ORIGINAL),
    Sign(WEIGHTS, "model-00001-of-00001.safetensors", NO_INDEX,
         "if it holds all the weights, rename it to model.safetensors"),
    Sign(WEIGHTS, "model-*-of-*.safetensors", NO_INDEX,
         "copy model.safetensors.index.json from where the shards are from"),
    Sign(WEIGHTS, "pytorch_model*.bin", PICKLED, RESAVE),
    Sign(WEIGHTS, "*.distcp */*.distcp", "{place} is a sharded checkpoint of FSDP: {file}",
         "merge its shards first: accelerate merge-weights {place}/{inner} NEW"),
    Sign(WEIGHTS, "zero_to_fp32.py *zero_pp_rank* */*zero_pp_rank*",
         "{place} is a training checkpoint of DeepSpeed: {file}",
         "merge its shards first: python zero_to_fp32.py . NEW --safe_serialization"),
    Sign(WEIGHTS, "*.npz", "{place} has its weights in {file}, an older form of MLX", ORIGINAL),
    Sign(WEIGHTS, "*.onnx */*.onnx *.h5 *.msgpack openvino_model.* *.engine *.tflite *.mnn",
         "{place} is an export for inference: its weights are in {file}", ORIGINAL),
    Sign(WEIGHTS, "*.pth *.pt *.bin *.ckpt", PICKLED, ORIGINAL),
    Sign(CONFIG, "models--*/*", "{place} is the Hub's cache of several repositories",
         "give one of them by its Hub id (owner/name), or its folder, such as {place}/{inner}"),
    Sign(CONFIG, "*/config.json",
         "{place} is not a checkpoint: it has no config.json, but {inner} in it has one",
         "give the folder inside: {place}/{inner}"),
    Sign(CONFIG, "*/" + ADAPTER, "{place} is not a base model, but holds the adapter {inner}",
         GIVE_ADAPTER),
    Sign(CONFIG, "model.safetensors model.safetensors.index.json tokenizer.json",
         "{place} holds {file}, but it has no config.json: a part of it is missing",
         "download or copy the whole checkpoint again, or give its Hub id"),
    Sign(WEIGHTS, "*/*.gguf", "{place} is in GGUF, a format for inference: {file}", ORIGINAL),
    Sign(WEIGHTS, "*.safetensors", "{place} holds {file}, but no model.safetensors",
         "if it holds all the weights, rename it to model.safetensors"),
    Sign(TOKENIZER, "vocab.json", NO_TOKENIZER + "only a slow tokenizer", RESAVE_TOKENIZER),
    Sign(TOKENIZER, "merges.txt", NO_TOKENIZER + "only a part of a slow tokenizer",
         "copy tokenizer.json from the checkpoint that this one was made from"),
    Sign(TOKENIZER, "*.tiktoken", NO_TOKENIZER + "the first Qwen's", USE_QWEN2),
    Sign(TOKENIZER, "tokenizer.model", NO_TOKENIZER + "another kind of model's", USE_QWEN2),
)  # fmt: skip


def refuse_files(place: str, names: Iterable[str]) -> None:
    """Raise BadCheckpoint if the files of a folder or Hub repository show what else it is."""
    names = sorted(names)
    for sign in FILES:
        found = [n for pattern in sign.holds.split() for n in _matching(names, pattern)]
        if found and not set(names) & set(sign.lacks):
            inner = found[0].rpartition("/")[0] or found[0]
            about = {"place": place, "file": found[0], "inner": inner}
            raise BadCheckpoint(sign.cause.format(**about), sign.remedy.format(**about))
    if ADAPTER in names:
        raise BadCheckpoint(
            f"{place} holds a base model and an adapter, so it is not clear which is meant",
            f"to use the base model alone, remove {ADAPTER} from a copy of it on this machine",
        )


def _matching(names: list[str], pattern: str) -> list[str]:
    depth = pattern.count("/")
    return [n for n in names if n.count("/") == depth and fnmatch.fnmatchcase(n, pattern)]


def refuse_folder(folder: Path) -> None:
    """`refuse_files` for a folder: its files and folders, and those directly in its folders."""
    gone = [path.name for path in folder.iterdir() if path.is_symlink() and not path.exists()]
    if gone:
        raise BadCheckpoint(
            f"{folder} holds links to files that are not there: {listed(sorted(gone), 3)}",
            "copy the folder with `cp -rL`, which follows links, or download it again",
        )
    entries = islice(chain(folder.glob("*"), folder.glob("*/*")), MOST_FILES)
    refuse_files(str(folder), [entry.relative_to(folder).as_posix() for entry in entries])


# First bytes

# Only for files that could not be read: a valid safetensors file may begin with any bytes.
STARTS = {
    b"version https://git-lfs": (
        "is a pointer of Git LFS, not the file itself",
        "run `git lfs install` and `git lfs pull` in {place}, or download with `hf download`",
    ),
    b"<": ("is a web page, not the file itself", "download it again, after `hf auth login`"),
    b"PK\x03\x04": ("is a pickle or an archive, under another name", RESAVE),
    b"\x80": ("is a pickle, under another name", RESAVE),
    b"GGUF": ("is in GGUF, under another name", ORIGINAL),
    b"\x1f\x8b": ("is compressed with gzip", "decompress it"),
}


def refuse_content(path: Path) -> None:
    """Raise BadCheckpoint if a file that could not be read is empty, or begins as another kind."""
    with path.open("rb") as file:
        start = file.read(32)
    if not start:
        raise BadCheckpoint(f"{path} is empty", COPY_AGAIN)
    for sign, (cause, remedy) in STARTS.items():
        if start.startswith(sign):
            raise BadCheckpoint(f"{path} {cause}", remedy.format(place=path.parent))


# Tensors

QUANTIZED_NAMES = re.compile(
    r"\.(qweight|qzeros|g_idx|scales|biases|absmax|nested_absmax|quant_map|nested_quant_map"
    r"|quant_state\..*|SCB|weight_format|weight_scale|weight_scale_inv|weight_scale_2|input_scale"
    r"|weight_packed|weight_shape|weight_zero_point|W_q|meta|qscales)$"
)
QUANTIZED_DTYPES = re.compile(r" is (U8|I8|I32|U32|F8_\w+|F4\w*|I16),")
TENSORS = (
    (QUANTIZED_NAMES, "its weights are quantized: " + UNQUANTIZED),
    (QUANTIZED_DTYPES, "its weights are quantized: " + UNQUANTIZED),
    (
        re.compile(r"lora_[AB]\b|lora_magnitude|\.base_layer\."),
        "it holds an adapter that is not merged: save it after PEFT's merge_and_unload()",
    ),
    (
        re.compile(r"^(module|_orig_mod|_fsdp_wrapped_module|base_model|_forward_module)\."),
        "it was saved with a wrapper around the model: unwrap the model, then save_pretrained",
    ),
    (
        re.compile(r"^(model\.)?(language_model|visual)\."),
        "it is a vision-language model: give a Qwen2, Qwen2.5 or dense Qwen3 text model",
    ),
    (
        re.compile(r"^[\w.]+\.(model\.(layers|embed_tokens|norm)|lm_head)\..* is not expected"),
        "it was saved as a part of another model: save that part with its save_pretrained",
    ),
    (
        re.compile(r"^(layers\.|embed_tokens\.|norm\.)"),
        "it was saved without its causal language model: save it with AutoModelForCausalLM",
    ),
    (
        re.compile(r"^(score|v_head|value_head|classifier|reward_head|regression_head)\b"),
        "it is a reward model or a classifier: give the language model that it was made from",
    ),
    (
        re.compile(r"^lm_head\.weight is missing"),
        "if its two embeddings are tied (3B and smaller, Qwen3 to 4B), set"
        ' "tie_word_embeddings": true in config.json; otherwise copy the missing weights too',
    ),
    (
        re.compile(r"^(model\.embed_tokens|lm_head)\.weight is \("),
        "its vocabulary was resized: give the config.json that was saved with these weights, or set"
        " vocab_size in it to the rows of the embedding",
    ),
    (re.compile(r"inv_freq is not expected"), RESAVE),
    (re.compile(r" is (F64|BOOL|I64)[, ]"), RESAVE.replace("'auto'", "'bfloat16'")),
    (re.compile(r" is missing"), "copy the whole checkpoint again, with all its files"),
)  # fmt: skip


def tensor_remedy(place: Path, problems: list[str]) -> str:
    """What helps with tensors that do not fit, each problem beginning with a tensor's name."""
    names = [problem.partition(" ")[0] for problem in problems]
    for pattern, remedy in TENSORS:
        if any(map(pattern.search, problems)) or any(map(pattern.search, names)):
            return remedy.replace("{place}", str(place))
    return "give the config.json that was saved with these weights"


# config.json


def read_object(
    path: Path, remedy: str = COPY_AGAIN, *, missing: str | None = None
) -> dict[str, Any]:
    """The object in a JSON file of a checkpoint; BadCheckpoint that says what else the file is."""
    try:
        return read_json(path, BadCheckpoint, remedy, missing=missing)
    except BadCheckpoint:
        if path.is_file():
            refuse_content(path)
        raise


def refuse_config(folder: Path, raw: dict[str, Any]) -> None:
    """Raise BadCheckpoint for another kind of model, a run of train.py, or quantized weights."""
    if isinstance(raw.get("options"), dict) and isinstance(raw.get("identity"), dict):
        raise BadCheckpoint(
            f"{folder} is a run of train.py, not a base model",
            f"give its adapter with --adapter {folder}/best, or merge it first: python -m"
            f" run.export --adapter {folder}/best --out merged, then --model merged",
        )
    kind, classes = raw.get("model_type"), raw.get("architectures")
    if kind is None:
        raise BadCheckpoint(
            f"{folder / 'config.json'} has no model_type",
            'if it is a Qwen2, add "model_type": "qwen2", or "qwen3"; otherwise ' + USE_QWEN2,
        )
    if kind not in ("qwen2", "qwen3"):
        named = f" ({classes[0]})" if isinstance(classes, list) and classes else ""
        raise BadCheckpoint(
            f"{folder} is a {kind}, not a qwen2 or qwen3: another architecture{named}", USE_QWEN2
        )
    if (method := quantization(raw)) and (not stored_kind(raw) or _is_plain(folder)):
        keys = " and ".join(key for key in QUANTIZATION_KEYS if raw.get(key))
        plain = f"its weights are not quantized: to use them as they are, take {keys} out of it"
        raise BadCheckpoint(
            f"{folder / 'config.json'} says that the weights are quantized ({method})",
            plain if _is_plain(folder) else UNQUANTIZED,
        )
    if raw.get("is_causal") is False:
        raise BadCheckpoint(
            f"{folder} is an encoder: its config.json sets is_causal to false", USE_QWEN2
        )


QUANTIZATION_KEYS = ("quantization", "quantization_config", "compression_config")


def quantization(raw: dict[str, Any]) -> str | None:
    """The method of quantization that `config.json` names; None without one."""
    if raw.get("quantization"):  # MLX writes quantization_config as well
        return "mlx"
    found = raw.get("quantization_config") or raw.get("compression_config")
    if not isinstance(found, dict):
        return "method not named" if found else None
    loaded = next((n for n in (4, 8) if found.get(f"load_in_{n}bit")), found.get("bits"))
    return f"{found.get('quant_method', 'method not named')}" + (
        f", {loaded} bits" if loaded else ""
    )


def _is_plain(folder: Path) -> bool:
    """Whether the weights have the names and dtypes of weights that are not quantized."""
    kinds = []
    try:
        for path in folder.glob("*.safetensors"):
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
                kinds += [(name, file.get_slice(name).get_dtype()) for name in names]
    except (OSError, SafetensorError):
        return False
    return bool(kinds) and all(
        name.endswith((".weight", ".bias")) and dtype in ("F32", "F16", "BF16")
        for name, dtype in kinds
    )
