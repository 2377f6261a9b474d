"""Fine-tune Qwen2 on worked answers through low-rank adapters, with the whole loop in plain sight.

    python train.py --demo                         # all of it, offline, in two minutes
    python train.py --epochs 3                     # Qwen2-0.5B-Instruct on GSM8K, both from the Hub
    python train.py --model FOLDER --data FOLDER   # the same from local files
    torchrun --nproc-per-node 2 train.py           # on two devices

The one idea: a step's loss is the sum over all its supervised tokens divided by how many there are,
whatever micro-batches and ranks they are spread over. `main` is the contents, `train` the loop.
"""

import gc
import itertools
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import safetensors
import tokenizers
import torch
from torch import nn

from data.audit import Audit, audit_lines, audit_mixture
from data.batches import Schedule, Share, flat_batch
from data.chat import ChatFormat
from data.encode import Example
from data.mixture import Part, encode_mixture, load_mixture, mixture_identity, source_names
from data.rows import Problem
from errors import BadOption, TrainingFailed, listed, printable, run_script
from evaluation.answers import GenerationSettings, answers
from evaluation.generative import choose_scorers
from evaluation.teacher_forced import teacher_forced
from files import JsonLines, hash_files, write_file, write_json
from lora.init import INITS
from lora.inject import (
    BIASES,
    LoRAConfig,
    added_numbers,
    by_target,
    count,
    inject,
    seed_dropout,
    trained_parameters,
)
from lora.peft_format import CONFIG, WEIGHTS, read_adapter, read_adapter_config
from lora.plus import rate_groups
from model.compile import check_compiler, compile_layers
from model.load import Checkpoint, find_checkpoint, load_model, read_config, read_eos_ids
from model.loss import linear_cross_entropy
from model.qwen2 import Qwen2, Qwen2Config
from progress_bar import progress_bar
from report import write_report
from run import distributed
from run.checkpoint import (
    Progress,
    check_place,
    check_run,
    check_space,
    load_checkpoint,
    lock,
    read_progress,
    repair,
    save_checkpoint,
)
from run.device import DTYPES, describe, peak_memory_gb, pick_device, pick_precision, prepare_memory
from run.distributed import World
from run.export import publish_best
from run.options import option, parse, table, to_json
from run.stopping import Stop, StopRequested

SKIPS_IN_A_ROW = 5  # steps without a finite gradient, after which the run is given up


