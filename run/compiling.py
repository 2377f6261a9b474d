"""Whether `--compile`, `--cuda-graphs` and `--shard` can be used here.

Compiling is tried on a tiny network first, whose gradients are compared with the plain ones: a
version of PyTorch that drops a gradient raises no error, and computes the right loss. Layers are
not compiled by default, since that saves next to no host time (docs/performance.md).
"""

import copy
from typing import Any

import torch
from torch import Tensor

from errors import BadOption
from lora.config import LoRAConfig
from lora.inject import adapters, inject, seed_dropout, trained_parameters
from model.attention import HALF_PRECISION
from model.compile import compile_layers
from model.loss import linear_cross_entropy
from model.quant import quantize_layers
from model.qwen2 import Qwen2, Qwen2Config
from run.device import DTYPES, pick_precision
from run.distributed import check_shard

TINY = Qwen2Config(64, 96, 1, 4, 2, 128)  # a network of one layer, on which compiling is tried


def check_execution(options: Any, device: torch.device, *, dora: bool) -> None:
    """Raise BadOption if the options of a run ask for an execution that is not possible here."""
    precision, _ = pick_precision(options.precision, device)
    if options.shard:
        fp16 = precision == "fp16"  # is tried on the whole base
        others = {"--compile": options.compile, "--cuda-graphs": options.cuda_graphs}
        check_shard(others | {"--dora": dora, "--precision fp16": fp16})
    if options.cuda_graphs and device.type != "cuda":
        raise BadOption(f"--cuda-graphs: a {device.type} has none", "omit --cuda-graphs")
    if options.compile and options.checkpoint_activations:
        # In half precision, a compiled layer is not recomputed as it was computed.
        raise BadOption("--compile does not work with --checkpoint-activations", "omit one of them")
    if options.compile:
        check_compiler(device, DTYPES[precision], dora=dora, held=options.base_precision)


def check_compiler(
    device: torch.device, dtype: torch.dtype, *, dora: bool, held: str | None = None
) -> None:
    """Raise BadOption if there is a `compiler_problem`."""
    if problem := compiler_problem(device, dtype, dora=dora, held=held):
        cause, remedy = problem
        raise BadOption(f"--compile: {cause}", f"{remedy}, or omit --compile")


def compiler_problem(
    device: torch.device,
    dtype: torch.dtype,
    *,
    dora: bool,
    held: str | None = None,
    backend: str = "inductor",
) -> tuple[str, str] | None:
    """(cause, remedy) if `torch.compile` does not work for `device`, or gives other gradients.

    It is tried in fp32 and in `dtype`, with the layers `held` in nf4 or int8 as those of the base.
    A CPU needs a C++ compiler; CUDA needs Triton and a C compiler.
    """
    try:
        for each in dict.fromkeys((torch.float32, dtype)):
            error = gradient_error(device, each, dora=dora, held=held, backend=backend)
            if not error < (0.05 if each in HALF_PRECISION else 1e-3):
                return (
                    f"PyTorch {torch.__version__} compiles gradients that differ from the plain"
                    f" ones by {error:.2g} in {str(each).removeprefix('torch.')}",
                    "install another version of PyTorch",
                )
    except Exception as error:  # of Triton or a compiler: anything may be missing
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        needed = "g++" if device.type == "cpu" else "triton and gcc"
        cause = f"nothing can be compiled for {device.type} here: {reason[:200]}"
        return cause, f"install {needed}"
    return None


def gradient_error(
    device: torch.device, dtype: torch.dtype, *, dora: bool, held: str | None = None, backend: str
) -> float:
    """The relative difference of compiled and plain gradients of a tiny network's adapters."""
    plain = Qwen2(TINY).to(device, dtype)
    if held:
        quantize_layers(plain, held, dtype, stored=set())
    inject(plain, LoRAConfig(r=4, targets=("all-linear",), dora=dora))  # with dropout
    for layer in adapters(plain):
        torch.nn.init.normal_(layer.lora_B, std=0.1)  # fresh ones give A no gradient
    compiled = copy.deepcopy(plain)
    compile_layers(compiled, backend)
    found, expected = tiny_gradient(compiled), tiny_gradient(plain)
    return ((found - expected).norm() / expected.norm()).item()


def tiny_gradient(model: Qwen2) -> Tensor:
    """The gradient of all adapters on two examples, in one vector."""
    lengths, device = [12, 5], model.head_weight.device
    positions = torch.cat([torch.arange(n) for n in lengths]).to(device)  # (T,)
    tokens = positions * 7 % TINY.vocab_size  # (T,)
    seed_dropout(model.train(), seed=0, epoch=0, row_ids=tokens, positions=positions)
    hidden = model(tokens, positions, lengths)  # (T, C)
    nats, _ = linear_cross_entropy(hidden, model.head_weight, tokens.roll(-1))
    grads = torch.autograd.grad(nats, [*trained_parameters(model).values()])
    return torch.cat([grad.flatten() for grad in grads])
