"""LoRA projections in a graph: values and gradients against float64, when they are taken, and what a graph makes of them.

Unsloth's own layers, with and without, are in projections_on_unsloth.py, in a process of their own.
"""

import json
import os
import re
import subprocess
import sys
import types
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

if find_spec("bitsandbytes") is None:
    pytest.skip("bitsandbytes is not installed: make setup", allow_module_level=True)

from projection_weights import exact, lora, mean_off, off, results, swiglu_backward, swiglu_forward

from unsloth_ext.compiling import products_fusion, projections
from unsloth_ext.compiling import projections_operators as operators
from unsloth_ext.compiling.projections_patch import PATCHES, _linear, _mlp, _qkv, _side_by_side, _stand_in
from unsloth_ext.nf4 import dense_copies, dequantize
from unsloth_ext.patching import NotHere

needs_unsloth = pytest.mark.skipif(find_spec("unsloth") is None, reason="Unsloth is not installed: make setup")
EPSILON = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
H, I, KV = 256, 384, 128  # noqa: E741
SHAPES = {"Linear": ((H, H),), "QKV": ((H, H), (KV, H), (KV, H)), "MLP": ((I, H), (I, H), (H, I))}


def given_for(name, ranks, dtype, scalings=(2.0, 2.0, 2.0), **options):
    return [
        lora(n, k, rank, dtype, scaling=scaling, **options)
        for (n, k), rank, scaling in zip(SHAPES[name], ranks, scalings, strict=False)
    ]


def function(name, given):
    return lambda x: getattr(projections, name).apply(x, *(one for projection in given for one in projection))


def outer_of(name, head, dtype):
    widths = {"Linear": (H,), "QKV": (H, KV, KV), "MLP": (H,)}[name]
    return [torch.randn(*head, width).to(dtype) for width in widths]


def in_place(name, given, x, outer):
    """One projection after the other, as Unsloth's functions sum: what ours may not be less exact than."""

    def project(x, packed, state, a, b, scaling):
        return torch.addmm(x @ dequantize(packed, state).t(), x @ a.to(x.dtype).t(), b.to(x.dtype).t(), alpha=scaling)

    def run(x):
        flat = x.reshape(-1, H)
        if name == "MLP":
            h = swiglu_forward(project(flat, *given[0]), project(flat, *given[1]))
            return project(h, *given[2]).view(*x.shape[:-1], -1)
        out = tuple(project(flat, *one).view(*x.shape[:-1], -1) for one in given)
        return out if len(out) > 1 else out[0]

    return results(run, x, given, outer)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("ranks", "scalings", "head"),
    [
        ((16, 16, 32), (2.0, 2.0, 2.0), (2, 19)),
        ((16, 8, 3), (0.7, 1.3, 4.0), (1, 37)),
        ((3, 3, 3), (1.0, 1.0, 1.0), (1, 5)),
    ],
)
def test_values_and_gradients(name, dtype, ranks, scalings, head):
    for lora_dtype in (torch.float32, dtype):
        given = given_for(name, ranks, dtype, scalings, dtype_of_lora=lora_dtype)
        x = torch.randn(*head, H).to(dtype).requires_grad_()
        outer = outer_of(name, head, dtype)
        assert not projections.refusal(x, *given[: 2 if name == "MLP" else 3])
        found, wanted = results(function(name, given), x, given, outer), exact(x, given, outer)
        # Each result within a few roundings of what is exact (at most 3.5 were seen), and as a whole as near as the other order
        # comes (0.9 to 1.14 times as far was seen).
        assert off(found, wanted) < 16 * EPSILON[dtype]
        assert mean_off(found, wanted) < 2 * mean_off(in_place(name, given, x, outer), wanted)


