"""Fine-tune Qwen2 on worked answers with low-rank adapters, with the whole loop in plain sight.

    python train.py --demo                         # everything, offline, in about a minute
    python train.py --epochs 3                     # Qwen2-0.5B-Instruct on GSM8K, from the Hub
    python train.py --model FOLDER --data FOLDER   # the same from local files
    torchrun --nproc-per-node 2 train.py           # on two devices

The one idea: the loss of a step is the sum over all its supervised tokens divided by their count,
however they are spread over micro-batches and ranks. `main` is the table of contents, `train` the
loop, `forward_backward` one micro-batch.
"""

from errors import run_script  # first: from here on, Ctrl-C ends without a traceback

# isort: split
import gc
import math
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data.audit import Audit, audit_mixture
from data.batches import Schedule, Step, flat_batch
from data.encode import Example
from data.mixture import (
    WeightedSource,
    check_rounding,
    encode_mixture,
    load_mixture,
    mixture_identity,
    source_names,
)
from data.rows import Problem
from data.tasks import TASKS
from evaluation.answers import GenerationSettings, exact_matches
from evaluation.tasks import Judge, judge_of, judged_problems
from evaluation.teacher_forced import teacher_forced
from lora.config import added_parameters
from lora.inject import adapters, count, inject, seed_dropout, trained_parameters
from lora.options import RENAMED, lora_config, lora_options
from lora.peft_format import check_adapter, inject_adapter
from lora.plus import rate_groups
from model.compile import compile_layers
from model.generate import Decoding
from model.graphs import graph_training
from model.loss import linear_cross_entropy
from model.qwen2 import Qwen2
from report import write_report
from run import console, distributed
from run.base import Base, checked_adapter
from run.best import publish_best
from run.checkpoint import load_checkpoint, save_checkpoint
from run.compiling import check_execution
from run.device import (
    DTYPES,
    check_trained,
    no_finite_gradient,
    out_of_memory_reported,
    peak_memory_gb,
    pick_device,
    total_memory_gb,
    why_given_up,
)
from run.distributed import World
from run.earlier import upgrade_options
from run.folder import Progress, Run, check_place, check_space, default_folder, lock
from run.fp16 import settle_fp16
from run.memory import MemoryModel, check_memory
from run.options import changed_options, option, parse, to_json
from run.stopping import Stop, StopRequested
from run.track import TRACKERS, RunLog, check_tracker

SKIPS_IN_A_ROW = 5  # steps without a finite gradient after which the run fails


