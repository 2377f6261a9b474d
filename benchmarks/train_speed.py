"""Training speed: our step compared with TRL + PEFT's, on the same rows in the same batches.

    python benchmarks/train_speed.py --model FOLDER --data FOLDER --batch-size 8 --json speed.json

    # the default for TRL is its fastest on a CPU; here it has its own loss and whole batches
    python benchmarks/train_speed.py --batch-size 8 --peer-loss trl --peer-micro-batch 8

A machine's speed drifts, so only steps that were timed next to each other are compared. Both
trainers are in one process and take turns: TRL's own loop makes a step, ours makes one with the
same rows, and then the matrix products of such a step are timed alone, which gives the GEMM peak.
Before that, a step on a few rows without dropout must give both the same loss and the same adapter
gradients. Startup is not part of any figure. TRL's time excludes the collation of its rows; ours
includes it.
"""

import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import (
    DEFAULTS,
    LORA,
    GemmPeak,
    Ours,
    StepTimer,
    UnequalWork,
    flat_gradient,
    is_installed,
    mean_counts,
    peft_config,
    peft_parameters,
    randomize_B,
    ratio,
    shown,
    spread,
    step_flop,
    training_steps,
    transformers_model,
    versions,
    write_result,
)
from data.batches import Schedule, Step
from data.encode import IGNORE
from errors import BadData, BadOption, run_script
from run.base import Base
from run.compiling import check_compiler
from run.device import DTYPES, describe
from run.options import option, parse

PEER = "TRL + PEFT"
PEER_PACKAGES = ("transformers", "trl", "peft", "accelerate", "datasets")
PEER_FLAGS = ("padding_free", "use_liger_kernel", "bf16")  # flattened batches; kernels; autocast
CHECKED_ROWS = 4  # in the check of equal work: enough for padding and for two micro-batches
SAME_LOSS = 2e-3  # largest relative difference
# Smallest cosine of all adapters' gradients to those of ours in fp32. In bf16, rounding in 24
# layers with random weights leaves 0.9985 to 0.9991, ours and TRL's alike.
SAME_GRADIENT = {"fp32": 0.999, "bf16": 0.99}


@dataclass(frozen=True)
class SpeedConfig:
    model: str = option("Qwen/Qwen2-0.5B-Instruct", "base model: folder or Hub id")
    data: str = option("gsm8k", "a task, a folder with train.jsonl, or a .jsonl or .parquet file")
    steps: int = option(6, "timed steps of each trainer", least=1)
    warm_up: int | None = option(
        None, "untimed steps before them (default: on a CPU 1, with CUDA 4)", least=1
    )
    compile: bool = option(False, "compile our layers, as train.py --compile does")
    batch_size: int = option(16, "sequences in an optimizer step", least=1)
    seed: int = option(0, "random seed of data order, dropout and adapters", least=0)
    device: str = option("auto", "where to train", choices=("auto", "cuda", "cpu"))
    precision: str = option("auto", "dtype of both bases", choices=("auto", "bf16", "fp32"))
    json: str | None = option(None, "file to write the result to")

    peer: bool = option(True, f"measure {PEER} too")
    peer_micro_batch: int | None = option(
        None, "its sequences per micro-batch (default: on a CPU 1, unpadded; else all)", least=1
    )
    peer_loss: str = option(
        "auto",
        "TRL's loss, or transformers' over all logits (auto: trl with CUDA, else transformers)",
        choices=("auto", "trl", "transformers"),
    )
    peer_attention: str = option("sdpa", "its attention", choices=("sdpa", "flash_attention_2"))
    peer_flags: tuple[str, ...] = option((), f"SFTConfig's flags to set: {', '.join(PEER_FLAGS)}")


