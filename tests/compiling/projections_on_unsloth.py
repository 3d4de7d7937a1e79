"""Unsloth's own functions with and without compiling.projections, on a CPU, in fp16 and compiled (traced and differentiated;
nothing is generated): `projections_on_unsloth.py [LoRA_MLP] [LoRA_QKV] [LoRA_W] [levels] [routes]`. The last line is JSON.

What is replaced for the CPU's sake, on both sides: the dequantisation, which upstream has for cards only, and the SwiGLU kernel, which
cannot be traced through Triton's interpreter, by the same formula.
"""

import json
import os
import sys
import types
from contextlib import contextmanager, nullcontext
from pathlib import Path

os.environ |= {"UNSLOTH_ALLOW_CPU": "1", "TRITON_INTERPRET": "1"}

import unsloth_ext  # isort: skip  (before unsloth)
import unsloth  # noqa: F401  # isort: skip  (before transformers)

import torch
from unsloth.kernels import fast_lora, utils

sys.path.insert(0, str(Path(__file__).parent))
from memory_models import assert_equal, hold, model_of, tokens_of, trained
from projection_weights import exact, lora, mean_off, swiglu_forward

from unsloth_ext.compiling import recompute
from unsloth_ext.compiling.memory_controller import memory_budget
from unsloth_ext.compiling.recompute import LEVELS
from unsloth_ext.nf4 import dequantize

DTYPE = torch.float16
swiglu = torch.library.custom_op("unsloth_ext_test::swiglu", mutates_args=())(swiglu_forward)
swiglu.register_fake(lambda e, g: torch.empty_like(e))


def prepare():
    utils._fast_dequantize_bnb = lambda W, state=None, **other: W if state is None else dequantize(W, state)
    fast_lora.swiglu_fg_kernel = swiglu
    recompute.SMALL = 256


class Counter:
    """An aot_eager backend that remembers what its graphs call."""

    def __init__(self):
        self.graphs, self.operators = 0, set()

    def __call__(self, graph, inputs):
        from torch._dynamo.backends.common import aot_autograd
        from torch._inductor.fx_passes.post_grad import decompose_auto_functionalized

        def keep(module, _):
            decompose_auto_functionalized(module.graph)  # as Inductor does: the memory probe sees operators
            module.recompile()
            self.operators |= {str(node.target) for node in module.graph.nodes if node.op == "call_function"}
            return module.forward

        self.graphs += 1
        return aot_autograd(fw_compiler=keep, bw_compiler=keep)(graph, inputs)


def compiled(function):
    torch._dynamo.reset()
    counter = Counter()
    return torch.compile(function, backend=counter, fullgraph=True, dynamic=True), counter


def errors(name):
    """Ours and theirs of one function: the errors of its results and gradients against float64, all as one vector."""
    h, i, kv = 256, 512, 128
    shapes = {"LoRA_MLP": ((i, h), (i, h), (h, i)), "LoRA_QKV": ((h, h), (kv, h), (kv, h)), "LoRA_W": ((h, h),)}[name]
    given = [
        lora(n, k, rank, DTYPE, dtype_of_lora=torch.float32) for (n, k), rank in zip(shapes, (8, 16, 3), strict=False)
    ]
    flat = [one for projection in given for one in projection]
    more = {"LoRA_MLP": [swiglu, fast_lora.swiglu_DWf_DW_dfg_kernel], "LoRA_QKV": [], "LoRA_W": []}[name]
    more += {"LoRA_MLP": [True, None, None, None, None], "LoRA_QKV": [True, None, None, None, None], "LoRA_W": []}[name]
    found, operators = {}, {}
    x = torch.randn(1, 37, h).to(DTYPE).requires_grad_()
    outer = None

    def run(function):
        nonlocal outer
        leaves = [x, *(t for p in given for t in p[2:4])]
        for leaf in leaves:
            leaf.grad = None
        out = function(x)
        out = out if isinstance(out, tuple) else (out,)
        outer = outer or [torch.randn_like(one) for one in out]
        torch.autograd.backward(out, outer)
        return [one.detach().double() for one in (*out, *(leaf.grad for leaf in leaves))]

    for side in ("ours", "theirs"):
        with nullcontext() if side == "ours" else taken_out():
            function, counter = compiled(lambda x: fast_lora._apply(getattr(fast_lora, name), x, *flat, *more))
            found[side], operators[side] = run(function), counter.operators
    wanted = exact(x, given, outer)
    sides = ["unsloth_ext.product_with_low.default" in operators[side] for side in ("ours", "theirs")]
    return {side: mean_off(found[side], wanted) for side in found} | {"ours was traced": sides}


