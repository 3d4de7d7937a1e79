"""What the nf4 room changes: who dequantises an NF4 weight, who multiplies by it, and which generations replay CUDA graphs.

Every release since 2026.9.14 has one seam for all of its modules: `unsloth.kernels.utils.fast_dequantize`, which everybody
imports by name, is a thin function that calls the module's global `_fast_dequantize_bnb`. That global is replaced. The
replacement takes NF4 states on NVIDIA cards and hands everything else (no state, fp4, FP8, NVFP4, float8 tensors, a CPU, an
`out` that does not fit) to what stood there, with the arguments as they came.

Multiplying has four seams: `_fast_gemv_bnb` behind `fast_gemv` (one row), `fast_linear_forward` (a decoding step of a batch) and
`matmul_lora` (prefill and training) in the same module, and bitsandbytes' `matmul_4bit`, through which its `Linear4bit` goes, with
Unsloth and without. Each takes `matmul.run` where `matmul_table` says that it is faster for so many rows on this card, without a
gradient, and hands everything else on.
"""

import functools
import math
from importlib import import_module

from ..patching import NotHere, Patch, SetAttribute, Target
from ..patching.fingerprint import of_object

# The CUDA branch's own fast_dequantize, behind the seam: its contract (scratch buffers, transposed weights) is the one kept here.
_BEHIND_THE_SEAM = {
    "a832f0d1edc3a534": "2026.9.14",
    "9a5f66d34bbb63c1": "2026.10.1 to 2026.10.7",
    "c0bdbe67f2221d13": "2026.10.8",
    "61748cd692395b08": "2026.10.9",
}
_WITHOUT_A_CARD = {"5ac648a444e1b37b": "2026.10.9"}  # what Unsloth defines there

# Where upstream's kernel was measured to be as fast: compute capability -> (least, most) elements, most None for any.
# Empty: none was found on the one measured card (9, 0); no other card has been measured.
UPSTREAM_AS_FAST: dict[tuple[int, int], tuple[int, int | None]] = {}


def _changes(module, target):
    original = vars(module)["_fast_dequantize_bnb"]
    if (found := of_object(original)) not in _BEHIND_THE_SEAM:
        if found in _WITHOUT_A_CARD:
            raise NotHere("for NVIDIA cards, and there is none")
        raise RuntimeError(
            f"upstream changed: _fast_dequantize_bnb is {found or 'not readable'}, known are {', '.join(_BEHIND_THE_SEAM)}"
        )
    return [SetAttribute(module, "_fast_dequantize_bnb", _replacement(module, original))]


def _replacement(module, original):
    import torch
    from bitsandbytes.functional import QuantState

    # All of it now, the kernel too: Unsloth has imported Triton already, and the first step should not wait for it.
    dequantization, states, launch = (
        import_module(f".{n}", __package__) for n in ("dequantization", "quant_state", "launch")
    )
    plans, run, traced = dequantization.plans, dequantization.run, dequantization.traced
    is_compiling, storages = torch.compiler.is_compiling, (torch.uint8, torch.bfloat16, torch.float16, torch.float32)
    scratch_views = {}  # (device index, shape, dtype) -> (a shared buffer, a view of it): making views costs a microsecond
    buffers = {}  # before 2026.10.1: device index -> a buffer of our own. Unsloth's comes in a pair that only it may make

    def ours(W, quant_state) -> bool:
        return (
            (type(quant_state) is QuantState or type(quant_state) is list)
            and states.quant_type(quant_state) == "nf4"
            and W.dtype in storages
            and W.device.type == "cuda"
            and torch.version.hip is None
        )

    def upstream_is_as_fast(W, state) -> bool:
        if not UPSTREAM_AS_FAST:
            return False
        least, most = UPSTREAM_AS_FAST.get(launch.capability(W.get_device()), (1, 0))
        return least <= math.prod(state.shape) and (most is None or math.prod(state.shape) <= most)

    def scratch(W, shape, dtype):
        """The shared buffer as a tensor of the weight's shape, or None where Unsloth would not use it."""
        index = W.get_device()
        key, since_2026_10 = (index, shape, dtype), hasattr(module, "_can_use_scratch")
        if since_2026_10:
            if not module._can_use_scratch(W.device):
                return None
            buffer = module._SCRATCH.get(("weight", index))
        else:
            buffer = buffers.get(index)
        known = scratch_views.get(key)
        if known is not None and known[0] is buffer:
            return known[1]
        n = math.prod(shape)
        if since_2026_10:
            module._scratch("weight", W.device, n, dtype)  # makes it, or makes it larger
            buffer = module._SCRATCH[("weight", index)]
        elif buffer is None or buffer.dtype != dtype or buffer.numel() < n:
            with torch.inference_mode(False):  # an inference tensor could not be written to outside
                buffer = buffers[index] = torch.empty(n, dtype=dtype, device=W.device)
        known = scratch_views[key] = (buffer, buffer[:n].view(shape))
        return known[1]

    def dequantize(W, quant_state, out, use_global_buffer):
        """The dense weight, or None where Unsloth's own way must be taken."""
        if not ours(W, quant_state):
            return None
        state = states.read(quant_state)
        if is_compiling():
            return traced(W, quant_state, out) if state.blocksize in states.BLOCKSIZES else None
        if upstream_is_as_fast(W, state):
            return None
        try:
            states.check(W, state, out, state.dtype)
        except (TypeError, ValueError, AttributeError):
            return None  # upstream has its own answer to it
        if out is None and use_global_buffer:
            out = scratch(W, state.shape, state.dtype)
        if out is None:
            out = torch.empty(state.shape, dtype=state.dtype, device=W.device)
        if not run(W, state, out, quant_state):
            return None
        return out.t() if W.shape[0] == 1 else out

    @functools.wraps(original)
    def _fast_dequantize_bnb(W, quant_state=None, out=None, use_global_buffer=False, **other):
        if quant_state is None:
            return original(W, quant_state, out=out, use_global_buffer=use_global_buffer, **other)
        if out is None and not is_compiling() and (plan := plans.get(id(quant_state))) is not None:
            buffer = scratch(W, quant_state.shape, quant_state.dtype) if use_global_buffer else None
            result = plan(W, quant_state, buffer)
            if result is not None:
                return result
        result = dequantize(W, quant_state, out, use_global_buffer)
        if result is None:
            return original(W, quant_state, out=out, use_global_buffer=use_global_buffer, **other)
        return result

    return _fast_dequantize_bnb


