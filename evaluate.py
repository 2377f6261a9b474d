"""What the tuning is worth: base and tuned answer the same problems, by the same code.

    python evaluate.py --demo                                            # after train.py --demo
    python evaluate.py --adapter out/qwen2-0.5b-instruct-gsm8k/best      # base against tuned
    python evaluate.py --model Qwen/Qwen2-0.5B-Instruct --limit 100      # one model by itself
    python evaluate.py --adapter out/.../best --data gsm8k arc-challenge hellaswag   # forgetting
    python evaluate.py --adapter out/.../best --ask "What is 3 + 4?"     # both answer, as you watch
    python evaluate.py --compare A/result.json B/result.json             # two finished evaluations

The base is the tuned model with its adapters switched off, which is the base bit for bit. Answers
are generated and scored; loss and teacher-forced token accuracy stand beside them under those
names. Of a task with choices the likeliest is taken. Every answer is written down as it comes, so
an evaluation that was stopped goes on where it was, each task by itself.

    python evaluate.py --adapter out/.../best --split train --samples 4 --temperature 0.7 \\
        --keep-correct own.jsonl

keeps the right solutions, for `train.py --data own.jsonl` to learn from (evaluation/rejection.py).
"""

import contextlib
import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data.chat import ChatFormat
from data.custom import parse_columns
from data.encode import encode_problems
from data.gsm8k import EXAMPLES
from data.mixture import source_names
from data.multiple_choice import CHOICE_TASKS
from data.rows import Message, Problem, Source, fingerprint, read_problems
from data.split import split_sources
from data.tasks import TASKS, load_source
from errors import BadData, BadOption, BadRun, listed, printable, run_script
from evaluation.answers import GenerationSettings, answers, read_answers
from evaluation.choices import Scored, choice_figures, read_scores, score, with_shots
from evaluation.conversation import turns
from evaluation.generative import SCORERS, choose_scorers
from evaluation.rejection import right_solutions
from evaluation.summary import (
    Completions,
    difference,
    figures,
    summary_line,
    summary_table,
    table,
    transcripts,
)
from evaluation.teacher_forced import teacher_forced
from files import JsonLines, write_file, write_json
from lora.inject import disabled
from lora.peft_format import CONFIG, WEIGHTS, read_adapter, read_adapter_config
from model.checkpoint import Checkpoint, find_checkpoint, read_config, read_eos_ids
from model.generate import Decoding, decode
from model.load import load_model
from model.qwen2 import Qwen2
from progress_bar import progress_bar
from report import write_report
from run.checkpoint import check_place, lock
from run.device import DTYPES, describe, pick_device, pick_precision, prepare_memory
from run.options import option, parse, to_json
from run.options import table as options_table


@dataclass(frozen=True)
class EvalConfig:
    """What one asks for: each field is an option of the command line."""

    adapter: str | None = option(None, "adapter folder, such as out/.../best")
    model: str | None = option(None, "base (default: the one the adapter names)")
    revision: str | None = option(None, "branch, tag or commit of the base on the Hub")
    data: tuple[str, ...] = option(
        (), "one or more, as for train.py (default: what the adapter's run used)"
    )
    data_revision: str | None = option(None, "branch, tag or commit of the data on the Hub")
    columns: tuple[str, ...] = option((), "what own data call theirs: question=problem,answer=text")
    split: str = option(
        "test", "validation: the rows held out in training", choices=("test", "validation", "train")
    )
    out: str | None = option(None, "folder for the results (default: the adapter's run folder)")
    ask: str | None = option(None, "answer this question, and leave")
    compare: tuple[str, ...] = option((), "two result.json: set them side by side, and leave")

    limit: int | None = option(None, "use only the first so many problems of each task", least=1)
    shots: int = option(0, "solved problems before each, lm-evaluation-harness's way", least=0)
    # From here to max_new_tokens: of generated answers, not of choices.
    cot: bool = option(False, "ask for a chain of thought, zero-shot, as plain text")
    samples: int = option(1, "answers to each problem; more give majority votes", least=1)
    temperature: float = option(0.0, "0 is greedy", least=0)
    top_k: int = option(0, "sample among the k likeliest tokens only; 0: all", least=0)
    top_p: float = option(1.0, "sample among the likeliest tokens of this mass", above=0)
    seed: int = option(0, "of sampling and of the bootstrap", least=0)
    max_new_tokens: int = option(512, "longest answer; GSM8K's longest is 455", least=1)
    keep_correct: str | None = option(
        None, "write right, distinct answers to this .jsonl, to learn from; with --split train"
    )
    batch_size: int = option(128, "answers in the making at once; changes none in fp32", least=1)

    precision: str = option("auto", "of the base", choices=("auto", *DTYPES))
    device: str = option("auto", "where to run", choices=("auto", "cuda", "mps", "cpu"))

    @property
    def prompt(self) -> str:
        return "few-shot" if self.shots else "chain-of-thought" if self.cot else "chat"

    @property
    def read_at_once(self) -> int:
        return min(16, self.batch_size)  # texts given whole; unlike answers, more are no faster


