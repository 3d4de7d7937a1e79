"""Unsloth's norms beside ours, on a CPU: `norms_on_unsloth.py [launches] [arithmetic] [interpreted] [layers] [levels] [routes]`. The last line is JSON.

interpreted: under TRITON_INTERPRET=1, where Unsloth's own kernels run; arithmetic: without, for the compiler. In the others the
operator stands for Unsloth's kernel outside of graphs too, where a CPU has none.
"""

import json
import os
import re
import sys
import types
from pathlib import Path

os.environ |= {"UNSLOTH_ALLOW_CPU": "1", "UNSLOTH_EXT_FUSED_NORMS": "1"}

import unsloth_ext  # isort: skip  (before unsloth)
import unsloth  # noqa: F401  # isort: skip  (before transformers)

import torch
from unsloth.kernels import rms_layernorm as theirs
from unsloth.models import _block_compile, llama

sys.path.insert(0, str(Path(__file__).parent))
from memory_models import assert_equal, hold, model_of, tokens_of, trained

from unsloth_ext.compiling import graph_passes, norms_fusion, recompute
from unsloth_ext.compiling import norms_kernel as kernel
from unsloth_ext.compiling.memory_controller import memory_budget
from unsloth_ext.compiling.norms_operators import rms_norm
from unsloth_ext.compiling.recompute import LEVELS

HOPPER = (9, 0)


def launches():
    """Widths for which the two would be launched differently, on a card that has no entry in Unsloth's table and on Hopper."""
    others = {width: warps for (capability, width), warps in theirs._NUM_WARPS.items() if capability == HOPPER}
    wrong = []
    for width in (*range(129, 20000, 7), *others, 32768, 65536):
        block, warps = theirs.calculate_settings(width)
        if kernel.settings(width, None) != (block, warps):
            wrong.append(width)
        if kernel.settings(width, HOPPER) != (block, others.get(width, warps)):
            wrong.append(width)
    return wrong


def arithmetic():
    """{case: what of the floating point and the order of the sum is not Unsloth's, compiled for Hopper}; of the fused kernels, of the sum."""
    found = {}
    strides = ("Y_row_stride", "X_row_stride", "dY_row_stride", "dX_row_stride", "n_cols")
    for width, dtype in ((1000, "bf16"), (4096, "bf16"), (5120, "fp16"), (8192, "bf16"), (4096, "fp32")):
        block, warps = kernel.settings(width, HOPPER)

        def of(function, given, block=block, warps=warps, width=width, dtype=dtype):
            function = getattr(function, "fn", function) if hasattr(function, "values") else function
            constants = given | {
                "WIDTH": width,
                "BLOCK": block,
                "BLOCK_SIZE": block,
                "W_row_stride": 1,
                "r_row_stride": 1,
            }
            constants |= dict.fromkeys(strides, width) | {"eps": 1e-5, "LONG_INDEXING": False}
            constants |= {"GEMMA": False, "TRAIN_W": False, "FROM_Y": False}
            ours = function in (kernel.rms_norm_kernel, kernel.rms_norm_backward_kernel)
            if ours:
                constants.pop("eps")
            scalars = {"eps": "fp32", "n_rows": "i32", "rows_per_program": "i32"}
            narrow = ("r", "dW", "rstd_ptr")
            signature = {
                name: "constexpr"
                if name in constants
                else scalars.get(name, "*fp32" if name in narrow else f"*{dtype}")
                for name in function.arg_names
            }
            return compiled(function, signature, {n: v for n, v in constants.items() if n in signature}, warps)

        for name, mine, his in (
            ("forward", kernel.rms_norm_kernel, theirs._rms_layernorm_forward),
            ("backward", kernel.rms_norm_backward_kernel, theirs._rms_layernorm_backward),
        ):
            alone, wanted = of(mine, {"ADD": False}), of(his, {})
            differs = [part for part, a, b in zip(("operations", "sums"), alone, wanted, strict=True) if a != b]
            if of(mine, {"ADD": True})[1] != wanted[1]:
                differs.append("sums beside an addition")
            found[f"{name} {width} {dtype}"] = differs if wanted[0] and len(wanted[1]) == 1 else ["nothing to compare"]
    return found


