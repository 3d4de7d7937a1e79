"""Symbolic arithmetic that is remembered: the expressions, values and guards of torch's own, until the ShapeEnv learns something."""

import random
from concurrent.futures import ThreadPoolExecutor

import torch
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
            assert len(done) == 1 and len({id(product.node) for product in products}) == 1
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
