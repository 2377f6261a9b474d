"""Measures what fine-tuning achieved: base and tuned model answer the same problems.

    python evaluate.py --demo                                            # after train.py --demo
    python evaluate.py --adapter out/qwen2-0.5b-instruct-gsm8k/best      # base against tuned
    python evaluate.py --model Qwen/Qwen2-0.5B-Instruct --limit 100      # one model alone
    python evaluate.py --adapter out/.../best --chat                     # a conversation

The base is the tuned model with its adapters disabled, which equals the base bit for bit, so both
run through the same code. Answers are generated and scored. The loss and token accuracy of the gold
answers are reported as well, but they are not answer accuracy. In tasks with choices, the likeliest
choice is the answer. Answers are logged as they are generated, so an interrupted evaluation resumes
when the command is repeated.

`main` is the table of contents. What a task is, and how it is judged: evaluation/tasks.py.
"""

from errors import run_script  # first: from here on, Ctrl-C ends without a traceback

# isort: split
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data.rows import fingerprint
from data.tasks import TASKS
from errors import BadOption
from evaluation.answers import GenerationSettings
from evaluation.chat import talk
from evaluation.measure import Models, measure
from evaluation.rejection import check_new_file, check_tasks
from evaluation.results import read_result
from evaluation.summary import comparison_text, result_text, task_summary, tasks_table
from evaluation.tasks import Selection, Task, find_tasks
from files import write_json
from lora.peft_folder import AdapterFolder
from lora.peft_format import inject_adapter
from model.checkpoint import read_sampling
from model.generate import Decoding
from report import write_report
from run import distributed
from run.base import Base, check_base_of_adapter, checked_adapter, checkpoint_of_adapter
from run.card import refresh_card
from run.device import DTYPES, decoded_rows, out_of_memory_reported, pick_device
from run.evaluation_folder import begin, folder_of_settings, record_session
from run.folder import Run, lock
from run.options import changed_options, in_two_columns, option, parse


@dataclass(frozen=True)
class EvalConfig:
    """The options: each field is a flag of the command line."""

    adapter: str | None = option(None, "adapter folder, such as out/.../best", path="any")
    model: str | None = option(None, "base model (default: the one the adapter names)", path="any")
    revision: str | None = option(None, "branch, tag or commit of the base on the Hub")

    data: tuple[str, ...] = option(
        (),
        f"tasks ({', '.join(TASKS)}) or custom data, as for train.py (default: what the adapter"
        " was trained on)",
    )
    data_revision: str | None = option(None, "branch, tag or commit of the data on the Hub")
    columns: tuple[str, ...] = option((), "rename columns: question=problem,answer=text")
    split: str = option(
        "test", "problems to measure on; validation: the rows held out in training",
        choices=("test", "validation", "train"),
    )  # fmt: skip
    limit: int | None = option(None, "use only the first N problems of each task", least=1)
    shots: int = option(
        0, "solved problems shown before each one, drawn as by lm-evaluation-harness",
        least=0,
    )  # fmt: skip
    same_shots: bool = option(False, "show the first --shots training rows before all problems")

    cot: bool = option(False, "ask for a chain of thought, zero-shot, as plain text")
    samples: int = option(1, "answers per problem; several give majority votes", least=1)
    temperature: float = option(0.0, "sampling temperature; 0 is greedy", least=0)
    top_k: int = option(0, "sample from the k most likely tokens only; 0 means all", least=0)
    top_p: float = option(1.0, "sample from the top tokens with this total probability", above=0)
    seed: int = option(0, "random seed of sampling and of the bootstrap", least=0)
    max_new_tokens: int = option(512, "longest answer in tokens; GSM8K's longest has 455", least=1)
    teacher_forced: int = option(
        200, "gold answers whose loss and token accuracy are measured; 0 for none", least=0
    )

    system: str | None = option(
        None, "system prompt of problems without one, '' for an empty one (default: as in training)"
    )
    chat_template: str | None = option(
        None, "file of a chat template to use instead of the adapter's or the base's", path="file"
    )

    out: str | None = option(
        None, "folder for the results (default: the adapter's run folder)", path="new"
    )
    fresh: bool = option(
        False, "use a new folder if there is a result already, or answers by other code"
    )
    keep_correct: str | None = option(
        None,
        "with --split train: write correct answers to this .jsonl file, to train on them",
        path="new",
    )
    ask: str | None = option(None, "answer this question instead of evaluating")
    chat: bool = option(False, "talk with the tuned model, or with --model alone, in the terminal")
    compare: tuple[str, ...] = option(
        (), "compare two result.json files instead of evaluating", path="file"
    )

    batch_size: int | None = option(
        None,
        "sequences decoded in parallel; same answers in fp32 (default: 128; on a GPU, by memory)",
        least=1,
    )
    precision: str = option("auto", "dtype of the base", choices=("auto", *DTYPES))
    base_precision: str | None = option(
        None, "how to hold the base's layers (default: as in training)",
        choices=("full", "nf4", "int8"),
    )  # fmt: skip
    shard: bool = option(False, "spread the base over ranks; the first one computes")
    device: str = option("auto", "where to run", choices=("auto", "cuda", "mps", "cpu"))

    @property
    def prompt(self) -> str:
        return "few-shot" if self.shots else "chain-of-thought" if self.cot else "chat"