@dataclass(frozen=True)
class TrainConfig:
    """What one asks for: each field is an option of the command line and a key of `config.json`."""

    model: str = option("Qwen/Qwen2-0.5B-Instruct", "folder or Hub id of the base")
    revision: str | None = option(None, "branch, tag or commit of the base on the Hub")
    data: tuple[str, ...] = option(
        ("gsm8k",), "tasks, folders, .jsonl or .parquet files, Hub datasets; name:2 takes one twice"
    )
    columns: tuple[str, ...] = option((), "what own data call theirs: question=problem,answer=text")
    data_revision: str | None = option(None, "branch, tag or commit of the data on the Hub")
    out: str | None = option(None, "run folder (default: out/<model>-<data>)")

    r: int = option(8, "rank: more holds more, and costs little", least=1)
    rank: str | None = option(None, "rank by target, as in q_proj=16,default=8")
    alpha: float = option(16.0, "scaling is alpha / r", above=0)
    alphas: str | None = option(None, "alpha by target, as in q_proj=32,default=16")
    dropout: float = option(0.1, "share of an adapter's inputs dropped", least=0, below=1)
    targets: tuple[str, ...] = option(("attention",), "attention, all-linear, or layer names")
    bias: str = option("none", "biases to train as well", choices=BIASES)
    rslora: bool = option(False, "scaling alpha / sqrt(r): for ranks above 32")
    dora: bool = option(False, "train directions and lengths apart; slower")
    init: str = option("kaiming", "what A and B start from", choices=INITS)
    from_adapter: str | None = option(None, "train on this adapter, with its r, alpha and targets")

    epochs: int = option(3, "times that each training row is taken", least=1)
    batch_size: int = option(16, "sequences of a micro-batch on one rank", least=1)
    grad_accum: int = option(1, "micro-batches of a step: less memory, same losses", least=1)
    learning_rate: float = option(2e-4, "peak of the schedule", least=0)
    schedule: str = option(
        "linear", "shape after the warm-up", choices=("constant", "linear", "cosine")
    )
    lora_plus_ratio: float | None = option(
        None, "LoRA+: B's rate is so many times A's; the paper's is 16", above=0
    )
    warmup: float = option(0.03, "share of the steps that the rate rises over", least=0, below=1)
    weight_decay: float = option(0.0, "AdamW's", least=0)
    clip: float = option(1.0, "largest gradient norm", above=0)

    validation_share: float = option(0.1, "share of the rows held out", above=0, below=1)
    evals_per_epoch: int = option(4, "validations an epoch", least=1)
    patience: int = option(5, "validations without a gain before stopping", least=1)
    stop_on: str = option(
        "loss", "what validation is to improve: the best adapter follows it",
        choices=("loss", "exact-match"),
    )  # fmt: skip
    exact_match_problems: int = option(64, "held-out problems answered for exact-match", least=1)
    max_new_tokens: int = option(512, "longest answer in that", least=1)
    max_length: int = option(2048, "tokens; longer rows are left out", least=2)
    limit: int | None = option(None, "use only this many rows of each source", least=2)
    max_steps: int | None = option(None, "stop after this many steps", least=1)
    seed: int = option(0, "of order, dropout and the adapters' first values", least=0, below=2**32)

    precision: str = option("auto", "of the base", choices=("auto", *DTYPES))
    device: str = option("auto", "where to train", choices=("auto", "cuda", "mps", "cpu"))
    compile: bool = option(False, "torch.compile the layers, for a GPU; not measured on one yet")
    price_per_hour: float | None = option(None, "of the machine in dollars, to report", least=0)
    save_every: float = option(60.0, "seconds between checkpoints", least=0)
    max_minutes: float | None = option(
        None, "leave in time, with exit code 75, to go on with the same command", above=0
    )
    show_example: bool = option(False, "print one example, what is supervised marked, and leave")


# `--demo`: the whole way in two minutes, offline. A base so small needs a higher rate.
DEMO = {
    "model": "demo", "data": ("demo",), "out": "out/demo", "epochs": 2, "learning_rate": 2e-2,
    "max_new_tokens": 160,
}  # fmt: skip


@dataclass(frozen=True)
class Data:
    """What a run learns from and is validated on, and what it takes to answer the latter."""

    train: list[Example]
    shares: tuple[Share, ...]  # of each source in `train`
    validation: dict[str, list[Example]]  # by source
    held_out: list[Problem]
    audit: Audit
    chat: ChatFormat
    eos_ids: tuple[int, ...]