@dataclass(frozen=True)
class TrainConfig:
    """The options: each field is a flag of the command line and a key of `config.json`."""

    model: str = option("Qwen/Qwen2-0.5B-Instruct", "base model: folder or Hub id", path="any")
    revision: str | None = option(None, "branch, tag or commit of the base on the Hub")
    data: tuple[str, ...] = option(
        ("gsm8k",),
        f"tasks ({', '.join(TASKS)}), files or folders of rows, Hub datasets; NAME:2 takes its rows"
        " twice an epoch",
    )
    columns: tuple[str, ...] = option((), "rename columns: question=problem,answer=text")
    data_revision: str | None = option(None, "branch, tag or commit of the data on the Hub")
    out: str | None = option(None, "run folder (default: out/<model>-<data>)", path="new")

    rank: str = option(
        "8",
        "adapter rank; higher can learn more, at little cost; per target as in 8,q_proj=16",
    )
    alpha: str = option("16", "adapters are scaled by alpha / rank; per target as in 16,q_proj=32")
    dropout: float = option(
        0.1, "fraction of an adapter's inputs set to zero in training", least=0, below=1
    )
    targets: tuple[str, ...] = option(
        ("attention",), "layers to adapt: attention, all-linear, or layer names"
    )
    rslora: bool = option(False, "scale by alpha / sqrt(rank) instead; for ranks above 32")
    dora: bool = option(False, "DoRA: train direction and magnitude separately; slower")
    from_adapter: str | None = option(
        None, "continue training this adapter (keeps its rank, alpha, targets)", path="any"
    )

    epochs: int = option(3, "passes over the training data", least=1)
    batch_size: int = option(16, "sequences per micro-batch, in each process", least=1)
    grad_accum: int = option(1, "micro-batches accumulated per step, to save memory", least=1)
    learning_rate: float = option(2e-4, "peak learning rate", least=0)
    schedule: str = option(
        "linear", "decay after warm-up", choices=("constant", "linear", "cosine")
    )
    lora_plus_ratio: float | None = option(
        None, "LoRA+: learning rate of B over that of A; the paper uses 16", above=0
    )
    warmup: float = option(0.03, "fraction of steps spent on linear warm-up", least=0, below=1)
    weight_decay: float = option(0.0, "AdamW's weight decay", least=0)
    clip: float = option(1.0, "largest gradient norm", above=0)
    system: str | None = option(
        None, "system prompt of rows without one, '' for an empty one (default: the template's)"
    )
    chat_template: str | None = option(
        None, "file of a chat template to use instead of the base's", path="file"
    )
    max_length: int = option(2048, "longest example in tokens; longer rows are left out", least=2)
    limit: int | None = option(None, "use only the first N rows of each source", least=2)
    max_steps: int | None = option(None, "stop after this many steps", least=1)
    seed: int = option(0, "random seed of data order, dropout and adapters", least=0, below=2**32)

    validation_share: float = option(
        0.1, "fraction of the rows held out for validation", above=0, below=1
    )
    evals_per_epoch: int = option(
        4, "validations per epoch; one more before the first step", least=1
    )
    patience: int = option(5, "validations without improvement before stopping", least=1)
    stop_on: str = option(
        "loss", "metric for early stopping and for choosing the best adapter",
        choices=("loss", "exact-match"),
    )  # fmt: skip
    exact_match_problems: int = option(64, "held-out problems answered for exact-match", least=1)
    max_new_tokens: int = option(512, "longest answer for exact-match, in tokens", least=1)

    precision: str = option("auto", "dtype of the base", choices=("auto", *DTYPES))
    base_precision: str | None = option(
        None, "hold the weights of the base's layers in 4 or 8 bits", choices=("nf4", "int8")
    )
    shard: bool = option(False, "spread the base's layers over all ranks; for torchrun")
    device: str = option("auto", "where to train", choices=("auto", "cuda", "mps", "cpu"))
    checkpoint_activations: bool = option(
        False, "keep each layer's input only and recompute the rest: less memory, slower"
    )
    compile: bool = option(False, "compile the layers, after checking their gradients")
    cuda_graphs: bool = option(
        False, "launch a training step as CUDA graphs; not tried on a GPU yet"
    )
    price_per_hour: float | None = option(
        None, "price of the machine in dollars, for the report", least=0
    )
    save_every: float = option(60.0, "seconds between checkpoints", least=0)
    max_minutes: float | None = option(
        None,
        "stop cleanly after this many minutes (exit code 75); rerun the command to resume",
        above=0,
    )
    dry_run: bool = option(
        False, "measure one step, print what the run would take, write nothing, and exit"
    )
    fresh: bool = option(
        False,
        "use a new folder, OUT-2, ..., if OUT holds a finished run or one of other code",
    )
    track: str | None = option(
        None, "show the log in this tracker too; its package must be installed", choices=TRACKERS
    )
    show_example: bool = option(False, "print one example with its supervised text, and exit")


GROUPS = {  # title -> first option, example
    "model and data": ("model", "--data gsm8k arc-challenge:0.5 rows.jsonl"),
    "adapter": ("rank", "--rank 16,q_proj=32 --targets all-linear"),
    "training": ("epochs", "--batch-size 4 --grad-accum 4"),
    "validation": ("validation_share", "--stop-on exact-match"),
    "machine": ("precision", "--max-minutes 55 --track tensorboard"),
}
HELP = """Fine-tune Qwen2, Qwen2.5 or Qwen3 with low-rank adapters.

examples:
  %(prog)s --demo
  %(prog)s --epochs 3
  %(prog)s --data rows.jsonl --show-example
"""
# `--demo`: the whole path in a minute, offline. So small a base needs a higher learning rate.
DEMO = {
    "model": "demo", "data": ("demo",), "out": "out/demo", "epochs": 2, "learning_rate": 2e-2,
    "max_new_tokens": 160,
}  # fmt: skip


