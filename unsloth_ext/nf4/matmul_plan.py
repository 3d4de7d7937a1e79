"""Launching the matmul kernels for `matmul.linear`: checked once for each weight, then by a plan.

As for `dequantize`, the first call for a weight checks everything and remembers a plan, a closure with what cannot change
unnoticed. Later calls compare what may have changed by identity, read addresses afresh, and launch.

Nobody has to trust a kernel: the first use of each compiled variant is compared with dequantise and matmul on rows of the weight
at hand. Where that is off, or does not compile, that variant is not used any more, with one warning: instead of one in CUDA C++ Triton's
is, instead of Triton's dequantise and matmul.
"""

from __future__ import annotations

import threading
import warnings
import weakref

import torch

from . import dequantization
from .quant_state import NF4State, offset_on

_PIECE = 512  # rows of the weight that the first use is compared on
# Relative difference to fp32 arithmetic, in the 2-norm, that still is rounding: what dequantise + cuBLAS has is 2.4e-3 and 3e-4.
_TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3}

_lock = threading.Lock()
plans: dict[int, object] = {}  # id(quant_state) -> plan(x, packed, quant_state, bias, out); gone with the state
_ready: dict = {}  # Variant -> a direct launcher, or None: through Triton
_given_up: dict = {}  # Variant -> why


def forget() -> None:
    """Drop every plan and every verdict about a device."""
    with _lock:
        plans.clear()
        _ready.clear()
        _given_up.clear()


def _variant(index: int, dtype, rows: int, state, bias: bool, absmax_at: int):
    """The variant to be launched: of matmul_table, in Triton where the one in CUDA C++ has failed or cannot read absmax."""
    from . import matmul_table

    found = matmul_table.variant_for(index, dtype, rows, state, bias)
    if found is not None and found.cuda and (found in _given_up or absmax_at % 16):
        found = matmul_table.variant_for(index, dtype, rows, state, bias, cuda=False)
    return None if found is None or found in _given_up else found


def run(x: torch.Tensor, packed: torch.Tensor, state: NF4State, bias, out: torch.Tensor, quant_state=None) -> bool:
    """Launch a kernel on checked arguments, x [M, K] and out [M, N]. False, with `out` as it was, where none can, may or should.

    With `quant_state`, the object that `state` was read from, later calls may use a plan.
    """
    if out.device.type != "cuda" or out.numel() == 0:
        return False
    index, biased = out.get_device(), bias is not None
    variant = _variant(index, x.dtype, x.shape[0], state, biased, state.absmax.data_ptr())
    if variant is None:
        return False
    from . import launch, matmul_launch

    if not x.is_contiguous() or x.data_ptr() % 16:
        x = x.clone(memory_format=torch.contiguous_format)
    if not out.is_contiguous() or out.data_ptr() % 16:
        result = torch.empty(out.shape, dtype=out.dtype, device=out.device)
        return run(x, packed, state, bias, result, quant_state) and out.copy_(result) is out
    if bias is not None and not bias.is_contiguous():
        bias = bias.contiguous()
    nested = state.code2 is not None
    offset = offset_on(out.device, state.offset) if nested else None
    fields = (packed, state.absmax, *((state.code2, state.absmax2, offset) if nested else (state.absmax,) * 3))
    addresses = [field.data_ptr() for field in fields]
    if 0 in addresses:
        name = ("packed", "absmax", "state2.code", "state2.absmax", "offset")[addresses.index(0)]
        raise ValueError(f"{name} has no storage: its memory was freed")
    if addresses[0] % 16:
        return False
    while variant not in _ready and not _first_use(variant, packed, state, offset):
        again = _variant(index, x.dtype, x.shape[0], state, biased, addresses[1]) if variant.cuda else None
        if again is None or again == variant:
            return False
        variant = again
    hooks_known = launch.hooks() is not None
    if (go := _ready[variant]) is None or (not variant.cuda and dequantization._hooked(launch)):
        matmul_launch.launch(variant, x, packed, state.absmax, state.code2, state.absmax2, offset, bias, out)
        return True
    with torch.cuda.device(index):
        stream = torch._C._cuda_getCurrentRawStream(index)
        go(stream, x.data_ptr(), *addresses, 0 if bias is None else bias.data_ptr(), out.data_ptr(), *out.shape)
    if (
        hooks_known
        and quant_state is not None
        and type(quant_state) is not list
        and (offset is state.offset or not nested)
    ):
        _remember(quant_state, state, packed, index)
    return True


