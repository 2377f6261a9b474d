"""Greedy decoding: ours against transformers' `generate()`, on the same prompts, for equal lengths.

    python benchmarks/generate_speed.py --model FOLDER --data FOLDER --json speed.json

Untrained weights do not end an answer, so each answer's length is given: that of the problem's gold
answer, or the mean of these for all (`--lengths equal`). `generate()` must go on until the longest
answer of its batch is there; ours lets a row go and takes in the next. Only the given tokens count.
The contestants take turns in one process, ours, then the peer with each batch size; all get the
prompts sorted by length, so that the peer pads little. Its batches do not depend on one another:
with `--peer-problems` it answers only some, spread evenly. Before it, both must give the same
tokens in fp32. The floor is the time of the matrix products alone, at the rows ours has at once.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import spread, versions, write_result
from data.chat import ChatFormat
from data.tasks import load_source
from errors import BadData, BadOption, UserError, run_script
from evaluation.prompts import prompt_tokens
from model.checkpoint import find_checkpoint, read_config
from model.generate import generate
from model.load import load_model
from model.packed import PackedWeights
from model.qwen2 import Qwen2
from run.device import DTYPES, describe, pick_device, pick_precision, prepare_memory, synchronize
from run.options import option, parse, to_json

PEER = "generate()"
PREFILL_ROWS = 1024  # tokens at once, when a prompt's products are timed
CHECKED = 4, 24  # prompts and tokens of the equal-work check


@dataclass(frozen=True)
class SpeedConfig:
    model: str = option("Qwen/Qwen2-0.5B-Instruct", "folder or Hub id of the base")
    data: str = option("gsm8k", "a task, or a folder with test.jsonl")
    problems: int = option(256, "test problems to answer", least=1)
    lengths: str = option("gold", "of the answers: the gold ones', or all the mean",
                          choices=("gold", "equal"))  # fmt: skip
    at_once: int = option(128, "answers that ours has in the making", least=1)
    rounds: int = option(2, "turns of each contestant", least=1)
    device: str = option("auto", "where to run", choices=("auto", "cuda", "cpu"))
    precision: str = option("auto", "of the weights", choices=("auto", "bf16", "fp32"))
    json: str | None = option(None, "file to write the result to")

    peer: bool = option(True, "measure transformers too")
    peer_batch_sizes: tuple[str, ...] = option(("64",), "answers that it makes together; some")
    peer_problems: int | None = option(
        None, "about how many problems it answers; default: all", least=1
    )
    peer_cache: str = option("dynamic", "its cache", choices=("dynamic", "static"))


@dataclass(frozen=True)
class Job:
    """Prompts, longest first, how many tokens each is to be answered with, and on what."""

    folder: Path
    prompts: list[list[int]]
    lengths: list[int]
    vocabulary: int
    device: torch.device
    dtype: torch.dtype


def main(argv: list[str] | None = None) -> None:
    """Load, check that both give the same tokens, take turns, report."""
    config = parse(SpeedConfig, argv, "Our decoding against transformers' generate().")
    sizes = [int(size) for size in config.peer_batch_sizes if size.isdigit() and int(size)]
    if len(sizes) < len(config.peer_batch_sizes):
        raise BadOption("--peer-batch-sizes must be numbers above 0", "--peer-batch-sizes 8,32")
    device = pick_device(config.device)
    prepare_memory(device)
    precision, _ = pick_precision(config.precision, device)
    job = prepare_job(config, device, DTYPES[precision])
    tokens, prompts = sum(job.lengths), sum(map(len, job.prompts))
    print(f"{describe(device)}, {precision}; {len(job.prompts)} problems,"
          f" {prompts:,} prompt tokens, {tokens:,} new ones,"
          f" at most {max(job.lengths)} each")  # fmt: skip
    has_peer = config.peer and peer_is_there()
    if has_peer:
        check_equal_work(job)

    ours = load_model(job.folder, dtype=job.dtype, device=device)
    turns: dict[str, Callable[[], Any]] = {"ours": lambda: answer(ours, job, config.at_once)}
    if has_peer:
        peer = load_peer(job)
        for size in sizes:
            turns[f"{PEER}, {size} at once"] = lambda n=size: peer_answers(peer, job, n, config)
    rows = min(config.at_once, len(job.prompts))
    floor = Floor(ours, job, rows)
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    rates: dict[str, list[float]] = {name: [] for name in turns}  # tokens/s
    answer(ours, shortened(job, 4, 4))  # what is done once: choosing kernels, trying them out
    for _ in range(config.rounds):
        for name, turn in turns.items():
            taken, given = timed(turn, device)
            seconds[name].append(taken)
            rates[name].append(sum(map(len, given)) / taken)
        floor.measure()
    result = summary(job, seconds, rates, floor)
    print(table(result))
    write_result(config.json, result | {"options": to_json(config), "device": describe(device),
                 "precision": precision, "peer": versions(("transformers",))})  # fmt: skip


def prepare_job(config: SpeedConfig, device: torch.device, dtype: torch.dtype) -> Job:
    """The first test problems in ChatML; BadData if there are too few."""
    folder = find_checkpoint(config.model).folder
    chat = ChatFormat.from_folder(folder, read_config(folder).vocab_size)
    problems = load_source(config.data).test[: config.problems]
    if len(problems) < config.problems:
        raise BadData(f"{config.data} has {len(problems)} test problems", "lower --problems")
    prompts = [prompt_tokens(problem, chat, "chat", []) for problem in problems]
    lengths = [sum(chat.encode(problem.messages).supervised_mask) for problem in problems]
    if config.lengths == "equal":
        lengths = [round(sum(lengths) / len(lengths))] * len(lengths)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    return Job(folder, [prompts[i] for i in order], [lengths[i] for i in order],
               chat.vocab_size, device, dtype)  # fmt: skip


def shortened(job: Job, prompts: int, tokens: int, dtype: torch.dtype | None = None) -> Job:
    """The last prompts only, answered with so many tokens each."""
    last = job.prompts[-prompts:]
    return Job(job.folder, last, [tokens] * len(last), job.vocabulary, job.device,
               dtype or job.dtype)  # fmt: skip


def timed(turn: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """(seconds, what it returns)."""
    synchronize(device)
    started = time.perf_counter()
    result = turn()
    synchronize(device)
    return time.perf_counter() - started, result


def answer(model: Qwen2, job: Job, at_once: int = 128) -> list[list[int]]:
    answers = generate(
        model, job.prompts, max_new_tokens=job.lengths, eos_ids=(), vocabulary=job.vocabulary,
        at_once=at_once,
    )  # fmt: skip
    assert [len(a.tokens) for a in answers] == job.lengths
    return [a.tokens for a in answers]


def peer_is_there() -> bool:
    try:
        import transformers
    except ImportError:
        print(f"{PEER}: not measured: transformers is missing (pip install transformers)")
        return False
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return True


def load_peer(job: Job) -> Any:
    from transformers import AutoModelForCausalLM, GenerationConfig

    peer = AutoModelForCausalLM.from_pretrained(
        job.folder, dtype=job.dtype, attn_implementation="sdpa", local_files_only=True
    )
    peer.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)  # no end token
    return peer.to(job.device).eval()


def peer_answers(
    peer: Any, job: Job, size: int, config: SpeedConfig | None = None, **options: Any
) -> list[list[int]]:
    """Batches of `size`, padded on the left, each until its longest answer is there."""
    answers = []
    if config is not None and config.peer_cache == "static":
        options["cache_implementation"] = "static"
    wanted = config and config.peer_problems or len(job.prompts)
    starts = range(0, len(job.prompts), size)
    count = min(len(starts), max(1, wanted // size))
    for i in range(count):
        start = starts[(2 * i + 1) * len(starts) // (2 * count)]
        prompts, lengths = (x[start : start + size] for x in (job.prompts, job.lengths))
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=job.device)
        real = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        out = peer.generate(
            ids, attention_mask=real.to(job.device), max_new_tokens=max(lengths), **options
        )
        found = [row[width : width + n].tolist() for row, n in zip(out, lengths)]
        assert [len(a) for a in found] == lengths
        answers += found
    return answers


class UnequalWork(UserError):
    """The contestants give other tokens, so their speeds mean nothing."""


def check_equal_work(job: Job) -> None:
    """Both must give the same tokens in fp32."""
    small = shortened(job, *CHECKED, dtype=torch.float32)
    ours = answer(load_model(job.folder, dtype=torch.float32, device=job.device), small)
    unused = list(range(job.vocabulary, read_config(job.folder).vocab_size))
    theirs = peer_answers(load_peer(small), small, CHECKED[0], suppress_tokens=unused)
    if ours != theirs:
        raise UnequalWork("the contestants' greedy tokens differ in fp32", "look at the first")
    print(f"equal work: {CHECKED[0]} answers of {CHECKED[1]} tokens are the same in fp32")


class Floor:
    """The matrix products alone: of a decoding step, and of a prompt's tokens."""

    def __init__(self, model: Qwen2, job: Job, rows: int):
        self.model, self.job, self.rows = model, job, rows
        self.weights = PackedWeights(model, model.head_weight[: job.vocabulary])
        self.linear = [m for m in model.model.modules() if isinstance(m, nn.Linear)]
        self.bytes = model.head_weight[: job.vocabulary].nbytes
        self.bytes += sum(m.weight.nbytes for m in self.linear)
        self.step: list[float] = []  # seconds of one token for all rows
        self.prompt: list[float] = []  # seconds a token
        self.bandwidth: list[float] = []  # bytes a second, read and written

    @torch.inference_mode()
    def measure(self) -> None:
        head = self._random(self.rows, self.model.config.hidden_size)
        with self.weights.used():
            layers = self._products(self.rows)
            self.step.append(layers + self._fastest(lambda: self.weights.logits(head)))
            self.prompt.append(self._products(PREFILL_ROWS) / PREFILL_ROWS)
        a = self._random(2**28 // self.job.dtype.itemsize)
        b = torch.empty_like(a)
        self.bandwidth.append(2 * a.nbytes / self._fastest(lambda: b.copy_(a)))

    def _products(self, rows: int) -> float:
        inputs = {n: self._random(rows, n) for n in {m.in_features for m in self.linear}}
        return self._fastest(lambda: [m(inputs[m.in_features]) for m in self.linear])

    def _fastest(self, turn: Callable[[], Any]) -> float:
        return min(timed(turn, self.job.device)[0] for _ in range(4))

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.job.device).to(self.job.dtype)

    def seconds(self) -> list[float]:
        """The least time of the whole job in each round; what all prompts share counts once."""
        first, last = min(self.job.prompts), max(self.job.prompts)
        shared = next((i for i, (a, b) in enumerate(zip(first, last)) if a != b), 0)
        prompt_tokens = sum(len(p) - shared for p in self.job.prompts) + shared
        each = zip(self.step, self.prompt)
        return [sum(self.job.lengths) * s / self.rows + prompt_tokens * p for s, p in each]


