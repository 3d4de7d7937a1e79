"""One Triton kernel for every NF4 weight that bitsandbytes can hold.

The work is 1 byte read for 4 written and three operations an element, so the store decides: 16 bytes a lane, 512 contiguous
bytes a warp, straight from registers, no shared memory and no barrier. A *unit* is what one such store takes: an int32 word
(8 elements) for fp16 and bf16, half a word (4 elements) for fp32. From there:

* The 16 codes sit in registers, one a lane, twice over in a warp, and `shfl.sync.idx` looks them up. Its clamp operand 0x100f
  makes segments of 16 lanes, in which only the low 4 bits of the index count: a nibble needs a shift and no mask.
* A lane handles `UNITS` units, 32 apart, so that each load and store of a warp stays contiguous. Loads of one lane are only
  concurrent if they are issued before the first is waited for, and ptxas would rather sink the later ones below the codebook
  gather, to save registers. So that gather is made to depend on all of them, through a mask that is always zero, which only we
  know. (One tensor of all units would be loaded 16 bytes wide, and sorted out again through shared memory.)
* A warp's scales are fetched once, one block a lane, and handed out by shuffle.
* bitsandbytes rounds the scale twice, `fp32(code2[i] * absmax2) + offset`, and is built with fast-math: its products flush
  subnormals, the addition (torch's) does not. `mul.rn.ftz` and `add.rn` say exactly that and are never contracted to an FMA.
* Memory likes a narrow front of writes, so where the output exceeds L2 few programs should run at a time; but then their loads
  no longer hide each other's latency. On Hopper and later a program therefore has the copy engine bring a tile far ahead of its
  own into L2 (`AHEAD`), and shared memory that nobody uses limits how many share a processor (`ROOM`).
* Both streams are marked evict-first: neither fits into L2 next to what the model works on, and lines that are written back
  in the order in which they were written cost memory less.
* With programmatic dependent launch the next kernel's programs are set up while the last ones of the kernel before it drain. Each
  waits before its first load from anything that a kernel could have written, so nothing is reordered; only our own constant
  table is read ahead.

Where a pointer is not aligned, and in Triton's interpreter, which cannot run PTX, `WIDE=False` takes a plain path: the same
arithmetic, byte by byte. An odd rest of elements at the end is left to it too.

The inline PTX needs all 32 lanes of a warp in step: it is declared impure, and nothing around it branches on a lane.
"""

from __future__ import annotations

import triton
import triton.language as tl


def _decode(convert: str, halves: int) -> str:
    """PTX of a unit: $n the unit, then this lane's code and the scale; 4 registers out, in the order of the elements."""
    unit, code, scale = "$4", "$5", "$6"
    lines = ["{ .reg .b32 high, low; .reg .f32 a, b; .reg .b32 u, v; .reg .b16 p, q; .reg .pred nan;"]
    for i in range(4 if halves else 2):
        lines += [
            f"shr.u32 high, {unit}, {8 * i + 4}; shr.u32 low, {unit}, {8 * i};",
            f"shfl.sync.idx.b32 a, {code}, high, 0x100f, 0xffffffff;",
            f"shfl.sync.idx.b32 b, {code}, low, 0x100f, 0xffffffff;",
            f"mul.rn.ftz.f32 a, a, {scale}; mul.rn.ftz.f32 b, b, {scale};",
            convert.format(i=i, first=2 * i, second=2 * i + 1),
        ]
    return "\n".join([*lines, "}"])


def _round_bf16(value: str, register: str) -> str:
    # Before sm_80 there is no conversion to bf16 (nor two at a time to fp16): nearest even by hand, and 0x7fff for a NaN, as CUDA's own fallback has it.
    return (
        f"mov.b32 {register}, {value}; shr.u32 high, {register}, 16; and.b32 high, high, 1; add.u32 high, high, 0x7fff; "
        f"add.u32 {register}, {register}, high; setp.nan.f32 nan, {value}, {value}; selp.b32 {register}, 0x7fff0000, {register}, nan; "
    )