GROUPS = {  # title -> first option, example
    "models": ("adapter", "--model Qwen/Qwen2-0.5B-Instruct --limit 100"),
    "data": ("data", "--adapter out/.../best --data gsm8k arc-challenge hellaswag"),
    "generated answers": ("cot", "--adapter out/.../best --samples 8 --temperature 0.7"),
    "results": ("out", "--compare A/result.json B/result.json"),
    "machine": ("batch_size", "--demo --batch-size 32"),
}
HELP = """Measure a base model and its adapter on the same problems.

examples:
  %(prog)s --demo
  %(prog)s --adapter out/.../best
  %(prog)s --adapter out/.../best --chat
"""
# `--demo`: the adapter that `python train.py --demo` wrote.
DEMO = {"adapter": "out/demo/best", "max_new_tokens": 160}


@dataclass(frozen=True)
class Evaluation:
    """One task to measure. Equal settings are the same evaluation, in the same folder."""

    task: Task
    settings: dict[str, Any]
    folder: Path


@distributed.lost_ranks_reported()
def main(argv: list[str] | None = None) -> None:
    """Find the tasks and the models, measure each task, and write the results."""
    # 1. What is asked for: an evaluation, a comparison of two old ones, or one answer.
    config = parse(EvalConfig, argv, HELP, presets={"demo": DEMO}, groups=GROUPS)
    check(config)
    if config.compare:
        a, b = (read_result(Path(path)) for path in config.compare)
        return print(comparison_text(a, b, config.seed))
    base = find_base(config)
    adapter = check_models(config, base)
    if config.shard and not distributed.join(base.device).is_main:
        return base.load(shard=True).lockstep.finish()  # gathers whatever the first rank computes
    if config.ask or config.chat:
        print("\n".join(base.lines()))
        models, one_by_one = load_models(config, base, adapter), replace(config, batch_size=1)
        talk(models, base.chat, decoding(one_by_one, base), config.ask, chatting=config.chat)
        return models.finish()

    # 2. What is measured: tasks, each with a judge, its settings and a results folder.
    evaluations = find_evaluations(config, base, adapter)
    print_start(config, base, evaluations)

    # 3. The models, on one network.
    models = load_models(config, base, adapter)
    if config.batch_size is None:
        dtype = DTYPES[base.precision]
        rows = decoded_rows(base.device, base.config, dtype, config.max_new_tokens)
        config = replace(config, batch_size=rows)

    # 4. Each task: answers are generated, or choices scored; then they are judged and compared.
    results = []
    for evaluation in evaluations:
        task, folder = evaluation.task, evaluation.folder
        if len(evaluations) > 1:
            print(f"\n{task.description}")
        lock(folder)
        settings = record_session(folder, evaluation.settings, base.device)
        asking = GenerationSettings(
            decoding(config, base), config.prompt, task.shots, config.samples
        )
        with out_of_memory_reported("rerun the command with a smaller --batch-size to resume"):
            found = measure(
                models, base.chat, task, asking, folder,
                teacher_forced=config.teacher_forced, keep_correct=config.keep_correct,
            )  # fmt: skip
        base.check_unchanged()
        result = {"settings": settings, "problems": len(task.problems), **found}
        write_json(folder / "result.json", result)
        print(f"{result_text(result)}\n\nresults in {folder}")
        results.append(result | {"task": task.name, "folder": str(folder)})

    # 5. The report: a table of all tasks, and the page of the run that the adapter is from.
    parent = evaluations[0].folder.parent
    if len(results) > 1:
        summaries = [task_summary(result) for result in results]
        write_json(parent / "summary.json", {"tasks": summaries})
        print(f"\n{tasks_table(summaries)}")
    run = Run.of_adapter(config.adapter)
    if run.config and (parent.parent / "config.json").exists():  # a model alone has no run
        refresh_card(run)
        price = run.options.get("price_per_hour")
        print(f"report in {write_report(parent.parent, price)}")
    models.finish()


