"""Toys for the tests: a tiny Qwen2 checkpoint in the Hub's layout, small data, a tiny training.

The weights are random. Tensor names, files and the tokenizer's format are those of the published
checkpoints, and the key biases are as large as theirs, so that an attention that drops them fails.
"""

import functools
import hashlib
import io
import json
import random
import socket
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from torch import Tensor

from data.chat import WORDS
from data.encode import IGNORE, Example
from files import JsonLines

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # the tokenizer's last ids, as in Qwen2
TOKENS = 300  # entries of the tokenizer, including the special ones
TABLE = 308  # rows of the embedding table: more than the tokenizer has, as in Qwen2
ENDOFTEXT, IM_START, IM_END = range(TOKENS - 3, TOKENS)
SYSTEM = "You are a helpful assistant."
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\n" + SYSTEM + "<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_checkpoint(
    folder: Path,
    *,
    tied: bool = True,
    shards: int = 1,
    new_config: bool = False,
    dtype: torch.dtype = torch.float32,
    hidden: int = 64,
    intermediate: int = 96,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    std: float = 0.02,
    seed: int = 0,
    lm_head_beside_tied: bool = False,
) -> Path:
    """Create `folder` with config, weights and tokenizer; returns it.

    `std` is the standard deviation of the matrices: 0.02 as published; larger values give less
    monotonous text. `lm_head_beside_tied` adds the redundant `lm_head.weight` that some exporters
    write.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = random_weights(hidden, intermediate, layers, heads, kv_heads, std=std, seed=seed)
    if not tied:
        generator = torch.Generator().manual_seed(seed + 1)
        tensors["lm_head.weight"] = normal(generator, TABLE, hidden, std=std)
    if lm_head_beside_tied:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    write_tensors(folder, {name: t.to(dtype) for name, t in tensors.items()}, shards)

    dtype_name = str(dtype).removeprefix("torch.")
    config = {
        "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": ENDOFTEXT,
        "eos_token_id": IM_END, "hidden_act": "silu", "hidden_size": hidden,
        "initializer_range": 0.02, "intermediate_size": intermediate,
        "max_position_embeddings": 32768, "max_window_layers": layers, "model_type": "qwen2",
        "num_attention_heads": heads, "num_hidden_layers": layers, "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-6, "tie_word_embeddings": tied, "use_cache": True,
        "use_sliding_window": False, "vocab_size": TABLE,
    }  # fmt: skip
    if new_config:  # with the keys of transformers 5
        rope = {"rope_theta": 1000000.0, "rope_type": "default"}
        config |= {"dtype": dtype_name, "rope_parameters": rope, "sliding_window": None,
                   "layer_types": ["full_attention"] * layers,
                   "transformers_version": "5.23.0"}  # fmt: skip
    else:
        config |= {"torch_dtype": dtype_name, "rope_theta": 1000000.0, "sliding_window": 32768,
                   "transformers_version": "4.41.2"}  # fmt: skip
    generation = {
        "bos_token_id": ENDOFTEXT, "pad_token_id": ENDOFTEXT, "eos_token_id": [IM_END, ENDOFTEXT],
        "do_sample": True, "repetition_penalty": 1.1, "temperature": 0.7, "top_p": 0.8, "top_k": 20,
        "transformers_version": "4.41.2",
    }  # fmt: skip
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", generation)
    write_tokenizer(folder)
    return folder


def random_weights(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, *, std: float, seed: int
) -> dict[str, Tensor]:
    """The fp32 tensors of a tied checkpoint, by name."""
    generator = torch.Generator().manual_seed(seed)
    kv = hidden // heads * kv_heads
    matrix = functools.partial(normal, generator, std=std)
    norm = functools.partial(normal, generator, hidden, std=0.1, mean=1.0)
    tensors = {"model.embed_tokens.weight": matrix(TABLE, hidden), "model.norm.weight": norm()}
    for i in range(layers):
        layer = {
            "input_layernorm.weight": norm(),
            "self_attn.q_proj.weight": matrix(hidden, hidden),
            "self_attn.q_proj.bias": normal(generator, hidden, std=0.5),
            "self_attn.k_proj.weight": matrix(kv, hidden),
            "self_attn.k_proj.bias": normal(generator, kv, std=8.0),
            "self_attn.v_proj.weight": matrix(kv, hidden),
            "self_attn.v_proj.bias": normal(generator, kv, std=0.1),
            "self_attn.o_proj.weight": matrix(hidden, hidden),
            "post_attention_layernorm.weight": norm(),
            "mlp.gate_proj.weight": matrix(intermediate, hidden),
            "mlp.up_proj.weight": matrix(intermediate, hidden),
            "mlp.down_proj.weight": matrix(hidden, intermediate),
        }
        tensors |= {f"model.layers.{i}.{name}": tensor for name, tensor in layer.items()}
    return tensors


def normal(generator: torch.Generator, *shape: int, std: float, mean: float = 0.0) -> Tensor:
    return torch.empty(*shape).normal_(mean, std, generator=generator)


def write_tensors(folder: Path, tensors: dict[str, Tensor], shards: int = 1) -> None:
    """Write one `model.safetensors`, or `shards` files and their index."""
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {
        name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors"
        for i, name in enumerate(sorted(tensors))
    }
    for shard in set(weight_map.values()):
        part = {name: tensors[name] for name in tensors if weight_map[name] == shard}
        save_file(part, folder / shard, metadata={"format": "pt"})
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)


def write_tokenizer(folder: Path) -> None:
    """Write `tokenizer.json`, and a `tokenizer_config.json` with Qwen2's chat template."""
    (folder / "tokenizer.json").write_text(trained_tokenizer())
    plain = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    added = {
        str(id): {"content": token, "special": True} | plain
        for id, token in zip((ENDOFTEXT, IM_START, IM_END), SPECIAL, strict=True)
    }
    config = {
        "add_prefix_space": False, "added_tokens_decoder": added, "bos_token": None,
        "unk_token": None,
        "additional_special_tokens": list(SPECIAL[1:]), "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False, "eos_token": SPECIAL[2], "errors": "replace",
        "model_max_length": 32768, "pad_token": SPECIAL[0], "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
    }  # fmt: skip
    write_json(folder / "tokenizer_config.json", config)