@pytest.mark.parametrize("name", ["Linear", "QKV"])
def test_the_forward_on_a_cpu_has_the_bits_of_one_projection_after_the_other(name):
    """With a scaling that is a power of two: others round s B."""
    given = given_for(name, (8, 16, 3), torch.bfloat16)
    x = torch.randn(2, 19, H).to(torch.bfloat16)
    found = function(name, given)(x)
    flat = x.view(-1, H)
    low = (flat @ torch.cat([one[2] for one in given]).to(x.dtype).t()).split([one[2].shape[0] for one in given], 1)
    for one, (packed, state, _, b, scaling), part in zip(found if name == "QKV" else (found,), given, low, strict=True):
        wanted = flat @ dequantize(packed, state).t()
        wanted.addmm_(part, b.to(x.dtype).t(), alpha=scaling)
        assert torch.equal(one.view(wanted.shape), wanted)


@pytest.mark.parametrize("ranks", [(8, 8), (16, 3), (5, 8)])
def test_gate_and_up_are_found_again(ranks):
    """What memory levels compute instead of keeping it: the bits that the function keeps."""
    given = given_for("MLP", (*ranks, 8), torch.bfloat16)
    x = torch.randn(2, 19, H).to(torch.bfloat16).requires_grad_()
    y = function("MLP", given)(x)
    kept = y.grad_fn.saved_tensors
    for name, tensor in zip(("gate", "up"), (one for one in kept if one.shape == (2, 19, I)), strict=True):
        assert torch.equal(projections.gate_or_up(name, x, *given[:2]), tensor)
    with pytest.raises(ValueError, match=r"gate and up must be NF4 projections .*: the input is torch.float32"):
        projections.gate_or_up("up", x.float(), *given[:2])


@pytest.mark.parametrize(
    "name", ["MLP", *(pytest.param(name, marks=pytest.mark.extended) for name in ("Linear", "QKV"))]
)
def test_one_graph_for_all_lengths(name):
    """Traced and differentiated with dynamic shapes: nothing is traced anew, and the numbers are those outside of a graph."""
    given = given_for(name, (8, 16, 3), torch.bfloat16)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    run = torch.compile(function(name, given), backend=counter, fullgraph=True, dynamic=True)
    made = None
    for length in (7, 19, 4):
        x, outer = (
            torch.randn(2, length, H).to(torch.bfloat16).requires_grad_(),
            outer_of(name, (2, length), torch.bfloat16),
        )
        plain = results(function(name, given), x, given, outer)
        assert off(results(run, x, given, outer), [one.double() for one in plain]) < EPSILON[torch.bfloat16]
        made = made or counter.frame_count
        leaves = [leaf for projection in given for leaf in projection[2:4]]
        for leaf, grad in zip(leaves, torch.autograd.grad(run(x), leaves, outer), strict=True):
            assert grad.is_contiguous() and grad.dtype == leaf.dtype  # nothing is left for autograd to copy
    assert counter.frame_count == made > 0


@pytest.mark.parametrize("name", SHAPES)
def test_weights_that_are_kept_dense(name):
    """The same numbers from weights that are inputs of the graph: nothing is dequantised, and no size of theirs is a symbol."""
    given = given_for(name, (8, 16, 3), torch.bfloat16, dtype_of_lora=torch.float32)
    x, outer = torch.randn(2, 19, H).to(torch.bfloat16).requires_grad_(), outer_of(name, (2, 19), torch.bfloat16)
    torch._dynamo.reset()
    plain = results(function(name, given), x, given, outer)
    kept = [dense_copies.keep(*one[:2]) for one in given]
    seen = []

    def backend(graph, inputs):
        seen.append([node for node in graph.graph.nodes if "nf4" in str(node.target)])
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    run = torch.compile(function(name, given), backend=backend, fullgraph=True, dynamic=True)
    assert off(results(run, x, given, outer), [one.double() for one in plain]) < EPSILON[torch.bfloat16]
    assert seen and not any(seen) and all(one.is_current() for one in kept)
    graphs = len(seen)
    x = torch.randn(3, 7, H).to(torch.bfloat16).requires_grad_()
    outer = outer_of(name, (3, 7), torch.bfloat16)
    for a in (one[2] for one in given):  # the adapter is no part of what is kept
        a.data.mul_(-0.5)
    again = results(run, x, given, outer)
    assert len(seen) == graphs
    dense_copies.drop([one[1] for one in given])
    assert (
        off(again, [one.double() for one in results(function(name, given), x, given, outer)]) < EPSILON[torch.bfloat16]
    )