# `--demo`: what `python train.py --demo` has left behind.
DEMO = {"adapter": "out/demo/best", "max_new_tokens": 160}


@dataclass(frozen=True)
class Task:
    """One data source to be measured on."""

    name: str
    problems: list[Problem]
    shots: list[Problem]  # to show before each question; choices have theirs in their contexts
    data: str  # which problems they are, in words

    @property
    def has_choices(self) -> bool:
        return self.problems[0].choices is not None


@dataclass(frozen=True)
class Bench:
    """Who is measured, and how: the same for all tasks."""

    config: EvalConfig
    model: Qwen2
    chat: ChatFormat
    eos_ids: tuple[int, ...]
    contestants: dict[str, Callable]  # name -> context in which the model is that one


def main(argv: list[str] | None = None) -> None:
    """Find everything, let each contestant answer, count, compare."""
    config = parse(
        EvalConfig, argv, "Measure a base and its adapter on the same problems.",
        presets={"demo": DEMO},
    )  # fmt: skip
    check(config)
    if config.compare:
        return compare(*config.compare, seed=config.seed)
    device = pick_device(config.device)
    precision, why = pick_precision(config.precision, device)
    prepare_memory(device)
    checkpoint = base_checkpoint(config)
    base = read_config(checkpoint.folder)
    chat = ChatFormat.from_folder(checkpoint.folder, base.vocab_size)
    eos_ids = read_eos_ids(checkpoint.folder)
    tasks = [] if config.ask else find_tasks(config)
    places = []
    for task in tasks:
        settings = evaluation_settings(config, checkpoint, task, precision)
        places.append((task, settings, results_folder(config, task, settings)))
        check_place(places[-1][-1])

    if not config.ask:
        chosen = {k: v for k, v in to_json(config).items() if v not in (None, [])}
        print(options_table(chosen))
        for task, settings, _ in places:
            print(f"data {task.data}: {len(task.problems)} problems; prompt {settings['prompt']}")
    print(f"base {checkpoint.name} at {checkpoint.commit or checkpoint.folder}")
    print(f"device {describe(device)}; precision {precision}: {why}")
    model = load_model(checkpoint.folder, dtype=DTYPES[precision], device=device)
    contestants: dict[str, Callable] = {"base": contextlib.nullcontext}
    if config.adapter:
        read_adapter(Path(config.adapter), model)
        model.eval()
        contestants = {"base": lambda: disabled(model), "tuned": contextlib.nullcontext}
    if config.ask:
        return ask(config, model, chat, contestants, eos_ids)
    if config.keep_correct:  # only the last one's are kept
        contestants = dict([contestants.popitem()])

    bench, results = Bench(config, model, chat, eos_ids, contestants), []
    for task, settings, folder in places:
        if len(places) > 1:
            print(f"\n{task.data}")
        lock(folder)
        write_json(folder / "settings.json", settings)
        measured = measure_choices if task.has_choices else measure_answers
        result = {"settings": settings, "problems": len(task.problems), "contestants": {}}
        result = measured(bench, task, folder, result)
        write_json(folder / "result.json", result)
        print_result(result, folder)
        results.append(result | {"task": task.name, "folder": str(folder)})
    if len(results) > 1:
        lines = [summary_line(result) for result in results]
        write_json(places[0][-1].parent / "summary.json", {"tasks": lines})
        print(f"\n{summary_table(lines)}")
    refresh_report(config, places[0][-1].parent.parent)