def main(argv: list[str] | None = None) -> int:
    """Parse, load, check, train: each chapter prints what it chose."""
    gc.freeze()  # what was imported is no garbage, and takes long to search for it
    config = parse(
        TrainConfig, argv, "Fine-tune Qwen2 through low-rank adapters.", presets={"demo": DEMO}
    )
    lora = adapter_settings(config)
    config = replace(config, **adapter_options(lora))  # what is trained, wherever it was said
    device = pick_device(config.device, distributed.local_rank())
    precision, why = pick_precision(config.precision, device)
    prepare_memory(device)
    if config.compile:
        check_compiler(device)
    out = Path(config.out or default_out(config))
    check_place(out)
    mixture = load_mixture(config.data, config.data_revision, config.columns)
    checkpoint = find_checkpoint(config.model, config.revision)
    base = read_config(checkpoint.folder)
    adapter_numbers = check_adapters(base, lora)
    base_sha256 = ThreadPoolExecutor(1).submit(fingerprint_base, checkpoint)  # beside what follows
    chat = ChatFormat.from_folder(checkpoint.folder, base.vocab_size)
    if config.show_example:
        for part in mixture:
            show_example(part.source.train[0], chat)
        return 0

    world = distributed.join(device)
    identity = {
        "base_commit": checkpoint.commit,
        "base_sha256": base_sha256.result(),
        "base_sizes": asdict(base),
        **mixture_identity(mixture, config.limit),
        "precision": precision,
        "ranks": world.size,
    }
    if config.from_adapter:
        files = [Path(config.from_adapter) / name for name in (CONFIG, WEIGHTS)]
        identity["from_adapter_sha256"] = hash_files([file for file in files if file.exists()])
    saved = {"options": to_json(config), "identity": identity}
    changes = check_run(out, saved, to_json(TrainConfig()))  # None: nothing to go on with
    if changes is None:
        check_space(out, adapter_numbers)
    elif world.is_main:
        lock(out)
        repair(out)
    world.wait()

    if world.is_main:
        print(table(to_json(config)))
        print(f"base {checkpoint.name} at {checkpoint.commit or checkpoint.folder}")
        for source in (part.source for part in mixture):
            at = f" at {source.commit}" if source.commit else ""
            print(f"data {source.name}{at}" + (f": {source.note}" if source.note else ""))
        if config.from_adapter:
            its_base = read_adapter_config(Path(config.from_adapter))[1]
            print(f"from the adapter in {config.from_adapter}, of {its_base}: {lora}")
        print(f"device {describe(device)}; precision {precision}: {why}")
    data = prepare_data(config, mixture, chat, read_eos_ids(checkpoint.folder))
    if world.is_main:
        print("\n".join(audit_lines(data.audit)))
    schedule = Schedule(
        data.train, batch_size=config.batch_size, grad_accum=config.grad_accum,
        epochs=config.epochs, seed=config.seed, rank=world.rank, ranks=world.size,
        sources=data.shares,
    )  # fmt: skip
    done = read_progress(out)
    if done and why_over(config, done, last_step(config, schedule)) and not changes:
        if world.is_main:
            if not (out / "report.html").exists():
                write_report(out, config.price_per_hour)
            print_end(done, out)
        return 0

    model = load_model(checkpoint.folder, dtype=DTYPES[precision], device=device)
    if config.from_adapter:
        lora = read_adapter(Path(config.from_adapter), model, dropout=config.dropout)
    else:
        inject(model, lora, seed=config.seed)
    if config.compile:
        compile_layers(model)
    if world.is_main:
        trainable, total = count(model)
        print(f"trainable {trainable:,} of {total:,} ({100 * trainable / total:.2f} %)")
        print(
            f"{config.batch_size} sequences x {config.grad_accum} micro-batches x {world.size}"
            f" ranks = {schedule.examples_per_step} a step;"
            f" {schedule.steps_per_epoch} steps an epoch, {last_step(config, schedule)} in all"
        )
        lock(out)  # a new folder is made when everything has been read
        facts = {"base": checkpoint.name, "device": describe(device), "versions": versions()}
        write_run(out, saved | facts, data, changes or [])
        for change in changes or []:
            print(f"goes on, but {change}")
    with Stop(config.max_minutes) as stop:
        progress = train(
            config, schedule, data,
            model=model, lora=lora, checkpoint=checkpoint, scaled=precision == "fp16",
            device=device, world=world, out=out, stop=stop,
        )  # fmt: skip
    if progress.stopped is None:
        if world.is_main:
            place = f"step {progress.cursor} of {last_step(config, schedule)}"
            print(f"{stop.why}: stopped after {place}; the same command goes on")
        return stop.exit_code
    if world.is_main:
        print(f"report in {write_report(out, config.price_per_hour)}")
        print_end(progress, out)
    return 0


