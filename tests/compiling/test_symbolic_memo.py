"""Symbolic arithmetic that is remembered: the expressions, values and guards of torch's own, until the ShapeEnv learns something."""

import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.source import ConstantSource
from torch.fx.experimental import sym_node
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from unsloth_ext.compiling import symbolic_memo
from unsloth_ext.compiling.symbolic_memo import remembered_arithmetic


def _sizes(env, values):
    tensor = torch.empty(values)
    context = StatelessSymbolicContext([DimDynamic.DYNAMIC] * len(values))
    sizes, _, _ = env.create_symbolic_sizes_strides_storage_offset(
        tensor, ConstantSource("x"), symbolic_context=context
    )
    return list(sizes)


_OPERATIONS = [
    lambda a, b: a + b, lambda a, b: a * b, lambda a, b: a - b, lambda a, b: a // b, lambda a, b: a % b,
    lambda a, b: a / b, lambda a, b: torch.sym_max(a, b), lambda a, b: torch.sym_min(a, b), lambda a, b: b + a,
    lambda a, b: a == b, lambda a, b: a < b, lambda a, b: a >= b, lambda a, b: a != b, lambda a, b: 2 * a + b,
]  # fmt: skip


def _walk(seed):
    """(text and value of each expression, guards) of a random walk, with some questions asked on the way."""
    found, choose, env = [], random.Random(seed), ShapeEnv()
    known = [*_sizes(env, (6, 35, 128)), 1, 4, 64]
    for _ in range(150):
        a, b = choose.choice(known), choose.choice(known)
        if not isinstance(a, torch.SymInt) or (not isinstance(b, torch.SymInt) and b == 0):
            continue
        operation = choose.choice(_OPERATIONS)
        result = operation(a, b)
        found.append((str(result), result.node.hint if hasattr(result, "node") else result, type(result).__name__))
        if isinstance(result, torch.SymInt) and 0 < result.node.hint < 10**6 and len(str(result)) < 60:
            known.append(result)
        elif isinstance(result, torch.SymBool) and choose.random() < 0.1:
            found.append(bool(result))  # a guard: from here on the ShapeEnv knows more
    return found, [str(guard.expr) for guard in env.guards]


def test_the_same_as_without():
    for seed in range(12):
        expected = _walk(seed)
        with remembered_arithmetic():
            assert _walk(seed) == expected
    assert len({entry for entry in expected[0] if isinstance(entry, tuple)}) > 20


def test_an_operation_is_done_once_until_something_is_learnt():
    env, done = ShapeEnv(), []
    a, b, _ = _sizes(env, (6, 35, 128))
    original = sym_node.SymNode._mul
    sym_node.SymNode._mul = lambda self, other: done.append(1) or original(self, other)
    symbolic_memo._made = None
    try:
        with remembered_arithmetic():
            products = [a * b for _ in range(5)]
            assert len(done) == 1 and len({str(product) for product in products}) == 1
            assert len({id(product.node) for product in products}) == 5  # a trace tells sizes apart by their nodes
            assert bool(a == 6)  # now it is a number
            assert str(a * b).count("s") == 1 and len(done) == 2
            other = _sizes(ShapeEnv(), (6, 35))
            assert str(other[0] * other[1]).count("s") == 2  # another ShapeEnv, whose symbols have the same names
    finally:
        sym_node.SymNode._mul = original
        symbolic_memo._made = None


def test_torch_is_as_it_was_afterwards():
    before = dict(vars(sym_node.SymNode))
    with remembered_arithmetic(), remembered_arithmetic():
        assert sum(vars(sym_node.SymNode)[name] is not value for name, value in before.items()) > 10
    assert dict(vars(sym_node.SymNode)) == before and symbolic_memo._results[0] is None


def test_in_several_threads():
    expected = [_walk(seed) for seed in range(6)]
    with remembered_arithmetic(), ThreadPoolExecutor(6) as pool:
        assert list(pool.map(_walk, range(6))) == expected


def _padded(x, weight):
    y, tokens = (x @ weight).sin(), x.shape[0] * x.shape[1]
    padded = torch.nn.functional.pad(y.view(tokens, 16), (0, 0, 0, 1))
    return padded, padded.new_zeros(tokens + 1, 16) * padded


def _flat(x, weight):
    y = (x.flatten(0, 1) @ weight).sin()
    return y.reshape(y.shape[0] * 16), y.new_zeros(y.shape[0], 16) + y


def _turned(x, weight):
    (b, s, h), y = x.shape, (x @ weight).sin()
    return y.transpose(0, 1).contiguous(), y.new_empty(b * s * h).fill_(2) * y.reshape(b * s * h)


@pytest.mark.parametrize("function", [_padded, _flat, _turned])
def test_the_graphs_of_forward_and_backward_too(function):
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    def graphs():
        found = []

        def keep(module, inputs):
            found.append(module.print_readable(print_output=False, include_stride=True))
            return make_boxed_func(module.forward)

        torch._dynamo.reset()
        backend = aot_autograd(fw_compiler=keep, bw_compiler=keep, partition_fn=min_cut_rematerialization_partition)
        torch.manual_seed(0)
        x, weight = (torch.randn(shape, requires_grad=True) for shape in ((3, 5, 16), (16, 16)))
        outputs = torch.compile(function, backend=backend, dynamic=True)(x, weight)
        sum(output.sum() for output in outputs).backward()
        return found, x.grad, weight.grad

    expected = graphs()
    with remembered_arithmetic():
        remembered = graphs()
    torch._dynamo.reset()
    assert remembered[0] == expected[0] and len(expected[0]) == 2
    assert torch.equal(remembered[1], expected[1]) and torch.equal(remembered[2], expected[2])


def test_a_compile_has_the_same_graph_and_fewer_operations():
    def function(x, weights):
        for weight in weights:
            x = torch.nn.functional.gelu(x.flatten(0, 1) @ weight).unflatten(0, x.shape[:2]) + x
        return x.sum()

    weights, counts, graphs = [torch.randn(16, 16) for _ in range(4)], [], []

    def backend(module, inputs):
        graphs.append(module.print_readable(print_output=False))
        return module.forward

    original = sym_node.SymNode._mul
    for scope in (False, True):
        done = []
        sym_node.SymNode._mul = lambda self, other, done=done: done.append(1) or original(self, other)
        symbolic_memo._made = None
        torch._dynamo.reset()
        try:
            compiled = torch.compile(function, backend=backend, dynamic=True)
            if scope:
                with remembered_arithmetic():
                    compiled(torch.randn(3, 5, 16), weights)
            else:
                compiled(torch.randn(3, 5, 16), weights)
        finally:
            sym_node.SymNode._mul = original
            symbolic_memo._made = None
        counts.append(len(done))
    torch._dynamo.reset()
    assert graphs[0] == graphs[1] and counts[1] < counts[0] / 2