_FP16 = tl.constexpr(_decode("cvt.rn.f16x2.f32 ${i}, b, a;", halves=True))
_BF16 = tl.constexpr(_decode("cvt.rn.bf16x2.f32 ${i}, b, a;", halves=True))
_FP32 = tl.constexpr(_decode("mov.b32 ${first}, a; mov.b32 ${second}, b;", halves=False))
_FP16_SM75 = tl.constexpr(_decode("cvt.rn.f16.f32 p, a; cvt.rn.f16.f32 q, b; mov.b32 ${i}, {{p, q}};", halves=True))
_BF16_SM75 = tl.constexpr(
    _decode(_round_bf16("a", "u") + _round_bf16("b", "v") + "prmt.b32 ${i}, u, v, 0x7632;", halves=True)
)
_LANE_CODE = tl.constexpr(
    "{ .reg .b32 lane; .reg .b64 where; mov.u32 lane, %laneid; and.b32 lane, lane, 15;"
    " mul.wide.u32 where, lane, 4; add.s64 where, where, $1; ld.global.nc.f32 $0, [where]; }"
)
_SCALE = tl.constexpr("{ .reg .f32 product; mul.rn.ftz.f32 product, $1, $2; add.rn.f32 $0, product, $3; }")
_FLUSHING_MUL = tl.constexpr("mul.rn.ftz.f32 $0, $1, $2;")
_SHUFFLE = tl.constexpr("shfl.sync.idx.b32 $0, $1, $2, 0x1f, 0xffffffff;")
_WAIT = tl.constexpr("griddepcontrol.wait; // $0")
# Bytes into L2, asked for by one thread. The engine wants 16-byte multiples: beginning and length are rounded down.
_PREFETCH = tl.constexpr(
    "{ .reg .pred lead; .reg .b32 tid, size; .reg .b64 at; mov.u32 tid, %tid.x; and.b32 size, $2, 0xfffffff0;"
    " and.b64 at, $1, 0xfffffffffffffff0; setp.eq.u32 lead, tid, 0; setp.gt.and.s32 lead, size, 0, lead;"
    " @lead cp.async.bulk.prefetch.L2.global [at], size; // $0\n }"
)


def room(n_bytes: int) -> str:
    """PTX that sets shared memory aside, outside of Triton's account of it. $1 is never negative, but ptxas cannot know."""
    return (
        f"{{ .reg .pred never; .reg .b32 at; .shared .align 16 .b8 nf4_room[{n_bytes}]; mov.u32 at, nf4_room;"
        " setp.lt.s32 never, $1, 0; @never st.shared.b32 [at], $1; // $0\n }"
        if n_bytes
        else ""
    )


@triton.jit
def _flush(x):
    # What fast-math does to a subnormal, for the interpreter.
    return tl.where(tl.abs(x) < 1.1754943508222875e-38, x * 0.0, x)


