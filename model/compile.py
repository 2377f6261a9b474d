"""Layers compiled by `torch.compile`: fewer and larger kernels, which is what a GPU wants.

A layer is compiled in two parts, before and after attention: they see nothing but flat tokens, so
one graph serves every micro-batch, whatever its lengths, and all layers share it. Attention and
the loss, whose kernels are large already, stay as they are. A graph is made at its first use: some
for training, others without gradients. What is compiled rounds in other places: in bf16 the
numbers differ from the plain ones by as much as its last bits.
"""

import torch

from errors import BadOption
from model.qwen2 import Qwen2


def check_compiler(device: torch.device) -> None:
    """BadOption if nothing can be compiled for `device` here: found out on a formula of one line.

    A CPU needs a C++ compiler, CUDA needs Triton and a C compiler.
    """
    try:
        torch.compile(lambda x: x.sin() + 1, dynamic=True)(torch.zeros(2, device=device))
    except (RuntimeError, OSError, ImportError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        needs = "g++" if device.type == "cpu" else "triton and gcc"
        raise BadOption(
            f"--compile: nothing can be compiled for {device.type} here: {reason[:200]}",
            f"install {needs}, or leave --compile out",
        ) from error


def compile_layers(model: Qwen2, backend: str = "inductor") -> None:
    """Compile the two parts of each layer, in place, adapters included: call it after `inject`."""
    for layer in model.model.layers:
        for part in ("before_attention", "after_attention"):
            fast = torch.compile(getattr(layer, part), dynamic=True, backend=backend)
            setattr(layer, part, fast)