def summary(
    job: Job, seconds: dict[str, list[float]], rates: dict[str, list[float]], floor: Floor
) -> dict[str, Any]:
    """Figures for people and for JSON; the peer is its fastest batch size."""
    tokens, spreads = sum(job.lengths), {name: spread(values) for name, values in rates.items()}
    peers = {name: rate["median"] for name, rate in spreads.items() if name != "ours"}
    fastest = max(peers, key=peers.__getitem__, default=None)
    ratio = None
    if fastest:
        ratio = spread([a / b for a, b in zip(rates["ours"], rates[fastest])])
        ratio["of_medians"] = spreads["ours"]["median"] / peers[fastest]
    return {
        "ratio": ratio,
        "fastest_peer": fastest,
        "tokens_per_second": spreads,
        "share_of_floor": spread([f / s for f, s in zip(floor.seconds(), seconds["ours"])]),
        "floor_tokens_per_second": spread([tokens / s for s in floor.seconds()]),
        "rows": floor.rows,
        "step_ms": spread([s * 1e3 for s in floor.step]),
        "prompt_token_ms": spread([s * 1e3 for s in floor.prompt]),
        "bytes_of_a_step": floor.bytes,
        "bandwidth_gb_per_second": spread([b / 1e9 for b in floor.bandwidth]),
        "seconds": seconds,
        "new_tokens": tokens,
        "prompt_tokens": sum(map(len, job.prompts)),
    }


