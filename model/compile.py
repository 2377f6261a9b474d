"""Compiles the layers with `torch.compile`: fewer and larger kernels, which are faster on a GPU.

Each layer is compiled in two parts, before and after attention. They see only flat tokens, so that
one graph serves every micro-batch, whatever its lengths, and all layers share it. Attention and the
loss are not compiled, since their kernels are large already. Graphs are built when first used,
separately with and without gradients. A compiled layer rounds at other places than a plain one: in
bf16 their results differ in the last bits. Whether a run compiles: run/compiling.py.
"""

import torch

from model.qwen2 import Qwen2


def compile_layers(model: Qwen2, backend: str = "inductor") -> None:
    """Compile both parts of each layer in place, adapters included: call it after `inject`."""
    for layer in model.model.layers:
        for part in ("before_attention", "after_attention"):
            compiled = torch.compile(getattr(layer, part), dynamic=True, backend=backend)
            setattr(layer, part, compiled)
