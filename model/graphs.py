"""CUDA graphs of the network in training: its forward and backward pass, launched in one call each.

A training step launches thousands of small kernels, which takes the host longer than a fast GPU
needs to run them. A CUDA graph records the launches once and replays them on the same memory. So it
has one size: micro-batches are filled up to a multiple of 256 tokens with one more example, whose
gradient is zero. The loss is not recorded, since its size is the number of supervised tokens.

Not tried on a GPU yet, so nothing is taken on trust. A graph is recorded when its size first comes,
and compared with the plain pass when that size comes again, on other tokens and other weights. Only
then is it used. After any error or difference, every pass is plain.

Legend: T tokens of a micro-batch, S tokens of its graph, C hidden size.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention import HALF_PRECISION, working_kernel
from model.cache import send
from model.qwen2 import Attend, Qwen2

TOKENS, LONGEST = 256, 512  # sizes, and bounds of the longest example, are multiples of these
MOST = 32  # graphs, since each takes memory; micro-batches of further sizes run plainly

# record(function) runs or records it once, and returns what repeats it on the same memory.
Record = Callable[[Callable[[], None]], Callable[[], None]]


class Keyed(Protocol):
    """A module whose `keys (T,)`, int32, change with each micro-batch, such as keyed dropout."""

    keys: Tensor | None


def graph_training(model: Qwen2, keyed: Sequence[Keyed], record: Record | None = None) -> None:
    """Let `model(...)` replay CUDA graphs in training mode, if they prove to be right.

    Call it once the trainable parameters exist; they must be updated in place. All of `keyed` read
    the same keys. The graphs need about as much memory again as the activations of a micro-batch.
    """
    # As `model.forward = ...`, which mypy forbids: a class defines it as a method.
    vars(model)["forward"] = GraphedForward(model, keyed, record or CudaRecorder())


class CudaRecorder:
    """Records CUDA graphs that share memory, which they can because they run one after another."""

    def __init__(self):
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as NCCL's, may call CUDA meanwhile.
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            function()
        return graph.replay


class GraphedForward:
    """`Qwen2.forward`, by graphs in training mode with gradients, otherwise as it was."""

    def __init__(self, model: Qwen2, keyed: Sequence[Keyed], record: Record):
        self.model, self.plain, self.keyed, self.record = model, model.forward, keyed, record
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.graphs: dict[tuple[int, int, int], Graph] = {}
        self.given_up = False
        self.unfinished = False  # whether the last backward pass has not reached the first layer
        self.parameters[0].register_post_accumulate_grad_hook(self._finish)

    def __call__(
        self, tokens: Tensor, positions: Tensor, lengths: list[int], cache: Attend | None = None
    ) -> Tensor:
        training = self.model.training and torch.is_grad_enabled() and cache is None
        if self.unfinished and training:
            self.give_up("a step was interrupted, for example because memory ran out")
        if self.given_up or not training:
            return self.plain(tokens, positions, lengths, cache)
        self.unfinished = True
        size, keys = padded_size(lengths), self.keyed[0].keys
        assert keys is not None  # set before each micro-batch
        inputs = torch.stack((tokens, positions, keys))  # (3, T)
        if graph := self.graphs.get(size):
            graph.load(inputs, lengths)
            graph.plain = None if graph.checked else self.plain(tokens, positions, lengths)
            return _Replay.apply(self, graph, len(tokens), *self.parameters)  # (T, C)
        if len(self.graphs) < MOST:
            try:
                self.graphs[size] = Graph(self, size, inputs, lengths)
            except Exception as error:  # of the driver, a compiler or the allocator
                reason = str(error).strip().partition("\n")[0] or type(error).__name__
                self.give_up(f"none can be recorded: {reason[:200]}")
            for module in self.keyed:
                module.keys = keys
        return self.plain(tokens, positions, lengths)

    def give_up(self, reason: str) -> None:
        """Run plainly from now on, and say why."""
        print(f"CUDA graphs are not used: {reason}")
        self.graphs, self.given_up = {}, True
        torch.cuda.empty_cache()

    def check(self, graph: "Graph", found: list[Tensor], expected: list[Tensor]) -> None:
        """Use `graph` if it agrees with the plain pass; if not, give up all graphs.

        `found` are the graph's hidden states (T, C) and then its gradients, `expected` those of the
        plain pass. If one of these is not finite, for example because fp16 overflowed,
        nothing is decided.
        """
        pairs = zip(found, expected)
        norms = [n for a, b in pairs for n in ((a - b).float().norm(), b.float().norm())]
        off, size = torch.stack(norms).view(-1, 2).cpu().unbind(1)
        if not size.isfinite().all():
            return
        error = torch.where(off == 0, 0.0, off / size).max().item()
        # In half precision, products of other sizes round differently.
        if error < (0.2 if found[0].dtype in HALF_PRECISION else 1e-3):
            graph.checked = True
            if sum(g.checked for g in self.graphs.values()) == 1:
                print(f"CUDA graphs are used: {graph.tokens:,} tokens differ by {error:.2g}")
        else:
            self.give_up(f"results of {graph.tokens:,} tokens differ by {error:.2g}")

    def split(self, gradient: Tensor) -> list[Tensor]:
        """The gradient of each parameter, from all of them in one vector."""
        parts = gradient.split([p.numel() for p in self.parameters])
        return [part.view_as(p) for part, p in zip(parts, self.parameters)]

    def _finish(self, _: Tensor) -> None:
        self.unfinished = False


def padded_size(lengths: list[int]) -> tuple[int, int, int]:
    """(S, number of examples, bound of their length) of the graph for examples of these lengths."""
    tokens = (sum(lengths) // TOKENS + 1) * TOKENS  # the example that fills up is never empty
    return tokens, len(lengths) + 1, -(-max(lengths) // LONGEST) * LONGEST


class Graph:
    """The forward and the backward pass of micro-batches of one size, on memory of their own.

    It is recorded on a first micro-batch: `inputs (3, T)`, which are tokens, positions and keys, of
    examples of the given lengths.
    """

    def __init__(self, owner: GraphedForward, size: tuple, inputs: Tensor, lengths: list[int]):
        self.owner, (self.tokens, examples, self.longest) = owner, size
        weight = owner.model.head_weight
        self.inputs = inputs.new_zeros(3, self.tokens)
        self.offsets = inputs.new_zeros(examples + 1, dtype=torch.int32)
        self.grad_hidden = weight.new_zeros(self.tokens, weight.shape[1])  # (S, C)
        self.plain: Tensor | None = None  # hidden states to compare with, until `checked`
        self.checked = False
        self.load(inputs, lengths)
        self._forward()  # so that kernels are chosen and compiled before they are recorded
        self._backward()
        self.replay_forward = owner.record(self._forward)
        self.replay_backward = owner.record(self._backward)
        self.hidden: Tensor = self.hidden.detach()  # (S, C)

    def load(self, inputs: Tensor, lengths: list[int]) -> None:
        """Copy a micro-batch to where the graph reads it, filled up with an example of zeros."""
        self.inputs.copy_(F.pad(inputs, (0, self.tokens - inputs.shape[1])))
        ends = [0, *itertools.accumulate(lengths), self.tokens]
        self.offsets.copy_(send(ends, self.offsets.device))

    def _forward(self) -> None:
        tokens, positions, keys = self.inputs
        keys = keys.to(torch.int32)
        for module in self.owner.keyed:
            module.keys = keys
        # With `cache`, this is the plain pass, with the model's hooks.
        self.hidden = self.owner.model(tokens, positions, [], cache=self._attend)  # (S, C)

    def _backward(self) -> None:
        grads = torch.autograd.grad(self.hidden, self.owner.parameters, self.grad_hidden)
        self.gradient = torch.cat([grad.flatten() for grad in grads])

    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        attend = working_kernel(q.device, q.dtype, q.shape[1:], k.shape[1:])
        return attend(q, k, v, self.offsets, self.longest)


class _Replay(torch.autograd.Function):
    """Hidden states (T, C) as a function of the parameters, by a graph; if it has not been checked,
    its plain ones and their gradients, with which it is compared.
    """

    @staticmethod
    def forward(ctx, owner: GraphedForward, graph: Graph, tokens: int, *parameters: Tensor):
        ctx.owner, ctx.graph, ctx.tokens = owner, graph, tokens
        graph.replay_forward()
        return (graph.hidden[:tokens] if graph.plain is None else graph.plain).detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        owner, graph, T = ctx.owner, ctx.graph, ctx.tokens
        graph.grad_hidden.copy_(F.pad(grad, (0, 0, 0, graph.tokens - T)))
        graph.replay_backward()
        # One copy for all parameters: the next replay overwrites it.
        found = owner.split(graph.gradient.clone())
        if graph.plain is None:
            return None, None, None, *found
        expected = torch.autograd.grad(graph.plain, owner.parameters, grad)
        owner.check(graph, [graph.hidden[:T], *found], [graph.plain, *expected])
        graph.plain = None
        return None, None, None, *expected
