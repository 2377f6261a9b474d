"""What the tuning is worth: base and tuned answer the same problems, by the same code.

    python evaluate.py --adapter out/qwen2-0.5b-instruct-gsm8k/best      # base against tuned
    python evaluate.py --model Qwen/Qwen2-0.5B-Instruct --limit 100      # one model by itself

The base is the tuned model with its adapters switched off, which is the base bit for bit. Answers are
generated, then scored; teacher-forced token accuracy is something else, and is not reported here.
Every answer is written down as it comes, so an evaluation that was stopped goes on where it was.
"""

import contextlib
import hashlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from data.batches import in_batches
from data.chat import ChatFormat
from data.rows import Problem, read_problems
from data.split import split_problems
from data.tasks import load_source
from errors import BadData, BadOption, run_script
from evaluation.generative import Completion, Scored, choose_scorers, score
from evaluation.statistics import in_words, paired, wilson_interval
from lora.inject import disabled
from lora.peft_format import CONFIG, WEIGHTS, read_adapter, read_adapter_config
from model.generate import Sampling, generate
from model.load import Checkpoint, find_checkpoint, load_model, read_eos_ids
from model.qwen2 import Qwen2
from run.checkpoint import write_json
from run.device import DTYPES, describe, pick_device, pick_precision, prepare_memory
from run.metrics import MetricsLog, read_metrics
from run.options import option, parse, table, to_json


@dataclass(frozen=True)
class EvalConfig:
    adapter: str | None = option(None, "adapter folder, such as out/.../best")
    model: str | None = option(None, "base (default: the one the adapter names)")
    revision: str | None = option(None, "branch, tag or commit of the base on the Hub")
    data: str | None = option(None, "as for train.py (default: what the adapter's run used)")
    data_revision: str | None = option(None, "branch, tag or commit of the data on the Hub")
    split: str = option(
        "test", "validation: the rows held out in training", choices=("test", "validation", "train")
    )
    out: str | None = option(None, "folder for the results (default: the adapter's run folder)")

    limit: int | None = option(None, "use only the first so many problems", least=1)
    batch_size: int = option(16, "problems answered together; does not change an answer", least=1)
    max_new_tokens: int = option(512, "longest answer; GSM8K's longest is 455", least=1)
    temperature: float = option(0.0, "0 is greedy", least=0)
    top_k: int = option(0, "sample among the k likeliest tokens only; 0: all", least=0)
    top_p: float = option(1.0, "sample among the likeliest tokens of this mass", above=0)
    seed: int = option(0, "of sampling", least=0)

    precision: str = option("auto", "of the base", choices=("auto", *DTYPES))
    device: str = option("auto", "where to run", choices=("auto", "cuda", "mps", "cpu"))


def main(argv: list[str] | None = None) -> None:
    """Find everything, answer with each contestant, score, compare."""
    config = parse(EvalConfig, argv, "Measure a base and its adapter on the same problems.")
    if config.adapter is None and config.model is None:
        raise BadOption("neither --adapter nor --model is given", "give at least one of them")
    device = pick_device(config.device)
    precision, why = pick_precision(config.precision, device)
    prepare_memory(device)
    checkpoint = base_checkpoint(config)
    chat = ChatFormat.from_folder(checkpoint.folder)
    eos_ids = read_eos_ids(checkpoint.folder)
    problems, data = find_problems(config)

    print(table({k: v for k, v in to_json(config).items() if v is not None}))
    print(f"base {checkpoint.name} at {checkpoint.commit or checkpoint.folder}")
    print(f"data {data}: {len(problems)} problems")
    print(f"device {describe(device)}; precision {precision}: {why}")
    settings = evaluation_settings(config, checkpoint, data, precision, problems)
    folder = results_folder(config, settings)
    model = load_model(checkpoint.folder, dtype=DTYPES[precision], device=device)
    contestants: dict[str, Callable] = {"base": contextlib.nullcontext}
    if config.adapter:
        read_adapter(Path(config.adapter), model)
        model.eval()
        contestants = {"base": lambda: disabled(model), "tuned": contextlib.nullcontext}

    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "settings.json", settings)
    results: dict[str, list[Scored]] = {}
    for name, context in contestants.items():
        with context():
            completions = answer_all(
                config, model, chat, problems, eos_ids=eos_ids, log=folder / f"{name}.jsonl", name=name
            )
        results[name] = [
            score(completions[p.id], p.answer, choose_scorers([p.answer for p in problems]))
            for p in problems
        ]
    print(report(results))
    write_json(folder / "result.json", {"settings": settings, **summary(results)})
    print(f"results in {folder}")


