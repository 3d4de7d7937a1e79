"""`dequantize(packed, quant_state)`: an NF4 weight as a dense tensor, bit for bit what bitsandbytes gives.

Three ways lead to the same numbers:

* On an NVIDIA card, eagerly: the Triton kernel. The first call for a weight checks it and remembers a *plan*, a closure with
  everything that cannot change unnoticed. Later calls read the addresses afresh, so that a moved, replaced, freed or re-gathered
  weight is seen, and launch. What may have changed is compared by identity; on any doubt the call starts from the beginning.
* While torch.compile traces: `torch.ops.unsloth_ext.dequantize_nf4`, an opaque operator around the same launch.
* Elsewhere (CPU, ROCm, XPU): bitsandbytes' own operators.

Nobody has to trust the kernel: the first use of each compiled variant is compared with bitsandbytes on a piece of the weight at
hand, and where that differs, or does not compile, bitsandbytes is used from then on, with one warning.
"""

from __future__ import annotations

import functools
import threading
import warnings
import weakref

import torch

from . import dense_copies, reference, repeated
from .quant_state import NF4State, check, offset_on, read

__all__ = ["dequantize", "forget", "plans", "run", "traced"]

_is_compiling, _is_dynamo_compiling = torch.compiler.is_compiling, torch.compiler.is_dynamo_compiling
_PIECE = 1 << 15  # elements compared at first use

_lock = threading.Lock()
plans: dict[int, object] = {}  # id(quant_state) -> plan(packed, quant_state, out or None); gone with the state
_plan_of = plans.get
_ready: dict = {}  # launch.Variant -> a direct launcher, or None: through Triton
_given_up: dict[int, str] = {}  # device index -> why


def dequantize(packed: torch.Tensor, quant_state, *, out: torch.Tensor | None = None, dtype: torch.dtype | None = None):
    """The dense weight of an NF4 quantised one, equal to `bitsandbytes.functional.dequantize_4bit` in every bit.

    packed: the 4-bit values, two a byte, contiguous: uint8, or any storage type that holds the same bytes (FSDP keeps them as
        bfloat16), of shape [bytes, 1]. With shape [1, bytes], a transposed weight, the result is transposed too.
    quant_state: its `bitsandbytes.functional.QuantState`, or the nested list of old versions; `absmax` double-quantised or not;
        blocksize a power of two from 32 to 4096.
    out: where to write, contiguous, of the state's shape and the output's dtype; allocated if None.
    dtype: of the output, float16, bfloat16 or float32; the state's own if None.

    Returns a tensor of `quant_state.shape` (`out` itself where given and not transposed). Runs on the device of `packed`, on its
    current stream, and waits for nothing. Raises TypeError or ValueError naming the argument for input that bitsandbytes could
    not have made, before any launch.

    The format is that of QLoRA (arXiv 2305.14314); the method is described in `kernel.py`.
    """
    if _is_dynamo_compiling():  # half the time of is_compiling(), whose other cases a plan declines
        return traced(packed, quant_state, out, dtype)
    if out is None and dtype is None:
        plan = _plan_of(id(quant_state))
        if plan is not None and (result := plan(packed, quant_state, None)) is not None:
            return result
    if _is_compiling() or torch._C._len_torch_dispatch_stack():  # fake tensors and other modes must see an operator
        return traced(packed, quant_state, out, dtype)
    state = read(quant_state)
    dtype = state.dtype if dtype is None else dtype
    check(packed, state, out, dtype)
    if out is None:
        out = torch.empty(state.shape, dtype=dtype, device=packed.device)
    if not run(packed, state, out, quant_state):
        _by_bitsandbytes(packed, state, out)
    return out.t() if packed.shape[0] == 1 else out


def forget() -> None:
    """Drop every plan and every verdict about a device."""
    with _lock:
        plans.clear()
        repeated.forget()
        _ready.clear()
        _given_up.clear()


