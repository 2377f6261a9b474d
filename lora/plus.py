"""LoRA+: B learns `ratio` times as fast as A, since it starts at zero and its gradient is small.

Source: LoRA+, arXiv:2402.12354; which parameters are meant, as peft 0.21's
`create_loraplus_optimizer` has it.
"""

from torch import nn


def rate_groups(
    parameters: dict[str, nn.Parameter], ratio: float | None, weight_decay: float
) -> list[dict]:
    """Groups for an optimizer, with the `ratio` of their rate to the schedule's: 1 without LoRA+.

    With it, all that is a vector learns as B does: DoRA's lengths and biases, which do not decay.
    Each group's `params` are (name, parameter), in the model's order.
    """
    if ratio is None:
        return [{"params": [*parameters.items()], "ratio": 1.0, "weight_decay": weight_decay}]
    slow, fast, biases = [], [], []
    for name, p in parameters.items():
        is_fast = name.endswith("lora_B") or p.ndim == 1
        (biases if name.endswith("bias") else fast if is_fast else slow).append((name, p))
    groups = [
        {"params": slow, "ratio": 1.0, "weight_decay": weight_decay},
        {"params": fast, "ratio": ratio, "weight_decay": weight_decay},
        {"params": biases, "ratio": ratio, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
