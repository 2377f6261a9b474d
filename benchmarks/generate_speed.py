"""Greedy generation speed: ours against transformers' `generate()`, on the same prompts.

    python benchmarks/generate_speed.py --model FOLDER --data FOLDER --json speed.json

Each answer has a fixed length, since untrained weights do not end one: the length of the problem's
gold answer, or with `--lengths equal` the mean of those. `generate()` runs until the longest answer
of its batch is complete; ours replaces finished sequences by waiting prompts. Only the requested
tokens count. In each round ours runs first, then `generate()` with each of its batch sizes, in the
same process and with prompts sorted by length, so that `generate()` pads little. Its batches are
independent: with `--peer-problems` it answers some of them only, evenly spaced. Before timing, both
must give the same tokens in fp32. The floor is the time of the matrix products alone.
"""

import itertools
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import (
    UnequalWork,
    answer,
    is_installed,
    problem_prompts,
    ratio,
    shown,
    spread,
    timed,
    transformers_model,
    versions,
    write_result,
)
from errors import BadData, BadOption, run_script
from model.generate import Decoding, decode, most_likely, sample
from model.packed import PackedWeights
from model.qwen2 import Qwen2
from run.base import Base
from run.device import DTYPES, describe
from run.options import option, parse

PEER = "generate()"
PREFILL_TOKENS = 1024  # in a product, when a prompt's products are timed
CHECK_PROMPTS, CHECK_TOKENS = 4, 24  # of the equal-work check


@dataclass(frozen=True)
class GenerateConfig:
    model: str = option("Qwen/Qwen2-0.5B-Instruct", "folder or Hub id of the base model")
    data: str = option("gsm8k", "a task, or a folder with test.jsonl")
    problems: int = option(256, "number of test problems to answer", least=1)
    lengths: str = option("gold", "lengths of the answers: the gold answers', or their mean",
                          choices=("gold", "equal"))  # fmt: skip
    batch_size: int = option(128, "sequences that ours decodes in parallel", least=1)
    rounds: int = option(2, "how often each is timed", least=1)
    device: str = option("auto", "device to run on", choices=("auto", "cuda", "cpu"))
    precision: str = option("auto", "dtype of the weights", choices=("auto", "bf16", "fp32"))
    choosing: bool = option(False, "measure only what choosing the tokens of a step costs")
    json: str | None = option(None, "file to write the result to")

    peer: bool = option(True, "measure transformers too")
    peer_batch_sizes: tuple[str, ...] = option(("64",), "one or more batch sizes of generate()")
    peer_problems: int | None = option(
        None, "roughly how many problems generate() answers (default: all)", least=1
    )


@dataclass(frozen=True)
class Job:
    """Prompts, longest first, and the number of tokens to answer each with."""

    base: Base
    prompts: list[list[int]]
    lengths: list[int]

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.base.precision]

    def shortened(self, prompts: int, tokens: int) -> "Job":
        """The last `prompts` prompts, each answered with `tokens` tokens."""
        last = self.prompts[-prompts:]
        return replace(self, prompts=last, lengths=[tokens] * len(last))


def main(argv: list[str] | None = None) -> None:
    """Load, check that both give the same tokens, time both in turns, and report."""
    config = parse(GenerateConfig, argv, "Our generation against transformers' generate().")
    sizes = [int(size) for size in config.peer_batch_sizes if size.isdigit() and int(size)]
    if len(sizes) < len(config.peer_batch_sizes):
        raise BadOption("--peer-batch-sizes must be integers above 0", "--peer-batch-sizes 8,32")
    base = Base.find(config.model, precision=config.precision, device=config.device)
    job = prepare_job(config, base)
    print(f"{describe(base.device)}, {base.precision}; {len(job.prompts)} problems,"
          f" {sum(map(len, job.prompts)):,} prompt tokens, {sum(job.lengths):,} new tokens,"
          f" at most {max(job.lengths)} per answer")  # fmt: skip
    if config.choosing:
        result = choosing(base.load(), job, config.batch_size)
        return write_result(config, result, base)
    has_peer = config.peer and is_installed(PEER, ("transformers",))
    if has_peer:
        check_equal_work(job)

    ours = base.load()
    runs: dict[str, Callable[[], Any]] = {"ours": lambda: our_answer(ours, job, config.batch_size)}
    if has_peer:
        peer = load_peer(job)
        for size in sizes:
            runs[f"{PEER}, batch size {size}"] = lambda n=size: peer_answer(
                peer, job, n, config.peer_problems
            )
    floor = Floor(ours, job, min(config.batch_size, len(job.prompts)))
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    speeds: dict[str, list[float]] = {name: [] for name in runs}  # tokens per second
    our_answer(ours, job.shortened(4, 4))  # warm-up: kernels are tried and chosen once
    for _ in range(config.rounds):
        for name, run in runs.items():
            taken, answers = timed(run, base.device)
            seconds[name].append(taken)
            speeds[name].append(sum(map(len, answers)) / taken)
        floor.measure()
    result = summary(job, seconds, speeds, floor)
    print(table(result))
    write_result(config, result | {"peer": versions(("transformers",))}, base)


