"""Whether fp16 can hold a base's activations: tried before a run begins, not found out by it.

fp16 holds nothing above 65504, and GPUs without bf16 units have no other fast precision. Whether a
base overflows depends on its weights; `benchmarks/activations.py` measures how close it comes.
"""

import math
from dataclasses import replace

import torch

from data.batches import flat_batch
from data.encode import encode_problems
from data.rows import Problem
from errors import BadOption
from model.loss import linear_cross_entropy
from run.base import Base

ROWS = 4  # tried


def settle_fp16(
    base: Base, requested: str, saved: str | None, rows: list[Problem], max_length: int
) -> Base:
    """`base` as the run computes it: in fp32 if `--precision auto` chose fp16, which overflows.

    `requested` is the option; `saved` the precision of the run to resume, which stays as it began.
    Another precision than fp16 is not tried. Raises BadOption if fp16 was requested and overflows.
    """
    if base.precision != "fp16":
        return base
    if requested == "auto" and saved == "fp32":
        return replace(base, precision="fp32", precision_reason="as the run began")
    if saved == "fp16" or not overflows(base, rows[:ROWS], max_length):
        return base
    if requested == "fp16":
        raise BadOption(
            "--precision fp16: this base's loss or gradient is not finite in it: fp16 holds nothing"
            " above 65504",
            "use --precision bf16 or fp32, or auto",
        )
    return replace(base, precision="fp32", precision_reason="this base overflows in fp16")


def overflows(base: Base, rows: list[Problem], max_length: int) -> bool:
    """Whether the loss of `rows`, or its gradient, is not finite; the gradient is not scaled up."""
    examples, _ = encode_problems(rows, range(len(rows)), base.chat, max_length)
    if not examples:
        return False
    model, batch = base.load(), flat_batch(examples, base.device)
    first = model.model.layers[0].input_layernorm.weight.requires_grad_()  # all layers are between
    hidden = model(batch.tokens, batch.positions, batch.lengths)  # (T, C)
    nats, _ = linear_cross_entropy(hidden, model.head_weight, batch.targets, batch.supervised_rows)
    (grad,) = torch.autograd.grad(nats / max(1, len(batch.supervised_rows)), first)
    return not all(map(math.isfinite, torch.stack((nats, grad.float().norm())).tolist()))