@triton.jit
def _product(a, b, PTX: tl.constexpr):
    if PTX:
        return tl.inline_asm_elementwise(_FLUSHING_MUL, "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return _flush(_flush(a) * _flush(b))


@triton.jit
def _plain(
    packed_ptr,
    absmax_ptr,
    code2_ptr,
    absmax2_ptr,
    offset_ptr,
    code_ptr,
    out_ptr,
    first,
    n_elements,
    BLOCK_SHIFT: tl.constexpr,
    BLOCK2_SHIFT: tl.constexpr,
    NESTED: tl.constexpr,
    PTX: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    element = first + tl.arange(0, ELEMENTS)
    inside = element < n_elements
    byte = tl.load(packed_ptr + (element >> 1), mask=inside, other=0).to(tl.int32)
    nibble = (byte >> (4 - 4 * (element & 1).to(tl.int32))) & 15
    block = element >> BLOCK_SHIFT
    if NESTED:
        index = tl.load(absmax_ptr + block, mask=inside, other=0).to(tl.int32)
        absmax2 = tl.load(absmax2_ptr + (block >> BLOCK2_SHIFT), mask=inside, other=0.0)
        scale = _product(tl.load(code2_ptr + index), absmax2, PTX) + tl.load(offset_ptr)
    else:
        scale = tl.load(absmax_ptr + block, mask=inside, other=0.0)
    value = _product(tl.load(code_ptr + nibble), scale, PTX)
    tl.store(out_ptr + element, value.to(out_ptr.dtype.element_ty), mask=inside)


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
def dequantize_kernel(
    packed_ptr,  # uint8 [ceil(n / 2)], the first element in the high nibble
    absmax_ptr,  # uint8 [ceil(n / blocksize)] where NESTED, else fp32
    code2_ptr,  # fp32 [256], where NESTED
    absmax2_ptr,  # fp32 [ceil(blocks / blocksize2)], where NESTED
    offset_ptr,  # fp32 [1], where NESTED
    code_ptr,  # fp32 [16]
    out_ptr,  # fp16, bf16 or fp32 [n]
    n_elements: tl.int64,
    BLOCK_SHIFT: tl.constexpr,  # log2(blocksize)
    BLOCK2_SHIFT: tl.constexpr,  # log2(blocksize2)
    NESTED: tl.constexpr,
    WIDE: tl.constexpr,  # units by inline PTX: the packed bytes start on a unit and the output on 16 bytes
    REST: tl.constexpr,  # the last unit is not whole
    UNITS: tl.constexpr,  # units a lane (elements a program where not WIDE)
    THREADS: tl.constexpr,  # 32 * num_warps
    PTX: tl.constexpr,  # False in the interpreter
    BEFORE_SM80: tl.constexpr,  # no packed conversions
    OVERLAP: tl.constexpr,  # programmatic dependent launch, sm_90 and later
    AHEAD: tl.constexpr,  # prefetch the tile of the program that comes so much later, sm_90 and later; 0: none
    ROOM: tl.constexpr,  # PTX from `room`
):
    program = tl.program_id(0).to(tl.int64)
    if not WIDE:
        _plain(packed_ptr, absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, code_ptr, out_ptr, program * UNITS, n_elements,
               BLOCK_SHIFT, BLOCK2_SHIFT, NESTED, PTX, UNITS)  # fmt: skip
    else:
        dtype: tl.constexpr = out_ptr.dtype.element_ty
        UNIT_SHIFT: tl.constexpr = 2 if dtype == tl.float32 else 3  # log2(elements of a unit)
        SHIFT: tl.constexpr = BLOCK_SHIFT - UNIT_SHIFT  # log2(units of a block)
        TILE: tl.constexpr = UNITS * THREADS
        WARP_TILE: tl.constexpr = UNITS * 32
        BLOCKS: tl.constexpr = WARP_TILE >> SHIFT  # blocks of a warp's tile; 0 where a block is longer
        tl.static_assert(BLOCKS <= 32, "a warp must hold the scales of its tile")

        thread = tl.arange(0, THREADS).to(tl.uint32)
        lane = thread & 31
        code = tl.inline_asm_elementwise(
            _LANE_CODE,
            "=f,l",
            [code_ptr.to(tl.int64) + tl.zeros([THREADS], tl.int64)],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
        if OVERLAP:  # nothing of the kernel before us may be read or overwritten until it has ended
            tl.inline_asm_elementwise(_WAIT, "=r", [], dtype=tl.int32, is_pure=False, pack=1)

        first = program * TILE
        if ROOM != "":
            tl.inline_asm_elementwise(
                ROOM, "=r,r", [(n_elements >> 63).to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1
            )
        if AHEAD:
            TILE_BYTES: tl.constexpr = TILE << (UNIT_SHIFT - 1)
            SCALE_BYTES: tl.constexpr = (TILE >> SHIFT) * (1 if NESTED else 4)
            at = (program + AHEAD) * TILE_BYTES
            size = tl.minimum(tl.maximum((n_elements >> 1) - at, 0), TILE_BYTES).to(tl.int32)
            tl.inline_asm_elementwise(
                _PREFETCH, "=r,l,r", [packed_ptr.to(tl.int64) + at, size], dtype=tl.int32, is_pure=False, pack=1
            )
            if SCALE_BYTES >= 16:  # all of them only where all of the tile is
                at = (program + AHEAD) * SCALE_BYTES
                size = tl.where(size == TILE_BYTES, SCALE_BYTES, 0).to(tl.int32)
                tl.inline_asm_elementwise(
                    _PREFETCH, "=r,l,r", [absmax_ptr.to(tl.int64) + at, size], dtype=tl.int32, is_pure=False, pack=1
                )
        left = tl.minimum((n_elements >> UNIT_SHIFT) - first, TILE).to(tl.uint32)
        warp_first = (thread >> 5) * WARP_TILE
        if dtype == tl.float32:
            units_ptr = packed_ptr.to(tl.pointer_type(tl.uint16)) + first
        else:
            units_ptr = packed_ptr.to(tl.pointer_type(tl.uint32)) + first
        words = ()
        together = tl.zeros([THREADS], tl.uint32)
        for i in tl.static_range(UNITS):
            unit = warp_first + lane + 32 * i
            word = tl.load(units_ptr + unit, mask=unit < left, other=0, eviction_policy="evict_first").to(tl.uint32)
            words = words + (word,)  # noqa: RUF005 (Triton knows no starred tuples)
            together = together | word

        # One block a lane. With one unit a lane that is its own block, and no shuffle is needed.
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
                absmax2 = tl.load(
                    absmax2_ptr + (block0 >> BLOCK2_SHIFT) + (block >> BLOCK2_SHIFT), mask=known, other=0.0
                )
            else:
                absmax2 = tl.load(absmax2_ptr + (block0 >> BLOCK2_SHIFT))
            offset = tl.load(offset_ptr)
            index = index | (together & (n_elements >> 63).to(tl.uint32))
            scale = tl.inline_asm_elementwise(
                _SCALE,
                "=f,f,f,f",
                [tl.load(code2_ptr + index), absmax2, offset],
                dtype=tl.float32,
                is_pure=True,
                pack=1,
            )
        else:
            scale = tl.load(absmax_ptr + block0 + block, mask=known, other=0.0)

        if dtype == tl.float32:
            asm: tl.constexpr = _FP32
        elif dtype == tl.float16:
            asm: tl.constexpr = _FP16_SM75 if BEFORE_SM80 else _FP16
        else:
            asm: tl.constexpr = _BF16_SM75 if BEFORE_SM80 else _BF16
        base = tl.multiple_of(out_ptr.to(tl.pointer_type(tl.int32)), 16) + first * 4
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
            # A lane's four registers side by side: one 16-byte store.
            quad = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [THREADS, 4])
            where = unit[:, None] * 4 + tl.arange(0, 4)[None, :].to(tl.uint32)
            tl.store(base + where, quad, mask=(unit < left)[:, None], eviction_policy="evict_first")
        if REST:
            if program == tl.num_programs(0) - 1:
                _plain(packed_ptr, absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, code_ptr, out_ptr,
                       (n_elements >> UNIT_SHIFT) << UNIT_SHIFT, n_elements, BLOCK_SHIFT, BLOCK2_SHIFT, NESTED, PTX, 8)  # fmt: skip
