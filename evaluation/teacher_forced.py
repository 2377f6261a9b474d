"""Loss and token accuracy of given answers: each token is predicted from the true ones before it.

This is what validation measures in training. Teacher-forced token accuracy is the share of tokens
predicted correctly when everything before them is given. It does not say whether the model would
reach the answer by itself.
"""

import math
from collections.abc import Callable

import torch

from data.batches import flat_batch, in_batches
from data.chat import ChatFormat
from data.encode import Example, encode_problems
from data.rows import Problem
from model.generate import not_finite_logits
from model.loss import linear_cross_entropy
from model.qwen2 import Qwen2
from progress_bar import progress_bar


@torch.no_grad()
def teacher_forced(
    model: Qwen2,
    examples: list[Example],
    batch_size: int,
    *,
    poll: Callable[[], object] = bool,
    done: list[list[float]] | None = None,
) -> tuple[float, float]:
    """(nats, correct tokens), summed over the supervised tokens of `examples`, without dropout.

    Sums, unlike means, can be added over ranks and do not depend on the batch size. `poll` is
    called before each batch, and may raise to stop. `done` holds the sums of the first batches, if
    they were measured before; those of the others are appended to it, also if `poll` raises.
    """
    was_training = model.training
    model.eval()
    done = [] if done is None else done
    sums = [torch.zeros(0, 2, device=model.head_weight.device)]
    batches = list(in_batches(examples, batch_size))[len(done) :]
    try:
        for some in progress_bar(batches, desc="validate", leave=False):
            poll()
            batch = flat_batch(some, model.head_weight.device)
            hidden = model(batch.tokens, batch.positions, batch.lengths)  # (T, C)
            nats, correct = linear_cross_entropy(
                hidden, model.head_weight, batch.targets, batch.supervised_rows
            )
            sums.append(torch.stack((nats, correct))[None])
    finally:
        model.train(was_training)
        done += torch.cat(sums).cpu().tolist()  # the only synchronization
    nats, correct = torch.tensor(done or [[0.0, 0.0]], dtype=torch.float64).sum(0).tolist()
    return nats, correct


def teacher_forced_metrics(
    model: Qwen2, chat: ChatFormat, problems: list[Problem], batch_size: int
) -> dict[str, float]:
    """Loss in nats per supervised token, and token accuracy, of the problems' gold answers.

    Empty without problems. Raises UserError if the loss is not finite.
    """
    if not problems:
        return {}
    examples, _ = encode_problems(problems, list(range(len(problems))), chat, max_length=2**20)
    nats, correct = teacher_forced(model, examples, batch_size)
    if not math.isfinite(nats):
        raise not_finite_logits(model.head_weight.dtype)
    supervised_count = sum(example.supervised_count for example in examples)
    return {
        "loss": nats / supervised_count,
        "token_accuracy": correct / supervised_count,
        "loss_problems": len(problems),
    }
