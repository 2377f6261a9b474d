"""Build the base that `--demo` adapts: a Qwen2 of a million parameters, from nothing, on two cores.

    python benchmarks/build_demo_base.py --out model/demo

An adapter can only bring out what is there, and the demo is about bringing out. So the base reads
generated text in which all is there but the form: the stories of `data/demo.py` with their sums,
written as plain text in two ways; sums alone; words and numbers repeated; and as chat only this:
somebody says something, and the assistant says it again. It never reads a story that is answered
in a chat, a sum inside `<<...>>`, or an answer after `####`. These symbols it knows as quotation
marks and headings: the rows of the tied table that no text uses stay untrained, and no adapter
changes that table. No story has the numbers of one of the demo's own problems.

The curriculum goes from repeating to sums to stories. Weights are kept in fp32 and multiplied in
bf16; matrices are trained by Muon, the rest by AdamW. The same machine and number of threads
give the same bytes; others round elsewhere, and the figures in `build.json` are what to compare.
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
# Shares of each kind of document, up to which share of the steps.
CURRICULUM = (
    (0.08, {"repeated": 50, "chat": 20, "sums": 30, "worked": 0}),
    (0.30, {"repeated": 10, "chat": 15, "sums": 55, "worked": 20}),
    (1.00, {"repeated": 5, "chat": 15, "sums": 30, "worked": 50}),
)


@dataclass(frozen=True)
class BuildConfig:
    out: str = option("model/demo", "folder to write")
    steps: int = option(5000, "optimizer steps; five a second on two quiet cores", least=1)
    rows: int = option(16, "rows of a step", least=1)
    length: int = option(192, "tokens of a row: longer than any of the demo's problems", least=2)
    learning_rate: float = option(5e-3, "after 100 steps of warm-up", above=0)
    cooling: float = option(0.4, "last share of the steps, over which the rate falls", above=0)
    measured: int = option(500, "stories, sums and texts to measure the outcome on", least=1)
    seed: int = option(1, "of the texts and the first weights", least=1)


def main(argv: list[str] | None = None) -> None:
    """Tokenizer, weights, figures: into a folder in the Hub's layout."""
    config = parse(BuildConfig, argv, "Build the demo's base.")
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    ids = write_tokenizer(out, Texts(config.seed))
    write_configs(out, ids)
    chat = ChatFormat.from_folder(out)

    started = time.perf_counter()
    model = Qwen2(Qwen2Config(**SIZES, vocab_size=chat.vocab_size))
    initialise(model, config.seed)
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
        "right": measure(load_model(out, dtype=torch.float32), chat, ids, config.measured),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    (out / "build.json").write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


def train(config: BuildConfig, model: Qwen2, chat: ChatFormat, eos: int) -> list[float]:
    """Next-token prediction over rows of documents laid end to end; nats a token, a step each."""
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.dim() == 1 or "embed" in n]
    optimizers = [
        torch.optim.Muon(matrices, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, weight_decay=0.0, betas=(0.9, 0.98), fused=True),
    ]
    B, L = config.rows, config.length
    positions = torch.arange(L).repeat(B)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Rows are of one length, so one call takes them all."""
        q, k, v = (x.view(B, L, -1, x.shape[-1]).transpose(1, 2) for x in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return y.transpose(1, 2).reshape(B * L, -1, y.shape[-1])

    losses: list[float] = []
    texts = Texts(config.seed)
    left: list[int] = []
    bar = progress_bar(range(config.steps), desc="read", unit="step")
    for step in bar:
        done = step / config.steps
        while len(left) < B * L + 1:
            left += document(texts, chat, done, eos)
        tokens, left = torch.tensor(left[: B * L + 1]), left[B * L :]
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model(tokens[:-1], positions, [L] * B, cache=attend)  # (T, C)
            nats, _ = linear_cross_entropy(hidden, model.head_weight, tokens[1:])
        (nats / (B * L)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rate = config.learning_rate * min(1, (step + 1) / 100, (1 - done) / config.cooling)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
        losses.append(nats.item() / (B * L))
        bar.set_postfix_str(f"{losses[-1]:.3f} nats a token", refresh=False)
    return losses


def initialise(model: Qwen2, seed: int) -> None:
    """Matrices so that each layer keeps the size of what it is given; biases 0, norms 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.dim() == 2:
            std = 0.05 if "embed" in name else p.shape[1] ** -0.5
            if name.endswith(("o_proj.weight", "down_proj.weight")):  # what is added to the stream
                std /= math.sqrt(2 * model.config.num_hidden_layers)
            nn.init.normal_(p, std=std, generator=generator)
        elif name.endswith("bias"):
            nn.init.zeros_(p)


