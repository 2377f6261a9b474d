"""Does TRL + PEFT learn the same from the same rows? Its losses next to ours, step by step.

    python benchmarks/same_learning.py --model FOLDER --data FOLDER --json same.json

Both start from the same adapters (B = 0) and take the rows of `train.py`'s first steps, with its
dropout and learning rate, the latter without warm-up and decay. Only dropout's masks differ. The
validation loss is taken by each trainer's own network, on the first of `train.py`'s held-out rows.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import DEFAULTS, Ours, StepTimer, is_installed, write_result
from benchmarks.train_speed import PEER, PEER_PACKAGES, SpeedConfig, load_peer, run_peer
from data.batches import Schedule
from data.encode import IGNORE, Example, encode_problems
from data.split import split_problems
from data.tasks import load_source
from errors import run_script
from evaluation.teacher_forced import teacher_forced
from run.base import Base
from run.options import option, parse


@dataclass(frozen=True)
class LearningConfig:
    model: str = option("Qwen/Qwen2-0.5B-Instruct", "base model: folder or Hub id")
    data: str = option("gsm8k", "a task, or a folder with train.jsonl")
    steps: int = option(30, "optimizer steps of each trainer", least=1)
    batch_size: int = option(16, "sequences in an optimizer step", least=1)
    validation_rows: int = option(64, "rows that both are validated on", least=1)
    seed: int = option(0, "random seed of data order, dropout and adapters", least=0)
    precision: str = option("auto", "dtype of both bases", choices=("auto", "bf16", "fp32"))
    json: str | None = option(None, "file to write the result to")


def main(argv: list[str] | None = None) -> None:
    """Train both in turns, validate both before and after, and print the losses side by side."""
    config = parse(LearningConfig, argv, f"Our losses and {PEER}'s on the same rows.")
    if not is_installed(PEER, PEER_PACKAGES):
        return
    base = Base.find(config.model, precision=config.precision, device="cpu")
    problems = load_source(config.data).train
    rows, held_out = split_problems(problems, DEFAULTS.validation_share)
    examples, _ = encode_problems([problems[i] for i in rows], rows, base.chat, max_length=2048)
    ids = held_out[: config.validation_rows]
    validation, _ = encode_problems([problems[i] for i in ids], ids, base.chat, max_length=2048)
    schedule = Schedule(examples, config.batch_size, grad_accum=1, epochs=1, seed=config.seed)
    steps = [schedule.step(index) for index in range(config.steps)]

    ours = Ours(base.load(), seed=config.seed)
    speed = SpeedConfig(batch_size=config.batch_size, peer_micro_batch=1, seed=config.seed)
    speed = replace(speed, peer_loss="transformers")  # the faster one without Triton
    peer = load_peer(speed, base, steps, ours)
    losses: dict[str, list[float]] = {"ours": [], PEER: []}

    def our_turn() -> None:
        theirs = peer.losses[-config.batch_size :]  # a micro-batch each; they add up to the mean
        losses[PEER].append(sum(loss.item() for loss in theirs))
        losses["ours"].append(ours.step(steps[len(losses["ours"])]))
        print(f"step {len(losses['ours']):>3}  " + row({k: v[-1] for k, v in losses.items()}))

    val_losses = [validate(ours, peer.model, validation)]
    print("validation, before: " + row(val_losses[0]))
    run_peer(peer, StepTimer(base.device, warm_up=0), our_turn)
    val_losses.append(validate(ours, peer.model, validation))
    print("validation, after:  " + row(val_losses[1]))
    write_result(config, {"train_loss": losses, "val_loss": val_losses}, base)


@torch.no_grad()
def validate(ours: Ours, peer: nn.Module, examples: list[Example]) -> dict[str, float]:
    """Nats per supervised token of each trainer's network, without dropout."""
    supervised_count = sum(e.supervised_count for e in examples)
    nats, _ = teacher_forced(ours.model, examples, batch_size=16, quiet=True)
    peer.eval()
    theirs = 0.0
    for e in examples:
        logits = peer(input_ids=torch.from_numpy(e.tokens)[None]).logits[0]  # (L, V)
        targets = torch.from_numpy(e.targets)
        theirs += nn.functional.cross_entropy(
            logits.float(), targets, ignore_index=IGNORE, reduction="sum"
        ).item()
    peer.train()
    return {"ours": nats / supervised_count, PEER: theirs / supervised_count}


def row(values: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4f}" for name, value in values.items())


if __name__ == "__main__":
    sys.exit(run_script(main))