def _few_rows(same_dtype: bool):
    """few(x, packed, quant_state, out, bias) -> x W^T + bias by our kernels, or None where the original is to be taken.

    `out` is only written where it fits. same_dtype: only where the state names x's dtype, which is what Unsloth's own return.
    """
    import torch
    from bitsandbytes.functional import QuantState

    matmul, table, states = (import_module(f".{n}", __package__) for n in ("matmul", "matmul_table", "quant_state"))
    plans, is_compiling, modes = matmul.plans, torch.compiler.is_compiling, torch._C._len_torch_dispatch_stack

    def few(x, packed, quant_state, out=None, bias=None):
        if out is not None and not out.is_contiguous():  # Unsloth's down projection offers a part of its buffer
            out = None
        if (plan := plans.get(id(quant_state))) is not None:
            if (y := plan(x, packed, quant_state, bias, out)) is not None:
                return y
        if (
            type(quant_state) is not QuantState
            or quant_state.quant_type != "nf4"
            or not isinstance(packed, torch.Tensor)
            or not table.may_take(x)
            or (same_dtype and x.dtype is not quant_state.dtype)
            or is_compiling()
            or modes()
            or matmul._wants_gradient(x, bias)
        ):
            return None
        state = states.read(quant_state)
        try:
            matmul._check(x, packed, state, bias)
        except (TypeError, ValueError, AttributeError):
            return None  # the original has its own answer to it
        rows, (n, k) = x.numel() // x.shape[-1], state.shape
        if table.variant_for(x.get_device(), x.dtype, rows, state, bias is not None) is None:
            return None
        shape = (*x.shape[:-1], n)
        if out is None or out.shape != shape or out.dtype is not x.dtype or out.device != x.device:
            out = torch.empty(shape, dtype=x.dtype, device=x.device)
        return out if matmul.run(x.reshape(rows, k), packed, state, bias, out.view(rows, n), quant_state) else None

    return few


# What fast_linear_forward asks before it takes a projection apart; each release has some of them.
_LEFT_TO_THE_MODULE = (
    "_has_non_lora_adapter",
    "_has_multiple_active_adapters",
    "_has_active_dora_adapter",
    "_has_active_lora_bias",
    "_has_packed_qweight",
)


def _route_matmuls(module, target):
    few, here = _few_rows(same_dtype=True), vars(module)
    routes = {"_fast_gemv_bnb": _gemv, "fast_linear_forward": _decoding, "matmul_lora": _matmul_lora}
    return [SetAttribute(module, name, make(module, here[name], few)) for name, make in routes.items()]


def _gemv(module, original, few):
    @functools.wraps(original)
    def _fast_gemv_bnb(X, W, quant_state, out=None):
        y = None if quant_state is None else few(X, W, quant_state, out)
        return original(X, W, quant_state, out=out) if y is None else y

    return _fast_gemv_bnb