def document(texts: "Texts", chat: ChatFormat, done: float, eos: int) -> list[int]:
    """One document of the curriculum, as token ids with its end."""
    shares = next(shares for end, shares in CURRICULUM if done < end)
    (kind,) = texts.rng.choices(list(shares), list(shares.values()))
    text = getattr(texts, kind)()
    if kind != "chat":
        return [*chat.plain(text), eos]
    return [*chat.encode((Message("user", text), Message("assistant", text))).tokens, eos]


class Texts:
    """What the base reads; a story never has the numbers of one of the demo's problems."""

    def __init__(self, seed: int):
        self.rng = random.Random(seed)
        self.words = [*demo.NAMES, *demo.THINGS, *demo.FRUITS, *demo.DAYS]
        own = demo.stories(demo.SEED)
        self.taken = {next(own).key for _ in range(demo.TRAIN + demo.TEST)}

    def story(self) -> demo.Story:
        kind = self.rng.choice(list(demo.KINDS.values()))
        return next(s for s in iter(lambda: kind(self.rng), None) if s.key not in self.taken)

    def worked(self) -> str:
        """A story and its solution, in one of two ways, neither of them the demo's."""
        story = self.story()
        if self.rng.random() < 0.5:
            sums = ", ".join(f"{s.sum}={s.result}" for s in story.steps)
            return f"{story.question}\n{sums}.\nSo {story.answer}."
        lines = "\n".join(f"{s.before} {s.sum} = {s.result} {s.after}." for s in story.steps)
        return f"{story.question}\n{lines}"

    def sum(self) -> str:
        """One that some story needs."""
        step = self.rng.choice(self.story().steps)
        return f"{step.sum}={step.result}"

    def sums(self) -> str:
        mark = self.rng.choice(("\n", ", ", " "))
        return mark.join(self.sum() for _ in range(self.rng.randint(3, 8)))

    def words_and_numbers(self) -> str:
        """Some under a heading, some in quotation marks: the demo's symbols in other uses."""
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
        """What a user says, and the assistant then says again."""
        kind = self.rng.choice((self.words_and_numbers, self.sum, lambda: self.story().question))
        return kind()


def write_tokenizer(out: Path, texts: Texts) -> dict[str, int]:
    """A byte-level BPE in Qwen2's pipeline, with a token for each word of the demo; special ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(WORDS), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=1000,  # more than there is to merge
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    told = [texts.story() for _ in range(4000)]
    corpus = [f"{s.question}\n{s.solution()}" for s in told]
    corpus += [texts.words_and_numbers() for _ in range(2000)]
    corpus += ["system\n", "user\n", "assistant\n", SYSTEM] * 500
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(out / "tokenizer.json"), pretty=False)
    return {token: tokenizer.token_to_id(token) for token in SPECIAL}


def write_configs(out: Path, ids: dict[str, int]) -> None:
    """The JSON files that transformers writes beside a Qwen2."""
    vocabulary = Tokenizer.from_file(str(out / "tokenizer.json")).get_vocab_size()
    files = {
        "config.json": SIZES | {
            "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu",
            "bos_token_id": ids[ENDOFTEXT], "eos_token_id": ids[END], "vocab_size": vocabulary,
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
    """Shares of fresh texts that the base gets right in its own ways of writing them."""
    texts = Texts(10**6)
    eos_ids = (ids[ENDOFTEXT], ids[END])

    def completed(prompts: list[list[int]], most: int) -> list[str]:
        given = []
        for start in progress_bar(range(0, len(prompts), 50), desc="measure", leave=False):
            some = prompts[start : start + 50]
            found = generate(model, some, Decoding(most, eos_ids, chat.vocab_size))
            given += [chat.decode(answer.tokens) for answer in found]
        return given

    told = [texts.story() for _ in range(count)]
    solved = completed([chat.plain(s.question + "\n") for s in told], 120)
    sums = [texts.sum() for _ in range(count)]
    # Sums are read among others, so one more stands before each.
    summed = completed([chat.plain(f"{texts.sum()}\n{s.partition('=')[0]}=") for s in sums], 6)
    said = [texts.words_and_numbers() for _ in range(count)]
    again = completed([chat.prompt((Message("user", text),)) for text in said], 120)
    written = [
        step for text in solved for step in re.findall(r"(\d+)([-+*/])([1-9]\d*) ?= ?(\d+)", text)
    ]
    right = {
        "stories": sum(re.findall(r"\d+", t)[-1:] == [str(s.answer)] for s, t in zip(told, solved)),
        "sums": sum(t.split()[:1] == [s.partition("=")[2]] for s, t in zip(sums, summed)),
        "repeated": sum(a == b for a, b in zip(said, again)),
    }
    exact = sum(str(demo.OPERATORS[op](int(a), int(b))) == c for a, op, b, c in written)
    shares = {name: n / count for name, n in right.items()}
    return shares | {"sums inside stories": exact / max(1, len(written))}


if __name__ == "__main__":
    sys.exit(run_script(main))