def prepare_job(config: GenerateConfig, base: Base) -> Job:
    """The first test problems as chat prompts; BadData if there are too few."""
    prompts, lengths = problem_prompts(base, config.data, config.problems)
    if len(prompts) < config.problems:
        raise BadData(f"{config.data} has {len(prompts)} test problems", "lower --problems")
    if config.lengths == "equal":
        lengths = [round(sum(lengths) / len(lengths))] * len(lengths)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    return Job(base, [prompts[i] for i in order], [lengths[i] for i in order])


def our_answer(model: Qwen2, job: Job, batch_size: int = 128) -> list[list[int]]:
    return answer(model, job.prompts, job.lengths, job.base.chat.vocab_size, batch_size)


@torch.inference_mode()
def choosing(model: Qwen2, job: Job, batch_size: int) -> dict[str, Any]:
    """Time the choice of a step's tokens, and print it as a fraction of the whole step.

    The logits are those of the last tokens of the prompts, so their distributions are real ones if
    the weights are. The network's time is the median of the later steps of greedy decoding.
    """
    job = replace(job, prompts=job.prompts[-batch_size:])
    greedy = Decoding(CHECK_TOKENS, (), job.base.chat.vocab_size, batch_size)
    device, starts = job.base.device, [time.perf_counter()]
    for _ in decode(model, job.prompts, greedy):
        starts.append(time.perf_counter())
    steps = sorted(b - a for a, b in itertools.pairwise(starts[-CHECK_TOKENS // 2 :]))
    step = steps[len(steps) // 2]  # seconds

    tokens = torch.tensor(list(itertools.chain(*job.prompts))[-8 * batch_size :], device=device)
    positions = torch.arange(len(tokens), device=device)
    hidden = model(tokens, positions, [len(tokens)])[-batch_size:]  # (B, C)
    head = model.head_weight[: greedy.vocab_size]
    logits, draws = hidden @ head.t(), torch.rand(batch_size, device=device)  # (B, V), (B,)
    choices = {"greedy": lambda: most_likely(logits, hidden, head)}
    settings = {"temperature": {}, "top-k 20": {"top_k": 20}, "top-p 0.8": {"top_p": 0.8},
                "top-k 20, top-p 0.8": {"top_k": 20, "top_p": 0.8}}  # fmt: skip
    for name, options in settings.items():
        sampled = replace(greedy, temperature=0.7, **options)
        choices[name] = lambda s=sampled: sample(logits, s, draws)
    seconds = {
        name: min(timed(choose, device)[0] for _ in range(8)) for name, choose in choices.items()
    }
    network = step - seconds["greedy"]
    print(f"a step of {batch_size} sequences without the choice: {network * 1e3:.1f} ms")
    for name, taken in seconds.items():
        print(f"{name:<24}{taken * 1e3:8.1f} ms, {taken / (network + taken):6.1%} of the step")
    return {"network_ms": network * 1e3} | {f"{k}_ms": s * 1e3 for k, s in seconds.items()}


# transformers


def load_peer(job: Job) -> Any:
    from transformers import GenerationConfig, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    peer = transformers_model(job.base, attn_implementation="sdpa")
    peer.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)  # no end token
    return peer.to(job.base.device)


def peer_answer(
    peer: Any, job: Job, size: int, problems: int | None = None, **options: Any
) -> list[list[int]]:
    """The answers of `generate()`, in batches of `size` prompts, padded on the left.

    `problems` is roughly how many are answered, evenly spaced; None for all.
    """
    answers = []
    starts = range(0, len(job.prompts), size)
    count = min(len(starts), max(1, (problems or len(job.prompts)) // size))
    for i in range(count):
        start = starts[(2 * i + 1) * len(starts) // (2 * count)]
        prompts, lengths = (x[start : start + size] for x in (job.prompts, job.lengths))
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        ids, mask = ids.to(job.base.device), mask.to(job.base.device)
        out = peer.generate(ids, attention_mask=mask, max_new_tokens=max(lengths), **options)
        found = [tokens[width : width + n].tolist() for tokens, n in zip(out, lengths)]
        assert [len(tokens) for tokens in found] == lengths
        answers += found
    return answers


def check_equal_work(job: Job) -> None:
    """Raise UnequalWork unless both produce the same tokens in fp32."""
    small = replace(
        job.shortened(CHECK_PROMPTS, CHECK_TOKENS), base=replace(job.base, precision="fp32")
    )
    ours = our_answer(small.base.load(), small)
    unused_ids = list(range(job.base.chat.vocab_size, job.base.config.vocab_size))
    theirs = peer_answer(load_peer(small), small, CHECK_PROMPTS, suppress_tokens=unused_ids)
    if ours != theirs:
        raise UnequalWork("greedy tokens differ in fp32", "compare the tokens of the first answer")
    print(f"equal work: {CHECK_PROMPTS} answers of {CHECK_TOKENS} tokens are the same in fp32")


# What cannot be saved


class Floor:
    """Times of the matrix products alone, in a decoding step and in processing a prompt."""

    def __init__(self, model: Qwen2, job: Job, batch_size: int):
        self.model, self.job, self.batch_size = model, job, batch_size
        head_weight = model.head_weight[: job.base.chat.vocab_size]
        self.weights = PackedWeights(model, head_weight)
        self.linear = [m for m in model.model.modules() if isinstance(m, nn.Linear)]
        self.step: list[float] = []  # seconds of a step of `batch_size` sequences
        self.prompt: list[float] = []  # seconds per prompt token

    @torch.inference_mode()
    def measure(self) -> None:
        hidden = self._random(self.batch_size, self.model.config.hidden_size)
        with self.weights.active():
            layers = self._products(self.batch_size)
            self.step.append(layers + self._fastest(lambda: self.weights.logits(hidden)))
            self.prompt.append(self._products(PREFILL_TOKENS) / PREFILL_TOKENS)

    def _products(self, tokens: int) -> float:
        inputs = {n: self._random(tokens, n) for n in {m.in_features for m in self.linear}}
        return self._fastest(lambda: [m(inputs[m.in_features]) for m in self.linear])

    def _fastest(self, function: Callable[[], Any]) -> float:
        return min(timed(function, self.job.base.device)[0] for _ in range(4))

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.job.base.device).to(self.job.dtype)

    def seconds(self) -> list[float]:
        """Per round, the time of the whole job; the prompts' common beginning counts once."""
        first, last = min(self.job.prompts), max(self.job.prompts)
        shared = next((i for i, (a, b) in enumerate(zip(first, last)) if a != b), 0)
        prompt_tokens = sum(len(p) - shared for p in self.job.prompts) + shared
        steps = sum(self.job.lengths) / self.batch_size
        return [steps * s + prompt_tokens * p for s, p in zip(self.step, self.prompt)]


def summary(
    job: Job, seconds: dict[str, list[float]], speeds: dict[str, list[float]], floor: Floor
) -> dict[str, Any]:
    """The measurements as JSON values; the ratio is that to the peer's fastest batch size."""
    tokens, spreads = sum(job.lengths), {name: spread(values) for name, values in speeds.items()}
    peers = {name: speed["median"] for name, speed in spreads.items() if name != "ours"}
    fastest = max(peers, key=peers.__getitem__, default=None)
    return {
        "ratio": ratio(speeds["ours"], speeds[fastest]) if fastest else None,
        "fastest_peer": fastest,
        "tokens_per_second": spreads,
        "share_of_floor": spread([f / s for f, s in zip(floor.seconds(), seconds["ours"])]),
        "floor_tokens_per_second": spread([tokens / s for s in floor.seconds()]),
        "batch_size": floor.batch_size,
        "step_ms": spread([s * 1e3 for s in floor.step]),
        "prompt_token_ms": spread([s * 1e3 for s in floor.prompt]),
        "seconds": seconds,
        "new_tokens": tokens,
        "prompt_tokens": sum(map(len, job.prompts)),
    }


def table(result: dict[str, Any]) -> str:
    """The result in 80 columns, the ratio first."""
    first = f"{PEER}: not measured"
    if found := result["ratio"]:
        first = (f"{found['of_medians']:.2f} times the tokens/s of {result['fastest_peer']}"
                 f" (by round {found['min']:.2f} to {found['max']:.2f})")  # fmt: skip
    lines = ["", first, f"{len(result['seconds']['ours'])} rounds; loading excluded", ""]
    lines.append(f"{'new tokens/s':<40}{'median':>10}{'slowest':>12}{'fastest':>12}")
    speeds = {**result["tokens_per_second"], "floor": result["floor_tokens_per_second"]}
    for name, speed in speeds.items():
        lines.append(
            f"{name:<40}{speed['median']:>10.1f}{speed['min']:>12.1f}{speed['max']:>12.1f}"
        )
    lines += [
        f"floor's time as a fraction of ours: {shown(result['share_of_floor'], '.1%')}",
        "",
        f"floor, matrix products alone: {result['step_ms']['median']:.1f} ms per step of"
        f" {result['batch_size']} sequences,"
        f" {result['prompt_token_ms']['median']:.2f} ms per prompt token",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_script(main))