@dataclass(frozen=True)
class Data:
    """What a run trains on, and what it is validated on."""

    schedule: Schedule
    validation: dict[str, list[Example]]  # by source
    held_out: list[Problem]  # the validation rows as problems
    answerable: list[Problem]  # those of them whose gold the judge can read
    judge: Judge  # how an answer to them is judged


@distributed.lost_ranks_reported()
def main(argv: list[str] | None = None) -> int:
    """From the command line to a trained adapter; returns the exit code."""
    # 1. The options, and what they say about the adapters.
    gc.freeze()  # imported modules live forever, and scanning them for garbage takes long
    config = parse(TrainConfig, argv, HELP, presets={"demo": DEMO}, groups=GROUPS, renamed=RENAMED)
    lora = lora_config(to_json(config))
    config = replace(config, **lora_options(lora))  # with --from-adapter, as the adapter has them
    device = pick_device(config.device, distributed.local_rank())
    check_execution(config, device, dora=lora.dora)
    check_tracker(config.track)
    out = Path(config.out or default_folder(config.model, source_names(config.data)))
    run = Run.choose(out, fresh=config.fresh)
    check_place(run.folder)

    # 2. What is read: data and base. Everything that can be wrong is found before weights are read.
    commits = run.commits_of_data(config.data, config.data_revision)
    mixture = load_mixture(config.data, config.data_revision, config.columns, commits)
    adapter = checked_adapter(config.from_adapter) if config.from_adapter else None
    base = Base.find(
        config.model, run.commit_of_base(config.model, config.revision),
        adapter=adapter and adapter.folder, precision=config.precision, device=device,
        system=config.system, chat_template=config.chat_template,
    ).held_in(config.base_precision)  # fmt: skip
    base.start_hashing()
    with torch.device("meta"):
        network = Qwen2(base.config)
    if adapter:
        check_adapter(adapter, network)
    trainable = added_parameters(network, lora)  # BadOption if the options do not fit the base
    if config.show_example:
        for part in mixture:
            console.show_example(part.source, base.chat)
        return 0

    # On a GPU without bf16 units: whether fp16 can hold this base is tried before there is a run.
    train_rows = [row for part in mixture for row in part.source.train]
    begun = run.identity.get("precision")
    base = settle_fp16(base, config.precision, begun, train_rows, config.max_length)

    # 3. The run: new, resumed, or refused because the folder holds another one.
    world = distributed.join(device)
    identity = base.identity() | mixture_identity(mixture, config.limit) | {"ranks": world.size}
    if adapter:
        identity["from_adapter_sha256"] = adapter.sha256
    saved = {"options": to_json(config), "identity": identity, **base.facts()}
    saved["changed_options"] = [*changed_options(config)]
    changes = run.check(saved, to_json(TrainConfig()), upgrade_options)  # None: a new run
    if run.format == 1:
        check_rounding(run.audit())
    if changes is None:
        check_space(run.folder, trainable)
    elif world.is_main and not config.dry_run:
        lock(run.folder)
        run.repair()
    world.wait()

    # 4. What will happen: the options, the data in numbers, the steps.
    if world.is_main:
        console.print_start(config, base, mixture, lora)
    data, audit = prepare_data(config, mixture, base, world)
    schedule, progress = data.schedule, run.read_progress()
    goal = (schedule.total_steps, config.patience, config.stop_on)
    if progress and not config.dry_run and (reason := progress.reason_finished(*goal)):
        run.check_finished_by_this_program()
        progress.stopped = reason
        if changes and world.is_main:
            run.report_page.unlink(missing_ok=True)  # such as another price per hour
        return finish(config, base, run, progress, world)
    halved, recompute = progress.halved if progress else 0, config.checkpoint_activations
    parts = world.size if config.shard else 1
    held = base.base_precision, parts, config.compile
    memory = MemoryModel(network, lora, DTYPES[base.precision], device, *held)
    needed = check_memory(memory, schedule, recompute=recompute, halved=halved)

    # 5. The model, with adapters.
    model = base.load(shard=config.shard)
    world = replace(world, lockstep=model.lockstep)
    if adapter:
        inject_adapter(adapter, model, dropout=config.dropout)
    else:
        inject(model, lora, seed=config.seed)
    model.model.checkpoint_activations = recompute
    if config.compile:
        compile_layers(model)
    if config.cuda_graphs:
        graph_training(model, [layer.dropout for layer in adapters(model)])
    if world.is_main:
        console.print_sizes(trainable, count(network)[1], schedule)
        print(needed)
    if config.dry_run:
        dry_run(config, schedule, base, model)
        world.wait()
        return 0
    if world.is_main:
        lock(run.folder)  # makes a new folder, now that everything has been read
        rows = [problem.row() for problem in data.held_out]
        run.write_start(saved, changes or [], asdict(audit), rows)
        console.print_changes(changes or [])

    # 6. Training, and the report.
    smaller = "rerun the command with half the --batch-size and twice the --grad-accum to resume"
    with Stop(config.max_minutes, world.notice) as stop, out_of_memory_reported(smaller):
        progress = train(config, data, base, model, run, world, stop)
    base.check_unchanged()
    if progress.stopped:
        return finish(config, base, run, progress, world)
    if world.is_main:
        print(f"{stop.reason}: stopped after step {progress.cursor} of {schedule.total_steps};"
              " rerun the command to resume")  # fmt: skip
    return stop.exit_code


