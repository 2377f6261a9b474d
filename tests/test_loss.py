"""Tests of the linear cross-entropy; the reference is `plain_loss`, which holds all logits at once.

Legend: T tokens, C hidden size, V vocabulary size.
"""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from model import fused, loss
from model.loss import IGNORE, linear_cross_entropy
from model.qwen2 import plain_loss
from tests.triton_stand_in import replace_triton

T, C, V = 37, 16, 53


@pytest.fixture(autouse=True, scope="module")
def small_chunks():
    """Several chunks of a few blocks each; no size divides the next larger one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "LOGITS_BYTES", 11 * V * 4)
        patch.setattr(loss, "PROBABILITIES_BYTES", 4 * V * 4)
        yield


def problem(
    seed: int = 0, tokens: int = T, ignored: float = 0.3, dtype=torch.float32, device="cpu"
):
    """hidden (T, C), weight (V, C), and targets (T,), a fraction `ignored` of which is IGNORE."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, C, generator=generator, dtype=dtype)
    weight = torch.randn(V, C, generator=generator, dtype=dtype)
    targets = torch.randint(V, (tokens,), generator=generator)
    targets[torch.rand(tokens, generator=generator) < ignored] = IGNORE
    hidden, weight, targets = (x.to(device) for x in (hidden, weight, targets))
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def test_the_plain_formula_equals_pytorchs_cross_entropy():
    hidden, weight, targets = problem()
    logits = hidden @ weight.t()  # (T, V)
    expected = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
    torch.testing.assert_close(plain_loss(hidden, weight, targets), expected)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 60), st.sampled_from([0.0, 0.3, 0.9]))
