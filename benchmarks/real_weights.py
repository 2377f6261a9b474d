"""How close this code is to transformers, PEFT and lm-evaluation-harness on published weights.

    python benchmarks/real_weights.py --model FOLDER --data FOLDER --json real.json
    python benchmarks/real_weights.py --model FOLDER --data FOLDER --rows 0 --harness 64
    python benchmarks/real_weights.py --model FOLDER --data FOLDER --rows 0 --held 6

Tests compare with the same packages on tiny random bases. Real weights have what those lack: large
activations, confident predictions, and near-ties. FOLDER is any Qwen2 or Qwen2.5 checkpoint, such
as what `hf download Qwen/Qwen2-0.5B-Instruct` fetches. The figures in docs/performance.md are of
Qwen2.5-Coder-0.5B-Instruct, dequantised from Q4_K_M: transformers writes such a folder from the
file qwen2.5-coder-0.5b-instruct-q4_k_m.gguf with `from_pretrained(..., gguf_file=...)` in bf16.
"""

import gc
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import (
    LORA,
    flat_gradient,
    is_installed,
    peft_parameters,
    randomize_B,
    transformers_model,
    write_result,
)
from data.batches import flat_batch
from data.encode import Example, encode_problems
from data.problems import Source
from data.tasks import load_source
from errors import run_script
from evaluation.teacher_forced import teacher_forced
from lora.inject import inject, trained_parameters
from lora.peft_format import save_adapter
from model.generate import Decoding, generate
from model.loss import linear_cross_entropy
from run.base import Base
from run.options import option, parse


@dataclass(frozen=True)
class RealConfig:
    model: str = option("Qwen/Qwen2-0.5B-Instruct", "folder or Hub id of published weights")
    data: str = option("gsm8k", "a task, or a folder with train.jsonl and test.jsonl")
    rows: int = option(8, "training rows for logits, divergence and gradients; 0 skips these")
    held: int = option(0, "training and test rows for bases held in nf4 and int8; 0 skips these")
    harness: int = option(0, "test problems also answered by lm-evaluation-harness's model class")
    max_new_tokens: int = option(256, "longest answer to them, in tokens", least=1)
    json: str | None = option(None, "file to write the result to")


def main(argv: list[str] | None = None) -> None:
    """Compare what is installed, print each figure, and write them."""
    config = parse(RealConfig, argv, "This code and its oracles on published weights.")
    base = Base.find(config.model, precision="fp32", device="cpu")
    source = load_source(config.data)
    result: dict[str, Any] = {}
    if config.rows and is_installed("transformers and PEFT", ("transformers", "peft")):
        rows = list(range(config.rows))
        examples, _ = encode_problems(source.train[: config.rows], rows, base.chat, max_length=2048)
        result["forward"] = compare_forward(base, examples)
        result["gradients"] = compare_gradients(base, examples)
    if config.held:
        result["held"] = compare_held(base, source, config.held)
    if config.harness and is_installed("lm-evaluation-harness", ("lm_eval", "transformers")):
        result["harness"] = compare_answers(
            base, source.test[: config.harness], config.max_new_tokens
        )
    write_result(config, result, base)


# Forward: logits in fp32, divergence in bf16


def compare_forward(base: Base, examples: list[Example]) -> dict[str, float]:
    """Our predictions and transformers', over all supervised tokens.

    In fp32, the largest difference of logits and how often both predict the same token. In bf16,
    the mean Kullback-Leibler divergence from our fp32 distribution, in nats per token: of the
    logits in bf16, as both compute them, and of the hidden states with the output embedding applied
    in fp32, since the rounding of the logits outweighs what happens before it.
    """
    states = {}  # by implementation and precision: hidden states (N, C), output embedding (V, C)
    for precision in ("fp32", "bf16"):
        states["ours", precision] = our_states(replace(base, precision=precision), examples)
        states["theirs", precision] = their_states(replace(base, precision=precision), examples)
    exact, theirs = (logits_of(*states[who, "fp32"]) for who in ("ours", "theirs"))  # (N, V)
    figures = {
        "tokens": len(exact),
        "largest_difference": (exact - theirs).abs().max().item(),
        "same_prediction": (exact.argmax(-1) == theirs.argmax(-1)).double().mean().item(),
    }
    print(f"fp32: logits differ from transformers' by at most {figures['largest_difference']:.1e}"
          f" (their standard deviation is {exact.std():.1f});\n      the same most likely token at"
          f" {figures['same_prediction']:.2%} of {len(exact):,} tokens")  # fmt: skip
    for part, wide in (("logits", False), ("hidden states", True)):
        ours, theirs = (
            divergence(exact, logits_of(*states[who, "bf16"], wide=wide))
            for who in ("ours", "theirs")
        )
        figures |= {f"divergence of {part}, ours": ours, f"divergence of {part}, theirs": theirs}
        print(f"bf16 {part}: divergence from fp32 {ours:.2e} nats a token, transformers"
              f" {theirs:.2e}: {ours / theirs:.2f} times")  # fmt: skip
    return figures


