"""Toys for the tests: a tiny Qwen2 checkpoint in the Hub's own layout, and a small task to learn.

Weights are random; names, shapes, files and tokenizer format are the published ones', and so are
the large key biases, so that an attention that drops them shows.
"""

import functools
import json
import random
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from torch import Tensor

from data.chat import WORDS
from files import JsonLines

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # the tokenizer's last ids, as in Qwen2
TOKENS = 300  # entries of the tokenizer, the special ones included
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
    """Write config, weights and tokenizer into `folder`, which is made; returns it.

    `std` is that of the matrices: 0.02 as published, more for a text that is less monotone.
    `lm_head_beside_tied` writes the superfluous `lm_head.weight` that some exporters leave in.
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
    if new_config:  # as transformers 5 spells it
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
    """A tied checkpoint's tensors by name, fp32."""
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
    """One `model.safetensors`, or `shards` of them with their index."""
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
    """`tokenizer.json` and a `tokenizer_config.json` with Qwen2's chat template."""
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
    """A byte-level BPE in Qwen2's pipeline, as the text of `tokenizer.json`."""
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
    """`train.jsonl` and `test.jsonl` of sums of two numbers from 0 to `largest`, no question twice.

    Answers have GSM8K's form: the step with its calculator note, then `#### ` and the number.
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


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def change_json(path: Path, **changes: object) -> None:
    """Set keys of a JSON object in a file; a key set to None is null there."""
    write_json(path, json.loads(path.read_text()) | changes)


def read_log(path: Path) -> list[dict]:
    """The objects of a JSON Lines file, all of whose lines are whole."""
    return [line.value for line in JsonLines.read(path)]