def prepare_data(
    config: TrainConfig, mixture: list[WeightedSource], base: Base, world: World
) -> tuple[Data, Audit]:
    """The rows as examples, split and scheduled for this rank, and their statistics, printed."""
    sources = encode_mixture(
        mixture, base.chat, limit=config.limit, validation_share=config.validation_share,
        max_length=config.max_length,
    )  # fmt: skip
    schedule = Schedule(
        [example for source in sources for example in source.train],
        batch_size=config.batch_size, grad_accum=config.grad_accum, epochs=config.epochs,
        max_steps=config.max_steps, seed=config.seed, rank=world.rank, ranks=world.size,
        sources=tuple(source.rows for source in sources),
    )  # fmt: skip
    held_out = [problem for source in sources for problem in source.held_out]
    validation = {source.name: source.validation for source in sources}
    judge = judge_of(held_out, [*validation], generated=True)
    answerable, golds = judged_problems(judge, held_out)
    audit = audit_mixture(sources)
    if world.is_main:
        console.print_audit(audit)
        if config.stop_on == "exact-match":
            print(f"exact match: judged as {judge.name}" + f"; {golds}" * bool(golds))
    return Data(schedule, validation, held_out, answerable, judge), audit


def train(
    config: TrainConfig, data: Data, base: Base, model: Qwen2, run: Run, world: World, stop: Stop
) -> Progress:
    """The loop: validate, save and stop where due; forward, backward, unscale, clip, step."""
    lora = lora_config(to_json(config))
    groups = rate_groups(trained_parameters(model), config.lora_plus_ratio, config.weight_decay)
    parameters = {name: p for group in groups for name, p in group["params"]}
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)
    scaler = torch.amp.GradScaler(base.device.type, enabled=base.precision == "fp16")
    scaler.scale(torch.zeros((), device=base.device))  # or a rank without rows could not unscale
    progress = load_checkpoint(run, parameters, optimizer, scaler)
    last = data.schedule.total_steps
    goal = (last, config.patience, config.stop_on)
    progress.stopped = progress.reason_finished(*goal)  # the options may allow more steps now
    log = RunLog(run, progress, tracker=config.track, enabled=world.is_main)
    validate_at = data.schedule.validation_steps(config.evals_per_epoch)
    display = console.Display(run, progress, validate_at, enabled=world.is_main)
    seconds_before, started, saved = progress.seconds, time.perf_counter(), time.perf_counter()
    stopping = saving = False
    model.train()

    while progress.stopped is None:
        # Validate where due and after the last step; keep the best adapter; stop early.
        due = progress.cursor in validate_at or progress.cursor >= last
        if due and progress.validated < progress.cursor and not stopping:
            found = validate(config, progress, data, base, model, world, stop)
            stopping = found is None  # a stop was requested; the validation is repeated on resuming
            if found:
                scores = found["val_loss"], found.get("val_exact_match")
                is_best = progress.record_validation(*scores)
                progress.stopped = progress.reason_finished(*goal)
                if is_best and world.is_main:
                    publish_best(model, lora, base, run, progress)
                epoch = data.schedule.epochs_in(progress.cursor)
                log.write(step=progress.step, epoch=epoch, **found)
                display.show_validation(found, is_best)

        # Save what resuming needs, and leave the loop if the run is finished or must stop.
        stopping = stopping or progress.stopped is not None
        now = time.perf_counter()
        progress.seconds = seconds_before + now - started
        if stopping or saving:
            progress.log_bytes = log.sync()
            if world.is_main:
                save_checkpoint(run, progress, parameters, optimizer, scaler)
            world.wait()
            saved = time.perf_counter()
            stop.record(saved - now)
        if stopping:
            break

        # Forward and backward: each micro-batch adds its part of the step's one mean.
        step_started = time.perf_counter()
        step = data.schedule.step(progress.cursor, halved=progress.halved)
        sums = torch.zeros(2, device=base.device)  # nats, correct tokens
        given_up = False, False  # for lack of memory; because a stop was requested
        try:
            for examples in step.micro_batches:
                stop.poll_in_step()
                sums += forward_backward(model, examples, step, seed=config.seed, scaler=scaler)
        except (RuntimeError, MemoryError, StopRequested) as error:
            given_up = why_given_up(error, [len(e.tokens) for e in examples])

        # Gradients: summed over ranks, unscaled, clipped. If one rank gave up, all repeat the step.
        too_large, stopping = world.sum_gradients(parameters.values(), *given_up)
        if too_large or stopping:
            progress.halved += too_large
            optimizer.zero_grad()
            continue
        scaler.unscale_(optimizer)
        grad_norm = nn.utils.clip_grad_norm_(parameters.values(), config.clip)

        # Step, unless something overflowed: a skipped step changes no weight, moment or schedule.
        # What the host must know is read from the device at once: the only wait of a step.
        nats, correct, grad_norm = torch.cat((sums, grad_norm[None])).tolist()
        save_due = time.perf_counter() - saved > config.save_every
        nats, correct, stops, saves = world.sum(nats, correct, stop.requested(), save_due)
        finite = math.isfinite(nats) and math.isfinite(grad_norm)
        lr = learning_rate(config, progress.step, last)
        if finite:
            for group in optimizer.param_groups:
                group["lr"] = lr * group["ratio"]
            scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        progress.record_step(finite)
        stopping, saving = stops > 0, saves > 0

        # Log: one line per step.
        seconds = time.perf_counter() - step_started
        stop.record(seconds)
        train_loss, speed = nats / step.supervised_count, step.token_count / seconds
        display.show_step(train_loss, speed)
        log.write(
            step=progress.step, epoch=data.schedule.epochs_in(progress.cursor),
            train_loss=train_loss, train_token_accuracy=correct / step.supervised_count,
            learning_rate=lr, grad_norm=grad_norm,
            tokens_per_second=speed, peak_memory_gb=peak_memory_gb(base.device),
            **({} if finite else {"skipped_rows": step.row_ids}),
        )  # fmt: skip
        # A smaller scale may make gradients finite, but not a loss.
        if progress.skipped_in_a_row >= SKIPS_IN_A_ROW and (
            not math.isfinite(nats) or scaler.get_scale() <= 1
        ):
            raise no_finite_gradient(progress, step.row_ids, run.best, base.precision)
    display.close()
    log.close()
    return progress


