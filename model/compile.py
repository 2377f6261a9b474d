"""Compiles the layers with `torch.compile`: fewer and larger kernels, which are faster on a GPU.

Each layer is compiled in two parts, before and after attention. They see only flat tokens, so that
one graph serves every micro-batch, whatever its lengths, and all layers share it. Attention and the
loss are not compiled, since their kernels are large already. Graphs are built when first used,
separately with and without gradients. A compiled layer rounds at other places than a plain one: in
bf16 their results differ in the last bits.
"""

import torch

from errors import BadOption
from model.loss import linear_cross_entropy
from model.qwen2 import Qwen2, Qwen2Config

TINY = Qwen2Config(64, 96, 1, 4, 2, 128)  # a network of one layer, on which compiling is tried


def check_compiler(device: torch.device, backend: str = "inductor") -> None:
    """Raise BadOption if `torch.compile` does not work for `device`, or computes other gradients.

    Both are checked on a tiny network: a version of PyTorch that drops a gradient raises no error,
    and computes the right loss. A CPU needs a C++ compiler; CUDA needs Triton and a C compiler.
    """
    try:
        error = gradient_error(device, backend)
    except (RuntimeError, OSError, ImportError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        needed = "g++" if device.type == "cpu" else "triton and gcc"
        raise BadOption(
            f"--compile: nothing can be compiled for {device.type} here: {reason[:200]}",
            f"install {needed}, or omit --compile",
        ) from error
    if not error < 1e-3:  # of fp32
        raise BadOption(
            f"--compile: PyTorch {torch.__version__} compiles gradients that differ from the plain"
            f" ones by {error:.2g}",
            "omit --compile, or install another version of PyTorch",
        )


def gradient_error(device: torch.device, backend: str) -> float:
    """The relative difference of compiled and plain gradients of a tiny network, in fp32."""
    tokens = torch.arange(12, device=device) * 7 % TINY.vocab_size  # (T,)
    positions = torch.arange(12, device=device)  # (T,)
    plain = Qwen2(TINY).to(device)
    compiled = Qwen2(TINY).to(device)
    compiled.load_state_dict(plain.state_dict())
    compile_layers(compiled, backend)
    grads = []
    for model in (plain, compiled):
        nats, _ = linear_cross_entropy(
            model(tokens, positions, [12]), model.head_weight, tokens.roll(-1)
        )
        layers = list(model.model.layers.parameters())
        grads.append(torch.cat([g.flatten() for g in torch.autograd.grad(nats, layers)]))
    return ((grads[1] - grads[0]).norm() / grads[0].norm()).item()


def compile_layers(model: Qwen2, backend: str = "inductor") -> None:
    """Compile both parts of each layer in place, adapters included: call it after `inject`."""
    for layer in model.model.layers:
        for part in ("before_attention", "after_attention"):
            compiled = torch.compile(getattr(layer, part), dynamic=True, backend=backend)
            setattr(layer, part, compiled)