def test_the_loss_and_its_gradients_equal_those_of_full_logits(device, seed, tokens, ignored):
    hidden, weight, targets = problem(seed, tokens, ignored, device=device)
    nats, _ = linear_cross_entropy(hidden, weight, targets)
    truth = plain_loss(hidden, weight, targets)
    torch.testing.assert_close(nats, truth)
    ours = torch.autograd.grad(nats * 0.7, (hidden, weight))
    theirs = torch.autograd.grad(truth * 0.7, (hidden, weight))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_these_tests_use_several_chunks_and_blocks_of_unequal_sizes():
    rows, block = (size // (V * 4) for size in (loss.LOGITS_BYTES, loss.PROBABILITIES_BYTES))
    supervised = (problem(ignored=0.0)[2] != IGNORE).sum().item()
    assert supervised > 3 * rows and supervised % rows and rows > 2 * block and rows % block


@pytest.mark.parametrize("chunk_rows", [1, 5, 36, 37, 1000])
@pytest.mark.parametrize("block_rows", [1, 3, 1000])
def test_chunk_and_block_sizes_do_not_change_the_result(
    monkeypatch, device, chunk_rows, block_rows
):
    monkeypatch.setattr(loss, "LOGITS_BYTES", chunk_rows * V * 4)
    monkeypatch.setattr(loss, "PROBABILITIES_BYTES", block_rows * V * 4)
    hidden, weight, targets = problem(ignored=0.0, device=device)
    nats, _ = linear_cross_entropy(hidden, weight, targets)
    truth = plain_loss(hidden, weight, targets)
    torch.testing.assert_close(nats, truth)
    ours, theirs = (torch.autograd.grad(x, (hidden, weight)) for x in (nats, truth))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_the_gradients_pass_gradcheck():
    hidden, weight, targets = problem(tokens=9, dtype=torch.float64)
    assert gradcheck(lambda h, w: linear_cross_entropy(h, w, targets)[0], (hidden, weight))
    frozen = weight.detach()
    assert gradcheck(lambda h: linear_cross_entropy(h, frozen, targets)[0], (hidden,))
    still = hidden.detach()
    assert gradcheck(lambda w: linear_cross_entropy(still, w, targets)[0], (weight,))


def test_no_gradient_is_computed_for_a_frozen_weight():
    hidden, weight, targets = problem()
    weight.requires_grad_(False)
    nats, _ = linear_cross_entropy(hidden, weight, targets)
    kept = nats.grad_fn.saved_tensors
    nats.backward()
    assert weight.grad is None
    assert hidden.grad is not None
    assert [None if t is None else t.shape[1] for t in kept] == [C, None]


def test_ignored_tokens_contribute_nothing_and_get_no_gradient():
    hidden, weight, targets = problem()
    ignored = targets == IGNORE
    changed = hidden.detach().clone()
    changed[ignored] = 1e4
    changed.requires_grad_()
    nats, correct = linear_cross_entropy(changed, weight, targets)
    assert (nats, correct) == linear_cross_entropy(hidden, weight, targets)
    nats.backward()
    assert ignored.any() and (changed.grad[ignored] == 0).all()
    assert (changed.grad[~ignored] != 0).any(dim=1).all()


def test_passing_the_supervised_rows_does_not_change_the_result():
    hidden, weight, targets = problem()
    supervised_rows = (targets != IGNORE).nonzero().squeeze(1)
    passed = linear_cross_entropy(hidden, weight, targets, supervised_rows)
    assert passed == linear_cross_entropy(hidden, weight, targets)


def test_without_supervised_tokens_loss_and_gradients_are_zero():
    hidden, weight, targets = problem()
    nats, correct = linear_cross_entropy(hidden, weight, torch.full_like(targets, IGNORE))
    nats.backward()
    assert (nats.item(), correct.item()) == (0.0, 0)
    assert (hidden.grad == 0).all() and (weight.grad == 0).all()


def test_one_tokens_loss_is_minus_the_log_of_its_targets_probability():
    hidden, weight, _ = problem(tokens=1)
    nats, _ = linear_cross_entropy(hidden, weight, torch.tensor([7]))
    torch.testing.assert_close(nats, -(weight @ hidden[0]).softmax(0)[7].log())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extreme_logits_give_finite_losses_and_gradients(device, dtype):
    weight = torch.linspace(-1e4, 1e4, V)[:, None].to(device, dtype).requires_grad_()
    hidden = torch.tensor([[1.0], [1.0], [-1.0], [0.0]]).to(device, dtype).requires_grad_()
    targets = torch.tensor([0, V - 1, V - 1, 5], device=device)
    nats, correct = linear_cross_entropy(hidden, weight, targets)
    truth = plain_loss(hidden.detach().double(), weight.detach().double(), targets)
    torch.testing.assert_close(nats, truth.float(), rtol=1e-3, atol=1e-3)
    nats.backward()
    assert correct == 1
    assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()


def test_bf16_inputs_give_the_fp32_loss_and_gradient_within_bf16_precision():
    hidden, weight, targets = problem(dtype=torch.bfloat16)
    wide = [x.detach().float().requires_grad_() for x in (hidden, weight)]
    nats, _ = linear_cross_entropy(hidden, weight, targets)
    truth = plain_loss(*wide, targets)
    assert nats.dtype == torch.float32
    torch.testing.assert_close(nats, truth, rtol=5e-3, atol=0)
    ours = torch.autograd.grad(nats, (hidden, weight))
    for mine, exact in zip(ours, torch.autograd.grad(truth, wide), strict=True):
        assert mine.dtype == torch.bfloat16
        assert (mine.float() - exact).norm() < 0.01 * exact.norm()


def test_the_gradient_of_the_loss_is_not_rounded_to_bf16():
    hidden, weight, targets = problem(dtype=torch.bfloat16)
    factor = 257 / 256  # halfway between two bf16 numbers, 0.4 % from each
    nats, _ = linear_cross_entropy(hidden, weight.detach(), targets)
    (whole,) = torch.autograd.grad(nats, hidden, retain_graph=True)
    (scaled,) = torch.autograd.grad(nats * factor, hidden)
    assert torch.equal(scaled, (whole.float() * factor).bfloat16())


def test_backward_can_be_called_twice():
    hidden, weight, targets = problem()
    nats, _ = linear_cross_entropy(hidden, weight, targets)
    first = torch.autograd.grad(nats * 3, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(nats * 3, (hidden, weight))
    assert all(map(torch.equal, first, second))


def test_correct_counts_the_supervised_tokens_whose_target_has_the_largest_logit():
    hidden, weight, targets = problem(seed=3, tokens=200)
    likeliest = (hidden @ weight.t()).argmax(dim=1)
    targets[::2] = torch.where(targets[::2] == IGNORE, IGNORE, likeliest[::2])
    _, correct = linear_cross_entropy(hidden, weight, targets)
    count = (likeliest == targets).sum().item()
    assert correct.item() == count and 50 < count < 100


def test_the_first_of_equal_logits_is_the_prediction():
    hidden, weight = torch.ones(1, C), torch.ones(V, C)
    assert linear_cross_entropy(hidden, weight, torch.tensor([0]))[1] == 1
    assert linear_cross_entropy(hidden, weight, torch.tensor([1]))[1] == 0


def test_without_gradients_the_results_are_the_same():
    hidden, weight, targets = problem()
    with torch.no_grad():
        without = linear_cross_entropy(hidden.detach(), weight.detach(), targets)
    nats, correct = linear_cross_entropy(hidden, weight, targets)
    assert without == (nats, correct) and not without[0].requires_grad


RAGGED = ((0, 3), (3, 20), (20, 21), (21, 37))  # micro-batches of 3, 17, 1 and 16 tokens


def gradient_of(micro_batches, hidden, weight, targets, *, divided_by):
    """Gradient of `hidden` from each micro-batch's sum divided by `divided_by(its targets)`."""
    hidden = hidden.detach().requires_grad_()
    for start, stop in micro_batches:
        nats, _ = linear_cross_entropy(hidden[start:stop], weight, targets[start:stop])
        (nats / divided_by(targets[start:stop])).backward()
    return hidden.grad


def test_micro_batches_of_different_sizes_give_the_gradient_of_one_batch():
    hidden, weight, targets = problem(seed=5, ignored=0.2)
    supervised_count = (targets != IGNORE).sum()
    parts = gradient_of(
        RAGGED, hidden, weight.detach(), targets, divided_by=lambda _: supervised_count
    )
    truth = plain_loss(hidden, weight, targets) / supervised_count
    (whole,) = torch.autograd.grad(truth, hidden)
    torch.testing.assert_close(parts, whole, atol=1e-7, rtol=1e-5)


def test_averaging_the_means_of_micro_batches_gives_another_gradient():
    hidden, weight, targets = problem(seed=5, ignored=0.2)
    supervised_count = (targets != IGNORE).sum()

    def own_mean(part):
        return (part != IGNORE).sum() * len(RAGGED)

    means = gradient_of(RAGGED, hidden, weight.detach(), targets, divided_by=own_mean)
    truth = plain_loss(hidden, weight, targets) / supervised_count
    (whole,) = torch.autograd.grad(truth, hidden)
    assert (means - whole).norm() > 0.1 * whole.norm()


# The Triton kernel; `triton_stand_in.py` runs its own source.

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def triton(monkeypatch):
    if fused.triton is not None:
        pytest.skip("Triton is installed: kernel_works compares the forms on the device")
    replace_triton(monkeypatch, fused, "score_kernel")
    monkeypatch.setattr(fused, "LANES", 16)  # several blocks, which do not divide V


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 37])
def test_the_kernels_loss_and_gradients_equal_the_plain_forms(triton, monkeypatch, dtype, tokens):
    hidden, weight, targets = problem(tokens=tokens, ignored=0.2, dtype=dtype)
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 1e-2}
    found = []
    for takes_kernels in (True, False):
        monkeypatch.setattr(loss, "takes_kernels", lambda *_: takes_kernels)  # noqa: B023
        nats, correct = linear_cross_entropy(hidden, weight, targets)
        found.append((nats, correct, *torch.autograd.grad(nats, (hidden, weight))))
    torch.testing.assert_close(*found, **close)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernel_scores_each_token_as_the_plain_form_whatever_its_logits(triton, dtype):
    logits = torch.randn(6, V, generator=torch.Generator().manual_seed(1)).to(dtype)
    logits[0, [7, 40]] = 9  # the first of equal logits is the prediction
    logits[1, [7, 40]] = 9
    logits[2, :30] = -torch.inf
    logits[3] *= 1e4
    logits[4, 50], logits[5, 50] = torch.inf, torch.nan
    targets = torch.tensor([7, 40, 52, 3, 4, 5])
    plain, kernel, without = (
        (logits.clone(), targets, torch.empty(6), torch.empty(6, dtype=torch.bool))
        for _ in range(3)
    )
    loss.score_in_place(*plain, True)
    fused.score(*kernel, True)
    fused.score(*without, False)
    torch.testing.assert_close(kernel, plain, equal_nan=True)
    assert kernel[3].tolist() == [True, False, False, False, False, False]
    torch.testing.assert_close(without, (logits, *kernel[1:]), equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_trial_on_a_device_finds_a_kernel_that_differs(triton, monkeypatch, dtype):
    cpu, right = torch.device("cpu"), fused.score
    assert loss.differing_scores(cpu, dtype) == []
    for wrong in range(3):  # nats, correct, the gradient

        def score(logits, targets, nats, correct, needs_grad, wrong=wrong):
            right(logits, targets, nats, correct, needs_grad)
            (nats, correct, logits)[wrong][-1:].zero_()

        monkeypatch.setattr(fused, "score", score)
        assert loss.differing_scores(cpu, dtype) == ["score"]