def finish(config: TrainConfig, base: Base, run: Run, progress: Progress, world: World) -> int:
    """Report a finished run; returns its exit code, or raises TrainingFailed if no step counted."""
    if world.is_main:
        if not run.report_page.exists():
            print(f"report in {write_report(run.folder, config.price_per_hour)}")
        console.print_end(progress, run)
    check_trained(progress, base.precision)
    return 0


def dry_run(config: TrainConfig, schedule: Schedule, base: Base, model: Qwen2) -> None:
    """Print what the run would take, from the second of two steps; nothing is updated."""
    scaler = torch.amp.GradScaler(base.device.type, enabled=base.precision == "fp16")
    model.train()
    smaller = f"use a --batch-size below {config.batch_size} with a larger --grad-accum"
    with out_of_memory_reported(smaller):
        for _ in range(2):  # the first one includes warm-up
            started, step = time.perf_counter(), schedule.step(0)
            for examples in step.micro_batches:
                forward_backward(model, examples, step, seed=config.seed, scaler=scaler).tolist()
            seconds = time.perf_counter() - started
    memory = peak_memory_gb(base.device), total_memory_gb(base.device)
    console.print_plan(schedule, step.token_count, seconds, memory)


def forward_backward(
    model: Qwen2, examples: list[Example], step: Step, *, seed: int, scaler: torch.amp.GradScaler
) -> Tensor:
    """Backpropagate one micro-batch; returns (2,): its nats and its number of correct tokens.

    Dividing by the supervised tokens of the whole step, rather than of the micro-batch, is what
    makes the gradient independent of how the step is split.
    """
    batch = flat_batch(examples, model.head_weight.device)
    seed_dropout(
        model, seed=seed, epoch=step.epoch, row_ids=batch.row_ids, positions=batch.positions
    )
    hidden = model(batch.tokens, batch.positions, batch.lengths)  # (T, C)
    nats, correct = linear_cross_entropy(
        hidden, model.head_weight, batch.targets, batch.supervised_rows
    )
    scaler.scale(nats / step.supervised_count).backward()
    return torch.stack((nats.detach(), correct))