@functools.cache
def trained_tokenizer() -> str:
    """A byte-level BPE tokenizer with Qwen2's pipeline, as the text of `tokenizer.json`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(WORDS), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=TOKENS - len(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    roles = ["system\n", "user\n", "assistant\n"]
    text = [*roles, "What is ", "the answer of these questions?", SYSTEM]
    tokenizer.train_from_iterator(text * 3, trainer)
    tokenizer.add_special_tokens(list(SPECIAL))
    assert tokenizer.get_vocab_size() == TOKENS, tokenizer.get_vocab_size()
    return tokenizer.to_str()


def write_arithmetic(
    folder: Path, *, rows: int = 100, test_rows: int = 20, largest: int = 19, seed: int = 0
) -> Path:
    """Write `train.jsonl` and `test.jsonl`: sums of two numbers from 0 to `largest`, each once.

    Answers are written like GSM8K's: the step with its calculator note, then `#### ` and the sum.
    """
    pairs = [(a, b) for a in range(largest + 1) for b in range(largest + 1)]
    assert rows + test_rows <= len(pairs), f"{rows} + {test_rows} rows of {len(pairs)} questions"
    random.Random(seed).shuffle(pairs)
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", pairs[:rows]), ("test", pairs[rows : rows + test_rows])):
        lines = [json.dumps(sum_problem(a, b)) for a, b in part]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def sum_problem(a: int, b: int) -> dict[str, str]:
    total = a + b
    answer = f"{a}+{b}=<<{a}+{b}={total}>>{total}\n#### {total}"
    return {"question": f"What is {a} + {b}?", "answer": answer}


# Files


def write_lines(path: Path, rows: list) -> Path:
    """Write rows as JSON Lines; a row of bytes is written unchanged. Returns `path`."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def parquet(rows: list[dict]) -> bytes:
    """The content of a parquet file with these rows."""
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def change_json(path: Path, **changes: object) -> None:
    """Set keys of the JSON object in a file; None becomes null."""
    write_json(path, json.loads(path.read_text()) | changes)


def read_log(path: Path) -> list[dict]:
    """The objects of a JSON Lines file without damaged lines."""
    return [line.value for line in JsonLines.read(path)]


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def free_port() -> int:
    """A port of the loopback interface on which nothing listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


# Examples


def example(row_id: int, length: int, supervised: int) -> Example:
    """An example of `length` tokens, of which the first `supervised` targets count."""
    targets = np.full(length, IGNORE)
    targets[:supervised] = 5
    return Example(row_id, np.arange(length), targets)


def some_examples(count: int, seed: int = 0) -> list[Example]:
    """Examples of random lengths; their row ids count from 100."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(2, 9, count)
    return [example(100 + i, n, rng.integers(1, n)) for i, n in enumerate(sizes)]


# A tiny training


def new_training(scaled: bool = True) -> tuple[torch.nn.Module, dict]:
    """A model of two layers, and what a checkpoint saves of its training: parameters, AdamW and
    GradScaler.
    """
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3))
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.1, weight_decay=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=3, enabled=scaled)
    return model, {"parameters": parameters, "optimizer": optimizer, "scaler": scaler}


def train_steps(model: torch.nn.Module, state: dict, steps: range) -> None:
    """Train `new_training`'s model on inputs that depend on the step."""
    for step in steps:
        x = torch.full((2, 5), 0.1 * step + 0.1)
        state["scaler"].scale(model(x).square().sum()).backward()
        state["scaler"].step(state["optimizer"])
        state["scaler"].update()
        state["optimizer"].zero_grad()