def train(
    config: TrainConfig,
    schedule: Schedule,
    data: Data,
    *,
    model: Qwen2,
    lora: LoRAConfig,
    checkpoint: Checkpoint,
    scaled: bool,
    device: torch.device,
    world: World,
    out: Path,
    stop: Stop,
) -> Progress:
    """The loop: validate, stop, save where it is due; forward, backward, accumulate, unscale, clip,
    step.
    """
    groups = rate_groups(trained_parameters(model), config.lora_plus_ratio, config.weight_decay)
    parameters = {name: p for group in groups for name, p in group["params"]}  # as it counts them
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=scaled)
    scaler.scale(torch.zeros((), device=device))  # or a rank without rows could not unscale
    progress = load_checkpoint(out, parameters=parameters, optimizer=optimizer, scaler=scaler)
    log = JsonLines(out / "metrics.jsonl", keep=progress.log_bytes) if world.is_main else None
    last = last_step(config, schedule)
    eval_at = validation_steps(schedule.epoch_start, config.evals_per_epoch, last)
    model.train()

    progress.stopped = why_over(config, progress, last)  # or not, with options that allow more

    bar = progress_bar(total=last, initial=progress.cursor, unit="step", disable=not world.is_main)
    resumed_at = saved_at = time.perf_counter()
    seconds_before = progress.seconds
    leaving = False
    while progress.stopped is None:
        # Validate now and then and at the end, keep the best, stop when it gets no better.
        due = progress.cursor in eval_at or progress.cursor >= last
        if due and progress.validated < progress.cursor and not leaving:
            found = validate(config, progress, model, data, world, stop)
            leaving = found is None  # asked to, meanwhile: it is done again
            if found:
                loss, exact_match = found["val_loss"], found.get("val_exact_match")
                is_best = progress.record_validation(loss, exact_match)
                progress.stopped = why_over(config, progress, last)
            if found and world.is_main:
                if is_best:
                    publish_best(
                        model, out, lora, checkpoint=checkpoint, data=", ".join(config.data),
                        step=progress.step, loss=loss,
                    )  # fmt: skip
                log.write(step=progress.step, epoch=schedule.epochs_in(progress.cursor), **found)
                bar.write(validation_line(progress.step, found, is_best))

        # Save all that is needed to go on from here, and leave if the run is over or asked to.
        leaving = leaving or progress.stopped is not None
        progress.seconds = seconds_before + time.perf_counter() - resumed_at
        if leaving or world.any(time.perf_counter() - saved_at > config.save_every):
            saving_at = time.perf_counter()
            if world.is_main:
                progress.log_bytes = log.sync()
                save_checkpoint(
                    out, progress, parameters=parameters, optimizer=optimizer, scaler=scaler
                )
            world.wait()
            saved_at = time.perf_counter()
            stop.record(saved_at - saving_at)
        if leaving:
            break

        # Forward and backward: each micro-batch adds its share of the step's one mean.
        started = time.perf_counter()
        step = schedule.step(progress.cursor, halved=progress.halved)
        sums = torch.zeros(2, device=device)  # nats, correct tokens
        try:
            for examples in step.micro_batches:
                batch = flat_batch(examples, device)
                seed_dropout(
                    model, seed=config.seed, epoch=step.epoch,
                    row_ids=batch.row_ids, positions=batch.positions,
                )  # fmt: skip
                hidden = model(batch.tokens, batch.positions, batch.lengths)  # (T, C)
                nats, correct = linear_cross_entropy(
                    hidden, model.head_weight, batch.targets, batch.supervised_rows
                )
                scaler.scale(nats / step.supervised_count).backward()
                sums += torch.stack((nats.detach(), correct))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if len(examples) == 1 or world.size > 1:  # ranks cannot tell each other in mid-step
                raise out_of_memory(examples, error) from error
            progress.halved += 1  # the same step again, in micro-batches half as large
            bar.write("out of memory: half as many sequences a micro-batch from here on")
            optimizer.zero_grad()
            batch = hidden = nats = correct = None  # or they keep what the smaller ones need
            continue

        # Gradients: all ranks' together, unscaled, clipped.
        world.sum_gradients(parameters.values())
        scaler.unscale_(optimizer)
        grad_norm = nn.utils.clip_grad_norm_(parameters.values(), config.clip)

        # Step, unless a number overflowed: a skipped step moves neither weights, moments nor rate.
        # What the host needs to know comes from the device at once, in the one wait of a step.
        nats, correct, grad_norm = torch.cat((sums, grad_norm[None])).tolist()
        nats, correct, asked = world.sum(nats, correct, stop.requested())
        finite = math.isfinite(nats) and math.isfinite(grad_norm)
        rate = learning_rate(config, progress.step, last)
        if finite:
            for group in optimizer.param_groups:
                group["lr"] = rate * group["ratio"]
            scaler.step(optimizer)
            progress.step += 1
        scaler.update()
        optimizer.zero_grad()
        progress.cursor += 1
        progress.skipped += not finite
        progress.skipped_in_a_row = 0 if finite else progress.skipped_in_a_row + 1
        leaving = asked > 0

        # Log: one line a step.
        seconds = time.perf_counter() - started
        stop.record(seconds)
        train_loss, speed = nats / step.supervised_count, step.token_count / seconds
        bar.update()
        bar.set_postfix_str(f"loss {train_loss:.3f}, {speed:,.0f} tokens/s", refresh=False)
        if world.is_main:
            log.write(
                step=progress.step,
                epoch=schedule.epochs_in(progress.cursor),
                train_loss=train_loss,
                train_token_accuracy=correct / step.supervised_count,
                learning_rate=rate,
                grad_norm=grad_norm,
                tokens_per_second=speed,
                peak_memory_gb=peak_memory_gb(device),
                **({} if finite else {"skipped_rows": step.row_ids}),
            )
        if progress.skipped_in_a_row >= SKIPS_IN_A_ROW and scaler.get_scale() <= 1:
            raise gave_up(progress, step.row_ids, out)
    bar.close()
    return progress