@pytest.mark.parametrize("name", SHAPES)
def test_no_dequantised_weight_is_kept_for_the_backward(name):
    """Which would be 2 bytes a parameter and layer: the forward's and the backward's are not one node to the partitioner."""
    given = given_for(name, (8, 8, 8), torch.bfloat16)
    x = torch.randn(2, 19, H).to(torch.bfloat16).requires_grad_()
    torch._dynamo.reset()
    run = torch.compile(
        function(name, given), fullgraph=True, backend="aot_eager_decomp_partition"
    )  # Inductor's partitioner
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        results = run(x)
    assert kept and (results[0] if name == "QKV" else results).requires_grad
    dense = {tuple(one[1].shape) for one in given}
    assert not [tensor.shape for tensor in kept if tensor.dtype == torch.bfloat16 and tuple(tensor.shape) in dense]


def test_additions_beside_a_projection_are_found():
    """A parallel block's: the residual onto what a projection gives, and the gradients of an input of two projections."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func

    taken = []

    def look(graph, inputs):
        taken.append(products_fusion.fuse(graph.graph))
        graph.graph.lint()
        graph.recompile()
        return make_boxed_func(graph.forward)

    first, second = (given_for("Linear", (8,), torch.bfloat16) for _ in range(2))
    x = torch.randn(2, 19, H).to(torch.bfloat16).requires_grad_()

    def run(x):
        y = x * 1.5
        return function("Linear", first)(y) + x, function("Linear", second)(y)

    wanted = run(x)
    gradient = torch.autograd.grad(wanted, x, [torch.ones_like(one) for one in wanted])
    torch._dynamo.reset()
    compiled = torch.compile(run, backend=aot_autograd(fw_compiler=look, bw_compiler=look), fullgraph=True)
    found = compiled(x)
    again = torch.autograd.grad(found, x, [torch.ones_like(one) for one in found])
    assert taken == [1, 1]
    assert off([*found, *again], [one.double() for one in (*wanted, *gradient)]) < 2 * EPSILON[torch.bfloat16]


@pytest.mark.extended
@pytest.mark.parametrize("name", ["MLP", "QKV"])
def test_inductor_copies_nothing_together(name):
    """The input's gradient is one sum of products, of the gradients where they are: columns of one matrix for gate and up, three of their
    own for q, k and v."""
    from torch._inductor.utils import run_and_get_code

    given = given_for(name, (8, 8, 8), torch.bfloat16)
    x = torch.randn(2, 19, H).to(torch.bfloat16).requires_grad_()
    torch._dynamo.mark_dynamic(x, 1)
    torch._dynamo.reset()
    run = torch.compile(lambda x: function(name, given)(x * 1.5), fullgraph=True)

    def both():
        out = run(x)
        torch.autograd.backward(out, [torch.ones_like(one) for one in out] if name == "QKV" else torch.ones_like(out))

    _, codes = run_and_get_code(both)
    backward = codes[-1]
    # torch writes onto=None or leaves it out.
    sums = re.findall(
        r"product_with_low\.default\(\[(.*?)\], \[.*?\], \[.*?\], .*?, (True|False)(?:, onto=None)?\)", backward
    )
    assert [(of.count("buf") + of.count("tangents"), transposed) for of, transposed in sums][-1] == (
        {"MLP": 2, "QKV": 3}[name],
        "False",
    ), backward
    if name == "MLP":
        (wide,) = re.findall(r"(buf\d+) = torch\.ops\.unsloth_ext\.swiglu_lora_backward", backward)
        made = re.findall(rf"(buf\d+) = {wide}\[0\]", backward)[0]
        assert sums[-1][0].count(f"reinterpret_tensor({made},") == 2, backward


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [3, 16])
def test_swiglu_lora(dtype, rank):
    e, g, a = torch.randn(7, 96).to(dtype), torch.randn(7, 96).to(dtype), torch.randn(rank, 96).to(dtype)
    torch.library.opcheck(torch.ops.unsloth_ext.swiglu_lora.default, (e, g, a))
    h, low = operators.swiglu_lora(e, g, a)
    assert torch.equal(h, torch.nn.functional.silu(e.float()).to(dtype) * g)
    # That is not e sigmoid(e) to the last bit, once in thousands: and its neighbour's product may be the neighbour after the next.
    torch.testing.assert_close(h, swiglu_forward(e, g), rtol=2 * torch.finfo(dtype).eps, atol=0)
    assert off([low], [h.double() @ a.double().t()]) < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_swiglu_lora_backward(dtype):
    dh, e, g = (torch.randn(7, 96).to(dtype) for _ in range(3))
    low, p = torch.randn(7, 5).to(dtype), torch.randn(7, 8).to(dtype)
    torch.library.opcheck(torch.ops.unsloth_ext.swiglu_lora_backward.default, (dh, e, g, low, p, 3))
    wide, sums = operators.swiglu_lora_backward(dh, e, g, low, p, 3)
    h, *both = swiglu_backward(dh, e, g)
    for found, wanted in zip((wide[:, 96:], wide[:, :96]), both, strict=True):
        assert torch.equal(found, wanted)
    assert wide.shape == (7, 192)
    pairs = (low[:, :3], wide[:, :96]), (low[:, 3:], wide[:, 96:]), (p, h)
    exact = torch.cat([left.double().t() @ right.double() for left, right in pairs])
    assert sums.shape == (13, 96) and sums.dtype == torch.float32
    assert off([sums], [exact]) < torch.finfo(dtype).eps


INTERPRETED = """
import torch
from unsloth_ext.compiling import projections_kernel as kernel
from unsloth_ext.compiling.projections_operators import swiglu_lora, swiglu_lora_backward
for rows, width, rank in ((3, 1500, 16), (70, 96, 3), (1, 64, 64), (0, 64, 8), (40, 256, 20)):
    e, g, a = (torch.randn(n, width).half() for n in (rows, rows, rank))
    wanted, rounded = swiglu_lora(e, g, a)
    h, low = torch.full((rows, width), 7.0).half(), torch.full((rows, rank), 7.0).half()
    kernel.swiglu_lora(e, g, a, h, low)
    torch.testing.assert_close(h, wanted, rtol=4e-3, atol=4e-3)
    assert ((low - rounded).norm() <= 2e-3 * rounded.norm()).item()