@torch.no_grad()
def our_states(base: Base, examples: list[Example]) -> tuple[Tensor, Tensor]:
    """Hidden states (N, C) of the supervised tokens, and the output embedding (V, C)."""
    model, found = base.load(), []
    for example in examples:
        batch = flat_batch([example], base.device)
        hidden = model(batch.tokens, batch.positions, batch.lengths)  # (T, C)
        found.append(hidden[batch.supervised_rows])
    return torch.cat(found), model.head_weight.detach()


@torch.no_grad()
def their_states(base: Base, examples: list[Example]) -> tuple[Tensor, Tensor]:
    """The same from transformers, one sequence at a time, so that nothing is padded."""
    model, found = transformers_model(base), []
    for example in examples:
        tokens = torch.as_tensor(example.tokens)[None].long()
        hidden = model.model(tokens).last_hidden_state[0]  # (T, C)
        found.append(hidden[flat_batch([example], base.device).supervised_rows])
    return torch.cat(found), model.lm_head.weight.detach()


def logits_of(hidden: Tensor, weight: Tensor, *, wide: bool = False) -> Tensor:
    """(N, V) fp32; with `wide`, multiplied in fp32 too."""
    if wide:
        hidden, weight = hidden.float(), weight.float()
    return (hidden @ weight.t()).float()


def divergence(exact: Tensor, rounded: Tensor) -> float:
    """Mean over tokens of KL(exact || rounded), both logits (N, V), in nats."""
    total = 0.0
    for p, q in zip(exact.split(64), rounded.split(64)):
        p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)
        total += (p.exp() * (p - q)).sum().item()
    return total / len(exact)


# Backward: the gradients of the adapters


def compare_gradients(base: Base, examples: list[Example]) -> dict[str, float]:
    """Cosines of the gradients of all adapters, as one vector, to ours in fp32; without dropout."""
    with tempfile.TemporaryDirectory() as scratch:
        adapter = Path(scratch) / "adapter"
        exact_loss, exact = our_gradient(base, examples, adapter)
        figures: dict[str, float] = {"loss": exact_loss}
        for who, precision, work in (
            ("PEFT", "fp32", their_gradient),
            ("ours", "bf16", our_gradient),
            ("PEFT", "bf16", their_gradient),
        ):
            loss, gradient = work(replace(base, precision=precision), examples, adapter)
            cosine = torch.cosine_similarity(gradient, exact, dim=0).item()
            name = f"{who} {precision}"
            figures |= {f"{name} loss": loss, f"{name} cosine": cosine}
            print(f"{name}: loss {loss:.6f}, {loss - exact_loss:+.1e} from ours in fp32; gradient"
                  f" cosine {cosine:.6f}")  # fmt: skip
            gc.collect()
    return figures


def our_gradient(base: Base, examples: list[Example], adapter: Path) -> tuple[float, Tensor]:
    """(mean loss, gradients of all adapters as one vector); saves the adapter for PEFT."""
    model = base.load()
    inject(model, LORA)
    parameters = trained_parameters(model)
    randomize_B(parameters, std=0.02)
    save_adapter(model, adapter, LORA, base=str(base.folder), revision=None)

    def nats(example: Example) -> Tensor:
        batch = flat_batch([example], base.device)
        hidden = model(batch.tokens, batch.positions, batch.lengths)  # (T, C)
        return linear_cross_entropy(
            hidden, model.head_weight, batch.targets, batch.supervised_rows
        )[0]

    return mean_loss(examples, nats), flat_gradient(parameters)