# What is asked for.


def check(config: EvalConfig) -> None:
    """Raise BadOption for options that contradict each other."""
    if config.shard:
        distributed.check_shard({})
    if config.compare and len(config.compare) != 2:
        raise BadOption("--compare takes two files", "--compare A/result.json B/result.json")
    if not config.compare and config.adapter is None and config.model is None:
        raise BadOption("neither --adapter nor --model is given", "give at least one of them")
    if config.samples > 1 and config.temperature == 0:
        raise BadOption(
            f"--samples {config.samples}: all samples are equal at temperature 0",
            "add --temperature 0.7",
        )
    if config.shots and config.cot:
        raise BadOption("--shots and --cot are two different prompts", "give one of them")
    if config.same_shots and not config.shots:
        raise BadOption("--same-shots without --shots: no problems are shown", "add --shots 5")
    if config.keep_correct and config.split != "train":
        raise BadOption(
            f"--keep-correct with --split {config.split}: problems cannot be trained on and then"
            " measured on",
            "add --split train",
        )
    if config.keep_correct:
        check_new_file(Path(config.keep_correct))


def find_base(config: EvalConfig) -> Base:
    """The base that was asked for, or else the one that the adapter was trained on."""
    base, kind = config.model, config.base_precision
    if config.adapter:
        base = checkpoint_of_adapter(config.adapter, config.model, config.revision)
        kind = kind or Run.of_adapter(config.adapter).identity.get("base_precision")
    base = Base.find(
        base, config.revision, precision=config.precision,
        device=pick_device(config.device, distributed.local_rank() if config.shard else 0),
        system=config.system, chat_template=config.chat_template,
        adapter=Path(config.adapter) if config.adapter else None,
    )  # fmt: skip
    return base.held_in(None if kind == "full" else kind)


def check_models(config: EvalConfig, base: Base) -> AdapterFolder | None:
    """The adapter, which was read; BadAdapter if it was trained on another base than `base`."""
    if not config.adapter:
        return None
    adapter, given = Path(config.adapter), config.model is not None
    check_base_of_adapter(base, base.hashing.result(), adapter, given=given)
    return checked_adapter(adapter)


def decoding(config: EvalConfig, base: Base) -> Decoding:
    return Decoding(
        max_new_tokens=config.max_new_tokens, eos_ids=base.eos_ids,
        vocab_size=base.chat.vocab_size, batch_size=config.batch_size,
        temperature=config.temperature, top_k=config.top_k, top_p=config.top_p, seed=config.seed,
    )  # fmt: skip


# What is measured.


