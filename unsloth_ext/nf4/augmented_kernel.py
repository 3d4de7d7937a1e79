"""The kernel of kernel.py for an output whose rows are apart, with other matrices' columns between them.

The same units, lookups, roundings and prefetches; see there for why. What is other: a unit goes to a place that takes one
division by a constant, and only what such outputs need is left: 16-bit elements, whole units, from sm_80 on. It stands by itself so that the
flat kernel, which is measured to the microsecond and is part of a git patch, stays as it is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import launch
from .kernel import _BF16, _FP16, _LANE_CODE, _PREFETCH, _SCALE, _SHUFFLE, _WAIT
from .table import Variant, constexprs, options


@triton.jit(
    do_not_specialize=[
        "packed_ptr",
        "absmax_ptr",
        "code2_ptr",
        "absmax2_ptr",
        "offset_ptr",
        "code_ptr",
        "out_ptr",
        "n_elements",
    ]
)
def pitched_kernel(
    packed_ptr,  # as dequantize_kernel's
    absmax_ptr,
    code2_ptr,
    absmax2_ptr,
    offset_ptr,
    code_ptr,
    out_ptr,  # fp16 or bf16: the first element of the first row, at 16 bytes
    n_elements: tl.int64,  # of the weight, a multiple of 8
    BLOCK_SHIFT: tl.constexpr,
    BLOCK2_SHIFT: tl.constexpr,
    NESTED: tl.constexpr,
    UNITS: tl.constexpr,
    THREADS: tl.constexpr,
    OVERLAP: tl.constexpr,
    AHEAD: tl.constexpr,
    ROOM: tl.constexpr,
    ROW: tl.constexpr,  # units (of 8 elements) a row
    GAP: tl.constexpr,  # units between the end of a row and the beginning of the next
):
    program = tl.program_id(0).to(tl.int64)
    SHIFT: tl.constexpr = BLOCK_SHIFT - 3  # log2(units of a block)
    TILE: tl.constexpr = UNITS * THREADS
    WARP_TILE: tl.constexpr = UNITS * 32
    BLOCKS: tl.constexpr = WARP_TILE >> SHIFT  # blocks of a warp's tile; 0 where a block is longer
    tl.static_assert(BLOCKS <= 32, "a warp must hold the scales of its tile")

    thread = tl.arange(0, THREADS).to(tl.uint32)
    lane = thread & 31
    code = tl.inline_asm_elementwise(
        _LANE_CODE, "=f,l", [code_ptr.to(tl.int64) + tl.zeros([THREADS], tl.int64)], dtype=tl.float32, is_pure=True, pack=1
    )  # fmt: skip
    if OVERLAP:
        tl.inline_asm_elementwise(_WAIT, "=r", [], dtype=tl.int32, is_pure=False, pack=1)

    first = program * TILE
    if ROOM != "":
        tl.inline_asm_elementwise(
            ROOM, "=r,r", [(n_elements >> 63).to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1
        )
    if AHEAD:
        TILE_BYTES: tl.constexpr = TILE << 2
        SCALE_BYTES: tl.constexpr = (TILE >> SHIFT) * (1 if NESTED else 4)
        at = (program + AHEAD) * TILE_BYTES
        size = tl.minimum(tl.maximum((n_elements >> 1) - at, 0), TILE_BYTES).to(tl.int32)
        tl.inline_asm_elementwise(
            _PREFETCH, "=r,l,r", [packed_ptr.to(tl.int64) + at, size], dtype=tl.int32, is_pure=False, pack=1
        )
        if SCALE_BYTES >= 16:
            at = (program + AHEAD) * SCALE_BYTES
            size = tl.where(size == TILE_BYTES, SCALE_BYTES, 0).to(tl.int32)
            tl.inline_asm_elementwise(
                _PREFETCH, "=r,l,r", [absmax_ptr.to(tl.int64) + at, size], dtype=tl.int32, is_pure=False, pack=1
            )
    left = tl.minimum((n_elements >> 3) - first, TILE).to(tl.uint32)
    warp_first = (thread >> 5) * WARP_TILE
    units_ptr = packed_ptr.to(tl.pointer_type(tl.uint32)) + first
    words = ()
    together = tl.zeros([THREADS], tl.uint32)
    for i in tl.static_range(UNITS):
        unit = warp_first + lane + 32 * i
        word = tl.load(units_ptr + unit, mask=unit < left, other=0, eviction_policy="evict_first")
        words = words + (word,)  # noqa: RUF005 (Triton knows no starred tuples)
        together = together | word

    block0 = first >> SHIFT
    if UNITS == 1:
        block = thread >> SHIFT
    elif BLOCKS > 1:
        block = (warp_first >> SHIFT) + (lane & (BLOCKS - 1))
    else:
        block = warp_first >> SHIFT
    known = (block << SHIFT) < left
    if NESTED:
        index = tl.load(absmax_ptr + block0 + block, mask=known, other=0).to(tl.uint32)
        if (TILE >> SHIFT) >> BLOCK2_SHIFT > 1:
            absmax2 = tl.load(absmax2_ptr + (block0 >> BLOCK2_SHIFT) + (block >> BLOCK2_SHIFT), mask=known, other=0.0)
        else:
            absmax2 = tl.load(absmax2_ptr + (block0 >> BLOCK2_SHIFT))
        offset = tl.load(offset_ptr)
        index = index | (together & (n_elements >> 63).to(tl.uint32))
        scale = tl.inline_asm_elementwise(
            _SCALE, "=f,f,f,f", [tl.load(code2_ptr + index), absmax2, offset], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        scale = tl.load(absmax_ptr + block0 + block, mask=known, other=0.0)

    if out_ptr.dtype.element_ty == tl.float16:
        asm: tl.constexpr = _FP16
    else:
        asm: tl.constexpr = _BF16
    base = tl.multiple_of(out_ptr.to(tl.pointer_type(tl.int32)), 16) + first * 4
    start = first.to(tl.uint32)  # units fit: the output is smaller than 2**33 elements
    for i in tl.static_range(UNITS):
        unit = warp_first + lane + 32 * i
        if UNITS > 1 and BLOCKS > 1:
            own = tl.inline_asm_elementwise(
                _SHUFFLE, "=f,f,r", [scale, (lane + 32 * i) >> SHIFT], dtype=tl.float32, is_pure=False, pack=1
            )
        else:
            own = scale
        a, b, c, d = tl.inline_asm_elementwise(
            asm,
            "=r,=r,=r,=r,r,f,f",
            [words[i], code, own],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=False,
            pack=1,
        )
        quad = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [THREADS, 4])
        place = unit + (start + unit) // ROW * GAP
        where = place[:, None] * 4 + tl.arange(0, 4)[None, :].to(tl.uint32)
        tl.store(base + where, quad, mask=(unit < left)[:, None], eviction_policy="evict_first")


def pitched_constexprs(variant: Variant, columns: int, pitch: int) -> dict:
    found = {name: value for name, value in constexprs(variant).items() if name in pitched_kernel.arg_names}
    return found | {"ROW": columns // 8, "GAP": (pitch - columns) // 8}


def launch_pitched(variant: Variant, columns: int, pitch: int, packed, absmax, code2, absmax2, offset, out, n: int):
    """As `launch.launch`, for an output with `columns` elements of each `pitch`."""
    with torch.cuda.device(variant.device_index):
        arguments = (absmax, *(absmax if field is None else field for field in (code2, absmax2, offset)))
        return pitched_kernel[(-(-n // variant.tile),)](
            packed.view(torch.uint8),
            *arguments,
            launch.codes(variant.device_index),
            out,
            n,
            **pitched_constexprs(variant, columns, pitch),
            **options(variant),
        )


def direct_pitched(compiled):
    """As `launch.direct`."""
    return launch.direct(compiled, len(pitched_kernel.arg_names) - launch._RUNTIME_ARGUMENTS)