def _decoding(module, original, few):
    import torch

    may_take = import_module(".matmul_table", __package__).may_take
    left_out = [vars(module)[name] for name in _LEFT_TO_THE_MODULE if name in vars(module)]
    is_compiling = torch.compiler.is_compiling

    def adapter(A, B, dtype):
        if A.dtype == B.dtype == dtype:
            return A, B
        if cast := vars(module).get("_fast_lora_weights"):
            return cast(A, B, dtype)
        for weight in (A, B):  # before 2026.10.8: cast once, for good
            if not hasattr(weight, "_fast_lora"):
                weight._fast_lora = weight.to(dtype)
        return A._fast_lora, B._fast_lora

    @functools.wraps(original)
    def fast_linear_forward(proj, X, temp_lora=None, out=None):
        rows = X.shape[0]  # one row goes to fast_gemv
        if rows > 1 and X.shape[1] == 1 and not is_compiling() and may_take(X):
            if not any(ask(proj) for ask in left_out):
                W, W_quant, A, B, scaling, bias = module.get_lora_parameters_bias(proj)
                y = None if W_quant is None else few(X, W, W_quant, out)
                if y is not None:
                    if A is not None:
                        A, B = adapter(A, B, X.dtype)
                        low = torch.mm(X.reshape(rows, -1), A.t()).to(X.dtype)
                        y.view(rows, -1).addmm_(low, B.t(), alpha=scaling)
                    if bias is not None:
                        y += bias
                    return y
        return original(proj, X, temp_lora=temp_lora, out=out)

    return fast_linear_forward


def _matmul_lora(module, original, few):
    import torch

    may_take = import_module(".matmul_table", __package__).may_take
    is_compiling = torch.compiler.is_compiling

    @functools.wraps(original)
    def matmul_lora(X, W, W_quant, A, B, s, out=None, **other):
        # A transposed weight, [1, bytes], is a backward: X is multiplied by W itself there.
        if out is None and W_quant is not None and W.shape[0] != 1 and not is_compiling() and may_take(X):
            if not torch.is_autocast_enabled("cuda") or torch.get_autocast_dtype("cuda") is X.dtype:
                y = few(X, W, W_quant)
                if y is not None:
                    if A is not None:
                        low = torch.mm(X.reshape(-1, X.shape[-1]), A.to(X.dtype).t())
                        y.view(-1, y.shape[-1]).addmm_(low, B.to(X.dtype).t(), alpha=s)
                    return y
        return original(X, W, W_quant, A, B, s, out=out, **other)

    return matmul_lora


def _matmul_4bit(original):
    import torch

    from .dense_copies import copy_of
    from .matmul import _wants_gradient, linear
    from .matmul_table import FACTORS, MOST_ROWS, enabled

    few = []  # made when it is first needed: bitsandbytes is only half imported here
    is_dynamo_compiling = torch.compiler.is_dynamo_compiling

    @torch.compiler.assume_constant_result  # the tracer need not see how a card is asked for its name
    def may_run(index):
        return enabled(index)

    @functools.wraps(original)
    def matmul_4bit(A, B, quant_state, out=None, bias=None):
        if is_dynamo_compiling():
            kept = copy_of(quant_state, A.dtype, A.device)
            if (
                kept is not None
                and out is None
                and A.shape[-1] == kept.shape[1]
                and (bias is None or bias.dtype == A.dtype)
            ):
                return torch.nn.functional.linear(A, kept, bias)
            if (
                out is None
                and A.is_cuda
                and A.dtype in FACTORS
                and getattr(quant_state, "quant_type", None) == "nf4"
                and A.shape[-1] == quant_state.shape[-1]
                and A.numel() <= MOST_ROWS * A.shape[-1]
                and not _wants_gradient(A, bias)
                and may_run(A.device.index)
            ):
                return linear(A, B, quant_state, bias)
        elif quant_state is not None:
            if not few:
                few.append(_few_rows(same_dtype=False))
            if (y := few[0](A, B, quant_state, out, bias)) is not None:
                return y if out is None or out is y else out.copy_(y)
        return original(A, B, quant_state, out=out, bias=bias)

    return matmul_4bit


# Below it, capturing a decoding step in as many graphs as there are layers costs more than replaying them gains.
_CAPTURE_FROM = 64  # new tokens


def _new_tokens(model, args, kwargs) -> int:
    """How many tokens a generate() call asks for; 0 where it does not say."""
    config = kwargs.get("generation_config") or getattr(model, "generation_config", None)
    found = kwargs.get("max_new_tokens")
    if found is None and kwargs.get("max_length") is not None:
        prompt = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        return kwargs["max_length"] - getattr(prompt, "shape", (0, 0))[-1]
    return found or getattr(config, "max_new_tokens", None) or 0


