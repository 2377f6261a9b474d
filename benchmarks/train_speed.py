"""Training speed: our step against TRL + PEFT's, on the same rows in the same optimizer batches.

    python benchmarks/train_speed.py --model FOLDER --data FOLDER --json speed.json
    python benchmarks/train_speed.py --model FOLDER --data FOLDER --peer-trials   # best settings

The one idea: a machine's speed drifts, so only what ran side by side is compared. One process holds
both contestants, and their steps alternate: TRL's own loop takes a step, then ours takes the same
rows, then the matrix products of such a step are timed alone, which is the roof. Before any of it,
a step on a few rows without dropout must give both the same loss and the same adapter gradients.
Start-up is no part of any figure. TRL's window leaves out the collating of its rows, ours does not.

Legend: T tokens, N supervised ones, C hidden size, V vocabulary.
"""

import ctypes
import gc
import json
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.batches import Schedule, Step, flat_batch
from data.chat import ChatFormat
from data.encode import IGNORE, Example, encode_problems
from data.tasks import load_source
from errors import BadData, BadOption, UserError, run_script
from lora.inject import LoRAConfig, inject, seed_dropout, trained_parameters
from lora.peft_format import peft_key
from model.checkpoint import find_checkpoint
from model.load import load_model
from model.loss import linear_cross_entropy
from model.qwen2 import Qwen2
from run.device import DTYPES, describe, pick_device, pick_precision, prepare_memory, synchronize
from run.options import option, parse, to_json

LEARNING_RATE, CLIP = 2e-4, 1.0
LORA = LoRAConfig()  # r 8, alpha 16, dropout 0.1, on q, k, v, o: the defaults of train.py
WARM_UP = 0  # the first step, which is not timed; memory is watched in it
CHECKED_ROWS = 4  # of the equal-work check: enough for padding and for two micro-batches

PEER = "TRL + PEFT"
ATTENTIONS = ("sdpa", "eager", "flash_attention_2")
PEER_MISSING = 'install it with: pip install -e ".[bench]"'
SAME_LOSS = 2e-3  # relative difference
SAME_GRADIENT = 0.999  # cosine over all adapters' gradients at once, both in fp32
ROUNDED_GRADIENT = 0.99  # in bf16 against fp32: what 24 layers of rounding leave, measured in both


@dataclass(frozen=True)
class SpeedConfig:
    model: str = option("Qwen/Qwen2-0.5B-Instruct", "folder or Hub id of the base")
    data: str = option("gsm8k", "a task, a folder with train.jsonl, or a .jsonl or .parquet file")
    steps: int = option(6, "timed steps of each contestant", least=1)
    batch_size: int = option(16, "sequences of an optimizer step", least=1)
    seed: int = option(0, "of order, dropout and the adapters' first values", least=0)
    device: str = option("auto", "where to train", choices=("auto", "cuda", "cpu"))
    precision: str = option("auto", "of the base, in both", choices=("auto", "bf16", "fp32"))
    json: str | None = option(None, "file to write the result to")

    peer: bool = option(True, "measure TRL + PEFT too")
    peer_micro_batch: int | None = option(
        None, "its sequences at once; default: on a CPU 1, which pads nothing, else all", least=1
    )
    peer_autocast: bool = option(False, "its autocast to bf16 over the bf16 base")
    peer_attention: str = option("sdpa", "its attention", choices=ATTENTIONS)
    peer_padding_free: bool = option(False, "its flattened batches")
    peer_loss: str = option(
        "auto",
        "TRL's fused head, or the model's own loss on all logits; auto: the faster, by device",
        choices=("auto", "trl", "transformers"),
    )
    peer_liger: bool = option(False, "its Liger kernels (CUDA)")
    peer_trials: bool = option(False, "try its settings one by one, and say which is fastest")