def base_checkpoint(config: EvalConfig) -> Checkpoint:
    """The base to load: what was asked for, or what the adapter says it was trained on."""
    if config.model:
        return find_checkpoint(config.model, config.revision)
    _, base, revision = read_adapter_config(Path(config.adapter))
    if not base:
        raise BadOption(f"{config.adapter} names no base model", "give it with --model")
    return find_checkpoint(base, config.revision or revision)


def find_problems(config: EvalConfig) -> tuple[list[Problem], str]:
    """(problems of the split, what they are), by default from the data that the adapter's run used."""
    run = training_options(config)
    data = config.data or run.get("data", "gsm8k")
    revision = config.data_revision or (None if config.data else run.get("data_commit"))
    held_out = Path(config.adapter or ".").parent / "validation.jsonl"
    if config.split == "validation" and config.adapter and not config.data and held_out.exists():
        problems, _ = read_problems(held_out)
        return problems[: config.limit], f"{data}, the rows held out by the adapter's run"
    source = load_source(data, revision)
    if config.split == "test":
        problems = source.test
    else:
        share = run.get("validation_share", 0.1)
        train, validation = split_problems(source.train, share)
        rows = validation if config.split == "validation" else train
        problems = [source.train[row] for row in rows]
    if not problems:
        raise BadData(
            f"{data} has no {config.split} problems", "use --split validation, or give data that has them"
        )
    at = f" at {source.commit}" if source.commit else ""
    return problems[: config.limit], f"{data}{at}, {config.split}"


def training_options(config: EvalConfig) -> dict:
    """Options and identity of the run that the adapter lies in; empty where there is none."""
    path = Path(config.adapter or "").parent / "config.json"
    if not config.adapter or not path.exists():
        return {}
    saved = json.loads(path.read_text())
    return saved.get("options", {}) | saved.get("identity", {})


def evaluation_settings(
    config: EvalConfig, checkpoint: Checkpoint, data: str, precision: str, problems: list[Problem]
) -> dict:
    """Everything that an answer depends on: the same settings are the same evaluation."""
    adapter = None
    if config.adapter:
        files = [Path(config.adapter) / name for name in (CONFIG, WEIGHTS)]
        adapter = hashlib.sha256(b"".join(f.read_bytes() for f in files if f.exists())).hexdigest()
    names = ("split", "max_new_tokens", "temperature", "top_k", "top_p", "seed")
    return {
        "base": checkpoint.name,
        "base_commit": checkpoint.commit,
        "adapter": config.adapter,
        "adapter_sha256": adapter,
        "data": data,
        "problems": len(problems),
        "problems_sha256": hashlib.sha256(json.dumps([p.row() for p in problems]).encode()).hexdigest(),
        "precision": precision,
        **{name: getattr(config, name) for name in names},
    }


def results_folder(config: EvalConfig, settings: dict) -> Path:
    """Where the answers of these settings lie: other settings lie elsewhere, so nothing is mixed up."""
    named = Path(config.adapter).parent if config.adapter else Path("out") / Path(config.model).name.lower()
    code = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    return Path(config.out or named) / "evaluation" / f"{config.split}-{code}"


