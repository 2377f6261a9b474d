"""How likely the given answers are to a model, token by token, each after the right ones before it.

This is what validation measures in training. Its token accuracy says how often the next token is
right when all before it are given; whether the model reaches an answer by itself is something else.
"""

import torch
from tqdm import tqdm

from data.batches import flat_batch, in_batches
from data.encode import Example
from model.loss import linear_cross_entropy
from model.qwen2 import Qwen2


@torch.no_grad()
def teacher_forced(
    model: Qwen2, examples: list[Example], batch_size: int, *, quiet: bool = False
) -> torch.Tensor:
    """(2,) fp64 on the model's device: the sums of nats and of correct tokens over `examples`.

    Dropout is off. Sums, not means: they can be added over ranks, and do not depend on the batch size.
    """
    was_training = model.training
    model.eval()
    device = model.head_weight.device
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    for group in tqdm(in_batches(examples, batch_size), desc="validate", leave=False, disable=quiet):
        batch = flat_batch(group, device)
        hidden = model(batch.tokens, batch.positions, batch.lengths)  # (T, C)
        totals += torch.stack(
            linear_cross_entropy(hidden, model.head_weight, batch.targets, batch.supervised)
        )
    model.train(was_training)
    return totals
