"""Additions inside products, and small kernels that run together: what is taken, what is left, and the kernels that Inductor writes for a card."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from unsloth_ext.compiling import graph_passes, norms_fusion, products_fusion
from unsloth_ext.compiling.norms_operators import rms_norm
from unsloth_ext.nf4.products import sum_of_products

T, N, K = 6, 16, 32


def rows(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape).to(dtype)


def given():
    """x, a, their weights, and what is added."""
    return rows(T, K), rows(T, 4), rows(N, K), rows(N, 4), rows(2, 3, N)


def added(use):
    """(how many additions went into the product, how many are left, how far the results are off those in fp32)."""

    def function(x, a, w, u, r):
        return use(sum_of_products([x, a], [w, u]), r)

    tensors = given()
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
        (lambda y, r: (y.view(2, 3, N) + r,), 1),
        (lambda y, r: (r + y.view(3, 2, N).view(2, 3, N),), 1),
        (lambda y, r: (y.view(2, 3, N) + r, y), 0),  # somebody else reads the product
        (lambda y, r: (y + y,), 0),
        (lambda y, r: (y.view(2, 3, N) + r[:1],), 0),
        (lambda y, r: (torch.add(y.view(2, 3, N), r, alpha=2),), 0),
        (lambda y, r: (y.view(2, 3, N) + r.sin(),), 0),  # Inductor computes it where it is added
        (lambda y, r: (y.view(2, 3, N).float() + r.float(),), 0),
        (lambda y, r: (y + (q := r.view(T, N)) @ q.t() @ q,), 0),  # made after the product: not waited for
        (lambda y, r: (y + r.view(T, N),), 0),  # this too, though it is but a view
    ],
)
def test_an_addition_goes_into_the_product(use, taken):
    count, left, off = added(use)
    assert (count, left) == (taken, 1 - taken) and off < 2**-6


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
    assert plain["operators"] == ours["operators"]