for dtype, rows, width, ranks in (
    (torch.float16, 3, 1500, (16, 16, 16)), (torch.float16, 70, 96, (3, 20, 8)), (torch.float16, 1, 64, (64, 1, 8)),
    (torch.float16, 0, 64, (1, 1, 8)), (torch.bfloat16, 5, 96, (1, 1, 8)),
):
    dh, e, g = (torch.randn(rows, width).to(dtype) for _ in range(3))
    low, p = (torch.randn(rows, n).to(dtype) for n in (ranks[0] + ranks[1], ranks[2]))
    wanted, rounded = swiglu_lora_backward(dh, e, g, low, p, ranks[0])
    near = 4 * torch.finfo(dtype).eps  # of sums and products: the last bit may differ
    for lora in (False, True):
        wide = torch.full((rows, 2 * width + 64), 7.0, dtype=dtype)
        if not lora:
            h = kernel.swiglu_backward(dh, e, g, wide)
            torch.testing.assert_close(h, torch.nn.functional.silu(e.float()).to(dtype) * g, rtol=near, atol=near)
        elif dtype == torch.float16:  # the interpreter takes the bits of bfloat16 for integers in a dot
            kernel._PROGRAMS = 4  # splits, where there are few columns
            sums = kernel.swiglu_lora_backward(dh, e, g, low, p, ranks[:2], wide)
            assert ((sums - rounded).norm() <= 2 * torch.finfo(dtype).eps * rounded.norm()).item()
        else:
            continue
        torch.testing.assert_close(wide[:, : 2 * width], wanted, rtol=near, atol=near)
        assert (wide[:, 2 * width :] == 7).all()
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_kernel_interpreted():
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), env.get("PYTHONPATH", ""))))
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton's interpreter compiles nothing")
def test_kernel_compiles_for_hopper():
    import triton
    from triton.backends.compiler import GPUTarget

    from unsloth_ext.compiling import projections_kernel as kernel
    from unsloth_ext.compiling.projections_kernel import (
        swiglu_backward_kernel,
        swiglu_lora_backward_kernel,
        swiglu_lora_kernel,
    )

    signature = dict.fromkeys(("dh_ptr", "e_ptr", "g_ptr", "h_ptr", "wide_ptr"), "*bf16")
    signature |= dict.fromkeys(("width", "pitch", "blocks"), "i32") | {"BLOCK": "constexpr", "PTX": "constexpr"}
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(7)}
    source = triton.compiler.ASTSource(swiglu_backward_kernel, signature, {"BLOCK": 1024, "PTX": True}, aligned)
    assembly = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["ptx"]
    assert (
        len(re.findall(r"ld\.global\S*\.v4", assembly)) == len(re.findall(r"st\.global\S*\.v4", assembly)) == 3
    ), assembly
    # With sums: what is read comes by copies of 16 bytes, steps ahead.
    names = swiglu_lora_backward_kernel.arg_names
    signature = {
        name: ("*fp32" if name == "sums_ptr" else "*bf16") if name.endswith("_ptr") else "i32" for name in names
    }
    options = kernel.step_for(16)
    blocks = {name: options.pop(name) for name in ("ROWS", "COLUMNS")} | {"RANK": 16, "PTX": True}
    signature |= dict.fromkeys(blocks, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name] != "constexpr"}
    source = triton.compiler.ASTSource(swiglu_lora_backward_kernel, signature, blocks, aligned)
    assembly = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    assert re.search(r"cp\.async\.cg\.\S* \[.*?\], \[.*?\], 0x10", assembly) and "mma.sync" in assembly, assembly
    assert re.search(r"st\.global\S*\.v4", assembly), assembly
    # Forward: the same.
    names, options = swiglu_lora_kernel.arg_names, dict(kernel._FORWARD)
    signature = {
        name: ("*fp32" if name == "sums_ptr" else "*bf16") if name.endswith("_ptr") else "i32" for name in names
    }
    blocks = {name: options.pop(name) for name in ("ROWS", "COLUMNS")} | {"RANK": 16, "PTX": True}
    signature |= dict.fromkeys(blocks, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name] != "constexpr"}
    source = triton.compiler.ASTSource(swiglu_lora_kernel, signature, blocks, aligned)
    assembly = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    assert re.search(r"(ld\.global\S*\.v4|cp\.async\.cg\S* \[.*?\], \[.*?\], 0x10)", assembly), assembly
    assert re.search(r"st\.global\S*\.v4", assembly) and "mma" in assembly, assembly