def validate(
    config: TrainConfig, progress: Progress, data: Data, base: Base, model: Qwen2, world: World,
    stop: Stop,
) -> dict[str, Any] | None:  # fmt: skip
    """Loss and teacher-forced token accuracy over all validation rows, by the log's keys.

    With --stop-on exact-match, also the share of a sample of these rows that is answered correctly.
    Ranks exchange sums, not means. Returns None on all ranks if a stop is requested of any of them
    during the validation, which continues on resuming.
    If a batch of a single rank does not fit into memory, all are halved from then on.
    """
    batch_size = max(1, config.batch_size >> progress.halved)
    sums: dict[str, list[float]] = {}  # by source: nats, correct tokens, supervised tokens
    try:
        for source, examples in data.validation.items():
            mine = examples[world.rank :: world.size]
            done = progress.part_of_validation(source, batch_size, world.rank, world.size)
            with world.stopping_together():
                own = teacher_forced(
                    model, mine, batch_size, quiet=not world.is_main, poll=stop.poll, done=done
                )
            sums[source] = [*world.sum(*own), sum(e.supervised_count for e in examples)]
        nats, correct, supervised = map(sum, zip(*sums.values()))
        found = {"val_loss": nats / supervised, "val_token_accuracy": correct / supervised}
        if len(sums) > 1:
            found["val_loss_by_source"] = {k: nats / n for k, (nats, _, n) in sums.items()}
        if config.stop_on == "exact-match":
            sample = data.answerable[: config.exact_match_problems]
            decoding = Decoding(
                config.max_new_tokens, base.eos_ids, base.chat.vocab_size, batch_size
            )
            settings = GenerationSettings(decoding)
            mine = sample[world.rank :: world.size]
            done = progress.part_of_validation("answers", batch_size, world.rank, world.size)
            with world.stopping_together():
                own = exact_matches(model, base.chat, mine, settings, data.judge, stop.poll, done)
            found["val_exact_match"] = sum(world.sum(own)) / len(sample)
        return found
    except StopRequested:
        model.train()
        progress.merge_validating(world.gather(progress.validating))  # rank 0 saves them
        return None
    except (RuntimeError, MemoryError) as error:
        if world.size > 1:  # the other ranks wait for this one's sums
            raise
        lengths = sorted(len(e.tokens) for part in data.validation.values() for e in part)
        why_given_up(error, lengths[-batch_size:])
    progress.halved += 1  # after the handler, which holds the memory of the batch that failed
    return validate(config, progress, data, base, model, world, stop)


def learning_rate(config: TrainConfig, step: int, last: int) -> float:
    """The learning rate of step `step`, counted from 0, in a run of `last` optimizer steps."""
    warmup = round(config.warmup * last)
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, last - warmup)  # 0 at the peak, 1 just after the last step
    shapes = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    return config.learning_rate * shapes[config.schedule]


if __name__ == "__main__":
    sys.exit(run_script(main))