def select_tasks(config: EvalConfig) -> list[Task]:
    """The tasks that the options select, by default those of the adapter's run."""
    selection = Selection(
        data=config.data, data_revision=config.data_revision, columns=config.columns,
        split=config.split, limit=config.limit, shots=config.shots, same_shots=config.same_shots,
        include_held_out=config.keep_correct is not None,
    )  # fmt: skip
    run = Run.of_adapter(config.adapter)
    return find_tasks(selection, run.options | run.identity, run.held_out_file)


def find_evaluations(
    config: EvalConfig, base: Base, adapter: AdapterFolder | None
) -> list[Evaluation]:
    """The tasks with their settings and folders; BadOption where --keep-correct cannot be used."""
    tasks = select_tasks(config)
    if config.keep_correct:
        check_tasks(tasks, config.prompt)
    scored = [task.name for task in tasks if not task.judge.generated]
    if scored and (config.cot or config.samples > 1 or config.temperature):
        print(
            f"--cot, --samples and --temperature do not apply to {', '.join(scored)}: choices are"
            " scored, not generated"
        )
    default = Path("out") / Path(config.model or "").name.lower()
    home = Path(config.out or (Path(config.adapter).parent if config.adapter else default))
    evaluations = []
    for task in tasks:
        settings = evaluation_settings(config, base, adapter, task)
        kind = config.split if task.judge.generated else f"{task.name}-{config.split}"
        folder = folder_of_settings(home, kind, settings)
        folder, settings = begin(folder, settings, fresh=config.fresh)
        evaluations.append(Evaluation(task, settings, folder))
    return evaluations


def evaluation_settings(
    config: EvalConfig, base: Base, adapter: AdapterFolder | None, task: Task
) -> dict[str, Any]:
    """Everything that an answer depends on, apart from the program."""
    if task.judge.generated:
        names = ("split", "prompt", "shots", "samples", "temperature", "top_k", "top_p", "seed",
                 "max_new_tokens")  # fmt: skip
        asked = {name: getattr(config, name) for name in names}
    else:
        asked = {"split": config.split, "prompt": "choices", "shots": config.shots}
    if config.same_shots or (config.shots and task.judge.generated):
        asked["same_shots"] = config.same_shots
    models = base.identity()
    del models["base_sizes"]
    return {
        "base": base.name,
        **models,
        "adapter": config.adapter,
        "adapter_sha256": adapter.sha256 if adapter else None,
        "data": task.description,
        "problems": len(task.problems),
        "problems_sha256": fingerprint(task.problems),
        **asked,
    }


# The models.


def load_models(config: EvalConfig, base: Base, adapter: AdapterFolder | None) -> Models:
    """The base, and with an adapter the tuned model (with --keep-correct, the tuned one alone)."""
    network = base.load(shard=config.shard)
    if adapter:
        inject_adapter(adapter, network)
    tuned_alone = adapter is not None and config.keep_correct is not None
    return Models.of(network, adapted=adapter is not None, tuned_alone=tuned_alone)


# What is printed.


def print_start(config: EvalConfig, base: Base, evaluations: list[Evaluation]) -> None:
    """The options given, the tasks and how they are judged, the base and the device."""
    print(in_two_columns(changed_options(config)))
    for evaluation in evaluations:
        print("\n".join(evaluation.task.lines(evaluation.settings["prompt"])))
    validations = Run.of_adapter(config.adapter).validation_count()
    if config.split == "validation" and validations:
        print(
            f"the adapter was chosen by these problems, as the best of {validations} validations,"
            " so its figures here are optimistic; --split test has other problems"
        )
    print("\n".join(base.lines()))
    if config.temperature and not config.top_k and config.top_p == 1:
        advice = ", ".join(f"{k} {v:g}" for k, v in read_sampling(base.folder).items())
        print(f"sampling from all tokens; the checkpoint recommends {advice or 'nothing'}")


if __name__ == "__main__":
    sys.exit(run_script(main))