def measure_answers(
    bench: Bench, task: Task, folder: Path, result: dict[str, Any]
) -> dict[str, Any]:
    """`result` with what the contestants generated, counted and compared."""
    config, problems = bench.config, task.problems
    asking = GenerationSettings(
        prompt=config.prompt, shots=tuple(task.shots), temperature=config.temperature,
        top_k=config.top_k, top_p=config.top_p, seed=config.seed,
        samples=config.samples, max_new_tokens=config.max_new_tokens, batch_size=config.batch_size,
    )  # fmt: skip
    given: dict[str, Completions] = {}
    for name, context in bench.contestants.items():
        with context():
            given[name] = answer_all(
                bench.model,
                bench.chat,
                problems,
                asking,
                eos_ids=bench.eos_ids,
                log=folder / f"{name}.jsonl",
                name=name,
            )
            kept = config.keep_correct  # of the rows to learn from that would say nothing
            measured = {} if kept else measure(bench, problems)
        result["contestants"][name] = figures(problems, given[name]) | measured
    if config.keep_correct:
        keep(Path(config.keep_correct), problems, *given.values())
    elif config.adapter:
        right = {name: c["outcomes"] for name, c in result["contestants"].items()}
        result |= difference(right["base"], right["tuned"], config.seed)
        result["transcripts"] = transcripts(problems, given["base"], given["tuned"], right)
    result["examples"] = [
        {"question": p.question, "gold": p.answer} | {n: c[p.id][0].text for n, c in given.items()}
        for p in EXAMPLES
    ]
    return result


def measure_choices(
    bench: Bench, task: Task, folder: Path, result: dict[str, Any]
) -> dict[str, Any]:
    """`result` with how likely each choice is to the contestants, counted and compared."""
    for name, context in bench.contestants.items():
        with context():
            scored = score_all(bench, task, folder / f"{name}.jsonl", name)
        result["contestants"][name] = choice_figures(task.problems, scored)
    if bench.config.adapter:
        right = {name: c["outcomes"] for name, c in result["contestants"].items()}
        result |= difference(right["base"], right["tuned"], bench.config.seed)
    return result | {"examples": []}


def check(config: EvalConfig) -> None:
    """BadOption for options that contradict each other."""
    if config.compare and len(config.compare) != 2:
        raise BadOption("--compare takes two files", "--compare A/result.json,B/result.json")
    if not config.compare and config.adapter is None and config.model is None:
        raise BadOption("neither --adapter nor --model is given", "give at least one of them")
    if config.samples > 1 and config.temperature == 0:
        raise BadOption(
            f"--samples {config.samples} at temperature 0 are all the same", "add --temperature 0.7"
        )
    if config.shots and config.cot:
        raise BadOption("--shots and --cot are two different prompts", "give one of them")
    if config.keep_correct:
        if config.split != "train":
            raise BadOption(
                f"--keep-correct of the {config.split} problems: learned, they measure nothing",
                "add --split train",
            )
        check_new(Path(config.keep_correct))


def check_new(path: Path) -> None:
    """BadOption if no file of rows can be made there, or one would be lost."""
    if path.suffix != ".jsonl" or not path.parent.is_dir():
        raise BadOption(
            f"--keep-correct {path} is no .jsonl file in a folder that exists", "such as own.jsonl"
        )
    if path.exists():
        raise BadOption(
            f"--keep-correct {path} exists already, and is not written over",
            "give another name, or move it away",
        )


def base_checkpoint(config: EvalConfig) -> Checkpoint:
    """The base to load: what was asked for, or what the adapter says it was trained on."""
    if config.model:
        return find_checkpoint(config.model, config.revision)
    _, base, revision = read_adapter_config(Path(config.adapter))
    if not base:
        raise BadOption(f"{config.adapter} names no base model", "give it with --model")
    return find_checkpoint(base, config.revision or revision)


