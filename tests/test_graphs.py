"""Training by CUDA graphs, with a recorder that works on a CPU: it repeats the recorded operators.

A tape keeps what a CUDA graph keeps: operators, the memory that they read and write, and the Python
numbers that they were called with. A number or memory that should have been an input is stale then.
"""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import train
from data.batches import Step, flat_batch
from lora.inject import LoRAConfig, adapters, inject, seed_dropout, trained_parameters
from model import graphs
from model.compile import compile_layers
from model.graphs import graph_training
from model.qwen2 import Qwen2, Qwen2Config
from tests import toys
from tests.refusals import TRAIN, refused

SIZES = Qwen2Config(32, 48, 2, 4, 2, 64)
NO_SCALING = torch.amp.GradScaler("cpu", enabled=False)
aten = torch.ops.aten


class Tape(TorchDispatchMode):
    """Records operators; `replay` repeats them on the same memory."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (aten._local_scalar_dense.default, aten.nonzero.default), "a wait"
        out = func(*args, **kwargs or {})
        memory = tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs or {}, out))
        self.calls.append((func, *memory))
        return out

    def replay(self):
        for func, args, kwargs, out in self.calls:
            inputs = {storage(x) for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)}
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if torch.is_tensor(old) and storage(old) not in inputs:  # neither view nor in place
                    old.copy_(new)


def storage(x):
    return x.untyped_storage().data_ptr()


def record(function):
    with Tape() as tape:
        function()
    return tape.replay


def training(graphed, recorder=record, optimizer=torch.optim.AdamW, dtype=torch.float32, **options):
    """A model with adapters that change its output, and its optimizer."""
    torch.manual_seed(0)
    model = Qwen2(SIZES).train().to(dtype)
    inject(model, LoRAConfig(r=4, **options))
    for layer in adapters(model):
        torch.nn.init.normal_(layer.lora_B, std=0.3)
    if graphed:
        graph_training(model, [layer.dropout for layer in adapters(model)], recorder)
    return model, optimizer(trained_parameters(model).values(), lr=1e-2)


def examples(rows):
    return [toys.example(row, 5 + row % 4, 3) for row in rows]


def backward(model, rows, epoch=0, scaler=NO_SCALING):
    """Nats and correct tokens of one micro-batch; its gradients are added."""
    step = Step(epoch, [], 0, 18, [])
    return train.forward_backward(model, examples(rows), step, seed=7, scaler=scaler)


def steps(model, optimizer, count, most=3):
    """The sums and gradients of steps of two micro-batches each, of at most `most` ragged rows."""
    found = []
    for i in range(count):
        rows = [3 * i + k * k for k in range(most - i % 2 * (most > 3))]
        sums = backward(model, rows, i // 2) + backward(model, [row + 1 for row in rows], i // 2)
        found.append([sums, *(p.grad.clone() for p in trained_parameters(model).values())])
        optimizer.step()
        optimizer.zero_grad()
    return found


def assert_equal_steps(found, expected):
    """Equal up to rounding, since sums over padded micro-batches are made in another order."""
    for ours, plain in zip(found, expected, strict=True):
        for x, y in zip(ours, plain, strict=True):
            assert (x - y).norm() <= 1e-4 * y.norm()


def test_padding_has_no_influence_on_hidden_states_and_gradients():
    """Whatever the padding holds, not a bit changes; without it, sums are rounded in another
    order.
    """
    model, _ = training(False)
    batch = flat_batch(examples(range(4)))
    T, parameters = len(batch.tokens), list(trained_parameters(model).values())
    grad = torch.randn(T, 32)

    def outcome(padding, token=0):
        tokens = F.pad(batch.tokens, (0, padding), value=token)
        positions, rows = (
            F.pad(x, (0, padding), value=token) for x in (batch.positions, batch.row_ids)
        )
        seed_dropout(model, seed=0, epoch=0, row_ids=rows, positions=positions)
        hidden = model(tokens, positions, [*batch.lengths, *[padding] * bool(padding)])
        grads = torch.autograd.grad(hidden, parameters, F.pad(grad, (0, 0, 0, padding)))
        return [hidden[:T].detach(), *grads]

    padded = outcome(40)
    assert all(map(torch.equal, padded, outcome(40, token=9)))
    assert_equal_steps([padded], [outcome(0)])


@pytest.mark.parametrize(
    "options", [{}, {"dora": True}, {"dropout": 0.0}, {"dtype": torch.float64}]
)  # in fp64, A and B are cast to another dtype than their own
def test_steps_by_graphs_equal_plain_steps(capsys, options):
    """Two micro-batches a step, in three epochs: tokens, lengths, masks and weights change."""
    model, optimizer = training(True, **options)
    assert_equal_steps(steps(model, optimizer, 5), steps(*training(False, **options), 5))
    (graph,) = model.forward.graphs.values()
    assert graph.checked and capsys.readouterr().out.count("CUDA graphs are used") == 1


def test_steps_by_graphs_of_compiled_layers_equal_plain_steps():
    """A tape cannot record inside of a compiler, so here a replay is one more call."""
    torch._dynamo.reset()

    def call_again(function):
        function()
        return torch.enable_grad()(function)

    model, optimizer = training(False)
    compile_layers(model, backend="aot_eager")
    graph_training(model, [layer.dropout for layer in adapters(model)], call_again)
    assert_equal_steps(steps(model, optimizer, 3), steps(*training(False), 3))
    (graph,) = model.forward.graphs.values()
    assert graph.checked


def test_the_plain_pass_runs_only_while_a_graph_is_recorded_and_compared():
    model, optimizer = training(True)
    plain, ran = model.forward.plain, []
    model.forward.plain = lambda *args: ran.append(args) or plain(*args)
    steps(model, optimizer, 4)
    # The first micro-batch: a trial of the graph, its recording, and the result. The second: the
    # comparison. The other six: none.
    assert len(ran) == 4


@pytest.mark.parametrize("stale", ["tokens", "positions", "keys", "offsets"])
def test_a_graph_that_does_not_read_an_input_anew_is_found_and_not_used(monkeypatch, capsys, stale):
    load = graphs.Graph.load

    def load_the_rest(graph, inputs, lengths):
        names = dict(zip(("tokens", "positions", "keys"), graph.inputs), offsets=graph.offsets)
        kept = names[stale].clone()
        load(graph, inputs, lengths)
        if kept.any():  # this is not the first micro-batch
            names[stale].copy_(kept)

    monkeypatch.setattr(graphs.Graph, "load", load_the_rest)
    model, optimizer = training(True)
    assert_equal_steps(steps(model, optimizer, 3), steps(*training(False), 3))
    assert model.forward.given_up
    assert "CUDA graphs are not used: results of 256 tokens differ" in capsys.readouterr().out


class Replacing(torch.optim.AdamW):
    """Puts new weights elsewhere in memory, where a graph does not read them."""

    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.data = p.data.clone()
        super().step()


def test_a_graph_that_does_not_see_new_weights_is_found_and_not_used():
    model, optimizer = training(True, optimizer=Replacing)
    found, expected = [], []
    for m, o, log in ((model, optimizer, found), (*training(False), expected)):
        for i in range(3):  # one micro-batch a step, so that weights change before the comparison
            backward(m, range(i, i + 3))
            log.append([p.grad for p in trained_parameters(m).values()])
            o.step()
            o.zero_grad()
    assert_equal_steps(found, expected)
    assert model.forward.given_up


def test_a_recording_that_fails_leaves_plain_training_and_is_not_tried_again(capsys):
    tried = []

    def refuse(function):
        tried.append(function)
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    found = steps(*training(True, recorder=refuse), 3)
    assert_equal_steps(found, steps(*training(False), 3))
    assert len(tried) == 1
    printed = capsys.readouterr().out
    assert printed.count("CUDA graphs are not used: none can be recorded: operation not") == 1
    assert "more" not in printed


def out_of_memory(*_):
    raise torch.OutOfMemoryError


def test_a_step_that_runs_out_of_memory_ends_the_use_of_graphs(monkeypatch, capsys):
    """It frees their memory, too, which the halves of the micro-batch may need."""
    model, optimizer = training(True)
    steps(model, optimizer, 3)
    loss = train.linear_cross_entropy
    monkeypatch.setattr(train, "linear_cross_entropy", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        backward(model, range(3))
    monkeypatch.setattr(train, "linear_cross_entropy", loss)
    assert model.forward.graphs
    steps(model, optimizer, 1)
    assert model.forward.given_up and not model.forward.graphs
    assert "CUDA graphs are not used: a step was interrupted" in capsys.readouterr().out


def test_an_overflow_decides_nothing_about_a_graph():
    """The first steps of a fp16 run have no finite gradient, until the scale is low enough."""
    model, _ = training(True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    for _ in range(3):
        backward(model, range(3), scaler=scaler)
    (graph,) = model.forward.graphs.values()
    assert not graph.checked and not model.forward.given_up
    backward(model, range(3))
    assert graph.checked


def test_validation_never_uses_graphs():
    model, optimizer = training(True)
    steps(model, optimizer, 3)
    (graph,) = model.forward.graphs.values()
    graph.replay_forward = None  # it could not be called
    batch = flat_batch(examples(range(3)))
    assert model.eval()(batch.tokens, batch.positions, batch.lengths).requires_grad


def test_only_so_many_sizes_have_graphs_and_further_ones_run_plainly(monkeypatch):
    monkeypatch.setattr(graphs, "MOST", 1)
    model, optimizer = training(True)
    found = steps(model, optimizer, 4, most=4)  # of 4 and 3 rows
    assert_equal_steps(found, steps(*training(False), 4, most=4))
    assert len(model.forward.graphs) == 1


def test_graphs_are_refused_on_a_cpu_before_a_run(workspace, capsys):
    assert "a cpu has none" in refused(train.main, TRAIN + "--cuda-graphs", capsys)
