"""LoRA+: the learning rate of B is a multiple of A's. At equal rates, B learns too slowly in wide
layers.

Source: LoRA+, arXiv:2402.12354; the assignment of parameters to groups equals peft 0.21's
`create_loraplus_optimizer`.
"""

from torch import nn


def rate_groups(
    parameters: dict[str, nn.Parameter], ratio: float | None, weight_decay: float
) -> list[dict]:
    """Parameter groups for a PyTorch optimizer, made from trained parameters by name.

    A group's `params` are (name, parameter) pairs in the order of the model, and its `ratio` is the
    factor on the scheduled learning rate. Without LoRA+ (`ratio` None) there is one group, with
    ratio 1. With it, B and DoRA's magnitudes form a second group with the given ratio.
    """
    if ratio is None:
        return [{"params": [*parameters.items()], "ratio": 1.0, "weight_decay": weight_decay}]
    # Magnitudes are the only vectors.
    fast = {n: p for n, p in parameters.items() if n.endswith("lora_B") or p.ndim == 1}
    slow = {n: p for n, p in parameters.items() if n not in fast}
    return [
        {"params": [*slow.items()], "ratio": 1.0, "weight_decay": weight_decay},
        {"params": [*fast.items()], "ratio": ratio, "weight_decay": weight_decay},
    ]
