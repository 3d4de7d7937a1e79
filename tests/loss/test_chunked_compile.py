"""chunked_loss inside torch.compile: one graph, the eager numbers, no full logits; and torch.compile of the function alone."""

import importlib.util
import shutil

import loss_heads
import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from unsloth_ext.loss import chunked_loss, functions
from unsloth_ext.loss.reference import full_loss

D, V = 6, 19
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def inputs(dtype=torch.float32, rows=(2, 13)):
    hidden = torch.randn(*rows, D, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, V, rows)
    labels[0, :4] = -100
    return hidden, labels


FUNCTIONS = {
    "mean": (functions.cross_entropy(label_smoothing=0.1, z_loss=0.01), {}),
    "items": (functions.cross_entropy(softcap=5.0), {"num_items_in_batch": 40}),
    "values": (functions.token_logprobs(entropy=True, entropy_gradient=True), {}),
    "scalar": (lambda z, y: z.float().logsumexp(-1).mean(), {"reduction": "mean"}),
}


def total(result):
    return sum(((i + 1) * value).sum() for i, value in enumerate(result if isinstance(result, tuple) else (result,)))


@pytest.mark.parametrize(
    "name, head_name",
    [("mean", "frozen"), ("mean", "lora"), ("values", "tied"), *((name, "bias") for name in FUNCTIONS)],
)
def test_one_graph_with_the_eager_numbers(name, head_name):
    function, options = FUNCTIONS[name]
    hidden, labels = inputs()
    head = loss_heads.EXACT[head_name](D, V, torch.float32)

    def step(hidden, labels):
        return total(chunked_loss(function, hidden * 2, head, labels, chunk_size=10, **options))

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(hidden, labels)
    eager = step(hidden, labels)
    torch.testing.assert_close(compiled, eager)
    tensors = [hidden, *loss_heads.trainable(head)]
    torch.testing.assert_close(torch.autograd.grad(compiled, tensors), torch.autograd.grad(eager, tensors))


def test_lengths_share_a_graph():
    head = loss_heads.bias(D, V, torch.float32)
    graphs = []

    def count(graph, example):
        graphs.append(1)
        return make_boxed_func(graph)

    step = torch.compile(
        lambda h, y: chunked_loss(functions.cross_entropy(), h, head, y, chunk_size=8),
        fullgraph=True,
        dynamic=True,
        backend=aot_autograd(fw_compiler=count, bw_compiler=lambda graph, example: make_boxed_func(graph)),
    )
    for rows in (18, 19, 23, 24, 30):
        hidden, labels = inputs(rows=(2, rows))
        torch.testing.assert_close(step(hidden, labels), full_loss(functions.cross_entropy(), hidden, head, labels))
    assert len(graphs) == len({-(-2 * rows // 8) for rows in (18, 19, 23, 24, 30)})


def test_the_graphs_hold_no_full_logits():
    hidden, labels = inputs(rows=(4, 64))
    head = loss_heads.bias(D, V, torch.float32)
    largest = []

    def watch(graph, example):
        for node in graph.graph.nodes:
            value = node.meta.get("val")
            if isinstance(value, torch.Tensor):
                largest.append(value.numel())
        return make_boxed_func(graph)

    backend = aot_autograd(fw_compiler=watch, bw_compiler=watch)
    step = torch.compile(
        lambda h, y: chunked_loss(functions.cross_entropy(), h, head, y, chunk_size=32), fullgraph=True, backend=backend
    )
    step(hidden, labels).backward()
    assert max(largest) == max(hidden.numel(), 32 * V) < 256 * V


@needs_compiler
def test_inductor_and_half_precision():
    hidden, labels = inputs(torch.bfloat16)
    head = loss_heads.linear(D, V, torch.bfloat16)
    step = torch.compile(
        lambda h, y: chunked_loss(functions.cross_entropy(), h, head, y, chunk_size=13), fullgraph=True
    )
    compiled = step(hidden, labels)
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, head.weight)]
    expected = full_loss(functions.cross_entropy(), *exact, labels)
    torch.testing.assert_close(compiled.double(), expected, rtol=1e-2, atol=1e-2)
    for mine, theirs in zip(
        torch.autograd.grad(compiled, [hidden, head.weight]), torch.autograd.grad(expected, exact), strict=True
    ):
        assert mine.dtype == torch.bfloat16
        assert (mine.double() - theirs).norm() < 2e-2 * theirs.norm()


@needs_compiler
def test_only_the_function_compiled():
    hidden, labels = inputs()
    head = loss_heads.bias(D, V, torch.float32)
    function = functions.cross_entropy(label_smoothing=0.1)
    mine = chunked_loss(torch.compile(function, dynamic=True), hidden, head, labels, chunk_size=7)
    expected = full_loss(function, hidden, head, labels)
    tensors = [hidden, *head.parameters()]
    torch.testing.assert_close(mine, expected)
    torch.testing.assert_close(torch.autograd.grad(mine, tensors), torch.autograd.grad(expected, tensors))


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_four_bit_head():
    head = loss_heads.four_bit(64, 96, None)
    hidden = torch.randn(2, 11, 64, requires_grad=True)
    labels = torch.randint(0, 96, (2, 11))
    function = functions.cross_entropy()
    eager = chunked_loss(function, hidden, head, labels, chunk_size=5)
    step = torch.compile(
        lambda h, y: chunked_loss(function, h, head, y, chunk_size=5), fullgraph=True, backend="aot_eager"
    )
    compiled = step(hidden, labels)
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        torch.autograd.grad(compiled, hidden), torch.autograd.grad(eager, hidden), rtol=1e-4, atol=1e-4
    )


def test_the_loss_alone_is_compiled_once(monkeypatch):
    made = []
    monkeypatch.setattr(torch, "compile", lambda f: made.append(f) or f)
    ready_made, own = (
        functions.cross_entropy(),
        lambda logits, labels: F.cross_entropy(logits, labels, reduction="none"),
    )
    hidden, head, labels = torch.randn(5, 8), torch.randn(11, 8), torch.randint(11, (5,))
    for _ in range(2):
        chunked_loss(ready_made, hidden, head, labels)  # not on a CPU unless asked for
        chunked_loss(own, hidden, head, labels)
    assert made == []
    for _ in range(2):
        chunked_loss(ready_made, hidden, head, labels, compile_function=True)
        chunked_loss(own, hidden, head, labels, compile_function=True)
    assert made == [ready_made, own]


@needs_compiler
def test_a_compiled_loss_gives_the_same_gradients():
    hidden, head, labels = torch.randn(37, 16), torch.randn(301, 16), torch.randint(301, (37,))

    def gradients(**keywords):
        tensors = [hidden.clone().requires_grad_(), head.clone().requires_grad_()]
        loss = chunked_loss(functions.cross_entropy(z_loss=1e-3), *tensors, labels, chunk_size=10, **keywords)
        return [loss.detach(), *torch.autograd.grad(loss * 2, tensors)]

    for found, expected in zip(gradients(compile_function=True), gradients(), strict=True):
        torch.testing.assert_close(found, expected)