def run(packed: torch.Tensor, state: NF4State, out: torch.Tensor, quant_state=None) -> bool:
    """Launch the kernel on checked arguments. False, with `out` as it was, where it cannot or must not run.

    With `quant_state`, the object that `state` was read from, later calls may use a plan.
    """
    if out.numel() == 0:
        return True
    if out.device.type != "cuda":
        return False
    from . import launch

    index = out.get_device()
    if index in _given_up or not launch.supported(out.device):
        return False
    nested, n = state.code2 is not None, out.numel()
    offset = offset_on(out.device, state.offset) if nested else None
    fields = (packed, state.absmax, *((state.code2, state.absmax2, offset) if nested else (state.absmax,) * 3))
    addresses = [field.data_ptr() for field in fields]
    if 0 in addresses:
        name = ("packed", "absmax", "state2.code", "state2.absmax", "offset")[addresses.index(0)]
        raise ValueError(f"{name} has no storage: its memory was freed")
    variant = launch.variant_for(
        index, out.dtype, state.blocksize, state.blocksize2, n, packed.data_ptr(), out.data_ptr()
    )
    if variant not in _ready and not _first_use(variant, packed, state, offset, out):
        return False
    if (go := _ready[variant]) is None or _hooked(launch):
        launch.launch(variant, packed, state.absmax, state.code2, state.absmax2, offset, out, n)
        return True
    with torch.cuda.device(index):
        programs, codes = -(-n // variant.tile), launch.codes(index).data_ptr()
        go(programs, torch._C._cuda_getCurrentRawStream(index), *addresses, codes, out.data_ptr(), n)
    if variant.wide:
        repeated.remember(packed, state, offset, out, go, programs, codes)
    if quant_state is not None and offset is state.offset and type(quant_state) is not list and variant.wide:
        if out.dtype is state.dtype:
            _remember(quant_state, state, packed, variant, go)
    return True


def _hooked(launch) -> bool:
    enter, leave = launch.hooks()
    return bool(enter.calls or leave.calls)


def _first_use(variant, packed, state, offset, out) -> bool:
    """Compile a variant and compare it with bitsandbytes on the first elements of this weight. True if it may be used."""
    from . import launch

    if torch.cuda.is_current_stream_capturing():
        return False  # cannot wait for a result here: a later call outside the capture will
    with _lock:
        if variant in _ready:
            return True
        n = min(out.numel(), _PIECE + out.numel() % 8)
        blocks = -(-n // state.blocksize)
        piece = state._replace(
            absmax=state.absmax.reshape(-1)[:blocks],
            shape=torch.Size([n]),
            dtype=out.dtype,
            absmax2=None if state.absmax2 is None else state.absmax2.reshape(-1)[: -(-blocks // state.blocksize2)],
        )
        head = packed.reshape(-1).view(torch.uint8)[: (n + 1) // 2]
        try:
            # At the alignment of the real output, which is part of the variant.
            spare = torch.empty(n + 8, dtype=out.dtype, device=out.device)
            spare = spare[(out.data_ptr() - spare.data_ptr()) % 16 // out.element_size() :][:n]
            compiled = launch.launch(variant, head, piece.absmax, piece.code2, piece.absmax2, offset, spare, n)
            expected = torch.empty_like(spare)
            _by_bitsandbytes(head, piece._replace(offset=offset), expected)
            bits = {2: torch.int16, 4: torch.int32}[out.element_size()]
            problem = (
                "" if torch.equal(spare.view(bits), expected.view(bits)) else "its result differs from bitsandbytes'"
            )
            if not problem and variant.wide:
                _ready[variant] = launch.direct(compiled)
            elif not problem:
                _ready[variant] = None
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        if problem:
            _given_up[variant.device_index] = problem
            repeated.forget()
            name = torch.cuda.get_device_name(variant.device_index)
            warnings.warn(
                f"unsloth_ext: the NF4 kernel is not used on {name}: {problem[:500]}", RuntimeWarning, stacklevel=4
            )
        return not problem


def _by_bitsandbytes(packed, state: NF4State, out) -> None:
    import bitsandbytes  # noqa: F401  (registers the operators)

    operators = torch.ops.bitsandbytes
    absmax = state.absmax
    if state.code2 is not None:
        absmax = operators.dequantize_blockwise(absmax, state.absmax2, state.code2, state.blocksize2, torch.float32)
        absmax += state.offset
    if packed.dtype != torch.uint8:
        packed = packed.reshape(-1).view(torch.uint8)
    packed = packed.reshape(-1, 1)
    if out.is_cuda:
        operators.dequantize_4bit.out(packed, absmax, state.blocksize, "nf4", list(out.shape), out.dtype, out=out)
        return
    # bitsandbytes' CPU code (0.50.2) takes a wrong scale where a row does not end with a block: give it blocks as rows, and do
    # the last, shorter block by the reference.
    flat, size, absmax = out.view(-1), state.blocksize, absmax.reshape(-1)
    blocks = flat.numel() // size
    if blocks:
        dense = operators.dequantize_4bit(
            packed[: blocks * size // 2], absmax[:blocks], size, "nf4", [blocks, size], out.dtype
        )
        flat[: blocks * size].copy_(dense.view(-1))
    if rest := flat.numel() - blocks * size:
        tail = packed[blocks * size // 2 : (flat.numel() + 1) // 2]
        flat[blocks * size :].copy_(reference.dequantize(tail, absmax[blocks:], size, (rest,), out.dtype))


# -- the short way ----------------------------------------------------------------------------------------------------------


def _plain_types():
    """Types of packed weights whose methods say what is so: no wrapper, nothing fake."""
    import bitsandbytes

    return torch.Tensor, torch.nn.Parameter, bitsandbytes.nn.Params4bit


def _remember(quant_state, state: NF4State, packed, variant, go) -> None:
    key = id(quant_state)
    if type(packed) not in _plain_types():
        return
    try:
        own = weakref.ref(quant_state, lambda _, plans=plans: plans.pop(key, None))
    except TypeError:
        return
    plans[key] = _plan(own, quant_state.state2, state, packed, variant, go)


def _plan(own, state2, state: NF4State, first_packed, variant, go):
    """call(packed, quant_state, out or None) -> the result, or None where something is not as it was.

    The weight's own address is read afresh, so it may move; a scale that moves needs a new plan. absmax is held weakly: a plan
    must not keep alive what its owner has replaced. (`state2` is a 64th of it.) `out` must have been checked.
    """
    from . import launch

    index, dtype, shape = variant.device_index, state.dtype, state.shape
    kind, packed_dtype, packed_shape = type(first_packed), first_packed.dtype, first_packed.shape
    first, first_at, turned_shape = (
        weakref.ref(first_packed),
        first_packed.data_ptr(),
        packed_shape[::-1],
    )  # a backward's
    blocksize, blocksize2 = state.blocksize, state.blocksize2
    enter, leave = launch.hooks()
    n = shape.numel() if isinstance(shape, torch.Size) else torch.Size(shape).numel()
    grid, code = -(-n // variant.tile), launch.codes(index).data_ptr()
    misaligned = 1 if dtype is torch.float32 else 3
    nested = state2 is not None
    absmax_ref, absmax_at = weakref.ref(state.absmax), state.absmax.data_ptr()
    absmax2, code2, offset = (state.absmax2, state.code2, state.offset) if nested else (None, None, None)
    absmax2_at, code2_at, offset_at = (t.data_ptr() for t in (absmax2, code2, offset)) if nested else (absmax_at,) * 3
    raw_stream, current_device = torch._C._cuda_getCurrentRawStream, torch._C._cuda_getDevice
    modes, empty = torch._C._len_torch_dispatch_stack, _allocator(tuple(shape), dtype, index)
    without_overrides, several = torch._C.DisableTorchFunctionSubclass, torch.cuda.device_count() != 1

    def call(packed, quant_state, out):
        if (
            type(packed) is not kind
            or own() is not quant_state
            or quant_state.dtype is not dtype
            or quant_state.shape is not shape
            or quant_state.blocksize != blocksize
            or quant_state.state2 is not state2
            or (absmax := absmax_ref()) is None
            or quant_state.absmax is not absmax
            or absmax.data_ptr() != absmax_at
            or ((given := packed.shape) != packed_shape and given != turned_shape)
            # The tensor of before where it was before has also its device, layout and alignment; else they are asked for.
            or (
                ((packed_at := packed.data_ptr()) != first_at or first() is not packed)
                and (
                    not packed_at
                    or packed_at & misaligned
                    or packed.get_device() != index
                    or packed.dtype is not packed_dtype
                    or not packed.is_contiguous()
                )
            )
            or (several and current_device() != index)
            or enter.calls
            or leave.calls
            or modes()
        ):
            return None
        if nested and (
            state2.absmax is not absmax2
            or state2.code is not code2
            or quant_state.offset is not offset
            or state2.blocksize != blocksize2
            or absmax2.data_ptr() != absmax2_at
            or code2.data_ptr() != code2_at
            or offset.data_ptr() != offset_at
        ):
            return None
        if out is None:
            out = empty()
            out_at = out.data_ptr()
        elif (out_at := out.data_ptr()) & 15:
            return None
        go(grid, raw_stream(index), packed_at, absmax_at, code2_at, absmax2_at, offset_at, code, out_at, n)
        return out.t() if given[0] == 1 else out

    if kind is torch.Tensor:
        return call

    def call_as_plain(packed, quant_state, out):
        with without_overrides():  # a parameter of bitsandbytes sends each method call through Python otherwise
            return call(packed, quant_state, out)

    return call_as_plain


def _allocator(shape, dtype, index):
    """A function that gives a new contiguous tensor on the current device, which is `index`.

    The one that torch's own compiler emits calls of takes a quarter of the time of torch.empty.
    """
    try:
        from torch._C._dynamo.guards import _empty_strided_cuda as empty

        spare = empty((2, 3), (3, 1), dtype)
        if spare.dtype == dtype and spare.shape == (2, 3) and spare.is_contiguous() and spare.get_device() == index:
            return functools.partial(empty, shape, spare.new_empty(shape, device="meta").stride(), dtype)
    except (ImportError, TypeError, RuntimeError):
        pass
    return functools.partial(torch.empty, shape, dtype=dtype, device=torch.device("cuda", index))


# -- torch.compile ----------------------------------------------------------------------------------------------------------

_library = torch.library.Library("unsloth_ext", "FRAGMENT")
_FIELDS = "Tensor packed, Tensor absmax, Tensor? code2, Tensor? absmax2, Tensor? offset, int blocksize, int blocksize2"
# Of one operator with one input the partitioner makes one node, whose result it keeps from the forward for the backward, 2 bytes a
# weight. So a backward has an operator of its own.
_WHOLE = ("dequantize_nf4", "dequantize_nf4_again")
for _name in _WHOLE:
    _library.define(
        f"{_name}({_FIELDS}, SymInt[] shape, ScalarType dtype) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
    )
_library.define(f"dequantize_nf4_out({_FIELDS}, Tensor(a!) out) -> ()", tags=(torch.Tag.pt2_compliant_tag,))


def _operator_out(packed, absmax, code2, absmax2, offset, blocksize, blocksize2, out) -> None:
    if repeated.again(packed, absmax, code2, absmax2, offset, blocksize, blocksize2, out):
        return
    state = NF4State(absmax, out.shape, out.dtype, blocksize, code2, absmax2, offset, blocksize2)
    check(packed, state, out, out.dtype)
    if not run(packed, state, out):
        _by_bitsandbytes(packed, state, out)


def _operator(packed, absmax, code2, absmax2, offset, blocksize, blocksize2, shape, dtype):
    with repeated.without_overrides():
        out = torch.empty(shape, dtype=dtype, device=packed.device)
    _operator_out(packed, absmax, code2, absmax2, offset, blocksize, blocksize2, out)
    return out


def _operator_fake(packed, absmax, code2, absmax2, offset, blocksize, blocksize2, shape, dtype):
    return torch.empty(shape, dtype=dtype, device=packed.device)


def _operator_out_fake(packed, absmax, code2, absmax2, offset, blocksize, blocksize2, out) -> None:
    return None


for _key in ("CPU", "CUDA", "XPU"):
    for _name in _WHOLE:
        _library.impl(_name, _operator, _key)
    _library.impl("dequantize_nf4_out", _operator_out, _key)
for _name in _WHOLE:
    torch.library.register_fake(f"unsloth_ext::{_name}", _operator_fake, lib=_library)
torch.library.register_fake("unsloth_ext::dequantize_nf4_out", _operator_out_fake, lib=_library)


def traced(packed, quant_state, out=None, dtype=None, again=False):
    """`dequantize` for torch.compile: one node of the graph, no graph break; none where the dense weight is kept (dense_copies.py).

    again: in the backward of what has dequantised it in its forward.
    """
    if out is None and (kept := dense_copies.copy_of(quant_state, dtype, packed.device)) is not None:
        return kept.t() if packed.shape[0] == 1 else kept
    state = read(quant_state)
    offset = state.offset
    if offset is not None and not isinstance(offset, torch.Tensor):
        offset = torch.tensor(offset, dtype=torch.float32, device=packed.device)
    fields = (packed, state.absmax, state.code2, state.absmax2, offset, state.blocksize, state.blocksize2)
    if out is None:
        operator = torch.ops.unsloth_ext.dequantize_nf4_again if again else torch.ops.unsloth_ext.dequantize_nf4
        out = operator(*fields, list(state.shape), dtype or state.dtype)
    else:
        torch.ops.unsloth_ext.dequantize_nf4_out(*fields, out)
    return out.t() if packed.shape[0] == 1 else out
