"""How likely the given answers are to a model, token by token, each after the right ones before it.

This is what validation measures in training. Its token accuracy says how often the next token is
right when all before it are given; whether the model reaches an answer by itself is something else.
"""

from collections.abc import Callable

import torch

from data.batches import flat_batch, in_batches
from data.encode import Example
from model.loss import linear_cross_entropy
from model.qwen2 import Qwen2
from progress_bar import progress_bar


@torch.no_grad()
def teacher_forced(
    model: Qwen2,
    examples: list[Example],
    batch_size: int,
    *,
    quiet: bool = False,
    poll: Callable[[], object] = bool,
) -> tuple[float, float]:
    """(nats, correct tokens), summed over the supervised tokens of `examples`, dropout off.

    Sums, not means: they can be added over ranks, and do not depend on the batch size. `poll` is
    called before each batch, and may raise to leave.
    """
    was_training = model.training
    model.eval()
    sums = [torch.zeros(2, device=model.head_weight.device)]
    groups = in_batches(examples, batch_size)
    for group in progress_bar(groups, desc="validate", leave=False, disable=quiet):
        poll()
        batch = flat_batch(group, model.head_weight.device)
        hidden = model(batch.tokens, batch.positions, batch.lengths)  # (T, C)
        nats, correct = linear_cross_entropy(
            hidden, model.head_weight, batch.targets, batch.supervised_rows
        )
        sums.append(torch.stack((nats, correct)))
    model.train(was_training)
    nats, correct = torch.stack(sums).cpu().double().sum(0).tolist()  # the one wait
    return nats, correct
