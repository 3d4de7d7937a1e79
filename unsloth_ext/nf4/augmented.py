"""NF4 weights beside and above each other and beside LoRA's: one matrix where a product would have been several.

A projection with LoRA is x W^T + (s x A^T) B^T, and with its columns side by side it is [x | s x A^T] [W | B]^T: one product with
a few columns more, no second pass over the result. Its input gradient is [dY | s dY B] [W; A], and that of several projections
of one input [dY_1 | dY_2 | ...] [W_1; W_2; ...; A_1; A_2; ...], whose sum over the projections then happens inside the product.
The wide matrices on the right are made here, dequantised straight to where they belong, so nothing is copied together:

* `nf4_stacked`: weights of the same input, one under the other, and rows of other matrices under them. All of it is contiguous.
* `nf4_augmented`: one weight between columns of other matrices, so its rows are further apart than they are long.

Both are operators, so that torch.compile sees one node; they are not differentiable. In both the dequantised numbers are those of
`dequantize` in every bit.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch

from . import dequantization, repeated
from .quant_state import NF4State, check, offset_on, read

__all__ = ["nf4_augmented", "nf4_stacked"]

_THROUGH_TRITON = "through Triton"
_pitched: dict = {}  # (launch.Variant, columns, pitch) -> a direct launcher or _THROUGH_TRITON; None: not to be used


def nf4_stacked(
    weights: Sequence[tuple[torch.Tensor, object]],
    extra_rows: Sequence[torch.Tensor] = (),
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """[W_1; W_2; ...; E_1; E_2; ...], each W dequantised: [sum of their rows, K], contiguous.

    weights: (packed, quant_state) of each, as `dequantize` takes them and not transposed, their states' shapes [N_i, K].
    extra_rows: floating point matrices [R_i, K], converted to dtype.
    dtype: of the result, float16, bfloat16 or float32; that of the first weight's state if None.

    Raises ValueError for weights or rows of different K. Not differentiable.
    """
    states = [read(state) for _, state in weights]
    if not states:
        raise ValueError("weights must hold at least one (packed, quant_state), got none")
    columns = {state.shape[1] if len(state.shape) == 2 else tuple(state.shape) for state in states}
    if len(columns) != 1 or not isinstance(next(iter(columns)), int):
        raise ValueError(f"weights must be matrices of equal K, got shapes {[tuple(s.shape) for s in states]}")
    packed = [packed for packed, _ in weights]
    return torch.ops.unsloth_ext.nf4_stacked(
        packed,
        [s.absmax for s in states],
        [s.code2 for s in states],
        [s.absmax2 for s in states],
        [_offset(p, s) for p, s in zip(packed, states, strict=True)],
        [s.blocksize for s in states],
        [s.blocksize2 for s in states],
        [s.shape[0] for s in states],
        columns.pop(),
        dtype or states[0].dtype,
        list(extra_rows),
    )


def nf4_augmented(
    packed: torch.Tensor,
    quant_state,
    left: torch.Tensor | None = None,
    right: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """[left | W | right], W dequantised: [N, l + K + r], contiguous.

    packed, quant_state: as `dequantize` takes them, not transposed, the state's shape [N, K].
    left, right: floating point matrices [N, l] and [N, r], converted to dtype; None for no columns.
    dtype: of the result, float16, bfloat16 or float32; the state's if None.

    Where K and the columns are multiples of 8 elements, as matrix products on a card like them too, the kernel writes in place; else W
    is dequantised and copied. Raises ValueError for shapes that do not fit. Not differentiable.
    """
    state = read(quant_state)
    if len(state.shape) != 2:
        raise ValueError(f"quant_state must describe a matrix, got shape {tuple(state.shape)}")
    return torch.ops.unsloth_ext.nf4_augmented(
        packed,
        state.absmax,
        state.code2,
        state.absmax2,
        _offset(packed, state),
        state.blocksize,
        state.blocksize2,
        list(state.shape),
        dtype or state.dtype,
        left,
        right,
    )


def _offset(packed, state: NF4State) -> torch.Tensor | None:
    if state.offset is None or isinstance(state.offset, torch.Tensor):
        return state.offset
    return torch.tensor(state.offset, dtype=torch.float32, device=packed.device)


# -- the operators ----------------------------------------------------------------------------------------------------------

_library = torch.library.Library("unsloth_ext", "FRAGMENT")
_library.define(
    "nf4_stacked(Tensor[] packed, Tensor[] absmax, Tensor?[] code2, Tensor?[] absmax2, Tensor?[] offset, int[] blocksize, "
    "int[] blocksize2, int[] rows, int columns, ScalarType dtype, Tensor[] extra_rows) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "nf4_augmented(Tensor packed, Tensor absmax, Tensor? code2, Tensor? absmax2, Tensor? offset, int blocksize, int blocksize2, "
    "int[] shape, ScalarType dtype, Tensor? left, Tensor? right) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _stacked(packed, absmax, code2, absmax2, offset, blocksize, blocksize2, rows, columns, dtype, extra_rows):
    with repeated.without_overrides():
        out = _stacked_like(packed, rows, columns, dtype, extra_rows)
    at = 0
    for i, n in enumerate(rows):
        part, at = out[at : at + n], at + n
        fields = packed[i], absmax[i], code2[i], absmax2[i], offset[i], blocksize[i], blocksize2[i]
        dequantization._operator_out(*fields, part)
    for extra in extra_rows:
        out[at : at + extra.shape[0]].copy_(extra)
        at += extra.shape[0]
    return out


def _stacked_like(packed, rows, columns, dtype, extra_rows):
    for extra in extra_rows:
        if extra.dim() != 2 or extra.shape[1] != columns:
            raise ValueError(f"extra_rows must be matrices with {columns} columns, got shape {tuple(extra.shape)}")
    return torch.empty(
        sum(rows) + sum(extra.shape[0] for extra in extra_rows), columns, dtype=dtype, device=packed[0].device
    )


def _stacked_fake(packed, absmax, code2, absmax2, offset, blocksize, blocksize2, rows, columns, dtype, extra_rows):
    return _stacked_like(packed, rows, columns, dtype, extra_rows)


def _write(packed, state: NF4State, out: torch.Tensor) -> None:
    check(packed, state, out, out.dtype)
    if not dequantization.run(packed, state, out):
        dequantization._by_bitsandbytes(packed, state, out)


def _augmented(packed, absmax, code2, absmax2, offset, blocksize, blocksize2, shape, dtype, left, right):
    with repeated.without_overrides():
        out = _augmented_like(packed, shape, dtype, left, right)
    at = 0 if left is None else left.shape[1]
    middle = out[:, at : at + shape[1]]
    if not repeated.again(packed, absmax, code2, absmax2, offset, blocksize, blocksize2, middle):
        _write_columns(packed, absmax, code2, absmax2, offset, blocksize, blocksize2, shape, dtype, middle)
    if left is not None:
        out[:, :at].copy_(left)
    if right is not None:
        out[:, at + shape[1] :].copy_(right)
    return out


def _write_columns(packed, absmax, code2, absmax2, offset, blocksize, blocksize2, shape, dtype, middle) -> None:
    state = NF4State(absmax, torch.Size(shape), dtype, blocksize, code2, absmax2, offset, blocksize2)
    check(packed, state, None, dtype)
    if middle.is_contiguous():
        _write(packed, state, middle)
    elif not _run_pitched(packed, state, middle):
        dense = torch.empty(shape, dtype=dtype, device=packed.device)
        _write(packed, state, dense)
        middle.copy_(dense)


def _augmented_like(packed, shape, dtype, left, right):
    columns = shape[1]
    for name, side in (("left", left), ("right", right)):
        if side is not None:
            if side.dim() != 2 or side.shape[0] != shape[0]:
                raise ValueError(f"{name} must be a matrix with {shape[0]} rows, got shape {tuple(side.shape)}")
            columns += side.shape[1]
    return torch.empty(shape[0], columns, dtype=dtype, device=packed.device)


def _augmented_fake(packed, absmax, code2, absmax2, offset, blocksize, blocksize2, shape, dtype, left, right):
    return _augmented_like(packed, shape, dtype, left, right)


for _key in ("CPU", "CUDA", "XPU"):
    _library.impl("nf4_stacked", _stacked, _key)
    _library.impl("nf4_augmented", _augmented, _key)
torch.library.register_fake("unsloth_ext::nf4_stacked", _stacked_fake, lib=_library)
torch.library.register_fake("unsloth_ext::nf4_augmented", _augmented_fake, lib=_library)


# -- rows that are apart ----------------------------------------------------------------------------------------------------


def _run_pitched(packed, state: NF4State, out: torch.Tensor) -> bool:
    """Launch the kernel on checked arguments, `out` being columns of a larger matrix. False, with `out` as it was, where it cannot run."""
    (rows, columns), pitch = out.shape, out.stride(0)
    if out.numel() == 0:
        return True
    if out.device.type != "cuda" or out.element_size() != 2 or columns % 8 or pitch % 8 or rows * pitch >= 1 << 33:
        return False
    from . import launch

    index, n = out.get_device(), out.numel()
    if index in dequantization._given_up or not launch.supported(out.device) or launch.capability(index) < (8, 0):
        return False
    from .augmented_kernel import launch_pitched

    nested = state.code2 is not None
    offset = offset_on(out.device, state.offset) if nested else None
    fields = (packed, state.absmax, *((state.code2, state.absmax2, offset) if nested else (state.absmax,) * 3))
    if 0 in (addresses := [field.data_ptr() for field in fields]):
        raise ValueError("a field of the weight has no storage: its memory was freed")
    variant = launch.variant_for(
        index, out.dtype, state.blocksize, state.blocksize2, n, packed.data_ptr(), out.data_ptr()
    )
    key = (variant, columns, pitch)
    if not variant.wide or (key not in _pitched and not _first_use(key, packed, state, offset)) or not _pitched[key]:
        return False
    with torch.cuda.device(index):
        if (go := _pitched[key]) is _THROUGH_TRITON or dequantization._hooked(launch):
            launch_pitched(*key, packed, state.absmax, state.code2, state.absmax2, offset, out, n)
        else:
            programs, codes = -(-n // variant.tile), launch.codes(index).data_ptr()
            go(programs, torch._C._cuda_getCurrentRawStream(index), *addresses, codes, out.data_ptr(), n)
            repeated.remember(packed, state, offset, out, go, programs, codes)
    return True


def _first_use(key, packed, state: NF4State, offset) -> bool:
    """Compile for these rows and compare the first of this weight with bitsandbytes. False where that cannot be done now."""
    from .augmented_kernel import direct_pitched, launch_pitched

    if torch.cuda.is_current_stream_capturing():
        return False  # cannot wait for a result here: a later call outside the capture will
    variant, columns, pitch = key
    with dequantization._lock:
        if key in _pitched:
            return True
        rows = min(state.shape[0], -(-dequantization._PIECE // columns))
        n = rows * columns
        blocks = -(-n // state.blocksize)
        piece = state._replace(
            absmax=state.absmax.reshape(-1)[:blocks],
            shape=torch.Size([rows, columns]),
            absmax2=None if state.absmax2 is None else state.absmax2.reshape(-1)[: -(-blocks // state.blocksize2)],
            offset=offset,
        )
        head = packed.reshape(-1).view(torch.uint8)[: n // 2]
        try:
            spare = torch.zeros(rows, pitch, dtype=variant.dtype, device=packed.device)
            expected = torch.zeros_like(spare)
            dense = torch.empty(rows, columns, dtype=variant.dtype, device=packed.device)
            compiled = launch_pitched(*key, head, piece.absmax, piece.code2, piece.absmax2, offset, spare, n)
            dequantization._by_bitsandbytes(head, piece, dense)
            expected[:, :columns] = dense
            same = torch.equal(spare.view(torch.int16), expected.view(torch.int16))
            problem = "" if same else "its result differs from bitsandbytes'"
            _pitched[key] = (direct_pitched(compiled) or _THROUGH_TRITON) if same else None
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            problem, _pitched[key] = f"{type(error).__name__}: {error}", None
        if problem:
            name = torch.cuda.get_device_name(variant.device_index)
            warnings.warn(
                f"unsloth_ext: the NF4 kernel is not used for rows that are apart on {name}: {problem[:500]}",
                RuntimeWarning,
                stacklevel=2,
            )
        return True
