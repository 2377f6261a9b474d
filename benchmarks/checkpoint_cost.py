"""What safety costs: saving, hashing and forcing to the disk, against the time of a run.

    python benchmarks/checkpoint_cost.py --model FOLDER --minutes 300

Takes a base of any size, puts the default adapters on it, gives every number a gradient, and times
what a run does to be safe: a checkpoint (written, forced to the disk, read back and hashed) every
`save_every` seconds, `best/` after each validation that is the best, and once the hash of the base.
Prints a table, and the share of a run of so many minutes; writes the same as JSON.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from errors import run_script
from lora.inject import inject, trained_parameters
from lora.options import lora_config
from model.checkpoint import find_checkpoint
from model.load import load_model
from run.best import publish_best
from run.checkpoint import save_checkpoint
from run.folder import Progress, Run
from run.options import option, parse
from train import TrainConfig, fingerprint_base


@dataclass(frozen=True)
class CostConfig:
    model: str = option("Qwen/Qwen2-0.5B-Instruct", "folder or Hub id of the base")
    minutes: float = option(300.0, "length of the run to compare with", above=0)
    repeat: int = option(20, "times that each is done; medians are given", least=1)
    out: str | None = option(None, "where to write (default: a temporary folder)")
    json: str = option("checkpoint_cost.json", "file of figures to write")


def main(argv: list[str] | None = None) -> None:
    """Time each part on a real base, and say what share of a run they are."""
    config, run = parse(CostConfig, argv, "Measure what checkpoints cost."), TrainConfig()
    checkpoint = find_checkpoint(config.model)
    started = time.perf_counter()
    fingerprint_base(checkpoint)
    hashed = time.perf_counter() - started

    model = load_model(checkpoint.folder, dtype=torch.bfloat16)
    lora = lora_config(asdict(run))
    inject(model, lora, seed=0)
    parameters = trained_parameters(model)
    optimizer = torch.optim.AdamW(parameters.values(), fused=True)
    for p in parameters.values():
        p.grad = torch.randn_like(p)
    optimizer.step()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    progress = Progress()

    def save(out: Path) -> None:
        progress.cursor += 1
        save_checkpoint(
            Run(out), progress, parameters=parameters, optimizer=optimizer, scaler=scaler
        )

    def publish(out: Path) -> None:
        publish_best(model, out, lora, checkpoint=checkpoint, data="gsm8k", step=1, loss=1.0)

    with tempfile.TemporaryDirectory(dir=config.out) as folder:
        saving = timed(lambda: save(Path(folder)), config.repeat)
        publishing = timed(lambda: publish(Path(folder)), config.repeat)
        newest = max(Path(folder, "checkpoints").iterdir())
        size = sum(f.stat().st_size for f in newest.iterdir())

    seconds = 60 * config.minutes
    validations = run.epochs * run.evals_per_epoch
    costs = {
        "checkpoint": statistics.median(saving) * (seconds / run.save_every + 1),
        "best": statistics.median(publishing) * validations,
        "base's hash": hashed,
    }
    found = {
        "numbers trained": sum(p.numel() for p in parameters.values()),
        "bytes of a checkpoint": size,
        "milliseconds": {
            "checkpoint": [round(1e3 * s, 1) for s in spread(saving)],
            "best": [round(1e3 * s, 1) for s in spread(publishing)],
            "base's hash": round(1e3 * hashed, 1),
        },
        "minutes of the run": config.minutes,
        "seconds in all": {name: round(s, 2) for name, s in costs.items()},
        "share of the run": sum(costs.values()) / seconds,
    }
    Path(config.json).write_text(json.dumps(found, indent=2) + "\n")
    print(f"{found['numbers trained']:,} numbers trained, {size:,} bytes a checkpoint")
    for name, times in (("checkpoint", saving), ("best", publishing)):
        low, middle, high = (1e3 * s for s in spread(times))
        print(f"{name:<12}{middle:8.1f} ms ({low:.1f} to {high:.1f})")
    print(f"{'base hash':<12}{1e3 * hashed:8.1f} ms, once")
    print(
        f"a run of {config.minutes:g} minutes: {sum(costs.values()):.1f} s,"
        f" {found['share of the run']:.2%}"
    )


def timed(work: Callable[[], None], repeat: int) -> list[float]:
    """Seconds of each of `repeat` calls, in order of size."""
    times = []
    for _ in range(repeat):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return sorted(times)


def spread(times: list[float]) -> tuple[float, float, float]:
    return times[0], statistics.median(times), times[-1]


if __name__ == "__main__":
    sys.exit(run_script(main))