def compiled(function, signature, constants, warps):
    """(its floating-point and shuffle instructions in order, the layout that each sum is over)."""
    import triton
    from triton.backends.compiler import GPUTarget

    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
    source = triton.compiler.ASTSource(function, signature, constants, aligned)
    assembly = triton.compile(
        source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "enable_fp_fusion": True}
    ).asm
    operations = re.findall(
        r"^\s*(?:@\S+ )?((?:add|sub|mul|fma|div|rsqrt|cvt|neg|rcp)\.\S*f\S*|shfl\S*)\s", assembly["ptx"], re.M
    )
    layouts = dict(re.findall(r"^(#\w+) = (#ttg\..*)$", assembly["ttgir"], re.M))
    sums = re.findall(r"\}\) : \(tensor<\S+, (#\w+)>\) -> f32", assembly["ttgir"])
    return operations, [layouts[name] for name in sums]


def interpreted():
    """Cases in which the kernel's bits are not those of Unsloth's own, forward and backward, both interpreted."""
    wrong = []
    for rows, width, dtype in ((3, 256, torch.float16), (2, 1000, torch.float32), (1, 4097, torch.float16)):
        x, other, dy = (torch.randn(rows, width).to(dtype) for _ in range(3))
        weight = torch.randn(width).to(dtype)
        total = x + other
        leaf = total.clone().requires_grad_()
        y = theirs.Fast_RMS_Layernorm.apply(leaf, weight, 1e-5)
        (dx,) = torch.autograd.grad(y, leaf, dy)
        ours = [torch.empty_like(x) for _ in range(4)]
        rstd = torch.empty(rows)
        kernel.rms_norm(x, other, weight, 1e-5, ours[0], ours[1], rstd)
        kernel.rms_norm_backward(dy, total, weight, rstd, None, ours[2])
        kernel.rms_norm_backward(dy, total, weight, rstd, other, ours[3])
        if not all(torch.equal(a, b) for a, b in zip(ours, (total, y, dx, dx + other), strict=True)):
            wrong.append((rows, width, str(dtype)))
    return wrong


class Taken:
    """How many additions went into norms, graph by graph."""

    def __init__(self):
        self.counts, self.plain = [], norms_fusion.fuse
        norms_fusion.fuse = self

    def __call__(self, graph):
        self.counts.append(self.plain(graph))
        return self.counts[-1]


def on_a_cpu():
    theirs.Fast_RMS_Layernorm.apply = staticmethod(lambda X, W, eps, *more: rms_norm(X, W, eps)[0])
    recompute.SMALL = 1024


def model(layers=2):
    """transformers' layers with Unsloth's norms. (Unsloth's rope cannot be traced for a CPU.) No LoRA on the output projection: as a
    module it ends in an addition that Inductor would fuse with the residual's, where Unsloth's function ends in a product."""
    made = model_of(layers=layers, hidden=256, wide=512, dtype=torch.bfloat16)
    for module in made.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)  # as ones, a norm's norm would be itself
            module.forward = types.MethodType(lambda self, x: llama.fast_rms_layernorm(self, x), module)
        if hasattr(module, "o_proj"):
            module.o_proj = module.o_proj.base_layer
    made.enable_input_require_grads()
    return made


