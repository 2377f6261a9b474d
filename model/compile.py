"""Compiles the layers with `torch.compile`: fewer and larger kernels, which are faster on a GPU.

Each layer is compiled in two parts, before and after attention. They see only flat tokens, so that
one graph serves every micro-batch, whatever its lengths, and all layers share it. Attention and the
loss are not compiled, since their kernels are large already. Graphs are built when first used,
separately with and without gradients. A compiled layer rounds at other places than a plain one: in
bf16 their results differ in the last bits.
"""

import torch

from errors import BadOption
from model.qwen2 import Qwen2


def check_compiler(device: torch.device) -> None:
    """Raise BadOption if `torch.compile` does not work for `device`, tried on a tiny function.

    A CPU needs a C++ compiler; CUDA needs Triton and a C compiler.
    """
    try:
        torch.compile(lambda x: x.sin() + 1, dynamic=True)(torch.zeros(2, device=device))
    except (RuntimeError, OSError, ImportError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        needed = "g++" if device.type == "cpu" else "triton and gcc"
        raise BadOption(
            f"--compile: nothing can be compiled for {device.type} here: {reason[:200]}",
            f"install {needed}, or omit --compile",
        ) from error


def compile_layers(model: Qwen2, backend: str = "inductor") -> None:
    """Compile both parts of each layer in place, adapters included: call it after `inject`."""
    for layer in model.model.layers:
        for part in ("before_attention", "after_attention"):
            compiled = torch.compile(getattr(layer, part), dynamic=True, backend=backend)
            setattr(layer, part, compiled)
