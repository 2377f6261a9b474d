"""A and B of all adapters are cast together for one forward pass, and gradients reach both."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora.inject import (
    LoRAConfig,
    adapters,
    disabled,
    inject,
    merge,
    seed_dropout,
    trained_parameters,
)
from model.loss import linear_cross_entropy
from model.qwen2 import Qwen2, Qwen2Config

TOKENS = torch.arange(9) * 7 % 64
PLACES = torch.arange(9)


def adapted(together: bool, dtype=torch.bfloat16, dora=False):
    """A model whose adapters change its output, cast `together` or each in its layer."""
    torch.manual_seed(0)
    model = Qwen2(Qwen2Config(32, 48, 2, 4, 2, 64)).to(dtype)
    inject(model, LoRAConfig(r=4, dropout=0.1, dora=dora))
    for layer in adapters(model):
        nn.init.normal_(layer.lora_B, std=0.3)
    if not together:
        model._forward_pre_hooks.clear()
    return model.train()


def nats(model, epoch=0):
    seed_dropout(model, seed=0, epoch=epoch, row_ids=TOKENS * 0, positions=PLACES)
    hidden = model(TOKENS, PLACES, [9])  # (T, C)
    return linear_cross_entropy(hidden, model.head_weight, TOKENS.roll(-1))[0]


def trained(model):
    """Losses and parameters of two steps, each of two micro-batches."""
    parameters = trained_parameters(model).values()
    optimizer, losses = torch.optim.AdamW(parameters, lr=0.01, fused=True), []
    for step in range(2):
        for micro_batch in range(2):
            losses.append(nats(model, epoch=2 * step + micro_batch))
            losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    return [*losses, *parameters]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dora", [False, True])
def test_training_is_bit_equal_to_a_cast_in_each_layer(dtype, dora):
    ours, theirs = (trained(adapted(together, dtype, dora)) for together in (True, False))
    assert all(map(torch.equal, ours, theirs)) and ours[0] != ours[2]


@torch.no_grad()
def test_no_change_of_a_matrix_is_missed_by_the_next_forward_pass():
    model = adapted(together=True).eval()
    layer, found = list(adapters(model))[-1], []
    for change in (
        lambda: None,
        lambda: layer.lora_B.add_(1),
        lambda: layer.lora_B.data.mul_(0.5),  # which no version counter of autograd counts
        lambda: setattr(layer.lora_B, "data", layer.lora_B.data + 1),
        lambda: setattr(layer, "lora_B", nn.Parameter(layer.lora_B * 2)),
    ):
        change()
        found.append(model(TOKENS, PLACES, [9]))
        alone = adapted(together=False).eval()
        list(adapters(alone))[-1].lora_B.copy_(layer.lora_B)
        assert torch.equal(found[-1], alone(TOKENS, PLACES, [9]))
    assert not any(map(torch.equal, found, found[1:]))


def test_the_casts_exist_only_during_the_forward_pass():
    model = adapted(together=True)
    seen = []
    hook = next(adapters(model)).register_forward_hook(
        lambda layer, *_: seen.append([x.dtype for x in layer.cast])
    )
    nats(model).backward()
    hook.remove()
    assert seen == [[torch.bfloat16] * 2]
    with pytest.raises(AssertionError):  # in the middle of the forward pass: keys of other tokens
        model(TOKENS[:3], PLACES[:3], [3])
    assert all(layer.cast is None for layer in adapters(model))
    with disabled(model):
        model(TOKENS, PLACES, [9])
    merge(model)
    model(TOKENS, PLACES, [9])


def test_recomputed_layers_have_the_same_gradients():
    found = []
    for recompute in (False, True):
        model = adapted(together=True)
        for layer in model.model.layers if recompute else ():
            plainly = layer.forward
            layer.forward = lambda *x, f=plainly: checkpoint(f, *x, use_reentrant=False)
        found.append(torch.autograd.grad(nats(model), list(trained_parameters(model).values())))
    assert all(map(torch.equal, *found)) and all(g.any() for g in found[0])
