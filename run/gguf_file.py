"""One GGUF file of a Qwen2 or Qwen3 checkpoint, for llama.cpp and Ollama, as its converter
writes it.

Matrices have the dtype of the checkpoint; norms and biases are fp32. `tokenizer.ggml.pre` qwen2
stands for Qwen2's pipeline, which `read_tokenizer` has checked. Rows of the embedding that have no
token are named `[PAD...]`.
Source: llama.cpp's convert_hf_to_gguf.py; the names of tensors and fields are from the package
`gguf`, which is imported only when it is used.
"""

import json
from pathlib import Path
from types import ModuleType

import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import Tensor

from errors import BadOption
from model.checkpoint import read_config, read_eos_ids
from model.qwen2 import Qwen2, Qwen2Config
from model.tensor_files import tensor_files
from run.best import TEMPLATE


def gguf_package() -> ModuleType:
    """The package `gguf`; BadOption if it is not installed."""
    try:
        import gguf
    except ImportError:
        raise BadOption("--gguf needs the package gguf", "pip install gguf") from None
    return gguf


def write_gguf(folder: Path, path: Path) -> None:
    """Convert the checkpoint in `folder` to the GGUF file `path`."""
    gguf = gguf_package()
    config = read_config(folder)
    raw = json.loads((folder / "config.json").read_text("utf-8"))
    writer = gguf.GGUFWriter(path, "qwen3" if config.is_qwen3 else "qwen2")
    writer.add_type("model")
    writer.add_name(path.stem)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(raw.get("max_position_embeddings", 32768))
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    if config.is_qwen3:
        writer.add_key_length(config.head_size)
        writer.add_value_length(config.head_size)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    dtype = raw.get("dtype", raw.get("torch_dtype"))
    kinds = {"float32": "ALL_F32", "float16": "MOSTLY_F16", "bfloat16": "MOSTLY_BF16"}
    writer.add_file_type(gguf.LlamaFileType[kinds[dtype]])
    _add_tokenizer(gguf, writer, folder, config.vocab_size)
    names = _names(gguf, config)
    for file in sorted(set(tensor_files(folder).values())):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():
                _add_tensor(gguf, writer, names[name], tensors.get_tensor(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_gguf(path: Path, config: Qwen2Config, dtype: torch.dtype) -> Qwen2:
    """The network with the tensors of the GGUF file `path`, which must be complete, in `dtype`."""
    gguf = gguf_package()
    ours = {theirs: name for name, theirs in _names(gguf, config).items()}
    kinds = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    state = {}
    for tensor in gguf.GGUFReader(path).tensors:
        data = torch.from_numpy(tensor.data.copy()).view(kinds[tensor.tensor_type.name])
        state[ours[tensor.name]] = data.view(*map(int, reversed(tensor.shape))).to(dtype)
    with torch.device("meta"):
        model = Qwen2(config)
    model.load_state_dict(state, strict=True, assign=True)
    return model.requires_grad_(False).eval()


def _names(gguf: ModuleType, config: Qwen2Config) -> dict[str, str]:
    """Checkpoint's name -> GGUF's name of every tensor."""
    kind = gguf.MODEL_ARCH.QWEN3 if config.is_qwen3 else gguf.MODEL_ARCH.QWEN2
    table = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    with torch.device("meta"):
        names = Qwen2(config).state_dict()
    return {name: table.get_name(name, try_suffixes=(".weight", ".bias")) for name in names}


def _add_tensor(gguf: ModuleType, writer, name: str, tensor: Tensor) -> None:
    if tensor.dim() == 1:
        writer.add_tensor(name, tensor.float().numpy())
    elif tensor.dtype == torch.bfloat16:  # numpy has no bf16
        kind = gguf.GGMLQuantizationType.BF16
        writer.add_tensor(name, tensor.view(torch.uint8).numpy(), raw_dtype=kind)
    else:
        writer.add_tensor(name, tensor.numpy())


def _add_tokenizer(gguf: ModuleType, writer, folder: Path, vocab_size: int) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    added, kind = tokenizer.get_added_tokens_decoder(), gguf.TokenType
    tokens = [tokenizer.id_to_token(i) for i in range(vocab_size)]
    kinds = [kind.UNUSED if token is None else kind.NORMAL for token in tokens]
    for i, token in added.items():
        control = token.special or token.content.startswith("<|")  # as <|fim_prefix|> looks
        kinds[i] = kind.CONTROL if control else kind.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([f"[PAD{i}]" if t is None else t for i, t in enumerate(tokens)])
    writer.add_token_types(kinds)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_add_bos_token(False)
    end = tokenizer.token_to_id("<|im_end|>")
    writer.add_eos_token_id(read_eos_ids(folder)[0] if end is None else end)
    if (pad := tokenizer.token_to_id("<|endoftext|>")) is not None:
        writer.add_pad_token_id(pad)
    if (folder / TEMPLATE).exists():
        writer.add_chat_template((folder / TEMPLATE).read_text("utf-8"))
