"""What safety costs: saving, hashing and forcing to the disk, as a fraction of a run's time.

    python benchmarks/checkpoint_cost.py --model FOLDER --minutes 300

Puts the default adapters on a base of any size, gives every parameter a gradient, and times what a
run does to be safe: a checkpoint every `save_every` seconds (written, forced to the disk, read back
and hashed), `best/` after each validation if that was the best so far, and the hash of the base
once. Prints the times, and their fraction of a run of the given length.
"""

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import DEFAULTS, LORA, Ours, shown, spread, timed, write_result
from errors import run_script
from run.base import Base, hash_base
from run.best import publish_best
from run.checkpoint import save_checkpoint
from run.folder import Progress, Run
from run.options import option, parse


@dataclass(frozen=True)
class CostConfig:
    model: str = option("Qwen/Qwen2-0.5B-Instruct", "base model: folder or Hub id")
    minutes: float = option(300.0, "length of the run to compare with", above=0)
    repeat: int = option(20, "how often to save", least=1)
    out: str | None = option(None, "folder to write to (default: a temporary one)")
    json: str | None = option(None, "file to write the result to")


def main(argv: list[str] | None = None) -> None:
    """Time each part on a real base, and print what fraction of a run they take."""
    config = parse(CostConfig, argv, "Measure what checkpoints cost.")
    base = Base.find(config.model)
    hashing, _ = timed(lambda: hash_base(base.folder), base.device)
    ours = Ours(base.load())
    for p in ours.parameters.values():
        p.grad = torch.randn_like(p)
    ours.optimizer.step()  # makes the optimizer's state

    progress = Progress(best_loss=1.0)
    with tempfile.TemporaryDirectory(dir=config.out) as folder:
        run = Run(Path(folder))

        def save() -> None:
            progress.cursor += 1
            save_checkpoint(run, progress, ours.parameters, ours.optimizer, ours.scaler)

        def publish() -> None:
            publish_best(ours.model, LORA, base, run, progress)

        saving = repeated(save, config.repeat, base.device)
        publishing = repeated(publish, config.repeat, base.device)
        size = sum(file.stat().st_size for file in run.checkpoints()[-1].iterdir())

    trained = sum(p.numel() for p in ours.parameters.values())
    seconds = 60 * config.minutes
    costs = {
        "checkpoint": saving["median"] * (seconds / DEFAULTS.save_every + 1),
        "best": publishing["median"] * DEFAULTS.epochs * DEFAULTS.evals_per_epoch,
        "hash of the base": hashing,
    }
    fraction = sum(costs.values()) / seconds
    print(f"{trained:,} trained parameters, {size:,} bytes per checkpoint")
    for name, times in (("checkpoint", saving), ("best", publishing)):
        milliseconds = {key: 1e3 * s for key, s in times.items()}
        print(f"{name:<18}{shown(milliseconds, '.1f')} ms")
    print(f"{'hash of the base':<18}{1e3 * hashing:.1f} ms, once")
    print(f"of a run of {config.minutes:g} minutes: {sum(costs.values()):.1f} s, {fraction:.2%}")
    result = {
        "trained_parameters": trained, "bytes_per_checkpoint": size,
        "seconds": {"checkpoint": saving, "best": publishing, "hash of the base": hashing},
        "seconds_of_the_run": costs, "fraction_of_the_run": fraction,
    }  # fmt: skip
    write_result(config, result, base)


def repeated(work: Callable[[], None], repeat: int, device: torch.device) -> dict[str, float]:
    """The spread of the seconds of `repeat` calls."""
    return spread([timed(work, device)[0] for _ in range(repeat)])


if __name__ == "__main__":
    sys.exit(run_script(main))