def validate(
    config: TrainConfig, progress: Progress, model: Qwen2, data: Data, world: World, stop: Stop
) -> dict[str, Any] | None:
    """Loss and teacher-forced token accuracy over every validation row; answers too, if asked for.

    The keys are those in `metrics.jsonl`. Sums travel between ranks, not means. None if `stop` is
    asked meanwhile; several ranks see that after their step only, all at the same.
    """
    poll = stop.poll if world.size == 1 else bool
    batch_size = max(1, config.batch_size >> progress.halved)
    sums: dict[str, list[float]] = {}  # nats, correct tokens, tokens of each source
    try:
        for source, examples in data.validation.items():
            mine = examples[world.rank :: world.size]
            own = teacher_forced(model, mine, batch_size, quiet=not world.is_main, poll=poll)
            sums[source] = [*world.sum(*own), sum(e.supervised_count for e in examples)]
        nats, correct, supervised = map(sum, zip(*sums.values()))
        found = {"val_loss": nats / supervised, "val_token_accuracy": correct / supervised}
        if len(sums) > 1:
            found["val_loss_by_source"] = {k: nats / n for k, (nats, _, n) in sums.items()}
        if config.stop_on == "exact-match":
            problems = data.held_out[: config.exact_match_problems]
            mine = problems[world.rank :: world.size]
            asking = GenerationSettings(max_new_tokens=config.max_new_tokens, batch_size=batch_size)
            (right,) = world.sum(exact_matches(asking, model, data, mine, poll))
            found["val_exact_match"] = right / len(problems)
        return found
    except StopRequested:
        model.train()
        return None


def exact_matches(
    asking: GenerationSettings,
    model: Qwen2,
    data: Data,
    problems: list[Problem],
    poll: Callable[[], object],
) -> int:
    """How many of `problems` the model answers right by itself, greedily."""
    is_right = next(iter(choose_scorers([p.answer for p in data.held_out]).values()))
    gold = {p.id: p.answer for p in problems}
    model.eval()
    given = answers(model, data.chat, problems, asking, eos_ids=data.eos_ids, poll=poll)
    right = sum(
        is_right(c.text, gold[c.id]) for c in progress_bar(given, desc="answer", leave=False)
    )
    model.train()
    return right


def validation_line(step: int, found: dict[str, Any], is_best: bool) -> str:
    """A validation for people, in lines of 80 columns: the sources' own losses below."""
    line = f"step {step:>5}  val loss {found['val_loss']:.4f}"
    line += f"  token accuracy (teacher-forced) {found['val_token_accuracy']:.1%}"
    if "val_exact_match" in found:
        line += f"  answers right {found['val_exact_match']:.1%}"
    line += "  best" if is_best else ""
    for source, loss in found.get("val_loss_by_source", {}).items():
        line += f"\n{'':12}val loss {loss:.4f}  {printable(source)[-45:]}"
    return line


def learning_rate(config: TrainConfig, step: int, last: int) -> float:
    """The rate of optimizer step `step`, from 0, of `last`: a function of the step alone."""
    warmup = round(config.warmup * last)
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, last - warmup)  # 0 at the peak, 1 just after the last step
    shapes = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    return config.learning_rate * shapes[config.schedule]