def main(argv: list[str] | None = None) -> None:
    """Load, check that both do the same work, time their steps in turns, and report."""
    groups = {f"{PEER} (pip install -e '.[bench]')": ("peer", "--peer-loss trl")}
    config = parse(SpeedConfig, argv, f"Our training step compared with {PEER}'s.", groups=groups)
    base = Base.find(config.model, precision=config.precision, device=config.device)
    if config.compile:
        check_compiler(base.device, DTYPES[base.precision], dora=False)
    config = with_defaults(config, base)
    steps = prepare_steps(config, base)
    tokens, supervised = mean_counts(steps)
    print(f"{describe(base.device)}, {base.precision}; {config.batch_size} sequences per step:"
          f" {tokens:,.0f} tokens, {supervised:,.0f} supervised")  # fmt: skip
    has_peer = config.peer and is_installed(PEER, PEER_PACKAGES)
    checks = check_equal_work(config, base, steps[0]) if has_peer else []
    result = measure(config, base, steps, has_peer)
    print(table(result, config))
    result |= {"equal_work": checks, "row_ids": [step.row_ids for step in steps]}
    result |= {"peer_versions": versions(PEER_PACKAGES)}
    write_result(config, result, base)


def with_defaults(config: SpeedConfig, base: Base) -> SpeedConfig:
    """`config` with the defaults of this device; BadOption for what cannot be measured."""
    if base.precision not in SAME_GRADIENT:
        raise BadOption(
            f"{base.precision}, this device's precision, is not measured", "use --precision fp32"
        )
    if unknown := set(config.peer_flags) - set(PEER_FLAGS):
        flags = ", ".join(PEER_FLAGS)
        raise BadOption(f"--peer-flags cannot set {', '.join(sorted(unknown))}", f"use {flags}")
    on_cpu = base.device.type == "cpu"
    micro_batch = config.peer_micro_batch or (1 if on_cpu else config.batch_size)
    if config.batch_size % micro_batch:
        raise BadOption(
            f"--peer-micro-batch {micro_batch} does not divide --batch-size {config.batch_size}",
            "give a divisor, so that both trainers have the same optimizer batches",
        )
    # On a CPU, without Triton, TRL's loss computes the logits of unsupervised tokens too.
    auto = "transformers" if on_cpu else "trl"
    loss = auto if config.peer_loss == "auto" else config.peer_loss
    warm_up = config.warm_up or (1 if on_cpu else 4)  # a GPU's first steps choose its kernels
    return replace(config, warm_up=warm_up, peer_micro_batch=micro_batch, peer_loss=loss)


def prepare_steps(config: SpeedConfig, base: Base) -> list[Step]:
    """Warm-up and timed steps over the first rows, shuffled; BadData if there are too few."""
    count = config.warm_up + config.steps
    steps = training_steps(base, config.data, count, config.batch_size, config.seed)
    rows, needed = sum(len(step.row_ids) for step in steps), count * config.batch_size
    if rows < needed:
        raise BadData(
            f"{config.data} has {rows} rows, and {count} steps take {needed}",
            "give more rows, or lower --steps, --warm-up or --batch-size",
        )
    return steps


def load_ours(config: SpeedConfig, base: Base) -> Ours:
    """Our trainer. Its B are not zero as in a new adapter, so that A has a gradient to compare."""
    ours = Ours(base.load(), seed=config.seed, compile=config.compile)
    randomize_B(ours.parameters, seed=config.seed)
    return ours


# TRL + PEFT


def load_peer(
    config: SpeedConfig, base: Base, steps: list[Step], ours: Ours, dropout: float = LORA.dropout
) -> Any:
    """An SFTTrainer over the rows of `steps`, in their order, with the weights of our adapters."""
    import transformers
    from trl import SFTTrainer

    class Peer(SFTTrainer):
        losses: list[Tensor]  # per micro-batch, already divided by the step's supervised tokens

        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            self.losses.append(loss)
            return loss

        if config.peer_loss == "transformers":
            compute_loss = transformers.Trainer.compute_loss

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="(trl|transformers|torch|accelerate)")
    tokenizer = transformers.AutoTokenizer.from_pretrained(base.folder)
    peer = Peer(
        model=transformers_model(base, attn_implementation=config.peer_attention),
        args=peer_arguments(config, base, len(steps)),
        train_dataset=peer_rows(steps),
        processing_class=tokenizer,
        peft_config=peft_config(dropout),
    )
    peer.losses = []
    peer.remove_callback(transformers.PrinterCallback)
    theirs = peft_parameters(peer.model)
    assert theirs.keys() == ours.parameters.keys(), theirs.keys() ^ ours.parameters.keys()
    with torch.no_grad():
        for name, parameter in theirs.items():
            parameter.copy_(ours.parameters[name])
    return peer