def main(argv: list[str] | None = None) -> None:
    """Load, check that both do the same work, time them side by side, report."""
    config = parse(SpeedConfig, argv, "Our training step against TRL + PEFT's, side by side.")
    device = pick_device(config.device)
    prepare_memory(device)
    job = prepare_job(config, device)
    print(f"{describe(device)}, {job.precision}; {config.batch_size} sequences a step;"
          f" {job.mean_tokens:,.0f} tokens, {job.mean_supervised:,.0f} supervised")  # fmt: skip
    settings = PeerSettings.from_config(config, device)
    if config.peer_trials:
        result = run_trials(job, settings)
        print(trials_table(result))
    else:
        peer = peer_or_none(settings) if config.peer else None
        checks = check_equal_work(job, peer, ("fp32", job.precision)) if peer else []
        ours = Ours(job)
        result = summary(job, ours, run_side_by_side(job, ours, peer))
        result["equal_work"] = [asdict(check) for check in checks]
        print(result_table(result, settings))
    if config.json:
        Path(config.json).write_text(
            json.dumps(result | about(config, job, settings), indent=2) + "\n"
        )


@dataclass(frozen=True)
class Job:
    """What both contestants are given."""

    folder: Path
    steps: list[Step]  # WARM_UP, and then those that are timed
    device: torch.device
    precision: str
    seed: int

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]

    @property
    def mean_tokens(self) -> float:
        return statistics.mean(s.tokens for s in self.steps)

    @property
    def mean_supervised(self) -> float:
        return statistics.mean(s.supervised_count for s in self.steps)


def prepare_job(config: SpeedConfig, device: torch.device) -> Job:
    """The first rows that fill the steps, shuffled as in training; BadData if there are too few."""
    precision, _ = pick_precision(config.precision, device)
    if precision == "fp16":
        raise BadOption("fp16, this device's precision, is not measured", "use --precision fp32")
    folder = find_checkpoint(config.model).folder
    count = 1 + config.steps
    needed = count * config.batch_size
    source = load_source(config.data)
    problems = source.train[:needed]
    if len(problems) < needed:
        raise BadData(
            f"{source.name} has {len(problems)} rows, and {count} steps take {needed}",
            "give more rows, or smaller --steps or --batch-size",
        )
    examples, left_out = encode_problems(
        problems, list(range(needed)), ChatFormat.from_folder(folder), max_length=2**20
    )
    assert not left_out, left_out
    schedule = Schedule(examples, config.batch_size, grad_accum=1, epochs=1, seed=config.seed)
    return Job(folder, [schedule.step(i) for i in range(count)], device, precision, config.seed)