def table(result: dict[str, Any]) -> str:
    """80 columns, the ratio first."""
    first = f"{PEER}: not measured"
    if ratio := result["ratio"]:
        first = (f"{ratio['of_medians']:.2f} times the tokens/s of {result['fastest_peer']}"
                 f" (by round {ratio['min']:.2f} to {ratio['max']:.2f})")  # fmt: skip
    lines = ["", first, f"over {len(result['seconds']['ours'])} turns; loading excluded", ""]
    lines.append(f"{'new tokens/s':<40}{'median':>10}{'slowest':>12}{'fastest':>12}")
    rates = {**result["tokens_per_second"], "floor": result["floor_tokens_per_second"]}
    for name, rate in rates.items():
        lines.append(f"{name:<40}{rate['median']:>10.1f}{rate['min']:>12.1f}{rate['max']:>12.1f}")
    share, step, speed = (result[k] for k in ("share_of_floor", "step_ms",
                                              "bandwidth_gb_per_second"))  # fmt: skip
    size = result["bytes_of_a_step"] / 1e9
    lines += [
        f"share of the floor: {share['median']:.1%} ({share['min']:.1%} to {share['max']:.1%})",
        "",
        f"floor, the products alone: {step['median']:.1f} ms a step of {result['rows']} rows,"
        f" {result['prompt_token_ms']['median']:.2f} ms a prompt token",
        f"reading a step's weights, {size:.2f} GB at {speed['median']:.0f} GB/s:"
        f" {size / speed['median'] * 1e3:.1f} ms",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_script(main))