def find_tasks(config: EvalConfig) -> list[Task]:
    """What is to be measured on; by default what the adapter's run learned from."""
    run = training_options(config)
    names = list(dict.fromkeys(source_names(config.data))) or run_sources(run)
    if config.data_revision and len(names) > 1:
        raise BadOption("--data-revision with several --data", "give them one at a time")
    if config.columns and all(name in TASKS for name in names):
        raise BadOption(f"--columns makes no sense for the task {', '.join(names)}", "leave it out")
    held_out = Path(config.adapter or ".").parent / "validation.jsonl"
    is_own = config.adapter and not config.data and held_out.exists()
    is_plain = len(names) == 1 and names[0] not in CHOICE_TASKS  # the file holds no choices
    if config.split == "validation" and is_own and is_plain and not config.shots:
        problems, _ = read_problems(held_out)
        data = f"{names[0]}, the rows held out by the adapter's run"
        tasks = [Task(names[0], problems[: config.limit], [], data)]
    else:
        asked = {"data_commit": config.data_revision, "columns": config.columns}
        told = ({} if config.data else run) | {k: v for k, v in asked.items() if v}
        sources = {name: load_of_run(told, name) for name in names}
        split = split_of(sources, config.split, run)
        tasks = [find_task(config, name, sources[name], split[name]) for name in names]
    found = [task for task in tasks if task.problems]
    for task in tasks:
        if not task.problems and (config.data or not found):
            raise BadData(
                f"{task.name} has 0 {config.split} problems", "use another --split or --data"
            )
        if not task.problems:
            print(f"{task.name} has no {config.split} problems: not measured")
    if config.keep_correct:
        check_kept(config, found)
    scored = [task.name for task in found if task.has_choices]
    if scored and (config.cot or config.samples > 1 or config.temperature):
        told = ", ".join(scored)
        print(f"--cot, --samples and --temperature are not for {told}: its choices are scored")
    return found


def check_kept(config: EvalConfig, tasks: list[Task]) -> None:
    """BadOption if right solutions of these tasks could not be told, or be no rows to learn."""
    problems = tasks[0].problems
    if len(tasks) > 1 or choose_scorers([p.answer for p in problems]) is not SCORERS:
        told = ", ".join(task.name for task in tasks)
        raise BadOption(
            f"--keep-correct takes one task whose answers have a '#### N', not {told}",
            "name that task with --data",
        )
    if config.prompt != "chat" and any(turns(p, "chat") > 1 for p in problems):
        raise BadOption(
            f"--keep-correct of {tasks[0].name}: asked as plain text, its turns get one answer",
            "leave out --shots and --cot",
        )


def find_task(config: EvalConfig, name: str, source: Source, problems: list[Problem]) -> Task:
    """One of the tasks, of these problems; without any if its source has none in this split."""
    at = f" at {source.commit}" if source.commit else ""
    data = f"{name}{at}, {config.split}"
    if source.bad:
        print(f"{name}: {len(source.bad)} rows are left out: {listed(source.bad, 3)}")
    if source.shots is None:
        asked = {p.id for p in problems}
        shots = [p for p in source.train if p.id not in asked][: config.shots]
        enough = len(shots) == config.shots
        if config.keep_correct:
            problems = [p for p in source.train if p not in shots]
            data += ", held-out rows too"  # train.py holds the same ones out again
        problems = problems[: config.limit]
    else:
        problems = problems[: config.limit]
        solved = source.shots(problems, config.shots)
        problems = [with_shots(p, rows) for p, rows in zip(problems, solved)]
        shots, enough = [], all(len(rows) == config.shots for rows in solved)
    if not enough:
        raise BadData(
            f"{data} has fewer than {config.shots} other problems to show before each",
            "use another --split, fewer --shots, or other --data",
        )
    return Task(name, problems, shots, data)


def split_of(sources: dict[str, Source], split: str, run: dict) -> dict[str, list[Problem]]:
    """The problems of a split by source, as a run with these options divided them.

    What a run held out in one of its sources it held out in all, so all of those are looked at.
    """
    if split == "test":
        return {name: source.test for name, source in sources.items()}
    together, alone = {}, []
    for name, source in sources.items():
        if name in run_sources(run):
            together[name] = source
        else:
            alone.append({name: source})
    if together:
        others = [name for name in run_sources(run) if name not in sources]
        together |= {name: load_of_run(run, name) for name in others}
    found = {}
    for group in (together, *alone):
        learned = [source.train[: run.get("limit")] for source in group.values()]
        sides = split_sources(learned, run.get("validation_share", 0.1))
        for name, problems, (train, validation) in zip(group, learned, sides):
            rows = validation if split == "validation" else train
            found[name] = [problems[row] for row in rows]
    return found


def load_of_run(run: dict, name: str) -> Source:
    """One of a run's sources, at the commit and by the columns that the run names."""
    commits = run.get("data_commit")
    commit = commits.get(name) if isinstance(commits, dict) else commits
    own = parse_columns(tuple(run_texts(run, "columns"))) if run.get("columns") else {}
    return load_source(name, commit, {} if name in TASKS else own)