@contextmanager
def taken_out():
    unsloth_ext.disable("compiling.projections")
    yield
    unsloth_ext.enable("compiling.projections")


def model(layers=2):
    """transformers' layers with Unsloth's MLP. (Unsloth's norms and rope cannot be traced for a CPU.)"""
    import bitsandbytes

    made = model_of(layers=layers, hidden=128, wide=256, dtype=DTYPE)
    for layer in made.base_model.model.model.layers:
        for module in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj):
            base = module.base_layer
            packed = bitsandbytes.nn.Linear4bit(
                base.in_features, base.out_features, bias=False, compute_dtype=DTYPE, quant_type="nf4"
            )
            packed.weight = bitsandbytes.nn.Params4bit(base.weight.data, requires_grad=False, quant_type="nf4")
            module.base_layer = packed.to("cpu")
        layer.mlp.forward = types.MethodType(fast_lora.apply_lora_mlp_swiglu, layer.mlp)
    return made


def levels():
    """Unsloth's layers, compiled by class: the same bits at every level, gate and up found, and no graph of their own."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    small = model()
    original = LlamaDecoderLayer.forward
    graph, counter = compiled(original)
    calls = []

    def forward(self, *args, **kwargs):
        calls.append(1)
        return graph(self, *args, **kwargs)

    forward._unsloth_block_original = original
    LlamaDecoderLayer.forward = forward
    tokens = tokens_of()

    def step():
        return trained(small, tokens, use_cache=False)

    expected = step()
    budget = memory_budget(small, "64GiB")
    assert_equal(step(), expected)
    counts = {}
    for level in LEVELS:
        hold(budget, level)
        calls.clear()
        assert_equal(step(), expected)
        counts[level] = len(calls)
    return {
        "counts": counts,
        "fused": sorted({script.fused for script in budget.scripts.values() if script.products}),
        "outlines": any(script.outline for script in budget.scripts.values()),
        "why": sorted({script.why for script in budget.scripts.values()}),
        "ours was traced": "unsloth_ext.product_with_low.default" in counter.operators,
    }


def routes():
    """Which calls are taken: how many of ours were traced."""
    h = 64
    given = lora(h, h, 4, DTYPE)
    x = torch.randn(1, 5, h).to(DTYPE)
    taken = {}

    def note(name, *args, gradient=True):
        function, counter = compiled(lambda x: fast_lora._apply(fast_lora.LoRA_W, x, *args))
        function(x.clone().requires_grad_(gradient))
        taken[name] = "unsloth_ext.product_with_low.default" in counter.operators

    note("plain", *given)
    note("no dropout, no bias", *given, None, None)
    note("dropout", *given, 0.5, None)
    note("bias", *given, None, torch.zeros(h, dtype=DTYPE))
    note("rank", *lora(h, h, 16, DTYPE))
    note("no LoRA", *given[:2], None, None, None, gradient=False)
    return taken


if __name__ == "__main__":
    prepare()
    theirs = fast_lora.LoRA_MLP.__wrapped__
    parts = {"levels": levels, "routes": routes}
    found = {name: parts[name]() if name in parts else errors(name) for name in sys.argv[1:]}
    unsloth_ext.disable("compiling.projections")
    found["restored"] = fast_lora.LoRA_MLP is theirs and issubclass(theirs, torch.autograd.Function)
    print(json.dumps(found))