def their_gradient(base: Base, examples: list[Example], adapter: Path) -> tuple[float, Tensor]:
    """The same from PEFT, with the loss of F.cross_entropy over all logits in fp32."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(transformers_model(base), adapter, is_trainable=True).eval()

    def nats(example: Example) -> Tensor:
        logits = model(torch.as_tensor(example.tokens)[None].long()).logits[0]  # (T, V)
        targets = torch.as_tensor(example.targets).long()
        return nn.functional.cross_entropy(logits.float(), targets, reduction="sum")

    return mean_loss(examples, nats), flat_gradient(peft_parameters(model))


def mean_loss(examples: list[Example], nats_of: Callable[[Example], Tensor]) -> float:
    """The mean loss over all supervised tokens, backpropagated example by example."""
    count, total = sum(example.supervised_count for example in examples), 0.0
    for example in examples:
        nats = nats_of(example)
        (nats / count).backward()
        total += nats.item()
    return total / count


# The base in 4 and 8 bits


def compare_held(base: Base, source: Source, rows: int) -> dict[str, float]:
    """By kind: the gradients' cosine to those on the bf16 base, and the validation loss of the base
    alone, on as many test rows.
    """
    train, test = (
        encode_problems(problems[:rows], list(range(rows)), base.chat, max_length=2048)[0]
        for problems in (source.train, source.test)
    )
    count = sum(example.supervised_count for example in test)
    figures: dict[str, float] = {}
    exact = None
    for kind in (None, "nf4", "int8"):
        held = replace(base, precision="bf16").held_in(kind)
        with tempfile.TemporaryDirectory() as scratch:
            started = time.perf_counter()
            loss, gradient = our_gradient(held, train, Path(scratch) / "adapter")
            seconds = time.perf_counter() - started
        exact = gradient if exact is None else exact
        cosine = torch.cosine_similarity(gradient, exact, dim=0).item()
        nats, _ = teacher_forced(held.load(), test, batch_size=rows, quiet=True)
        name = kind or "bf16"
        figures |= {f"{name} loss": loss, f"{name} cosine": cosine, f"{name} seconds": seconds}
        figures[f"{name} validation loss"] = nats / count
        print(f"layers in {name}: validation loss {nats / count:.4f}; with adapters, loss"
              f" {loss:.4f} and gradient cosine to bf16 {cosine:.5f},"
              f" in {seconds:.1f} s")  # fmt: skip
        gc.collect()
    return figures


# Answers, compared with lm-evaluation-harness's


def compare_answers(base: Base, problems: list[Any], max_new_tokens: int) -> dict[str, int]:
    """Greedy answers by `generate`, and by the harness's own model class, to the same prompts.

    The checkpoint's generation_config may hold a repetition penalty, which transformers, and so the
    harness, applies to greedy decoding too. It is compared as it comes and without the penalty.
    """
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    base = replace(base, precision="bf16")
    prompts = [base.chat.prompt(problem.messages[:-1]) for problem in problems]
    decoding = Decoding(max_new_tokens, base.eos_ids, base.chat.vocab_size, batch_size=16)
    ours = [base.chat.decode(d.tokens) for d in generate(base.load(), prompts, decoding)]
    theirs = HFLM(str(base.folder), dtype="bfloat16", device="cpu", batch_size=16)
    texts = [theirs.tokenizer.decode(prompt) for prompt in prompts]  # control tokens too
    figures = {"problems": len(problems)}
    for name, penalty in (("as it comes", None), ("without repetition penalty", 1.0)):
        settings: dict[str, Any] = {"until": ["<|im_end|>"], "max_gen_toks": max_new_tokens}
        if penalty:
            settings["repetition_penalty"] = penalty
        requests = [
            Instance("generate_until", {}, (text, settings), i) for i, text in enumerate(texts)
        ]
        answers = theirs.generate_until(requests)
        figures[name] = sum(a.strip() == b.strip() for a, b in zip(ours, answers))
        print(f"harness, {name}: {figures[name]} of {len(problems)} answers are the same text")
    return figures


if __name__ == "__main__":
    sys.exit(run_script(main))