def answer_all(
    config: EvalConfig,
    model: Qwen2,
    chat: ChatFormat,
    problems: list[Problem],
    *,
    eos_ids: tuple[int, ...],
    log: Path,
    name: str,
) -> dict[str, Completion]:
    """A completion for each problem, by id; those that `log` holds already are not generated again."""
    done = read_completions(log)
    out = MetricsLog(log, keep=log.read_bytes().rfind(b"\n") + 1 if log.exists() else 0)
    sampling = Sampling(config.temperature, config.top_k, config.top_p, config.seed)
    prompts = {row: chat.prompt(p.messages[:-1]) for row, p in enumerate(problems) if p.id not in done}
    rows = sorted(prompts, key=lambda row: len(prompts[row]))  # like lengths end at like times
    bar = tqdm(total=len(problems), initial=len(done), desc=name, unit="problem")
    for group in in_batches(rows, config.batch_size):
        started = time.perf_counter()
        decoded = generate(
            model,
            [prompts[row] for row in group],
            max_new_tokens=config.max_new_tokens,
            eos_ids=eos_ids,
            vocabulary=chat.vocabulary,
            sampling=sampling,
            rows=group,
        )
        seconds = (time.perf_counter() - started) / len(group)
        for row, answer in zip(group, decoded):
            text = chat.decode(answer.tokens)
            completion = Completion(problems[row].id, text, len(answer.tokens), answer.cut_off, seconds)
            out.write(**asdict(completion))
            done[completion.id] = completion
        bar.update(len(group))
    bar.close()
    return done


def read_completions(log: Path) -> dict[str, Completion]:
    """The completions that an earlier, interrupted call wrote."""
    return {row["id"]: Completion(**row) for row in read_metrics(log)} if log.exists() else {}


def summary(results: dict[str, list[Scored]]) -> dict:
    """Counts and rates as JSON values."""
    figures = {}
    for name, scored in results.items():
        n = len(scored)
        figures[name] = {
            "problems": n,
            "right": {scorer: sum(s.right[scorer] for s in scored) for scorer in scored[0].right},
            "had_format": sum(s.had_format for s in scored),
            "cut_off": sum(s.completion.cut_off for s in scored),
            "empty": sum(not s.completion.text.strip() for s in scored),
            "tokens": sum(s.completion.tokens for s in scored),
            "seconds": sum(s.completion.seconds for s in scored),
        }
    if len(results) == 2:
        headline = next(iter(figures["base"]["right"]))
        pair = paired(*([s.right[headline] for s in results[name]] for name in ("base", "tuned")))
        return {"figures": figures, "difference": asdict(pair), "in_words": in_words(pair)}
    return {"figures": figures}


def report(results: dict[str, list[Scored]]) -> str:
    """Base and tuned side by side, in 80 columns."""
    found = summary(results)
    figures = found["figures"]
    n = next(iter(figures.values()))["problems"]
    rows = [("", *figures)]
    for scorer in next(iter(figures.values()))["right"]:
        counts = [f["right"][scorer] for f in figures.values()]
        rows.append((f"answer accuracy, {scorer}", *(_rate(c, n) for c in counts)))
    for key in ("had_format", "cut_off", "empty"):
        rows.append((key.replace("_", " "), *(f"{f[key]} of {n}" for f in figures.values())))
    rows.append(("tokens an answer", *(f"{f['tokens'] / n:.0f}" for f in figures.values())))
    rows.append(("tokens a second", *(f"{f['tokens'] / max(f['seconds'], 1e-9):.0f}" for f in figures.values())))
    lines = [f"{row[0]:<34}" + "".join(f"{cell:>23}" for cell in row[1:]) for row in rows]
    if "in_words" in found:
        lines.append(f"tuned against base: {found['in_words']}")
    return "\n".join(lines)


def _rate(right: int, n: int) -> str:
    low, high = wilson_interval(right, n)
    return f"{right / n:.1%} ({low:.1%}-{high:.1%})"


if __name__ == "__main__":
    sys.exit(run_script(main))
