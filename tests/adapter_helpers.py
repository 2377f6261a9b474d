"""Tiny adapted models, and the same models in transformers and PEFT, for the tests of adapters.

Legend: T tokens, V vocabulary.
"""

import torch

from lora.config import LoRAConfig
from lora.inject import inject, trained_parameters
from model.load import load_model
from tests import toys

LENGTHS = (7, 1, 12)  # tokens of three examples
EVERYWHERE = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def tokens_of(lengths=LENGTHS, seed: int = 0):
    """(tokens (T,), positions (T,), lengths) of random examples."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(toys.TOKENS, (sum(lengths),), generator=generator)
    return tokens, torch.cat([torch.arange(n) for n in lengths]), list(lengths)


@torch.no_grad()
def logits(model, batch=None) -> torch.Tensor:
    """(T, V) of our model, all examples in one flat batch."""
    tokens, positions, lengths = batch or tokens_of()
    weight = model.head_weight
    return model(tokens.to(weight.device), positions.to(weight.device), lengths) @ weight.t()


@torch.no_grad()
def as_if_trained(model, seed: int = 0, size: float = 0.1) -> None:
    """Add noise to all trained parameters."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in trained_parameters(model).values():
        noise = size * torch.randn(parameter.shape, generator=generator)
        parameter += noise.to(parameter.device)


def adapted(folder, *, dtype=torch.float32, device="cpu", trained=True, size=0.1, **config):
    """The checkpoint in `folder` with adapters of rank 4 and alpha 8, in eval mode."""
    model = load_model(folder, dtype=dtype, device=device)
    inject(model, LoRAConfig(r=4, alpha=8, **{"dropout": 0.0} | config))
    if trained:
        as_if_trained(model, size=size)
    return model


def bits(model) -> dict[str, torch.Tensor]:
    """A copy of the state dict."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(a: dict, b: dict) -> bool:
    """Whether two dicts of tensors are equal bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def transformers_model(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def peft_model(folder, *, trained=True, size=0.05, **config):
    """PEFT's model with the adapters that `adapted` makes, in eval mode; other initial values."""
    from peft import LoraConfig, get_peft_model

    config = LoRAConfig(r=4, alpha=8, **{"dropout": 0.0} | config)
    targets = {"attention": list(EVERYWHERE[:4]), "all-linear": "all-linear"}
    theirs = LoraConfig(
        r=config.r, lora_alpha=config.alpha, lora_dropout=config.dropout,
        target_modules=targets.get(config.targets[0], list(config.targets)),
        use_rslora=config.rslora, use_dora=config.dora,
        rank_pattern=config.ranks, alpha_pattern=config.alphas, task_type="CAUSAL_LM",
    )  # fmt: skip
    model = get_peft_model(transformers_model(folder), theirs)
    if trained:
        as_if_trained(model, size=size)
    return model.eval()


def peft_logits(model, batch=None) -> torch.Tensor:
    """(T, V) of a transformers or PEFT model, which computes each example separately."""
    tokens, _, lengths = batch or tokens_of()
    return torch.cat([model(row[None]).logits[0] for row in tokens.split(lengths)])