def peer_arguments(config: SpeedConfig, base: Base, steps: int) -> Any:
    """Our optimizer, schedule, clipping and order. Nothing is logged, saved or evaluated."""
    from trl import SFTConfig

    return SFTConfig(
        output_dir=str(Path(tempfile.gettempdir()) / "train_speed"),
        per_device_train_batch_size=config.peer_micro_batch,
        gradient_accumulation_steps=config.batch_size // config.peer_micro_batch,
        max_steps=steps,
        train_sampling_strategy="sequential",
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        padding_free="padding_free" in config.peer_flags,
        use_liger_kernel="use_liger_kernel" in config.peer_flags,
        bf16="bf16" in config.peer_flags and base.precision == "bf16",
        use_cpu=base.device.type == "cpu",
        dataloader_pin_memory=base.device.type == "cuda",
        gradient_checkpointing=False,
        optim="adamw_torch_fused",
        learning_rate=DEFAULTS.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=DEFAULTS.clip,
        logging_strategy="no",
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=config.seed,
    )


def peer_rows(steps: list[Step]) -> Any:
    """The examples as token ids and labels; TRL shifts the labels itself."""
    from datasets import Dataset

    return Dataset.from_list([
        {"input_ids": e.tokens.tolist(), "labels": [IGNORE, *e.targets[:-1].tolist()]}
        for step in steps
        for e in step.micro_batches[0]
    ])  # fmt: skip


# The check of equal work