class Ours:
    """Our contestant: the model, and one optimizer step with the lines of `train.py`'s loop."""

    def __init__(self, job: Job):
        self.job = job
        self.model = load_model(job.folder, dtype=job.dtype, device=job.device)
        inject(self.model, LORA, seed=job.seed)
        self.parameters = trained_parameters(self.model)
        generator = torch.Generator().manual_seed(job.seed)
        for name, p in self.parameters.items():
            if name.endswith("lora_B"):  # not zero, or A would have no gradient to compare
                p.data.copy_(torch.randn(p.shape, generator=generator) * 0.01)
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=LEARNING_RATE, weight_decay=0.0, fused=True
        )

    def step(self, step: Step) -> None:
        self.model.train()
        self.backward(step)
        nn.utils.clip_grad_norm_(self.parameters.values(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def backward(self, step: Step) -> float:
        """Add the step's gradients; returns its mean loss."""
        total = torch.zeros((), device=self.job.device)
        for examples in step.micro_batches:
            batch = flat_batch(examples, self.job.device)
            seed_dropout(
                self.model, seed=self.job.seed, epoch=step.epoch,
                row_ids=batch.row_ids, positions=batch.positions,
            )  # fmt: skip
            hidden = self.model(batch.tokens, batch.positions, batch.lengths)  # (T, C)
            nats, _ = linear_cross_entropy(
                hidden, self.model.head_weight, batch.targets, batch.supervised_rows
            )
            (nats / step.supervised_count).backward()
            total += nats.detach()
        return total.item() / step.supervised_count


@dataclass(frozen=True)
class PeerSettings:
    """How TRL + PEFT runs, where that is not part of the job."""

    micro_batch: int | None = None
    autocast: bool = False
    attention: str = "sdpa"
    padding_free: bool = False
    loss: str = "trl"
    liger: bool = False

    @classmethod
    def from_config(cls, config: SpeedConfig, device: torch.device) -> "PeerSettings":
        # On a CPU, the fastest that --peer-trials found: one sequence at a time pads nothing,
        # and TRL's head, without Triton, scores silent tokens too. On CUDA they are TRL's own.
        on_gpu = device.type == "cuda"
        loss = "trl" if on_gpu else "transformers"
        return cls(
            micro_batch=config.peer_micro_batch or (None if on_gpu else 1),
            autocast=config.peer_autocast,
            attention=config.peer_attention,
            padding_free=config.peer_padding_free,
            loss=loss if config.peer_loss == "auto" else config.peer_loss,
            liger=config.peer_liger,
        )

    def __str__(self) -> str:
        parts = [f"micro-batch {self.micro_batch or 'all'}", self.attention, f"{self.loss} loss"]
        flags = {"autocast": self.autocast, "padding-free": self.padding_free, "liger": self.liger}
        return ", ".join(parts + [name for name, on in flags.items() if on])


def peer_or_none(settings: PeerSettings) -> PeerSettings | None:
    """The settings, if what they need is installed; else None, after a line on what is missing."""
    try:
        import accelerate  # noqa: F401
        import datasets  # noqa: F401
        import peft  # noqa: F401
        import trl  # noqa: F401
    except ImportError as error:
        print(f"{PEER}: not measured: {error.name} is missing; {PEER_MISSING}")
        return None
    return settings


def build_peer(job: Job, settings: PeerSettings, ours: Ours, dropout: float = LORA.dropout) -> Any:
    """An SFTTrainer over the job's rows, in their order, with our adapters' weights."""
    import transformers
    from peft import LoraConfig
    from trl import SFTTrainer

    class Peer(SFTTrainer):
        losses: list[Tensor]  # of each micro-batch, already divided by the step's supervised tokens

        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            self.losses.append(loss)
            return loss

        if settings.loss == "transformers":
            compute_loss = transformers.Trainer.compute_loss

    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", module="(trl|transformers|torch|accelerate)")
    tokenizer = transformers.AutoTokenizer.from_pretrained(job.folder, local_files_only=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        job.folder, dtype=job.dtype, attn_implementation=settings.attention, local_files_only=True
    )
    targets = sorted({name.split(".")[-2] for name in ours.parameters})
    trainer = Peer(
        model=model,
        args=peer_arguments(job, settings),
        train_dataset=peer_rows(job),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=LORA.r, lora_alpha=LORA.alpha, lora_dropout=dropout, target_modules=targets,
            task_type="CAUSAL_LM",
        ),
    )  # fmt: skip
    trainer.losses = []
    trainer.remove_callback(transformers.PrinterCallback)
    copy_adapters(ours.parameters, peer_parameters(trainer.model))
    return trainer


def peer_arguments(job: Job, settings: PeerSettings) -> Any:
    """Our optimizer, schedule, clipping and order; nothing logged, saved or evaluated."""
    from trl import SFTConfig

    batch_size = len(job.steps[0].row_ids)
    micro_batch = settings.micro_batch or batch_size
    if batch_size % micro_batch:
        raise BadOption(
            f"--peer-micro-batch {micro_batch} does not divide a step of {batch_size}",
            "the optimizer batches would differ",
        )
    return SFTConfig(
        output_dir=str(Path(tempfile.gettempdir()) / "train_speed"),
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=batch_size // micro_batch,
        max_steps=len(job.steps),
        train_sampling_strategy="sequential",
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        padding_free=settings.padding_free,
        bf16=settings.autocast and job.precision == "bf16",
        use_cpu=job.device.type == "cpu",
        dataloader_pin_memory=job.device.type == "cuda",
        use_liger_kernel=settings.liger,
        gradient_checkpointing=False,
        optim="adamw_torch_fused",
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=CLIP,
        logging_strategy="no",
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=job.seed,
    )


def peer_rows(job: Job) -> Any:
    """The job's examples in their order, as token ids and labels; TRL shifts the labels itself."""
    from datasets import Dataset

    def row(example: Example) -> dict[str, list[int]]:
        return {
            "input_ids": example.tokens.tolist(),
            "labels": [IGNORE, *example.targets[:-1].tolist()],
        }

    return Dataset.from_list([row(e) for s in job.steps for m in s.micro_batches for e in m])


def peer_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """PEFT's trained parameters, under our names."""
    renamed = {
        n.replace(".default.weight", ".weight"): p
        for n, p in model.named_parameters()
        if p.requires_grad
    }
    prefix = peft_key("").removesuffix(".weight")
    return {n.removeprefix(prefix).removesuffix(".weight"): p for n, p in renamed.items()}


@torch.no_grad()
def copy_adapters(source: dict[str, nn.Parameter], target: dict[str, nn.Parameter]) -> None:
    assert source.keys() == target.keys(), sorted(source.keys() ^ target.keys())[:4]
    for name, parameter in target.items():
        parameter.copy_(source[name])


@dataclass(frozen=True)
class Work:
    """What a step computes: its loss, and all adapters' gradients as one vector."""

    loss: float
    gradient: Tensor

    @classmethod
    def of(cls, loss: float, parameters: dict[str, nn.Parameter]) -> "Work":
        gradients = [parameters[name].grad.flatten() for name in sorted(parameters)]
        return cls(loss, torch.cat(gradients).double())


@dataclass(frozen=True)
class EqualWork:
    """How far one contestant's work is from the reference's, which is ours in fp32."""

    who: str
    precision: str
    loss: float
    loss_difference: float  # relative
    gradient_cosine: float

    @property
    def holds(self) -> bool:
        least = SAME_GRADIENT if self.precision == "fp32" else ROUNDED_GRADIENT
        return self.loss_difference <= SAME_LOSS and self.gradient_cosine >= least

    def __str__(self) -> str:
        return (
            f"  {self.who:<11}{self.precision}  loss {self.loss:.5f},"
            f" {self.loss_difference:.0e} off; gradient cosine {self.gradient_cosine:.5f}"
        )


class UnequalWork(UserError):
    """The contestants do not compute the same thing, so their speeds mean nothing."""


def check_equal_work(
    job: Job, settings: PeerSettings, precisions: tuple[str, ...]
) -> list[EqualWork]:
    """Both contestants' work in each precision, against ours in fp32; UnequalWork if it differs."""
    small = replace(job, steps=[first_rows(job.steps[0], CHECKED_ROWS)])
    if settings.micro_batch is not None:
        most = max(1, len(small.steps[0].row_ids) // 2)
        settings = replace(settings, micro_batch=min(settings.micro_batch, most))
    reference = our_work(replace(small, precision="fp32"))
    print("equal work: a step without dropout, against ours in fp32")
    found = []
    for precision in dict.fromkeys(precisions):
        this = replace(small, precision=precision)
        for who, work in (("ours", our_work(this)), (PEER, peer_work(this, settings))):
            found.append(compare(reference, work, who, precision))
            print(found[-1])
    if not all(check.holds for check in found):
        raise UnequalWork(
            "the contestants' losses or gradients differ, so their speeds mean nothing",
            f"losses must agree within {SAME_LOSS}; cosines be at least {SAME_GRADIENT} in fp32,"
            f" {ROUNDED_GRADIENT} in bf16",
        )
    return found


def first_rows(step: Step, count: int) -> Step:
    """The same step with only its first examples."""
    examples = step.micro_batches[0][:count]
    return replace(
        step,
        micro_batches=[examples],
        tokens=sum(len(e.tokens) for e in examples),
        supervised=sum(e.supervised_count for e in examples),
        rows=[e.row_id for e in examples],
    )


def our_work(job: Job) -> Work:
    """Of the job's first step, without dropout."""
    ours = Ours(job)
    ours.model.eval()
    return Work.of(ours.backward(job.steps[0]), ours.parameters)


def peer_work(job: Job, settings: PeerSettings) -> Work:
    """Of the job's first step in TRL's own loop, without dropout."""
    from transformers import TrainerCallback

    trainer = build_peer(job, settings, Ours(job), dropout=0.0)
    works = []

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **_):  # clipped: no cosine changes
            loss = sum(loss.item() for loss in trainer.losses)
            works.append(Work.of(loss, peer_parameters(trainer.model)))

    trainer.add_callback(Look())
    trainer.train()
    return works[0]


def compare(reference: Work, work: Work, who: str, precision: str) -> EqualWork:
    a, b = reference.gradient, work.gradient
    difference = abs(work.loss - reference.loss) / abs(reference.loss)
    return EqualWork(who, precision, work.loss, difference, (a @ b / (a.norm() * b.norm())).item())


@dataclass
class Record:
    """What was measured of one contestant."""

    weights_gb: float
    seconds: list[float] = field(default_factory=list)  # of each timed step
    memory_gb: float = 0.0  # peak within the warm-up step, above what lay there before it


class Stopwatch:
    """Times one contestant's steps; in the warm-up step it watches memory instead."""

    def __init__(self, model: nn.Module, device: torch.device):
        tensors = {t.data_ptr(): t for t in model.parameters()}  # tied ones once
        self.record = Record(sum(t.nbytes for t in tensors.values()) / 1e9)
        self.device, self.meter = device, MemoryMeter(device)

    def begin(self, index: int) -> None:
        if index == WARM_UP:
            self.meter.start()
        synchronize(self.device)
        self.started = time.perf_counter()

    def end(self, index: int) -> None:
        synchronize(self.device)
        seconds = time.perf_counter() - self.started
        if index == WARM_UP:
            self.record.memory_gb = self.meter.stop()
        elif index > WARM_UP:
            self.record.seconds.append(seconds)


class MemoryMeter:
    """Peak memory between `start` and `stop`, in GB above what was in use at `start`.

    On a CPU: anonymous resident memory, sampled, after the allocator has given back what it kept
    from others; mapped weight files are no part of it. On CUDA: what PyTorch has allocated.
    """

    INTERVAL = 0.01  # seconds between samples

    def __init__(self, device: torch.device):
        self.device = device

    def start(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
            return
        if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
            libc.malloc_trim(0)
        self.before = self.peak = resident_bytes()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._sample, daemon=True)
        self.thread.start()

    def _sample(self) -> None:
        while not self.done.wait(self.INTERVAL):
            self.peak = max(self.peak, resident_bytes())

    def stop(self) -> float:
        if self.device.type == "cuda":
            return (torch.cuda.max_memory_allocated(self.device) - self.before) / 1e9
        self.done.set()
        self.thread.join()
        return (self.peak - self.before) / 1e9


def resident_bytes() -> int:
    """Anonymous resident memory of this process; 0 where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(x.split()[1]) * 1024 for x in lines if x.startswith("RssAnon:")), 0)


@dataclass
class Measured:
    """Of one run: both contestants' records, and the roof's rate beside each pair of steps."""

    ours: Record
    peer: Record | None
    roof: list[float]  # FLOP/s


def run_side_by_side(job: Job, ours: Ours, settings: PeerSettings | None) -> Measured:
    """Alternate the peer's steps, if there is a peer, our steps, and the roof's products."""
    watch, roof, rates = Stopwatch(ours.model, job.device), Roof(ours.model, job), []

    def our_turn(index: int) -> None:
        watch.begin(index)
        ours.step(job.steps[index])
        watch.end(index)
        if index > WARM_UP:
            rates.append(roof.measure())

    if settings is not None:
        return Measured(watch.record, run_peer(job, ours, settings, our_turn), rates)
    for index in range(len(job.steps)):
        our_turn(index)
    return Measured(watch.record, None, rates)


def run_peer(
    job: Job, ours: Ours, settings: PeerSettings, our_turn: Callable[[int], None]
) -> Record:
    """TRL's own loop; its clock runs from a step's begin to its end, then comes our turn."""
    from transformers import TrainerCallback

    trainer = build_peer(job, settings, ours)
    watch = Stopwatch(trainer.model, job.device)

    class Turns(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            watch.begin(state.global_step)

        def on_step_end(self, args, state, control, **_):
            index = state.global_step - 1  # it has been counted already
            watch.end(index)
            our_turn(index)

    trainer.add_callback(Turns())
    trainer.train()
    return watch.record


class Roof:
    """The matrix products of one step, alone: what the machine gives if nothing else cost anything.

    Frozen layers make two products each, forward and the gradient of their input; the head makes
    them on the supervised rows only. Adapters and attention, 3 % of the arithmetic, are left out.
    """

    def __init__(self, model: Qwen2, job: Job):
        self.job = job
        layers = model.config.num_hidden_layers
        tokens, supervised = round(job.mean_tokens), round(job.mean_supervised)
        self.products = [(w, tokens, layers) for w in frozen_weights(model)]  # weight, rows, times
        self.products += [(model.head_weight, supervised, 1)]

    def measure(self) -> float:
        """FLOP/s over all products, each weighted by how often a step makes it."""
        work = seconds = 0.0
        for weight, rows, times in self.products:
            for left in (weight, weight.t()):  # input gradient, forward
                x = torch.randn(rows, left.shape[0], device=self.job.device).to(self.job.dtype)
                y = x.new_empty(rows, left.shape[1])
                fastest = min(self._seconds(x, left, y) for _ in range(2))
                work += times * 2 * rows * weight.numel()
                seconds += times * fastest
        return work / seconds

    def _seconds(self, x: Tensor, weight: Tensor, y: Tensor) -> float:
        synchronize(self.job.device)
        started = time.perf_counter()
        torch.mm(x, weight, out=y)
        synchronize(self.job.device)
        return time.perf_counter() - started


def frozen_weights(model: Qwen2) -> list[Tensor]:
    """The weights (out, in) of one layer's linear products."""
    layer = model.model.layers[0].parameters()
    return [p for p in layer if p.dim() == 2 and not p.requires_grad]


def useful_flop(model: Qwen2, step: Step) -> float:
    """The least arithmetic of a step: padding, silent rows of the head, recomputation are no use.

    A multiply and an add are 2. A frozen weight costs 4 a token, forward and input gradient; a
    trained one 6; attention two products of C a pair of tokens, and twice as much backward.
    """
    C, layers = model.config.hidden_size, model.config.num_hidden_layers
    frozen = layers * sum(w.numel() for w in frozen_weights(model))
    trained = sum(p.numel() for p in trained_parameters(model).values())
    lengths = [len(e.tokens) for micro_batch in step.micro_batches for e in micro_batch]
    pairs = sum(n * (n + 1) // 2 for n in lengths)  # of a token and one that it attends to
    head = 4 * C * model.config.vocab_size * step.supervised_count
    return (4 * frozen + 6 * trained) * step.token_count + 12 * C * layers * pairs + head


def summary(job: Job, ours: Ours, measured: Measured) -> dict[str, Any]:
    """Figures for people and for JSON: the ratio first, then each contestant, then the roof."""
    timed = job.steps[1:]
    flop = [useful_flop(ours.model, step) for step in timed]
    records = {"ours": measured.ours, "peer": measured.peer}
    rates = {
        who: [step.token_count / s for step, s in zip(timed, record.seconds)] if record else None
        for who, record in records.items()
    }
    contestants = {
        who: {
            "tokens_per_second": spread(rates[who]),
            "share_of_roof": spread(
                [f / s / roof for f, s, roof in zip(flop, record.seconds, measured.roof)]
            ),
            "peak_memory_above_loading_gb": record.memory_gb,
            "weights_gb": record.weights_gb,
            "seconds": record.seconds,
        }
        if record
        else None
        for who, record in records.items()
    }
    return {
        "ratio": ratio(rates["ours"], rates["peer"]) if measured.peer else None,
        **contestants,
        "roof_gflop_per_second": spread([r / 1e9 for r in measured.roof]),
        "useful_gflop_per_token": sum(flop) / sum(s.tokens for s in timed) / 1e9,
    }


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratio(a: list[float], b: list[float]) -> dict[str, float]:
    """The ratio of medians, with the range of the ratios of neighbouring steps."""
    pairs = [x / y for x, y in zip(a, b, strict=True)]
    return {
        "of_medians": statistics.median(a) / statistics.median(b),
        "pairwise_min": min(pairs),
        "pairwise_max": max(pairs),
    }


def result_table(result: dict[str, Any], settings: PeerSettings) -> str:
    """80 columns, the ratio first."""
    contestants = [result["ours"]] + ([result["peer"]] if result["peer"] else [])
    steps = len(result["ours"]["seconds"])
    if result["ratio"]:
        first = (
            "{of_medians:.2f} times the tokens/s of {peer}"
            " (pairwise {pairwise_min:.2f} to {pairwise_max:.2f})"
        ).format(peer=PEER, **result["ratio"])
    else:
        first = f"{PEER}: not measured"

    def row(name: str, cell: Callable[[dict[str, Any]], str]) -> str:
        return f"{name:<32}" + "".join(f"{cell(c):>22}" for c in contestants)

    rows = [
        f"{'':<32}" + "".join(f"{name:>22}" for name in ["ours", PEER][: len(contestants)]),
        row("tokens/s, median", lambda c: f"{c['tokens_per_second']['median']:,.1f}"),
        row("  slowest to fastest step", lambda c: _range(c["tokens_per_second"], ",.1f")),
        row("share of the roof, median", lambda c: f"{c['share_of_roof']['median']:.1%}"),
        row("  lowest to highest", lambda c: _range(c["share_of_roof"], ".1%")),
        row("peak memory above loading, GB", lambda c: f"{c['peak_memory_above_loading_gb']:.2f}"),
        row("weights, GB", lambda c: f"{c['weights_gb']:.2f}"),
    ]
    roof = result["roof_gflop_per_second"]
    return "\n".join(
        ["", first, f"over {steps} timed steps of each; start-up and warm-up excluded", ""]
        + [*rows, ""]
        + ([f"{PEER} with {settings}"] if result["ratio"] else [])
        + [f"roof: {roof['median']:,.0f} GFLOP/s ({_range(roof, ',.0f')}): its products alone"]
    )


def _range(values: dict[str, float], form: str) -> str:
    return f"{values['min']:{form}} to {values['max']:{form}}"


def trial_changes(first: PeerSettings, job: Job) -> list[dict[str, Any]]:
    """What to try, one after the other; each is kept if it makes the peer faster."""
    batch_size = len(job.steps[0].row_ids)
    sizes = [size for size in (1, batch_size // 2, batch_size) if size]
    changes: list[dict[str, Any]] = [
        {"loss": "transformers" if first.loss == "trl" else "trl"},
        {"autocast": not first.autocast},
        {"attention": "eager" if first.attention == "sdpa" else "sdpa"},
        *({"micro_batch": size} for size in sizes if size != (first.micro_batch or batch_size)),
        *({"micro_batch": size, "padding_free": True} for size in sizes if size > 1),
    ]
    if job.device.type == "cuda":
        changes.append({"liger": not first.liger})
        changes.append({"attention": "flash_attention_2", "padding_free": True})
    return changes


def run_trials(job: Job, first: PeerSettings) -> dict[str, Any]:
    """Change the peer's settings one by one and keep what is faster; ours is the yardstick."""
    if peer_or_none(first) is None:
        raise BadOption("--peer-trials: there is no peer", PEER_MISSING)
    ours = Ours(job)
    best, results = first, [run_trial(job, ours, first)]
    least = results[0].get("ratio", {}).get("of_medians", float("inf"))
    for change in trial_changes(first, job):
        results.append(run_trial(job, ours, replace(best, **change)))
        found = results[-1].get("ratio", {}).get("of_medians", float("inf"))
        if found < least:
            best, least = replace(best, **change), found
    return {"fastest": str(best), "trials": results}


def run_trial(job: Job, ours: Ours, settings: PeerSettings) -> dict[str, Any]:
    """The summary of one run; of settings that cannot run, or do other work, the reason."""
    print(f"trial: {settings}")
    try:
        check_equal_work(job, settings, (job.precision,))
        found = summary(job, ours, run_side_by_side(job, ours, settings))
        print(f"  ours over it {found['ratio']['of_medians']:.2f}")
    except (UnequalWork, ImportError, ValueError, RuntimeError) as error:
        found = {"failed": str(error).splitlines()[0]}
        print(f"  failed: {found['failed'][:68]}")
    gc.collect()
    return {"settings": asdict(settings), "name": str(settings)} | found


def trials_table(result: dict[str, Any]) -> str:
    """The peer's settings, fastest first by their ratio to ours."""
    works = sorted(
        (t for t in result["trials"] if "failed" not in t), key=lambda t: t["ratio"]["of_medians"]
    )
    lines = [f"{'':<52}{'ours over it':>14}{'tokens/s':>14}"]
    for t in works:
        rate = t["peer"]["tokens_per_second"]["median"]
        lines.append(f"{t['name']:<52}{t['ratio']['of_medians']:>14.2f}{rate:>14,.1f}")
    lines += [f"{t['name']:<52}{'failed':>14}" for t in result["trials"] if "failed" in t]
    return "\n".join(["", *lines, f"fastest: {result['fastest']}"])


def about(config: SpeedConfig, job: Job, settings: PeerSettings) -> dict[str, Any]:
    """The machine, the versions and the settings behind the figures."""
    return {
        "options": to_json(config),
        "peer_settings": asdict(settings),
        "device": describe(job.device),
        "precision": job.precision,
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],  # more than the threads: others were busy too
        "platform": platform.platform(),
        "versions": versions(),
        "start_up": "excluded",
        "rows": [step.row_ids for step in job.steps],
    }


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("torch", "transformers", "trl", "peft", "accelerate"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


if __name__ == "__main__":
    sys.exit(run_script(main))