def run_sources(run: dict) -> list[str]:
    """The names of what a run learned from; an evaluation without a run is of GSM8K."""
    return source_names(run_texts({"data": "gsm8k"} | run, "data"))


def run_texts(run: dict, key: str) -> list[str]:
    """An option of a run that is one or more texts; BadRun if it is something else."""
    texts = [run[key]] if isinstance(run[key], str) else run[key]
    if not isinstance(texts, (list, tuple)) or not texts or {type(t) for t in texts} != {str}:
        raise BadRun(f"the adapter's run names its {key} as {texts!r}", f"give it with --{key}")
    return list(texts)


def training_options(config: EvalConfig) -> dict[str, Any]:
    """Options and identity of the run that the adapter lies in; empty where there is none."""
    path = Path(config.adapter or "").parent / "config.json"
    if not config.adapter or not path.exists():
        return {}
    try:
        saved = json.loads(path.read_text())
        return saved["options"] | saved["identity"]
    except (OSError, ValueError, KeyError, TypeError):
        raise BadRun(
            f"{path} is no configuration of a run", "move the adapter elsewhere, or mend the file"
        ) from None


def evaluation_settings(
    config: EvalConfig, checkpoint: Checkpoint, task: Task, precision: str
) -> dict[str, Any]:
    """Everything that an answer depends on: the same settings are the same evaluation."""
    adapter = None
    if config.adapter:
        files = [Path(config.adapter) / name for name in (CONFIG, WEIGHTS)]
        adapter = hashlib.sha256(b"".join(f.read_bytes() for f in files if f.exists())).hexdigest()
    names = ("split", "prompt", "shots", "samples", "temperature", "top_k", "top_p", "seed",
             "max_new_tokens")  # fmt: skip
    asked = {name: getattr(config, name) for name in names}
    if task.has_choices:
        asked = {"split": config.split, "prompt": "choices", "shots": config.shots}
    return {
        "base": checkpoint.name,
        "base_commit": checkpoint.commit,
        "adapter": config.adapter,
        "adapter_sha256": adapter,
        "data": task.data,
        "problems": len(task.problems),
        "problems_sha256": fingerprint(task.problems),
        "precision": precision,
        **asked,
    }


def results_folder(config: EvalConfig, task: Task, settings: dict[str, Any]) -> Path:
    """Where the answers of these settings lie; those of other settings lie elsewhere."""
    model = Path(config.model or "").name.lower()
    home = Path(config.adapter).parent if config.adapter else Path("out") / model
    code = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    kind = f"{task.name}-{config.split}" if task.has_choices else config.split
    return Path(config.out or home) / "evaluation" / f"{kind}-{code}"


def answer_all(
    model: Qwen2,
    chat: ChatFormat,
    problems: list[Problem],
    asking: GenerationSettings,
    *,
    eos_ids: tuple[int, ...],
    log: Path,
    name: str,
) -> Completions:
    """All samples of each problem and example, by id; what `log` holds is not generated again."""
    headline = next(iter(choose_scorers([p.answer for p in problems]).values()))
    gold = {p.id: p.answer for p in problems}
    kept, size = read_answers(log)
    done = {(c.id, c.sample): c for c in kept}
    out = JsonLines(log, keep=size)
    asked = [*problems, *EXAMPLES]
    total = len(asked) * asking.samples
    right = sum(headline(c.text, gold[c.id]) for c in kept if c.id in gold)
    count = sum(c.id in gold for c in kept)
    with progress_bar(total=total, initial=len(done), desc=name, unit="answer") as bar:
        for c in answers(model, chat, asked, asking, eos_ids=eos_ids, done=set(done)):
            out.write(**asdict(c))
            done[c.id, c.sample] = c
            if c.id in gold:
                right, count = right + headline(c.text, gold[c.id]), count + 1
            bar.update()
            bar.set_postfix_str(f"{right} of {count} right", refresh=False)
    return {p.id: [done[p.id, sample] for sample in range(asking.samples)] for p in asked}