def check_equal_work(config: SpeedConfig, base: Base, step: Step) -> list[dict[str, Any]]:
    """Compare both trainers' work on a few rows, in fp32 and in the base's precision.

    Raises UnequalWork if a loss or the gradients differ too much from ours in fp32.
    """
    examples = step.micro_batches[0][:CHECKED_ROWS]
    few = Schedule(examples, len(examples), grad_accum=1, epochs=1, seed=config.seed).step(0)
    micro_batch = min(config.peer_micro_batch, max(1, len(examples) // 2))
    config = replace(config, batch_size=len(examples), peer_micro_batch=micro_batch)
    print("equal work: one step without dropout, compared with ours in fp32")
    plain = replace(config, compile=False)
    reference_loss, reference_gradient = our_work(plain, replace(base, precision="fp32"), few)
    checks, equal = [], True
    for precision in dict.fromkeys(("fp32", base.precision)):
        for who, work in (("ours", our_work), (PEER, peer_work)):
            loss, gradient = work(config, replace(base, precision=precision), few)
            difference = abs(loss - reference_loss) / abs(reference_loss)
            cosine = torch.cosine_similarity(gradient, reference_gradient, dim=0).item()
            equal &= difference <= SAME_LOSS and cosine >= SAME_GRADIENT[precision]
            checks.append({"who": who, "precision": precision, "loss": loss,
                           "loss_difference": difference, "gradient_cosine": cosine})  # fmt: skip
            print(f"  {who:<11}{precision}  loss {loss:.5f}, relative difference {difference:.0e};"
                  f" gradient cosine {cosine:.5f}")  # fmt: skip
    if not equal:
        raise UnequalWork(
            "the trainers' losses or gradients differ, so their speeds cannot be compared",
            f"losses must agree within {SAME_LOSS}, and cosines be at least {SAME_GRADIENT}",
        )
    return checks


def our_work(config: SpeedConfig, base: Base, step: Step) -> tuple[float, Tensor]:
    """(loss, gradients of all adapters as one vector) of our step without dropout."""
    ours = load_ours(config, base)
    ours.model.eval()
    nats, _ = ours.backward(step).tolist()
    return nats / step.supervised_count, flat_gradient(ours.parameters)


def peer_work(config: SpeedConfig, base: Base, step: Step) -> tuple[float, Tensor]:
    """The same for the peer's step in its own loop, which clips: that changes no cosine."""
    from transformers import TrainerCallback

    peer = load_peer(config, base, [step], load_ours(config, base), dropout=0.0)
    found = []

    class Read(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **_):
            loss = sum(loss.item() for loss in peer.losses)
            found.append((loss, flat_gradient(peft_parameters(peer.model))))

    peer.add_callback(Read())
    peer.train()
    return found[0]


# What is measured


def measure(config: SpeedConfig, base: Base, steps: list[Step], has_peer: bool) -> dict[str, Any]:
    """Time our steps, the peer's if it is installed, and the GEMM peak, in turns; the figures."""
    ours = load_ours(config, base)
    timer = StepTimer(base.device, config.warm_up)
    gemm, peaks = GemmPeak(ours.model, steps, base.device), []

    def our_turn() -> None:
        timer.time(lambda: ours.step(steps[timer.count]))
        if timer.seconds:
            peaks.append(gemm.measure())

    timers = {"ours": timer}
    if has_peer:
        timers["peer"] = StepTimer(base.device, config.warm_up)
        run_peer(load_peer(config, base, steps, ours), timers["peer"], our_turn)
    else:
        for _ in steps:
            our_turn()
    timed_steps = steps[config.warm_up :]
    tokens = [step.token_count for step in timed_steps]
    flop = [step_flop(ours.model, step) for step in timed_steps]
    speeds = {who: [n / s for n, s in zip(tokens, t.seconds)] for who, t in timers.items()}
    result: dict[str, Any] = {
        "ratio": ratio(speeds["ours"], speeds["peer"]) if has_peer else None,
        "gemm_peak_gflop_per_second": spread([peak / 1e9 for peak in peaks]),
        "gflop_per_token": sum(flop) / sum(tokens) / 1e9,
    }
    for who, measured in timers.items():
        rates = [f / s for f, s in zip(flop, measured.seconds, strict=True)]
        result[who] = {
            "tokens_per_second": spread(speeds[who]),
            "fraction_of_gemm_peak": spread([r / peak for r, peak in zip(rates, peaks)]),
            "peak_memory_above_loading_gb": measured.memory_gb,
            "seconds": measured.seconds,
        }
    return result


def run_peer(peer: Any, timer: StepTimer, our_turn: Callable[[], None]) -> None:
    """TRL's own loop; each of its steps is timed, and followed by our turn."""
    from transformers import TrainerCallback

    class Turns(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            timer.begin()

        def on_step_end(self, args, state, control, **_):
            timer.end()
            our_turn()

    peer.add_callback(Turns())
    peer.train()


def table(result: dict[str, Any], config: SpeedConfig) -> str:
    """The result in 80 columns, the ratio first."""
    names, first, settings = {"ours": "ours"}, f"{PEER}: not measured", ""
    if found := result["ratio"]:
        names["peer"] = PEER
        first = (f"{found['of_medians']:.2f} times the tokens/s of {PEER}"
                 f" (by step {found['min']:.2f} to {found['max']:.2f})")  # fmt: skip
        flags = ", ".join((config.peer_attention, *config.peer_flags))
        settings = (f"{PEER}: {flags}, {config.peer_loss} loss,"
                    f" micro-batches of {config.peer_micro_batch}")  # fmt: skip
    lines = ["", first, f"{config.steps} timed steps; startup and warm-up excluded", ""]
    lines.append(f"{'':<11}{'tokens/s':>22}{'of the GEMM peak':>28}{'memory, GB':>18}")
    for who, name in names.items():
        speed = shown(result[who]["tokens_per_second"], ",.0f")
        fraction = shown(result[who]["fraction_of_gemm_peak"], ".1%")
        memory = result[who]["peak_memory_above_loading_gb"]
        lines.append(f"{name:<11}{speed:>22}{fraction:>28}{memory:>18.2f}")
    peak = shown(result["gemm_peak_gflop_per_second"], ",.0f")
    lines += [settings, "memory: peak in the first step, above that after loading",
              f"GEMM peak, matrix products alone: {peak} GFLOP/s"]  # fmt: skip
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_script(main))
