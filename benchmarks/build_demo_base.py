"""Build the base model of `--demo`: a Qwen2 with a million parameters, trained from scratch.

    python benchmarks/build_demo_base.py --out model/demo

The demo shows that a small adapter can teach a model a format, so the base has to know everything
else. It is trained on generated text: the stories of `data/demo.py` with their calculations, as
plain text in two styles; calculations alone; words and numbers repeated; and conversations in which
the assistant repeats what the user says. It never sees a story solved in a conversation, a
calculation inside `<<...>>`, or an answer after `####`. It does see these symbols, as quotation
marks and headings, because an adapter does not change the embedding table, where the row of an
unseen token would stay untrained. No story has the numbers of one of the demo's problems.

The curriculum proceeds from repetition to calculations to stories. Weights are fp32, products
bf16; Muon trains the matrices and AdamW the rest. It takes about 17 minutes on two cores. The same
machine with the same number of threads gives the same bytes. Elsewhere rounding differs: compare
the measurements in `build.json`.
"""

import json
import math
import random
import re
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from data import demo
from data.chat import END, START, WORDS, ChatFormat
from data.rows import Message
from errors import run_script
from model.generate import Decoding, generate
from model.load import load_model
from model.loss import linear_cross_entropy
from model.qwen2 import Qwen2, Qwen2Config
from progress_bar import progress_bar
from run.options import option, parse