def why_over(config: TrainConfig, progress: Progress, last: int) -> str | None:
    """Why a run that has just been validated is over; None if it is not."""
    if progress.cursor == progress.validated >= last:  # more, if fewer are asked for than before
        return f"all {last} steps done"
    if progress.validations_since_best >= config.patience:
        return f"no better {config.stop_on} in {config.patience} validations"
    return None


def last_step(config: TrainConfig, schedule: Schedule) -> int:
    """Steps of the whole run."""
    return min(schedule.total_steps, config.max_steps or schedule.total_steps)


def validation_steps(
    epoch_start: Callable[[int], int], evals_per_epoch: int, last: int
) -> set[int]:
    """After how many steps to validate: evenly in each epoch, at its end, and at the very end."""
    steps, epoch = {last}, 0
    while (start := epoch_start(epoch)) < last:
        size = epoch_start(epoch + 1) - start
        steps |= {start + round((k + 1) * size / evals_per_epoch) for k in range(evals_per_epoch)}
        epoch += 1
    return {s for s in steps if 0 < s <= last}


def adapter_settings(config: TrainConfig) -> LoRAConfig:
    """What is trained: as the options have it or, with --from-adapter, as the adapter has it.

    BadOption if both say something, and not the same. Dropout is always the options'.
    """
    ranks = by_target("--rank", config.rank, int)
    alphas = by_target("--alphas", config.alphas, float)
    usual = LoRAConfig(dropout=config.dropout)
    asked = LoRAConfig(
        r=ranks.pop("default", config.r), alpha=alphas.pop("default", config.alpha),
        dropout=config.dropout, targets=config.targets, bias=config.bias, rslora=config.rslora,
        dora=config.dora, init=config.init, ranks=ranks, alphas=alphas,
    )  # fmt: skip
    if config.r not in (usual.r, asked.r) or config.alpha not in (usual.alpha, asked.alpha):
        raise BadOption(
            f"--r {config.r}, --alpha {config.alpha:g} and default={asked.r} of --rank,"
            f" default={asked.alpha:g} of --alphas are not the same",
            "give each in one way",
        )
    if config.from_adapter is None:
        return asked
    theirs, _, _ = read_adapter_config(Path(config.from_adapter))
    theirs = replace(theirs, dropout=config.dropout)
    values = [
        (f.name, *(getattr(c, f.name) for c in (theirs, usual, asked))) for f in fields(asked)
    ]
    if refused := [f"{n} is {t} there, {a} here" for n, t, u, a in values if a not in (t, u)]:
        raise BadOption(
            f"--from-adapter {config.from_adapter}: {listed(refused)}",
            "leave those options out: the adapter says what they are",
        )
    return theirs


def adapter_options(lora: LoRAConfig) -> dict[str, object]:
    """The options that say `lora`, each in one way."""
    names = ("r", "alpha", "targets", "bias", "rslora", "dora", "init")
    rank, alphas = (
        ",".join(f"{end}={v}" for end, v in values.items()) or None
        for values in (lora.ranks, lora.alphas)
    )
    return {name: getattr(lora, name) for name in names} | {"rank": rank, "alphas": alphas}


def check_adapters(base: Qwen2Config, lora: LoRAConfig) -> int:
    """How many numbers such adapters have on such a base; BadOption if they do not fit its layers.
    Before its weights are read.
    """
    with torch.device("meta"):
        return added_numbers(Qwen2(base), lora)


def prepare_data(
    config: TrainConfig, mixture: list[Part], chat: ChatFormat, eos_ids: tuple[int, ...]
) -> Data:
    """Split, encode and audit the rows of each source; BadData if a side is left without any."""
    parts = encode_mixture(
        mixture, chat, limit=config.limit, validation_share=config.validation_share,
        max_length=config.max_length, epochs=config.epochs,
    )  # fmt: skip
    return Data(
        train=[example for part in parts for example in part.train],
        shares=tuple(part.share for part in parts),
        validation={part.name: part.validation for part in parts},
        held_out=[problem for part in parts for problem in part.held_out],
        audit=audit_mixture(parts),
        chat=chat,
        eos_ids=eos_ids,
    )


