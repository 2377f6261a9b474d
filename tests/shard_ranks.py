"""What each rank of tests/test_shard.py computes: python -m tests.shard_ranks BASE RESULTS."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from data.batches import Step
from lora import LoRAConfig, inject, trained_parameters
from model.generate import Decoding, generate
from model.load import load_model
from model.shard import is_sharded
from run import distributed
from tests import toys
from train import forward_backward

OLD = torch.__version__ < (2, 13)  # FSDP2 shards only floating-point parameters
KINDS = (None, "recomputed") if OLD else (None, "nf4", "recomputed")
LENGTHS = {0: (9, 4, 12), 1: (7,), 2: ()}  # of the micro-batches of each rank, one row each
DECODING = Decoding(8, (toys.IM_END,), toys.TOKENS, batch_size=2)


def micro_batches(rank: int) -> list:
    return [[toys.example(10 * rank + i, n, n - 1)] for i, n in enumerate(LENGTHS[rank])]


def prompts(rank: int) -> list[list[int]]:
    return [[7 * i % 290 + rank for i in range(3 + n)] for n in range(3 - rank)]


def adapted(base: Path, **options) -> torch.nn.Module:
    """The base with adapters whose B is not zero, with dropout."""
    model = load_model(base, dtype=torch.float32, **options)
    inject(model, LoRAConfig(r=4, alpha=8, dropout=0.2, targets=("all-linear",)))
    generator = torch.Generator().manual_seed(1)
    for name, p in trained_parameters(model).items():
        if name.endswith("lora_B"):
            p.data.normal_(0, 0.1, generator=generator)
    return model


def step_of(model: torch.nn.Module, ranks: list[int], world: distributed.World) -> dict:
    """Nats and gradients of one step over the micro-batches of `ranks`."""
    scaler, nats = torch.amp.GradScaler("cpu", enabled=False), 0.0
    step = Step(0, [], 0, 20, [])
    model.train()
    for rank in ranks:
        for examples in micro_batches(rank):
            nats += forward_backward(model, examples, step, seed=0, scaler=scaler)[0].item()
    parameters = trained_parameters(model).values()
    world.sum_gradients(parameters)
    return {
        "nats": world.sum(nats)[0],
        "gradients": torch.cat([p.grad.flatten() for p in parameters]).tolist(),
    }


def texts_of(model: torch.nn.Module, rank: int, world: distributed.World) -> list[list[int]]:
    found = [decoded.tokens for decoded in generate(model.eval(), prompts(rank), DECODING)]
    world.wait()
    return found


def main(base: Path, results: Path) -> None:
    world, alone = distributed.join(torch.device("cpu")), distributed.World()
    found = {}
    for kind in KINDS:
        held = None if kind == "recomputed" else kind
        plain, sharded = (adapted(base, base_precision=held, shard=s) for s in (False, True))
        for model in (plain, sharded):
            model.model.checkpoint_activations = kind == "recomputed"
        together = replace(world, lockstep=sharded.lockstep)
        parts = [p.to_local() for p in sharded.parameters() if is_sharded(p)]
        found[str(kind)] = {
            "own bytes": sum(part.untyped_storage().nbytes() for part in parts),
            "all bytes": sum(
                p.nbytes for n, p in plain.named_parameters() if "layers" in n and "lora" not in n
            ),
            "sharded": step_of(sharded, [world.rank], together),
            "plain": step_of(plain, [*range(world.size)], alone),
            "sharded texts": texts_of(sharded, world.rank, together),
            "plain texts": texts_of(plain, world.rank, alone),
        }
    (results / f"{world.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