ENDOFTEXT = "<|endoftext|>"
SPECIAL = (ENDOFTEXT, START, END)
SYSTEM = "You are a helpful assistant."
TEMPLATE = (  # Qwen2's, with its default system prompt
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\n" + SYSTEM + "<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SIZES = {
    "hidden_size": 128, "intermediate_size": 336, "num_hidden_layers": 5, "num_attention_heads": 4,
    "num_key_value_heads": 2, "rope_theta": 1e4, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
}  # fmt: skip
# (end as a fraction of the steps, weight of each kind of document until then)
CURRICULUM = (
    (0.08, {"repeated": 50, "chat": 20, "sums": 30, "worked": 0}),
    (0.30, {"repeated": 10, "chat": 15, "sums": 55, "worked": 20}),
    (1.00, {"repeated": 5, "chat": 15, "sums": 30, "worked": 50}),
)


@dataclass(frozen=True)
class BuildConfig:
    out: str = option("model/demo", "folder to write")
    steps: int = option(5000, "optimizer steps; two idle cores do five per second", least=1)
    rows: int = option(16, "sequences per step", least=1)
    length: int = option(192, "tokens per sequence; the demo's problems are shorter", least=2)
    learning_rate: float = option(5e-3, "peak, after 100 steps of warm-up", above=0)
    cooling: float = option(0.4, "fraction of steps in which the learning rate falls", above=0)
    measured: int = option(500, "stories, calculations and texts to measure the result on", least=1)
    seed: int = option(1, "of the texts and the initial values", least=1)


def main(argv: list[str] | None = None) -> None:
    """Write tokenizer, weights and measurements to a folder in the Hub's layout."""
    config = parse(BuildConfig, argv, "Build the base model of the demo.")
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    ids = write_tokenizer(out, Texts(config.seed))
    write_configs(out, ids)
    chat = ChatFormat.from_folder(out)

    started = time.perf_counter()
    model = Qwen2(Qwen2Config(**SIZES, vocab_size=chat.vocab_size))
    initialize(model, config.seed)
    losses = train(config, model, chat, ids[ENDOFTEXT])
    tensors = {name: p.detach().to(torch.bfloat16) for name, p in model.named_parameters()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)  # safetensors makes it 0600

    found = {
        "options": {k: v for k, v in asdict(config).items() if k != "out"},
        "parameters": sum(t.numel() for t in tensors.values()),
        "tokens_read": config.steps * config.rows * config.length,
        "minutes": round((time.perf_counter() - started) / 60, 1),
        "loss": round(sum(losses[-100:]) / len(losses[-100:]), 4),
        "correct": measure(load_model(out, dtype=torch.float32), chat, ids, config.measured),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    (out / "build.json").write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


def train(config: BuildConfig, model: Qwen2, chat: ChatFormat, eos: int) -> list[float]:
    """Next-token prediction on concatenated documents; returns each step's loss, nats per token."""
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.dim() == 1 or "embed" in n]
    optimizers = [
        torch.optim.Muon(matrices, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, weight_decay=0.0, betas=(0.9, 0.98), fused=True),
    ]
    B, L = config.rows, config.length
    positions = torch.arange(L).repeat(B)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """All sequences have the same length, so one batched call suffices."""
        q, k, v = (x.view(B, L, -1, x.shape[-1]).transpose(1, 2) for x in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return y.transpose(1, 2).reshape(B * L, -1, y.shape[-1])

    losses: list[float] = []
    texts = Texts(config.seed)
    buffer: list[int] = []  # tokens of documents not used yet
    bar = progress_bar(range(config.steps), desc="read", unit="step")
    for step in bar:
        done = step / config.steps
        while len(buffer) < B * L + 1:
            buffer += document(texts, chat, done, eos)
        tokens, buffer = torch.tensor(buffer[: B * L + 1]), buffer[B * L :]
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model(tokens[:-1], positions, [L] * B, cache=attend)  # (T, C)
            nats, _ = linear_cross_entropy(hidden, model.head_weight, tokens[1:])
        (nats / (B * L)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        learning_rate = config.learning_rate * min(1, (step + 1) / 100, (1 - done) / config.cooling)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            optimizer.step()
            optimizer.zero_grad()
        losses.append(nats.item() / (B * L))
        bar.set_postfix_str(f"{losses[-1]:.3f} nats per token", refresh=False)
    return losses


def initialize(model: Qwen2, seed: int) -> None:
    """Scale matrices so that each layer preserves the variance of its input; biases 0, norms 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.dim() == 2:
            std = 0.05 if "embed" in name else p.shape[1] ** -0.5
            if name.endswith(("o_proj.weight", "down_proj.weight")):  # added to the residual stream
                std /= math.sqrt(2 * model.config.num_hidden_layers)
            nn.init.normal_(p, std=std, generator=generator)
        elif name.endswith("bias"):
            nn.init.zeros_(p)


def document(texts: "Texts", chat: ChatFormat, done: float, eos: int) -> list[int]:
    """Token ids of a document and an end token; `done` is the fraction of training completed."""
    weights = next(weights for end, weights in CURRICULUM if done < end)
    (kind,) = texts.rng.choices(list(weights), list(weights.values()))
    text = getattr(texts, kind)()
    if kind != "chat":
        return [*chat.plain(text), eos]
    return [*chat.encode((Message("user", text), Message("assistant", text))).tokens, eos]


class Texts:
    """Random training texts; no story has the numbers of one of the demo's problems."""

    def __init__(self, seed: int):
        self.rng = random.Random(seed)
        self.words = [*demo.NAMES, *demo.THINGS, *demo.FRUITS, *demo.DAYS]
        problems = demo.stories(demo.SEED)
        self.taken = {next(problems).key for _ in range(demo.TRAIN + demo.TEST)}

    def story(self) -> demo.Story:
        kind = self.rng.choice(list(demo.KINDS.values()))
        return next(s for s in iter(lambda: kind(self.rng), None) if s.key not in self.taken)

    def worked(self) -> str:
        """A story and its solution, in one of two formats, neither of them the demo's."""
        story = self.story()
        if self.rng.random() < 0.5:
            steps = ", ".join(f"{s.expression}={s.result}" for s in story.steps)
            return f"{story.question}\n{steps}.\nSo {story.answer}."
        lines = "\n".join(f"{s.before} {s.expression} = {s.result} {s.after}." for s in story.steps)
        return f"{story.question}\n{lines}"

    def sum(self) -> str:
        """A calculation from a random story."""
        step = self.rng.choice(self.story().steps)
        return f"{step.expression}={step.result}"

    def sums(self) -> str:
        separator = self.rng.choice(("\n", ", ", " "))
        return separator.join(self.sum() for _ in range(self.rng.randint(3, 8)))

    def words_and_numbers(self) -> str:
        """With the demo's symbols in other roles: #### as a heading, <<...>> as quotation marks."""
        rng = self.rng

        def one() -> str:
            text = rng.choice(self.words) if rng.random() < 0.6 else str(rng.randint(1, 300))
            return rng.choice((text, text, text, f"<<{text}>>"))

        heading = rng.choice(("", "", f"#### {one()}\n"))
        return heading + " ".join(one() for _ in range(rng.randint(2, 10))) + rng.choice((".", ""))

    def repeated(self) -> str:
        text = self.words_and_numbers()
        return f"{text}\n{text}"

    def chat(self) -> str:
        """What a user says, and the assistant repeats."""
        kind = self.rng.choice((self.words_and_numbers, self.sum, lambda: self.story().question))
        return kind()


def write_tokenizer(out: Path, texts: Texts) -> dict[str, int]:
    """Train a byte-level BPE that knows each word of the demo; returns the special tokens' ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(WORDS), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=1000,  # more than the corpus has merges for
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    stories = [texts.story() for _ in range(4000)]
    corpus = [f"{s.question}\n{s.solution()}" for s in stories]
    corpus += [texts.words_and_numbers() for _ in range(2000)]
    corpus += ["system\n", "user\n", "assistant\n", SYSTEM] * 500
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(out / "tokenizer.json"), pretty=False)
    return {token: tokenizer.token_to_id(token) for token in SPECIAL}


def write_configs(out: Path, ids: dict[str, int]) -> None:
    """The JSON files that transformers saves with a Qwen2."""
    vocab_size = Tokenizer.from_file(str(out / "tokenizer.json")).get_vocab_size()
    files = {
        "config.json": SIZES | {
            "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu",
            "bos_token_id": ids[ENDOFTEXT], "eos_token_id": ids[END], "vocab_size": vocab_size,
            "max_position_embeddings": 2048, "torch_dtype": "bfloat16", "use_sliding_window": False,
        },
        "generation_config.json": {
            "eos_token_id": [ids[END], ids[ENDOFTEXT]], "pad_token_id": ids[ENDOFTEXT],
        },
        "tokenizer_config.json": {
            "tokenizer_class": "Qwen2Tokenizer", "chat_template": TEMPLATE, "eos_token": END,
            "pad_token": ENDOFTEXT, "additional_special_tokens": [START, END],
        },
    }  # fmt: skip
    for name, values in files.items():
        (out / name).write_text(json.dumps(values, indent=2) + "\n")


def measure(model: Qwen2, chat: ChatFormat, ids: dict[str, int], count: int) -> dict[str, float]:
    """Accuracy on new texts in the formats that the base was trained on."""
    texts = Texts(10**6)
    eos_ids = (ids[ENDOFTEXT], ids[END])

    def complete(prompts: list[list[int]], max_new_tokens: int) -> list[str]:
        answers = []
        for start in progress_bar(range(0, len(prompts), 50), desc="measure", leave=False):
            batch = prompts[start : start + 50]
            found = generate(model, batch, Decoding(max_new_tokens, eos_ids, chat.vocab_size))
            answers += [chat.decode(answer.tokens) for answer in found]
        return answers

    stories = [texts.story() for _ in range(count)]
    solutions = complete([chat.plain(s.question + "\n") for s in stories], 120)
    sums = [texts.sum() for _ in range(count)]
    # In training no calculation stands alone, so each prompt begins with another one.
    results = complete([chat.plain(f"{texts.sum()}\n{s.partition('=')[0]}=") for s in sums], 6)
    said = [texts.words_and_numbers() for _ in range(count)]
    repeated = complete([chat.prompt((Message("user", text),)) for text in said], 120)
    written = [
        step
        for text in solutions
        for step in re.findall(r"(\d+)([-+*/])([1-9]\d*) ?= ?(\d+)", text)
    ]
    correct = {
        "stories": sum(
            re.findall(r"\d+", t)[-1:] == [str(s.answer)] for s, t in zip(stories, solutions)
        ),
        "sums": sum(t.split()[:1] == [s.partition("=")[2]] for s, t in zip(sums, results)),
        "repeated": sum(a == b for a, b in zip(said, repeated)),
    }
    exact = sum(str(demo.OPERATORS[op](int(a), int(b))) == c for a, op, b, c in written)
    accuracy = {name: n / count for name, n in correct.items()}
    return accuracy | {"sums inside stories": exact / max(1, len(written))}


if __name__ == "__main__":
    sys.exit(run_script(main))
