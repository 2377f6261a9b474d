"""Activations: the largest value at each place of the network, against what fp16 can hold.

    python benchmarks/activations.py --model FOLDER --data FOLDER

Only what the network computes in its own dtype matters: the residual stream, norms, rotation and
scores are fp32 in any precision. The gradient is that of the step's mean loss, not scaled up.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data import load_source
from data.batches import flat_batch
from data.encode import encode_problems
from errors import run_script
from model.loss import linear_cross_entropy
from run.base import Base
from run.options import option, parse

LARGEST = torch.finfo(torch.float16).max
PLACES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Config:
    model: str = option("Qwen/Qwen2-0.5B-Instruct", "base model: folder or Hub id")
    data: str = option("gsm8k", "where the rows are from")
    rows: int = option(8, "rows in the one micro-batch", least=1)
    precision: str = option("fp32", "dtype to compute in", choices=("bf16", "fp16", "fp32"))
    device: str = option("cpu", "where", choices=("auto", "cuda", "mps", "cpu"))


def main(argv: list[str] | None = None) -> None:
    config = parse(Config, argv, __doc__)
    base = Base.find(config.model, precision=config.precision, device=config.device)
    problems = load_source(config.data).train[: config.rows]
    examples, _ = encode_problems(problems, range(len(problems)), base.chat, max_length=2048)
    batch, model = flat_batch(examples, base.device), base.load()
    peaks: dict[str, list[tuple[float, str]]] = {}  # by place: (largest value, layer)

    def record(place: str, layer: str, x: Tensor) -> None:
        peaks.setdefault(place, []).append((x.detach().abs().max().item(), layer))

    def observe(name: str) -> Callable[..., None]:
        """A forward hook for the module called `name`."""
        place, layer = name.rpartition(".")[2], name.split(".")[2]

        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            record(f"{place} input", layer, inputs[0])
            record(f"{place} output", layer, output)
            output.register_hook(lambda grad: record(f"{place} gradient", layer, grad))

        return hook

    for name, module in model.named_modules():
        if name.endswith(PLACES):
            module.register_forward_hook(observe(name))
    model.model.embed_tokens.weight.requires_grad_()  # so that gradients pass through all layers
    hidden = model(batch.tokens, batch.positions, batch.lengths)  # (T, C)
    nats, _ = linear_cross_entropy(hidden, model.head_weight, batch.targets, batch.supervised_rows)
    (nats / len(batch.supervised_rows)).backward()
    print(f"{base.name}, {len(batch.tokens):,} tokens, {base.precision}; fp16 holds {LARGEST:,.0f}")
    for place in sorted(peaks):
        peak, layer = max(peaks[place])
        print(
            f"{place:<20} {peak:>12.4g}  layer {layer:>2}  {peak / LARGEST:.2%} of fp16's largest"
        )


if __name__ == "__main__":
    sys.exit(run_script(main))