def write_run(out: Path, config: dict, data: Data, changes: list[str]) -> None:
    """What the run folder holds from the start; `config.json` first, by which a run is known."""
    path = out / "config.json"
    earlier = json.loads(path.read_text()).get("changes", []) if path.exists() else []
    (out / "report.html").unlink(missing_ok=True)  # an earlier end's
    write_json(path, config | {"changes": earlier + changes})
    write_json(out / "audit.json", asdict(data.audit))
    rows = [json.dumps(problem.row()) + "\n" for problem in data.held_out]
    write_file(out / "validation.jsonl", "".join(rows).encode())


def fingerprint_base(checkpoint: Checkpoint) -> str | None:
    """Of a base without a commit: a hash of all that a run reads of it."""
    if checkpoint.commit:
        return None
    patterns = ("*.safetensors", "*config.json", "tokenizer.json", "chat_template.jinja")
    return hash_files([path for pattern in patterns for path in checkpoint.folder.glob(pattern)])


def show_example(problem: Problem, chat: ChatFormat) -> None:
    """Print one example as the model reads it: supervised text green, or in [[ ]]."""
    encoded = chat.encode(problem.messages)
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    before, after = ("\033[32m", "\033[0m") if colour else ("[[", "]]")
    pairs = zip(encoded.supervised_mask, encoded.tokens)
    for supervised, run in itertools.groupby(pairs, key=lambda pair: pair[0]):
        text = chat.tokenizer.decode([token for _, token in run], skip_special_tokens=False)
        text = printable(text, "\n\t")
        print(before + text + after if supervised else text, end="")
    print(f"{len(encoded.tokens)} tokens, {sum(encoded.supervised_mask)} supervised (marked)")


def default_out(config: TrainConfig) -> Path:
    """out/<model>-<data>, in lower case; the data without their weights."""
    names = [Path(name).name for name in (config.model, *source_names(config.data))]
    stems = [name.removesuffix(".jsonl").removesuffix(".parquet") for name in names]
    return Path("out") / "-".join(stems).lower()


def gave_up(progress: Progress, rows: list[int], out: Path) -> TrainingFailed:
    best = out / "best" if progress.best_step else "none yet"
    return TrainingFailed(
        f"{progress.skipped_in_a_row} steps in a row had no finite gradient, up to step"
        f" {progress.cursor}, rows {rows[:4]}...; best adapter: {best}",
        "lower --learning-rate, or use --precision fp32",
    )


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, which each kind of device says in its own words."""
    words = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or any(word in str(error) for word in words)


def out_of_memory(examples: list[Example], error: Exception) -> TrainingFailed:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else "out of memory"
    lengths = [len(example.tokens) for example in examples]
    fewer = f"leave such rows out with --max-length {max(lengths) - 1}"
    if len(lengths) > 1:
        fewer = f"take a --batch-size below {len(lengths)}"
    return TrainingFailed(
        f"{len(lengths)} sequences of {sum(lengths)} tokens do not fit into memory: {reason[:200]}",
        f"{fewer}, use a smaller --precision, or fewer --targets, in another --out",
    )


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "safetensors": safetensors.__version__,
        "tokenizers": tokenizers.__version__,
    }


def print_end(progress: Progress, out: Path) -> None:
    """What was reached, where it lies, and what to type next."""
    print(f"done: {progress.stopped}, in {progress.seconds / 60:.1f} minutes")
    if progress.skipped:
        print(f"{progress.skipped} steps were skipped: see skipped_rows in {out / 'metrics.jsonl'}")
    if progress.best_loss is None:
        print("no validation loss was finite, so there is no best adapter")
        return
    reached = f"validation loss {progress.best_loss:.4f} nats a token"
    if progress.best_exact_match is not None:
        reached += f", {progress.best_exact_match:.1%} of the held-out sample answered right"
    print(f"best: {reached}, at step {progress.best_step}")
    print(f"adapter in {out / 'best'}; what it is worth:")
    print(f"  python evaluate.py --adapter {out / 'best'}")


if __name__ == "__main__":
    sys.exit(run_script(main))