def layers():
    """Unsloth's compile of the layers, by Inductor: what is fused, and whether the bits are those without."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    on_a_cpu()
    torch.compiler.config.force_disable_caches = True  # a graph that is found again goes through no pass
    original, taken, small, tokens, found = LlamaDecoderLayer.forward, Taken(), model(), tokens_of(), {}

    def step():
        return trained(small, tokens, use_cache=False)

    for which in ("separate", "fused"):
        (unsloth_ext.enable if which == "fused" else unsloth_ext.disable)("compiling.fused_norms")
        torch._dynamo.reset()
        taken.counts.clear()
        LlamaDecoderLayer.forward = original
        _block_compile._wrap(LlamaDecoderLayer, _block_compile._COMPILE_OPTIONS)
        found[which] = step()
        found[f"{which} counts"] = list(taken.counts)
    LlamaDecoderLayer.forward = original
    assert_equal(found.pop("fused"), found.pop("separate"))
    return found


def levels():
    """A memory budget around layers whose graphs are fused and else as traced: the same bits at every level, and norms found in them."""
    from torch._dynamo.backends.common import aot_autograd
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    on_a_cpu()
    original, small, tokens, taken, calls = LlamaDecoderLayer.forward, model(), tokens_of(), [], []

    def compiler(module, _):
        taken.append(norms_fusion.fuse(module.graph))
        module.graph.lint()
        module.recompile()
        return module.forward

    graph = torch.compile(
        original, backend=aot_autograd(fw_compiler=compiler, bw_compiler=compiler), fullgraph=True, dynamic=True
    )

    def forward(self, *args, **kwargs):
        calls.append(1)
        return graph(self, *args, **kwargs)

    forward._unsloth_block_original = original
    LlamaDecoderLayer.forward = forward

    def step():
        return trained(small, tokens, use_cache=False)

    expected, counts = step(), {}
    budget = memory_budget(small, "64GiB")
    assert_equal(step(), expected)
    for level in LEVELS:
        hold(budget, level)
        calls.clear()
        assert_equal(step(), expected)
        counts[level] = len(calls)
    scripts = budget.scripts.values()
    return {
        "taken": taken,
        "counts": counts,
        "outlines": any(script.outline for script in scripts),
        "norms": sorted({name for s in scripts for name, _ in (*s.norms.values(), *filter(None, (s.norm,)))}),
        "why": sorted({script.why for script in scripts}),
    }


def routes():
    """Which calls become our operator in a graph, and that outside of one none does."""
    on_a_cpu()
    found = {}

    def norm(width=256, dtype=torch.bfloat16, trained=False, **names):
        weight = torch.nn.Parameter(torch.randn(width).to(dtype), requires_grad=trained)
        return types.SimpleNamespace(weight=weight, **(names or {"variance_epsilon": 1e-5}))

    def note(name, layernorm, *args, dtype=torch.bfloat16, **options):
        seen = []

        def backend(graph, inputs):
            seen.extend(str(node.target) for node in graph.graph.nodes)
            return graph.forward

        torch._dynamo.reset()
        x = torch.randn(2, 7, layernorm.weight.shape[0]).to(dtype)
        run = torch.compile(lambda x: llama.fast_rms_layernorm(layernorm, x, *args, **options) * 2, backend=backend)
        try:
            run(x)
        except Exception:  # Unsloth's own kernel, for a card
            seen.append("theirs")
        found[name] = "unsloth_ext.rms_norm.default" in seen

    note("plain", norm())
    note("eps", norm(eps=1e-6))
    note("options", norm(), save_output=True, reuse_grad=True)
    note("fp32 weight", norm(dtype=torch.float32))
    note("gemma", norm(), True)
    note("gemma by name", norm(), gemma=True)
    note("trained", norm(trained=True))
    note("narrow", norm(128))
    note("other dtype", norm(dtype=torch.float16))
    note("double", norm(dtype=torch.float64), dtype=torch.float64)
    found["everywhere"] = all(
        module.fast_rms_layernorm is theirs.fast_rms_layernorm
        for name, module in list(sys.modules.items())
        if name.startswith("unsloth.") and "fast_rms_layernorm" in vars(module)
    )
    return found


if __name__ == "__main__":
    found = {name: globals()[name]() for name in sys.argv[1:]}
    found["states"] = {row.id: row.state for row in unsloth_ext.status() if "norms" in row.id}
    unsloth_ext.disable("compiling.norms", "compiling.fused_norms")
    found["restored"] = theirs.fast_rms_layernorm is llama.fast_rms_layernorm
    found["restored"] &= not hasattr(llama.fast_rms_layernorm, "__wrapped__")
    found["restored"] &= graph_passes.ENTRY not in _block_compile._COMPILE_OPTIONS
    print(json.dumps(found))