def test_refusals():
    dtype = torch.bfloat16
    x, good = torch.randn(3, H).to(dtype), lora(KV, H, 8, dtype)
    packed, state, a, b, scaling = good

    def why(x=x, packed=packed, state=state, a=a, b=b, scaling=scaling):
        return projections.refusal(x, good, (packed, state, a, b, scaling))

    assert why() == ""
    assert why(x=x.float()) == "the input is torch.float32"
    assert why(x=x.to("meta")) == "it is no NVIDIA card"
    with torch.autocast("cpu", torch.bfloat16):
        assert why() == "" and projections.refusal(x.half(), good) == "autocast is to another dtype"
    assert why(state=None) == why(state=types.SimpleNamespace(quant_type="fp4")) == "a weight is not NF4"
    assert why(a=None) == why(b=None) == "a projection has no LoRA"
    assert why(packed=packed.t()) == "a weight is transposed"
    assert why(a=a[:, 1:]) == why(b=b[1:]) == why(b=b[:, 1:]) == "the shapes do not fit"
    assert why(a=torch.randn(40, H), b=torch.randn(KV, 40)) == "a rank is more than an eighth of the input's width"
    assert why(scaling=torch.ones(())) == "a scaling is no number"
    assert projections.refusal(x.half(), good) == "a weight is of another dtype than the input"
    assert projections.refusal(x[:, : H // 2], good) == "the shapes do not fit"
    odd = lora(16, 96, 8, dtype)
    assert projections.refusal(x[:, :96], odd) == "a weight's rows are no whole blocks"
    wide = [lora(KV, H, 20, dtype) for _ in range(2)]
    assert not projections.refusal(x, *wide)
    assert projections.mlp_refusal(x, *wide) == "the ranks of gate and up are more than an eighth of the input's width"


def test_routes():
    """What Unsloth's names stand for chooses while a graph is traced; these are the choices."""
    dtype = torch.bfloat16
    x, mlp, qkv = torch.randn(1, 5, H).to(dtype), given_for("MLP", (8, 8, 8), dtype), given_for("QKV", (8, 8, 8), dtype)
    gelu = object()
    module = types.SimpleNamespace(swiglu_fg_kernel=object(), swiglu_DWf_DW_dfg_kernel=object())
    functions = (module.swiglu_fg_kernel, module.swiglu_DWf_DW_dfg_kernel)
    flat = [one for projection in mlp for one in projection]

    route = _mlp(module)
    assert route(x, *flat, *functions, True, None, None, None, None) == (projections.MLP, (x, *flat))
    assert route(x, *flat, *functions) is not None
    assert route(x, *flat, gelu, functions[1], True, None, None, None, None) is None
    assert route(x, *flat, *functions, True, (0.1, 0.0, 0.0), None, None, None) is None
    assert route(x, *flat, *functions, True, None, None, torch.zeros(I), None) is None
    assert route(x, *flat[:10], *lora(H, I, 50, dtype), *functions) is None  # down's rank
    assert route(x.float(), *flat, *functions) is None

    route, flat = _qkv(module), [one for projection in qkv for one in projection]
    assert route(x, *flat, True, None, None, None, None) == (projections.QKV, (x, *flat))
    assert route(x, *flat, True, (0.0, 0.0, 0.0), None, None, None) is None
    assert route(x, *flat, True, None, None, None, torch.zeros(KV)) is None
    assert route(x, *flat[:12], None, None, None) is None

    route = _linear(module)
    assert route(x, *qkv[0]) == route(x, *qkv[0], None, None) == (projections.Linear, (x, *qkv[0]))
    assert route(x, *qkv[0], 0.5, None) is None and route(x, *qkv[0], None, torch.zeros(H)) is None


def test_outside_of_a_graph_it_is_the_original():
    class Original(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, dy):
            return dy * 2

    stand_in = _stand_in(Original, lambda x: pytest.fail("asked outside of a graph"))
    x = torch.ones(3, requires_grad=True)
    stand_in.apply(x).sum().backward()
    assert torch.equal(x.grad, torch.full((3,), 2.0))
    assert stand_in.forward is Original.forward and stand_in.backward is Original.backward

    class Ours:
        @staticmethod
        def apply(x):
            return x * 5

    ours = _stand_in(Original, lambda x: (Ours, (x,)) if x.dim() == 1 else None)
    torch._dynamo.reset()
    run = torch.compile(ours.apply, backend="eager", fullgraph=True)
    assert run(torch.ones(3)).tolist() == [5.0] * 3 and run(torch.ones(1, 1)).tolist() == [[2.0]]


def test_torch_that_does_not_trace_them_is_left_alone():
    with pytest.raises(NotHere, match="does not trace"):
        _side_by_side(types.SimpleNamespace(TRACE_LORA_FUNCTIONS=False), PATCHES[0].targets[0])


@needs_unsloth
def test_on_the_installed_unsloth():
    from unsloth_ext.patching.release import folder_of
    from unsloth_ext.patching.survey import survey

    (row,) = survey(PATCHES, {"unsloth": folder_of("unsloth")})
    assert (row.id, row.state) == ("compiling.projections", "applied"), row


def test_the_switch(monkeypatch):
    (patch,) = PATCHES
    twice = type(
        "Twice", (torch.autograd.Function,), dict.fromkeys(("forward", "backward"), staticmethod(lambda ctx, x: x * 2))
    )
    module = types.SimpleNamespace(TRACE_LORA_FUNCTIONS=True, LoRA_MLP=twice, LoRA_QKV=twice, LoRA_W=twice)
    monkeypatch.delenv("UNSLOTH_EXT_SIDE_BY_SIDE", raising=False)
    assert not patch.is_switched_off
    cards = torch.cuda.device_count()
    measured = cards and {torch.cuda.get_device_capability(i) for i in range(cards)} == {(9, 0)}
    if measured:
        assert len(patch.changes(module, None)) == 3
    else:
        with pytest.raises(NotHere, match="SIDE_BY_SIDE=1"):
            patch.changes(module, None)
    monkeypatch.setenv("UNSLOTH_EXT_SIDE_BY_SIDE", "1")
    assert not patch.is_switched_off and len(patch.changes(module, None)) == 3
    monkeypatch.setenv("UNSLOTH_EXT_SIDE_BY_SIDE", "0")
    assert patch.is_switched_off


def on_unsloth(tmp_path, *parts):
    env = {name: value for name, value in os.environ.items() if not name.startswith("UNSLOTH")}
    env |= {
        "HF_HUB_OFFLINE": "1",
        "UNSLOTH_EXT_SIDE_BY_SIDE": "1",
        "OMP_NUM_THREADS": "1",
        "UNSLOTH_COMPILE_LOCATION": str(tmp_path / "cache"),
    }
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), env.get("PYTHONPATH", ""))))
    command = [sys.executable, str(Path(__file__).with_name("projections_on_unsloth.py")), *parts]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-6000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.pop("restored")
    return found


def exact_enough(found):
    assert found["ours was traced"] == [True, False]
    assert found["ours"] < 8 * EPSILON[torch.float16] and found["ours"] < 2 * found["theirs"], found


@pytest.mark.extended
@needs_unsloth
def test_beside_unsloths_mlp(tmp_path):
    exact_enough(on_unsloth(tmp_path, "LoRA_MLP")["LoRA_MLP"])


@needs_unsloth
@pytest.mark.extended
def test_beside_unsloths_other_functions(tmp_path):
    found = on_unsloth(tmp_path, "LoRA_QKV", "LoRA_W", "routes")
    taken = {"plain", "no dropout, no bias"}
    assert {name for name, side_by_side in found.pop("routes").items() if side_by_side} == taken
    for one in found.values():
        exact_enough(one)


@needs_unsloth
@pytest.mark.extended
def test_memory_levels_around_unsloths_mlp(tmp_path):
    found = on_unsloth(tmp_path, "levels")["levels"]
    assert found["ours was traced"] and found["fused"] == ["one sum"] and found["outlines"], found
    assert set(found["counts"].values()) == {2}  # no layer's graph ran again