def _first_use(variant, packed, state: NF4State, offset) -> bool:
    """Compile a variant and compare it with dequantise + matmul on the first rows of this weight. True if it may be used."""
    from . import matmul_launch

    if torch.cuda.is_current_stream_capturing():
        return False  # cannot wait for a result here: a later call outside the capture will
    with _lock:
        if variant in _ready or variant in _given_up:  # another thread was quicker
            return variant in _ready
        index, dtype, k = variant.device_index, variant.dtype, variant.columns
        n = min(state.shape[0], _PIECE)
        blocks = -(-n * k // state.blocksize)
        piece = state._replace(
            absmax=state.absmax.reshape(-1)[:blocks],
            shape=torch.Size([n, k]),
            absmax2=None if state.absmax2 is None else state.absmax2.reshape(-1)[: -(-blocks // state.blocksize2)],
            offset=offset,
        )
        head = packed.reshape(-1).view(torch.uint8)[: n * k // 2]
        device = torch.device("cuda", index)
        random = torch.Generator(device).manual_seed(n)  # leaves the user's random state alone
        m = (variant.rows or variant.shape.block_m) - 1
        try:
            with torch.cuda.device(index), torch.no_grad():
                x = torch.randn(m, k, dtype=dtype, device=device, generator=random)
                bias = torch.randn(n, dtype=dtype, device=device, generator=random) if variant.bias else None
                out = torch.full((m, n), float("nan"), dtype=dtype, device=device)
                fields = (x, head, piece.absmax, piece.code2, piece.absmax2, offset, bias, out)
                compiled = matmul_launch.launch(variant, *fields)
                expected = _in_float64(x, dense(head, piece, torch.float32), bias)
                finite = expected.isfinite()  # a weight may hold infinities: what is not finite there is not compared
                difference = torch.where(finite, out.double() - expected, 0.0).norm()
                error = (difference / torch.where(finite, expected, 0.0).norm().clamp_min(1e-30)).item()
                problem = "" if error <= _TOLERANCE[dtype] else f"its result is off by {error:.1e}"
                if not problem:
                    _ready[variant] = matmul_launch.direct(variant, compiled)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        if problem:
            _given_up[variant] = problem
            name = torch.cuda.get_device_name(index)
            instead = ", Triton's is instead" if variant.cuda else ""
            warnings.warn(
                f"unsloth_ext: an NF4 matmul kernel ({variant}) is not used on {name}{instead}: {problem[:500]}",
                RuntimeWarning,
                stacklevel=5,
            )
        return not problem


def dense(packed, state: NF4State, dtype) -> torch.Tensor:
    """The weight, written out."""
    out = torch.empty(state.shape, dtype=dtype, device=packed.device)
    if not dequantization.run(packed, state, out):
        dequantization._by_bitsandbytes(packed, state, out)
    return out


def _in_float64(x, weight, bias):
    y = x.double() @ weight.double().t()
    return y if bias is None else y + bias.double()


# -- the short way ----------------------------------------------------------------------------------------------------------


def _remember(quant_state, state: NF4State, packed, index: int) -> None:
    key = id(quant_state)
    if type(packed) not in dequantization._plain_types():
        return
    if (known := plans.get(key)) is not None and known.is_of(quant_state):
        return  # it declined for what it was called with, not for the weight
    try:
        own = weakref.ref(quant_state, lambda _, plans=plans: plans.pop(key, None))
    except TypeError:
        return
    plans[key] = _plan(own, quant_state.state2, state, packed, index)


def _plan(own, state2, state: NF4State, first_packed, index: int):
    """call(x, packed, quant_state, bias, out or None) -> the result, or None where something is not as it was.

    As in `dequantization._plan`: identities are compared, addresses read afresh, absmax held weakly. Launchers are kept for each
    number of rows, dtype and bias.
    """
    from . import launch

    shape, blocksize, blocksize2 = state.shape, state.blocksize, state.blocksize2
    n, k = shape
    kinds, packed_dtype, packed_shape = dequantization._plain_types(), first_packed.dtype, first_packed.shape
    first, first_at = weakref.ref(first_packed), first_packed.data_ptr()
    turned_shape = packed_shape[::-1]
    enter, leave = launch.hooks()
    nested = state2 is not None
    absmax_ref, absmax_at = weakref.ref(state.absmax), state.absmax.data_ptr()
    absmax2, code2, offset = (state.absmax2, state.code2, state.offset) if nested else (None, None, None)
    absmax2_at, code2_at, offset_at = (t.data_ptr() for t in (absmax2, code2, offset)) if nested else (absmax_at,) * 3
    raw_stream, current_device = torch._C._cuda_getCurrentRawStream, torch._C._cuda_getDevice
    modes, grad_enabled, several = (
        torch._C._len_torch_dispatch_stack,
        torch.is_grad_enabled,
        torch.cuda.device_count() != 1,
    )
    without_overrides, plain, parameter = torch._C.DisableTorchFunctionSubclass, torch.Tensor, torch.nn.Parameter
    # A plan must not keep alive, through `state`, an absmax that its owner has replaced.
    facts = state._replace(absmax=None, absmax2=None, code2=code2, offset=None)
    launchers: dict = {}  # (shape of x, its dtype, with bias) -> (go, allocator of the result, its shape, rows of x)

    def launcher(size, dtype, bias):
        if not size or size[-1] != k or not (rows := size.numel() // k):
            return None
        variant = _variant(index, dtype, rows, facts, bias, absmax_at)
        go = None if variant is None else _ready.get(variant)
        shape = (*size[:-1], n)
        return None if go is None else (go, dequantization._allocator(shape, dtype, index), shape, rows)

    def call(x, packed, quant_state, bias, out):
        if (
            type(x) is not plain
            or type(packed) not in kinds
            or own() is not quant_state
            or quant_state.shape is not shape
            or quant_state.blocksize != blocksize
            or quant_state.state2 is not state2
            or (absmax := absmax_ref()) is None
            or quant_state.absmax is not absmax
            or absmax.data_ptr() != absmax_at
            or ((given := packed.shape) != packed_shape and given != turned_shape)
            or (
                ((packed_at := packed.data_ptr()) != first_at or first() is not packed)
                and (
                    not packed_at
                    or packed_at & 15
                    or packed.get_device() != index
                    or packed.dtype is not packed_dtype
                    or not packed.is_contiguous()
                )
            )
            or x.get_device() != index
            or not x.is_contiguous()
            or (x_at := x.data_ptr()) & 15
            or (x.requires_grad and grad_enabled())
            or (several and current_device() != index)
            or enter.calls
            or leave.calls
            or modes()
        ):
            return None
        if bias is None:
            bias_at = 0
        elif (
            (type(bias) is not plain and type(bias) is not parameter)
            or bias.shape != (n,)
            or bias.dtype is not x.dtype
            or bias.get_device() != index
            or not bias.is_contiguous()
            or (bias.requires_grad and grad_enabled())
        ):
            return None
        else:
            bias_at = bias.data_ptr()
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
        key = x.shape, x.dtype, bias is not None
        if (found := launchers.get(key)) is None:
            if (found := launcher(*key)) is None:
                return None
            if len(launchers) >= 256:
                launchers.clear()
            launchers[key] = found
        go, empty, shape_of_out, rows = found
        if out is None:
            out = empty()
            out_at = out.data_ptr()
        elif (
            type(out) is not plain
            or out.shape != shape_of_out
            or out.dtype is not x.dtype
            or out.get_device() != index
            or not out.is_contiguous()
            or (out_at := out.data_ptr()) & 15
            or (out.requires_grad and grad_enabled())
        ):
            return None
        stream = raw_stream(index)
        go(stream, x_at, packed_at, absmax_at, code2_at, absmax2_at, offset_at, bias_at, out_at, rows, n)
        return out

    def is_of(quant_state):
        return (
            absmax_ref() is quant_state.absmax
            and quant_state.absmax.data_ptr() == absmax_at
            and quant_state.shape is shape
            and quant_state.blocksize == blocksize
            and quant_state.state2 is state2
            and (
                not nested
                or (
                    (state2.absmax is absmax2 and state2.code is code2 and quant_state.offset is offset)
                    and state2.blocksize == blocksize2
                    and (absmax2.data_ptr(), code2.data_ptr(), offset.data_ptr()) == (absmax2_at, code2_at, offset_at)
                )
            )
        )

    def call_as_plain(x, packed, quant_state, bias, out):
        if type(packed) is plain:
            return call(x, packed, quant_state, bias, out)
        with without_overrides():  # a parameter of bitsandbytes sends each method call through Python otherwise
            return call(x, packed, quant_state, bias, out)

    call_as_plain.is_of = is_of
    return call_as_plain
