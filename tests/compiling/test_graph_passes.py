"""Additions inside products, and small kernels that run together: what is taken, what is left, and the kernels that Inductor writes for a card."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from unsloth_ext.compiling import graph_passes, norms_fusion, products_fusion, small_kernels
from unsloth_ext.compiling.norms_operators import rms_norm
from unsloth_ext.nf4.products import product_with_low, sum_of_products

pytestmark = pytest.mark.filterwarnings("error:erase_node")
T, N, K = 6, 16, 32


def rows(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape).to(dtype)


def given():
    """x, a, their weights, and what is added."""
    return rows(T, K), rows(T, 4), rows(N, K), rows(N, 4), rows(2, 3, N)


def added(use, with_low):
    """(how many additions went into the product, how many are left, how far the results are off those in fp32)."""

    def function(x, a, w, u, r, f):
        if with_low:
            y, low = product_with_low([x], [w[:8]], [w], u)
            return *use(y, r, f), low
        return use(sum_of_products([x, a], [w, u]), r, f)

    tensors = *given(), rows(2 * T, N // 2)
    graph = make_fx(function, tracing_mode="fake")(*tensors)
    exact = function(*(t.float() for t in tensors))
    count = products_fusion.fuse(graph.graph)
    graph.graph.lint()
    graph.recompile()
    off = [
        ((one.float() - wanted).norm() / wanted.norm()).item()
        for one, wanted in zip(graph(*tensors), exact, strict=True)
    ]
    return count, len(graph.graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor)), max(off)


@pytest.mark.parametrize(
    ("use", "taken"),
    [
        (lambda y, r, f: (y.view(2, 3, N) + r,), 1),
        (lambda y, r, f: (r + y.view(3, 2, N).view(2, 3, N),), 1),
        (lambda y, r, f: (y.view(2, 3, N) + r, y), 0),  # somebody else reads the product
        (lambda y, r, f: (y + y,), 0),
        (lambda y, r, f: (y.view(2, 3, N) + r[:1],), 0),
        (lambda y, r, f: (torch.add(y.view(2, 3, N), r, alpha=2),), 0),
        (lambda y, r, f: (y.view(2, 3, N) + r.sin(),), 0),  # Inductor computes it where it is added
        (lambda y, r, f: (y.view(2, 3, N).float() + r.float(),), 0),
        (lambda y, r, f: (y.view(2 * T, N // 2) + f,), 1),  # of two dimensions, but other ones
        (lambda y, r, f: (y + (q := r.view(T, N)) @ q.t() @ q,), 0),  # made after the product: not waited for
        (lambda y, r, f: (y + r.view(T, N),), 0),  # this too, though it is but a view
    ],
)
@pytest.mark.parametrize("with_low", [False, True])
def test_an_addition_goes_into_the_product(use, taken, with_low):
    count, left, off = added(use, with_low)
    assert (count, left) == (taken, 1 - taken) and off < 2**-6


def test_a_sum_of_as_many_products_as_the_kernel_takes_is_left():
    def function(x, a, w, u, r):
        return sum_of_products([x, a, x, a], [w, u, w, u]).view(2, 3, N) + r

    def with_low(x, a, w, u, r):  # which is one more
        return product_with_low([x, a, x], [w[:8], u[:8], w[:8]], [w, u, w], u)[0].view(2, 3, N) + r

    def without(x, a, w, u, r):
        return product_with_low([x, a], [w[:8], u[:8]], [w, u], u)[1] + x[:, :8]  # not the product, the narrow one

    for one in (function, with_low, without):
        graph = make_fx(one, tracing_mode="fake")(*given()).graph
        assert products_fusion.fuse(graph) == 0


def test_the_norm_goes_first():
    """Of two additions to products the one before a norm is the norm's; the other goes into its product."""

    def layer(x, a, w, u, r, weight):
        r = sum_of_products([x, a], [w, u]).view(2, 3, N) + r
        y = rms_norm(r, weight, 1e-5)[0].view(T, N)
        return (sum_of_products([y, a], [w[:, :N].contiguous(), u]).view(2, 3, N) + r,)

    graph = make_fx(layer, tracing_mode="fake")(*given(), torch.ones(N).bfloat16())
    graph_passes.pass_over_graphs(graph.graph)
    graph.graph.lint()
    names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert sum("add_rms_norm" in name for name in names) == 1 and not any("add.Tensor" in name for name in names), names
    assert norms_fusion.fuse(graph.graph) == products_fusion.fuse(graph.graph) == 0


@pytest.fixture(scope="module")
def written():
    script = Path(__file__).with_name("small_kernels_written.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("kind", ["fixed", "dynamic"])
def test_small_kernels_run_together(written, kind):
    """Of a graph like a LoRA layer's: the casts that it begins with, and the gradients that it ends with."""
    plain, ours = written[kind]["plain"], written[kind]["together"]
    assert sorted(plain["kernels"]) == [1] * 10, written
    assert sorted(ours["kernels"]) == [1, 1, 4, 4], written  # a large one, and one in the middle, stay as they are
    assert plain["operators"] == ours["operators"] and ours["blocks of their own"] and not plain["blocks of their own"]


def test_small_kernels_of_two_cards_do_not(written):
    assert sorted(written["two cards"]["together"]["kernels"]) == [2, 2], written


def test_what_was_written_to_is_left_alone(written):
    assert written["written to"]["together"] == written["written to"]["plain"]


def test_where_small_kernels_run_together(monkeypatch):
    from unsloth_ext.compiling import measured_cards

    for said, found in (("0", 0), ("off", 0), ("1", 2)):
        monkeypatch.setenv("UNSLOTH_EXT_SMALL_KERNELS", said)
        assert len(small_kernels.options()) == found
    monkeypatch.delenv("UNSLOTH_EXT_SMALL_KERNELS")
    assert bool(small_kernels.options()) == measured_cards.are_measured()


def test_the_compile_caches_stay_on():
    """torch 2.13 asks for a class of its own; 2.11 pickles the object."""
    import pickle

    from torch._inductor import custom_graph_pass

    kind = getattr(custom_graph_pass, "CustomSchedulerPass", object)
    assert isinstance(small_kernels.together, kind) and small_kernels.together.uuid()
    assert pickle.loads(pickle.dumps(small_kernels.together)).uuid() == small_kernels.together.uuid()
