"""What the nf4 room changes in Unsloth: who dequantises an NF4 weight.

Every release since 2026.9.14 has one seam for all of its modules: `unsloth.kernels.utils.fast_dequantize`, which everybody
imports by name, is a thin function that calls the module's global `_fast_dequantize_bnb`. That global is replaced. The
replacement takes NF4 states on NVIDIA cards and hands everything else (no state, fp4, FP8, NVFP4, float8 tensors, a CPU, an
`out` that does not fit) to what stood there, with the arguments as they came.
"""

import functools
import math
from importlib import import_module

from ..patching import Patch, SetAttribute, Target
from ..patching.fingerprint import of_object

# The CUDA branch's own fast_dequantize, behind the seam: its contract (scratch buffers, transposed weights) is the one kept here.
_BEHIND_THE_SEAM = {
    "a832f0d1edc3a534": "2026.9.14",
    "9a5f66d34bbb63c1": "2026.10.1 to 2026.10.7",
    "c0bdbe67f2221d13": "2026.10.8",
    "61748cd692395b08": "2026.10.9",
}

# Where upstream's kernel was measured to be as fast: compute capability -> (least, most) elements, most None for any.
# Empty: none was found on the one measured card (9, 0); no other card has been measured.
UPSTREAM_AS_FAST: dict[tuple[int, int], tuple[int, int | None]] = {}


def _changes(module, target):
    original = vars(module)["_fast_dequantize_bnb"]
    if (found := of_object(original)) not in _BEHIND_THE_SEAM:
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
)