def keep(path: Path, problems: list[Problem], given: Completions) -> None:
    """Write the right solutions, whole or not at all, and say how many there are."""
    rows = list(right_solutions(problems, given))
    solved = len({row["id"] for row in rows})
    print(f"kept {len(rows):,} right, distinct answers to {solved:,} of {len(problems):,} problems")
    if not rows:
        return print(f"{path} is not written: there is nothing to learn from")
    check_new(path)  # again: the answers took their time
    write_file(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
    print(f"to learn from them: python train.py --data {path}")


def score_all(bench: Bench, task: Task, log: Path, name: str) -> dict[str, Scored]:
    """The scores of each problem, by id; what `log` holds is not computed again."""
    kept, size = read_scores(log)
    done = {scored.id: scored for scored in kept}
    out = JsonLines(log, keep=size)
    rest = score(bench.model, bench.chat, task.problems, bench.config.read_at_once, set(done))
    initial, total = len(done), len(task.problems)
    for scored in progress_bar(rest, total=total, initial=initial, desc=name, unit="question"):
        out.write(**asdict(scored))
        done[scored.id] = scored
    return done


def measure(bench: Bench, problems: list[Problem]) -> dict[str, float]:
    """Loss and token accuracy of the gold answers, teacher-forced."""
    rows = list(range(len(problems)))
    examples, _ = encode_problems(problems, rows, bench.chat, max_length=2**20)
    nats, correct = teacher_forced(bench.model, examples, bench.config.read_at_once)
    supervised = sum(e.supervised_count for e in examples)
    return {"loss": nats / supervised, "token_accuracy": correct / supervised}


def ask(
    config: EvalConfig,
    model: Qwen2,
    chat: ChatFormat,
    contestants: dict[str, Callable],
    eos_ids: tuple[int, ...],
) -> None:
    """Print each contestant's answer to one question as it is generated."""
    prompt = chat.prompt((Message("user", config.ask),))
    decoding = Decoding(
        max_new_tokens=config.max_new_tokens, eos_ids=eos_ids, vocab_size=chat.vocab_size,
        temperature=config.temperature, top_k=config.top_k, top_p=config.top_p, seed=config.seed,
    )  # fmt: skip
    for name, context in contestants.items():
        print(f"\n{name}: ", end="", flush=True)
        tokens, shown = [], ""
        with context():
            for ((_, token, ended),) in decode(model, [prompt], decoding):
                tokens += [] if token in eos_ids else [token]
                text = chat.decode(tokens)
                if not text.endswith("\ufffd") or ended:  # half of a character may be still to come
                    print(printable(text[len(shown) :], "\n\t"), end="", flush=True)
                    shown = text
        print()


def print_result(result: dict[str, Any], folder: Path) -> None:
    """The table, the verdict, the two examples, and where it all lies."""
    print(table(result))
    if "in_words" in result:
        found = result["difference"]
        print(f"tuned against base: fixed {found['fixed']}, broke {found['broke']}, exact p"
              f" {found['p_value']:.2g}\n{result['in_words']}")  # fmt: skip
    for example in result["examples"]:
        print(f"\n{example['question']} ({example['gold'].removeprefix('#### ')})")
        for name in result["contestants"]:
            print(f"  {name}: {printable(' '.join(example[name].split())[:300])}")
    print(f"\nresults in {folder}")


def refresh_report(config: EvalConfig, home: Path) -> None:
    """Make the run's report anew, now that there is more to say; a lone model has no run."""
    if (home / "config.json").exists():
        price = training_options(config).get("price_per_hour")
        print(f"report in {write_report(home, price)}")


def compare(one: str, other: str, *, seed: int) -> None:
    """Set two finished evaluations side by side, each by its tuned model or its only one."""
    results = []
    for path in (one, other):
        try:
            results.append(json.loads(Path(path).read_text()))
            results[-1]["settings"]["problems_sha256"], results[-1]["contestants"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BadData(
                f"{path} is no result of an evaluation ({error})",
                "give a result.json that it wrote",
            ) from None
    a, b = results
    if a["settings"]["problems_sha256"] != b["settings"]["problems_sha256"]:
        raise BadData(
            "the two results are of different problems", "compare the same split and --limit"
        )
    differing = [k for k in a["settings"] if a["settings"][k] != b["settings"].get(k)]
    for key in differing:
        print(f"{key}: {a['settings'][key]} against {b['settings'].get(key)}")
    found = {name: list(r["contestants"].values())[-1] for name, r in zip(("A", "B"), results)}
    print(table({"problems": a["problems"], "contestants": found}))
    print(
        "B against A: "
        + difference(found["A"]["outcomes"], found["B"]["outcomes"], seed)["in_words"]
    )


if __name__ == "__main__":
    sys.exit(run_script(main))