def _hooked(model) -> bool:
    """Would a replay leave out what somebody has hooked in? The model itself and its embedding, on which trainers have a hook of
    their own, are called as ever."""
    as_ever = {model, model.get_input_embeddings()}
    return any((m._forward_hooks or m._forward_pre_hooks) and m not in as_ever for m in model.modules())


def _captured_generate(original):
    # What a graph has baked in (weights, adapters, quant states, tables, cache) upstream compares before each generate() and after
    # each optimizer step; model types, caches and positions that it does not know run as they did. Beams, assistants, caches of
    # the caller and hooks are left out here.
    from .generation import is_plain_search

    @functools.wraps(original)
    def unsloth_fast_generate(self, *args, **kwargs):
        graphs = import_module("unsloth.models._decode_graphs")
        if (
            graphs.enabled()
            or not is_plain_search(self, kwargs)
            or kwargs.get("past_key_values") is not None
            or _new_tokens(self, args, kwargs) < _CAPTURE_FROM
            or _hooked(self)
        ):
            return original(self, *args, **kwargs)
        with graphs.rl_generation():  # says yes unless UNSLOTH_DECODE_CUDA_GRAPHS=0 does not want it
            return original(self, *args, **kwargs)

    return unsloth_fast_generate


# Of each release: 2026.9.14, 2026.10.1 and .2, .3, .4, .5, .6 and .7, .8 and .9.
_FAST_LINEAR_FORWARD = (
    "5018fbeaa8d60363",
    "7efb5a1a47780c3b",
    "6f5905b8200e15eb",
    "996826bb6f472005",
    "2b233ffdc76e0fe8",
    "77bb13735cf760ae",
    "310221cfb3eb79ea",
)
_MATMUL_LORA = ("720a8a470370762f", "e457000e4cbaf8bb", "3382a29ecb3b3264")  # 2026.9.14, 2026.10.1 to .7, .8 and .9
_MATMUL_4BIT = ("99fd94549f7edb44",)  # bitsandbytes 0.50.2
_UTILS, _GRAPHS = "unsloth.kernels.utils", "unsloth.models._decode_graphs"

PATCHES = (
    Patch(
        id="nf4.dequantize",
        challenge="A",
        summary="NF4 weights are dequantised by one Triton kernel at the memory limit, bit for bit as bitsandbytes does it",
        targets=(
            Target("unsloth.kernels.utils", "fast_dequantize", ">=2026.9.14", ("72e7f103ac6dece8", "d04cacd0c5e48e3f")),
        ),
        changes=_changes,
    ),
    Patch(
        id="nf4.matmul",
        challenge="A",
        summary="few rows of activations are multiplied by an NF4 weight as it is stored, without writing it out",
        targets=(Target(_UTILS, "fast_linear_forward", ">=2026.9.14", _FAST_LINEAR_FORWARD),),
        changes=_route_matmuls,
        relies_on=(
            Target(_UTILS, "fast_gemv", ">=2026.9.14", ("0d17bf9bd1756b75",)),
            Target(_UTILS, "matmul_lora", ">=2026.9.14", _MATMUL_LORA),
        ),
        run_time_only="the kernels behind it are this package's own, too large for a patch",
        switch="UNSLOTH_EXT_NF4_MATMUL",
        on_unless_switched_off=True,
    ),
    Patch(
        id="nf4.linear4bit",
        challenge="A",
        summary="bitsandbytes' Linear4bit does the same, with Unsloth or without",
        targets=(Target("bitsandbytes.autograd._functions", "matmul_4bit", ">=0.50", _MATMUL_4BIT),),
        replace=_matmul_4bit,
        run_time_only="it is bitsandbytes that it changes",
        switch="UNSLOTH_EXT_NF4_MATMUL",
        on_unless_switched_off=True,
    ),
    Patch(
        id="nf4.decode_graphs",
        challenge="A",
        summary="generate() of 64 tokens and more replays its decoding steps as CUDA graphs, as Unsloth does for RL trainers",
        targets=(Target("unsloth.models.llama", "unsloth_fast_generate", ">=2026.10.9", ("868a54723c06be13",)),),
        replace=_captured_generate,
        relies_on=(
            Target(_GRAPHS, "enabled", ">=2026.10.9", ("ecba76f381c271b4",)),
            Target(_GRAPHS, "decode_step", ">=2026.10.9", ("ec91317075653c95",)),
        ),
        run_time_only="upstream has it behind UNSLOTH_DECODE_CUDA_GRAPHS=1 already",
        switch="UNSLOTH_EXT_DECODE_GRAPHS",
        on_unless_switched_off=True,
    ),
)
