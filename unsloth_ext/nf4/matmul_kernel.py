"""Two Triton kernels that multiply by an NF4 weight as bitsandbytes holds it, and the sum of split partial products.

Both compute `y = x W^T` for `x` [M, K] and a packed weight [N, K]. A dense copy of the weight never exists.

`few_rows_kernel`, for up to 16 rows of x, is bound by the packed bytes, so the work for each of them must be small:

* The weight is the first operand of `mma.sync.m16n8k16` (16 rows of the weight, 8 rows of x), so that the tensor cores multiply
  and add, and no fp32 operation an element remains.
* A byte is looked up as a pair of 16-bit codes in a table of 256 entries in shared memory. Each entry is repeated for the 32
  lanes, in their own banks, so no two lanes ever wait for each other: two integer operations and one load for two weights.
* The order of K inside an `mma` is free as long as both operands agree. A lane therefore holds 8 contiguous bytes of a weight
  row (16 weights) and the 16 values of x that belong to them, both as they lie in memory: nothing is shuffled or transposed.
* Sums stay apart for each block of the weight, whose scale is applied to them in fp32, so the only rounding is that of the 16
  codes. A common factor, chosen so that all 16 lie close to 16-bit numbers (`matmul_table.FACTORS`), makes it smaller than what
  rounding `code * scale` costs, as dequantising does. Four lanes take 64 weights of a row together, which have one scale
  whatever the block size is (64 or more). Up to 4 rows of x (`WIDE`) they take 128, in loads twice as wide: the columns of the
  product are twice the rows of x then, one half for the block of lanes 0 and 1, with zeros for the other lanes' x, and one for
  the block of lanes 2 and 3.
* K is split over the 4 warps of a program and the partial sums meet in shared memory in a fixed order: results do not vary.
* Many small programs, 4 to a processor, wait for memory and for each other's sums at different times. On an H200 that is faster
  than fewer of 8 or 16 warps, than programs that stay for several tiles, and than sums kept for several tiles (by 1.1 to 2).

`many_rows_kernel`, from there on, is a matmul over tiles: a tile of the weight is decoded once, in registers, and used by the
tensor cores for all rows of x in the tile. Its weights are those of `dequantize`, rounded in the same places; or, with
`SCALE_SUMS`, codes whose scale is applied to the sums, as above. Few tiles are split over K; `sum_kernel` adds the parts.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .kernel import _LANE_CODE, _PREFETCH, _SCALE, _WAIT, _product


def _lookups(word: str, first: int) -> str:
    """PTX: the 4 bytes of a word as 4 registers of two codes, p{first}.. The table holds entry `byte` for this lane at $base."""
    shifts = ("shl.b32 a, {}, 7;", "shr.u32 a, {}, 1;", "shr.u32 a, {}, 9;", "shr.u32 a, {}, 17;")
    return "\n".join(
        f"{shift.format(word)} and.b32 a, a, 0x7f80; or.b32 a, a, lane4; add.u32 a, a, base; ld.shared.b32 p{first + i}, [a];"
        for i, shift in enumerate(shifts)
    )


def _step(dtype: str, groups: int) -> str:
    """PTX: 8 weights of two rows times x. Out: 4 sums a group of 8 columns. In: table, lane4, word, word, then for each group
    4 registers of x, then for each group the 4 sums before."""
    out = [f"${i}" for i in range(4 * groups)]
    n = 4 * groups
    table, lane4, low, high = (f"${n + i}" for i in range(4))
    x = [f"${n + 4 + i}" for i in range(4 * groups)]
    before = [f"${2 * n + 4 + i}" for i in range(4 * groups)]
    lines = [f"{{ .reg .b32 a, base, lane4; .reg .b32 p<8>; mov.b32 base, {table}; mov.b32 lane4, {lane4};"]
    lines += [_lookups(low, 0), _lookups(high, 4)]
    for i in range(groups):
        own, own_x, sums = out[4 * i : 4 * i + 4], x[4 * i : 4 * i + 4], before[4 * i : 4 * i + 4]
        mma = f"mma.sync.aligned.m16n8k16.row.col.f32.{dtype}.{dtype}.f32"
        lines += [
            f"{mma} {{{', '.join(own)}}}, {{p0, p4, p1, p5}}, {{{own_x[0]}, {own_x[1]}}}, {{{', '.join(sums)}}};",
            f"{mma} {{{', '.join(own)}}}, {{p2, p6, p3, p7}}, {{{own_x[2]}, {own_x[3]}}}, {{{', '.join(own)}}};",
        ]
    return "\n".join([*lines, "}"])


def _constraints(groups: int) -> str:
    # Outputs are written before all inputs are read: early clobber.
    return ",".join(["=&f"] * 4 * groups + ["r"] * (4 + 4 * groups) + ["f"] * 4 * groups)


def _fill(threads: int) -> str:
    """PTX: build the table from the 256 entries at $1 and give its address. Behind it is room for 256 floats."""
    lines = ["{ .shared .align 128 .b8 nf4_pairs[33792]; .reg .b32 tid, at, entry, v; .reg .b64 from;"]
    lines += ["mov.u32 tid, %tid.x; mov.u32 $0, nf4_pairs; shl.b32 at, tid, 4; add.u32 at, at, $0;"]
    lines += ["shr.u32 entry, tid, 3; mul.wide.u32 from, entry, 4; add.s64 from, from, $1;"]
    for i in range(2048 // threads):
        lines.append(
            f"ld.global.nc.b32 v, [from + {i * threads // 2}]; st.shared.v4.b32 [at + {i * threads * 16}], {{v, v, v, v}};"
        )
    return "\n".join([*lines, "}"])


def _finish(threads: int, nested: bool) -> str:
    """PTX: put the 256 floats at $2 behind the table at $1, and wait for all threads. Gives the table's address."""
    lines = ["{ .reg .b32 tid, at, v; .reg .b64 from; .reg .pred p; mov.u32 $0, $1;"]
    if nested:
        lines.append("mov.u32 tid, %tid.x; mul.wide.u32 from, tid, 4; add.s64 from, from, $2;")
        lines.append("shl.b32 at, tid, 2; add.u32 at, at, $0; setp.lt.u32 p, tid, 256;")
        for i in range(max(1, 256 // threads)):
            lines.append(
                f"@p ld.global.b32 v, [from + {4 * i * threads}]; @p st.shared.b32 [at + {32768 + 4 * i * threads}], v;"
            )
    return "\n".join([*lines, "bar.sync 0; }"])


_STEP_BF16_1, _STEP_BF16_2 = tl.constexpr(_step("bf16", 1)), tl.constexpr(_step("bf16", 2))
_STEP_FP16_1, _STEP_FP16_2 = tl.constexpr(_step("f16", 1)), tl.constexpr(_step("f16", 2))
_CONSTRAINTS_1, _CONSTRAINTS_2 = tl.constexpr(_constraints(1)), tl.constexpr(_constraints(2))
_FILL_128, _FILL_256, _FILL_512 = (tl.constexpr(_fill(n)) for n in (128, 256, 512))
_FINISH_128, _FINISH_256, _FINISH_512 = (tl.constexpr(_finish(n, True)) for n in (128, 256, 512))
_FINISH = tl.constexpr(_finish(0, False))
_LOAD_2 = tl.constexpr("{ .reg .pred p; setp.gt.s32 p, $3, 0; @p ld.global.L1::no_allocate.v2.b32 {$0, $1}, [$2]; }")
_LOAD_4 = tl.constexpr(
    "{ .reg .pred p; setp.gt.s32 p, $5, 0; @p ld.global.L1::no_allocate.v4.b32 {$0, $1, $2, $3}, [$4]; }"
)
_LOAD_X = tl.constexpr(
    "{ .reg .pred p; setp.ne.s32 p, $5, 0; mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0;"
    " @p ld.global.v4.b32 {$0, $1, $2, $3}, [$4]; }"
)
_CODE2 = tl.constexpr("{ .reg .b32 a; shl.b32 a, $1, 2; add.u32 a, a, $2; ld.shared.f32 $0, [a + 32768]; }")
_QUAD = tl.constexpr("shfl.sync.idx.b32 $0, $1, $2, 0x1c03, 0xffffffff;")  # from lane $2 of our four
_LAUNCH_NEXT = tl.constexpr("griddepcontrol.launch_dependents; // $0")

_LOOKUP_EIGHT = tl.constexpr(
    "{ .reg .b32 a, base, lane4; .reg .b32 p<4>; mov.b32 base, $9; mov.b32 lane4, $10;\n"
    + _lookups("$8", 0)
    + "\n"
    + " ".join(f"mov.b32 {{${2 * i}, ${2 * i + 1}}}, p{i};" for i in range(4))
    + "}"
)


def _decode_eight(convert: str) -> str:
    """PTX: 8 weights as 8 registers of 16 bits, from a word, the lane's code and the scale; rounded as `dequantize` does."""
    lines = ["{ .reg .b32 high, low, r; .reg .f32 a, b;"]
    for i in range(4):
        lines += [
            f"shr.u32 high, $8, {8 * i + 4}; shr.u32 low, $8, {8 * i};",
            "shfl.sync.idx.b32 a, $9, high, 0x100f, 0xffffffff; shfl.sync.idx.b32 b, $9, low, 0x100f, 0xffffffff;",
            f"mul.rn.ftz.f32 a, a, $10; mul.rn.ftz.f32 b, b, $10; cvt.rn.{convert}.f32 r, b, a;",
            f"mov.b32 {{${2 * i}, ${2 * i + 1}}}, r;",
        ]
    return "\n".join([*lines, "}"])


_DECODE_BF16, _DECODE_FP16 = tl.constexpr(_decode_eight("bf16x2")), tl.constexpr(_decode_eight("f16x2"))
_EIGHT_HALVES = tl.constexpr("=h,=h,=h,=h,=h,=h,=h,=h,r,r,r")
_EIGHT_HALVES_F = tl.constexpr("=h,=h,=h,=h,=h,=h,=h,=h,r,f,f")
_LANE4 = tl.constexpr("{ mov.u32 $0, %laneid; shl.b32 $0, $0, 2; }")


@triton.jit
def _build_table(pairs_ptr, THREADS: tl.constexpr):
    if THREADS == 512:
        fill: tl.constexpr = _FILL_512
    elif THREADS == 256:
        fill: tl.constexpr = _FILL_256
    else:
        fill: tl.constexpr = _FILL_128
    at = pairs_ptr.to(tl.int64) + tl.zeros([THREADS], tl.int64)
    return tl.inline_asm_elementwise(fill, "=&r,l", [at], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _finish_table(table, code2_ptr, NESTED: tl.constexpr, THREADS: tl.constexpr):
    if not NESTED:
        finish: tl.constexpr = _FINISH
    elif THREADS == 512:
        finish: tl.constexpr = _FINISH_512
    elif THREADS == 256:
        finish: tl.constexpr = _FINISH_256
    else:
        finish: tl.constexpr = _FINISH_128
    at = code2_ptr.to(tl.int64) + tl.zeros([THREADS], tl.int64)
    return tl.inline_asm_elementwise(finish, "=&r,r,l", [table, at], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _words_of(row_at, k, K: tl.constexpr, WORDS: tl.constexpr):
    """The words of a lane, 8 weights of a row each, from `k` on; past the end of the row anything, as x is zero there."""
    at = row_at + (k >> 1)
    if WORDS == 2:
        return tl.inline_asm_elementwise(
            _LOAD_2, "=&r,=&r,l,r", [at, K - k], dtype=(tl.int32, tl.int32), is_pure=False, pack=1
        )
    else:
        return tl.inline_asm_elementwise(
            _LOAD_4, "=&r,=&r,=&r,=&r,l,r", [at, K - k], dtype=(tl.int32,) * 4, is_pure=False, pack=1
        )


@triton.jit
def _chunk_of(row_at, k, K: tl.constexpr, WORDS: tl.constexpr):
    """A lane's 8 words of a chunk of 256 weights, its row starting at an address."""
    if WORDS == 2:
        return (
            _words_of(row_at, k, K, 2) + _words_of(row_at, k + 64, K, 2)
            + _words_of(row_at, k + 128, K, 2) + _words_of(row_at, k + 192, K, 2)
        )  # fmt: skip
    else:
        return _words_of(row_at, k, K, 4) + _words_of(row_at, k + 128, K, 4)


@triton.jit
def _x_of(x_ptr, token, known, k, K: tl.constexpr, WORDS: tl.constexpr):
    """The values of x that go with the words of a lane, 4 registers a word; zeros where not `known`."""
    inside = (known & (k < K)).to(tl.int32)
    x = ()
    for word in tl.static_range(WORDS):
        at = x_ptr.to(tl.int64) + 2 * (token.to(tl.int64) * K + k + 8 * word)
        x = x + tl.inline_asm_elementwise(
            _LOAD_X, "=&r,=&r,=&r,=&r,l,r", [at, inside], dtype=(tl.int32,) * 4, is_pure=False, pack=1
        )
    return x


@triton.jit
def _scale_of(
    absmax_ptr, code2_ptr, absmax2_ptr, row, k, K: tl.constexpr, BLOCK_SHIFT: tl.constexpr, BLOCK2_SHIFT: tl.constexpr,
    NESTED: tl.constexpr,
):  # fmt: skip
    """What is loaded for one scale: (the block's maximum or its index, the maximum of its own block or nothing of use)."""
    if K % (1 << BLOCK_SHIFT) == 0:
        block = row.to(tl.int64) * (K >> BLOCK_SHIFT) + (k >> BLOCK_SHIFT)
    else:
        block = (row.to(tl.int64) * K + k) >> BLOCK_SHIFT
    inside = k < K
    if NESTED:
        return (
            tl.load(absmax_ptr + block, mask=inside, other=0).to(tl.int32),
            tl.load(absmax2_ptr + (block >> BLOCK2_SHIFT), mask=inside, other=0.0),
        )
    else:
        scale = tl.load(absmax_ptr + block, mask=inside, other=0.0)
        return scale, scale


@triton.jit
def _scale(found, second, code2_ptr, offset, NESTED: tl.constexpr, PTX: tl.constexpr):
    if NESTED:
        code2 = tl.load(code2_ptr + found)
        if PTX:
            return tl.inline_asm_elementwise(
                _SCALE, "=f,f,f,f", [code2, second, offset], dtype=tl.float32, is_pure=True, pack=1
            )
        else:
            return _product(code2, second, False) + offset
    else:
        return found


@triton.jit
def _shared_scale(found, second, table, offset, NESTED: tl.constexpr):
    if NESTED:
        code2 = tl.inline_asm_elementwise(_CODE2, "=f,r,r", [found, table], dtype=tl.float32, is_pure=False, pack=1)
        return tl.inline_asm_elementwise(
            _SCALE, "=f,f,f,f", [code2, second, offset], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return found


@triton.jit
def _from_quad(value, source):
    return tl.inline_asm_elementwise(_QUAD, "=f,f,r", [value, source], dtype=tl.float32, is_pure=False, pack=1)


@triton.jit
def _times_x(table, lane4, low, high, x, at: tl.constexpr, sums, GROUPS: tl.constexpr, BF16: tl.constexpr):
    """One `_step`: 8 weights of each of a lane's two rows, with 4 registers of x from `at` on, and 8 on for the second group."""
    if GROUPS == 1:
        return tl.inline_asm_elementwise(
            _STEP_BF16_1 if BF16 else _STEP_FP16_1,
            _CONSTRAINTS_1,
            [table, lane4, low, high, x[at], x[at + 1], x[at + 2], x[at + 3], sums[0], sums[1], sums[2], sums[3]],
            dtype=(tl.float32,) * 4,
            is_pure=False,
            pack=1,
        )
    else:
        return tl.inline_asm_elementwise(
            _STEP_BF16_2 if BF16 else _STEP_FP16_2,
            _CONSTRAINTS_2,
            [table, lane4, low, high, x[at], x[at + 1], x[at + 2], x[at + 3],
             x[at + 8], x[at + 9], x[at + 10], x[at + 11],
             sums[0], sums[1], sums[2], sums[3], sums[4], sums[5], sums[6], sums[7]],
            dtype=(tl.float32,) * 8,
            is_pure=False,
            pack=1,
        )  # fmt: skip


@triton.jit
def _store_group(a, b, c, d, group: tl.constexpr, tile, bias_ptr, out_ptr, M, N, INVERSE: tl.constexpr, BIAS: tl.constexpr,
                 WARPS: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    # a, b belong to row g of the tile and columns 2t, 2t + 1 of the product, c, d to row g + 8. A column is a row of x; where
    # WIDE, columns 4 to 7 are those of 0 to 3 for the other blocks. What warps and columns hold of a result is added here.
    if WIDE:
        parts = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [WARPS, 8, 2, 2, 4])
        y = tl.reshape(tl.sum(tl.sum(parts, axis=0), axis=1), [16, 4]) * INVERSE
        lane = tl.arange(0, 16)[:, None]
        g = lane >> 1
        column = 2 * (lane & 1)
    else:
        parts = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [WARPS, 32, 4])
        y = tl.sum(parts, axis=0) * INVERSE
        lane = tl.arange(0, 32)[:, None]
        g = lane >> 2
        column = 8 * group + 2 * (lane & 3)
    j = tl.arange(0, 4)[None, :]
    row = tile * 16 + g + 8 * (j >> 1)
    token = column + (j & 1)
    inside = (row < N) & (token < M)
    if BIAS:
        y += tl.load(bias_ptr + row, mask=row < N, other=0.0).to(tl.float32)
    tl.store(out_ptr + token.to(tl.int64) * N + row, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["x_ptr", "packed_ptr", "absmax_ptr", "code2_ptr", "absmax2_ptr", "offset_ptr", "pairs_ptr",
                               "bias_ptr", "out_ptr", "M", "N"])  # fmt: skip
def few_rows_kernel(
    x_ptr,  # fp16 or bf16 [M, K], on 16 bytes
    packed_ptr,  # uint8 [N * K / 2], on 16 bytes
    absmax_ptr,  # uint8 [N * K / blocksize] where NESTED, else fp32
    code2_ptr,  # fp32 [256], where NESTED
    absmax2_ptr,  # fp32, where NESTED
    offset_ptr,  # fp32 [1], where NESTED
    pairs_ptr,  # int32 [256]: two codes of x's dtype for each byte, the first in the low half
    bias_ptr,  # of x's dtype [N], where BIAS
    out_ptr,  # of x's dtype [M, N]
    M,
    N,
    K: tl.constexpr,  # a multiple of 64
    BLOCK_SHIFT: tl.constexpr,  # log2(blocksize), at least 6
    BLOCK2_SHIFT: tl.constexpr,
    NESTED: tl.constexpr,
    BIAS: tl.constexpr,
    INVERSE: tl.constexpr,  # what a code in `pairs` must be multiplied with
    GROUPS: tl.constexpr,  # of 8 rows of x: 1 or 2
    WIDE: tl.constexpr,  # up to 4 rows of x: 16 bytes a lane instead of 8
    WARPS: tl.constexpr,
    FETCH: tl.constexpr,  # have the copy engine bring the tile into L2 before anything else
    OVERLAP: tl.constexpr,  # programmatic dependent launch
):
    THREADS: tl.constexpr = 32 * WARPS
    STEPS: tl.constexpr = (K + 256 * WARPS - 1) // (256 * WARPS)  # in each, a warp takes 256 of K
    WORDS: tl.constexpr = 4 if WIDE else 2  # a lane's, contiguous
    SPAN: tl.constexpr = 32 * WORDS  # of K, that the four lanes of a row take together
    BF16: tl.constexpr = x_ptr.dtype.element_ty == tl.bfloat16
    tl.static_assert(not WIDE or GROUPS == 1, "WIDE is for up to 4 rows of x")

    thread = tl.arange(0, THREADS)
    lane = thread & 31
    warp = thread >> 5
    g = lane >> 2
    t = lane & 3
    lane4 = lane * 4
    tile = tl.program_id(0)
    if FETCH:  # before the wait: what is only brought into L2 cannot be stale
        tl.inline_asm_elementwise(
            _PREFETCH,
            "=r,l,r",
            [packed_ptr.to(tl.int64) + tile.to(tl.int64) * (8 * K), tl.minimum(N - tile * 16, 16) * (K // 2)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    table = _build_table(pairs_ptr, THREADS)
    if OVERLAP:
        tl.inline_asm_elementwise(_WAIT, "=r", [], dtype=tl.int32, is_pure=False, pack=1)
        tl.inline_asm_elementwise(_LAUNCH_NEXT, "=r", [], dtype=tl.int32, is_pure=False, pack=1)

    row = tl.minimum(tile * 16 + g, N - 1)  # rows past the end repeat the last
    row8 = tl.minimum(tile * 16 + g + 8, N - 1)
    at = packed_ptr.to(tl.int64) + row.to(tl.int64) * (K // 2)
    at8 = packed_ptr.to(tl.int64) + row8.to(tl.int64) * (K // 2)
    k = warp * 256 + 8 * WORDS * t
    low = _chunk_of(at, k, K, WORDS)
    high = _chunk_of(at8, k, K, WORDS)
    k = warp * 256 + 64 * t
    scale = _scale_of(absmax_ptr, code2_ptr, absmax2_ptr, row, k, K, BLOCK_SHIFT, BLOCK2_SHIFT, NESTED)
    scale8 = _scale_of(absmax_ptr, code2_ptr, absmax2_ptr, row8, k, K, BLOCK_SHIFT, BLOCK2_SHIFT, NESTED)
    if NESTED:
        offset = tl.load(offset_ptr)
    else:
        offset = 0.0
    table = _finish_table(table, code2_ptr, NESTED, THREADS)
    zero = tl.zeros([THREADS], tl.float32)
    sums = (zero,) * (4 * GROUPS)
    for step in range(STEPS):
        # The bytes of the next step, before the work of this one.
        first = (warp + WARPS * (step + 1)) * 256
        next_low = _chunk_of(at, first + 8 * WORDS * t, K, WORDS)
        next_high = _chunk_of(at8, first + 8 * WORDS * t, K, WORDS)
        k = first + 64 * t
        next_scale = _scale_of(absmax_ptr, code2_ptr, absmax2_ptr, row, k, K, BLOCK_SHIFT, BLOCK2_SHIFT, NESTED)
        next_scale8 = _scale_of(absmax_ptr, code2_ptr, absmax2_ptr, row8, k, K, BLOCK_SHIFT, BLOCK2_SHIFT, NESTED)
        factor = _shared_scale(scale[0], scale[1], table, offset, NESTED)
        factor8 = _shared_scale(scale8[0], scale8[1], table, offset, NESTED)
        # Past the end of a row x is zero, and the scale must be no NaN, whatever code2 and the offset hold.
        if K % (256 * WARPS) != 0:
            past = (warp + WARPS * step) * 256 + 64 * t >= K
            factor = tl.where(past, 0.0, factor)
            factor8 = tl.where(past, 0.0, factor8)
        for part in tl.static_range(8 // WORDS):
            k = (warp + WARPS * step) * 256 + SPAN * part + 8 * WORDS * t
            if WIDE:  # two blocks: lanes 0 and 1 of four hold one, in columns 0 to 3, lanes 2 and 3 the other
                token = g & 3
                x = _x_of(x_ptr, token, ((t >> 1) == (g >> 2)) & (token < M), k, K, WORDS)
                source = 2 * part + (t >> 1)
            else:
                x = _x_of(x_ptr, g, g < M, k, K, WORDS)
                if GROUPS == 2:
                    x = x + _x_of(x_ptr, g + 8, g + 8 < M, k, K, WORDS)
                source = tl.full([THREADS], part, tl.int32)
            products = (zero,) * (4 * GROUPS)
            for word in tl.static_range(WORDS):
                products = _times_x(
                    table,
                    lane4,
                    low[WORDS * part + word],
                    high[WORDS * part + word],
                    x,
                    4 * word,
                    products,
                    GROUPS,
                    BF16,
                )
            f = _from_quad(factor, source)
            f8 = _from_quad(factor8, source)
            added = ()
            for group in tl.static_range(GROUPS):
                added = added + (  # noqa: RUF005
                    sums[4 * group] + f * products[4 * group],
                    sums[4 * group + 1] + f * products[4 * group + 1],
                    sums[4 * group + 2] + f8 * products[4 * group + 2],
                    sums[4 * group + 3] + f8 * products[4 * group + 3],
                )
            sums = added
        low = next_low
        high = next_high
        scale = next_scale
        scale8 = next_scale8
    for group in tl.static_range(GROUPS):
        _store_group(sums[4 * group], sums[4 * group + 1], sums[4 * group + 2], sums[4 * group + 3], group, tile, bias_ptr,
                     out_ptr, M, N, INVERSE, BIAS, WARPS, WIDE)  # fmt: skip


@triton.jit
def _interleave(e0, e1, e2, e3, e4, e5, e6, e7, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    even = tl.join(tl.join(e0, e4), tl.join(e2, e6))
    odd = tl.join(tl.join(e1, e5), tl.join(e3, e7))
    return tl.reshape(tl.join(even, odd), [ROWS, COLUMNS])


@triton.jit
def _tile_scales(
    absmax_ptr, code2_ptr, absmax2_ptr, offset, row, k, K: tl.constexpr, BLOCK_SHIFT: tl.constexpr,
    BLOCK2_SHIFT: tl.constexpr, NESTED: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    found = _scale_of(absmax_ptr, code2_ptr, absmax2_ptr, row, k, K, BLOCK_SHIFT, BLOCK2_SHIFT, NESTED)
    return _scale(found[0], found[1], code2_ptr, offset, NESTED, PTX)


@triton.jit(do_not_specialize=["absmax_ptr", "code2_ptr", "absmax2_ptr", "offset_ptr", "pairs_ptr", "code_ptr",
                               "bias_ptr", "M", "N"])  # fmt: skip
def many_rows_kernel(
    x_ptr,  # fp16 or bf16 [M, K], on 16 bytes
    packed_ptr,  # int32 [N * K / 8], on 16 bytes
    absmax_ptr,
    code2_ptr,
    absmax2_ptr,
    offset_ptr,
    pairs_ptr,
    code_ptr,  # fp32 [16]
    bias_ptr,
    out_ptr,  # of x's dtype [M, N], or where SPLIT > 1 fp32 [SPLIT, M, N]
    M,
    N,
    K: tl.constexpr,  # a multiple of 64
    BLOCK_SHIFT: tl.constexpr,
    BLOCK2_SHIFT: tl.constexpr,
    NESTED: tl.constexpr,
    BIAS: tl.constexpr,
    INVERSE: tl.constexpr,
    BLOCK_N: tl.constexpr,  # rows of the weight
    BLOCK_M: tl.constexpr,  # rows of x
    BLOCK_K: tl.constexpr,  # 64, or a larger power of two that divides K
    SPLIT: tl.constexpr,
    SCALE_SUMS: tl.constexpr,
    THREADS: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
    PTX: tl.constexpr,  # False in the interpreter
):
    WORDS: tl.constexpr = BLOCK_K // 8
    WIDTHS: tl.constexpr = BLOCK_K // 64
    tl.static_assert(BLOCK_K == 64 or SCALE_SUMS == 0, "the scale of a sum belongs to 64 weights")
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    STEPS: tl.constexpr = K // BLOCK_K
    PER_PART: tl.constexpr = (STEPS + SPLIT - 1) // SPLIT
    tile_m = tl.program_id(0)
    tile_n = tl.program_id(1)
    part = tl.program_id(2)
    row = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    known = tl.minimum(row, N - 1)  # rows past the end repeat the last
    token = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    known_token = tl.minimum(token, M - 1)
    # [rows, widths of 64 weights, words of a width]: a scale is the same along the last one where blocks have 64 or more.
    rows = known[:, None, None]
    width = tl.arange(0, WIDTHS)[None, :, None]
    word = tl.arange(0, 8)[None, None, :]

    if PTX:
        if SCALE_SUMS:
            # The table is built by one element a thread: each thread of the program runs the PTX once.
            tables = _finish_table(_build_table(pairs_ptr, THREADS), pairs_ptr, False, THREADS)
            base = tl.max(tables, 0) + tl.zeros([BLOCK_N, WIDTHS, 8], tl.int32)
            lane4 = tl.inline_asm_elementwise(
                _LANE4, "=r,r", [tl.zeros([BLOCK_N, WIDTHS, 8], tl.int32)], dtype=tl.int32, is_pure=True, pack=1
            )
        else:
            codes = code_ptr.to(tl.int64) + tl.zeros([BLOCK_N, WIDTHS, 8], tl.int64)
            code = tl.inline_asm_elementwise(_LANE_CODE, "=f,l", [codes], dtype=tl.float32, is_pure=True, pack=1)
    if OVERLAP:
        tl.inline_asm_elementwise(_WAIT, "=r", [], dtype=tl.int32, is_pure=False, pack=1)
    if NESTED:
        offset = tl.load(offset_ptr)
    else:
        offset = 0.0

    first = part * PER_PART
    last = tl.minimum(first + PER_PART, STEPS)
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    words_ptr = packed_ptr + rows.to(tl.int64) * (K // 8) + 8 * width + word
    values_ptr = x_ptr + known_token[None, :].to(tl.int64) * K + tl.arange(0, BLOCK_K)[:, None]
    if BLOCK_SHIFT >= 6:
        within = 64 * width
        scales = _tile_scales(absmax_ptr, code2_ptr, absmax2_ptr, offset, rows, first * BLOCK_K + within,
                              K, BLOCK_SHIFT, BLOCK2_SHIFT, NESTED, PTX)  # fmt: skip
    else:
        within = 64 * width + 8 * word
    for step in tl.range(first, last, num_stages=STAGES):
        words = tl.load(words_ptr + step * WORDS)
        x = tl.load(values_ptr + step * BLOCK_K)
        if BLOCK_SHIFT >= 6:  # the next step's are on their way early
            scale = scales
            scales = _tile_scales(absmax_ptr, code2_ptr, absmax2_ptr, offset, rows,
                                  tl.minimum(step + 1, STEPS - 1) * BLOCK_K + within,
                                  K, BLOCK_SHIFT, BLOCK2_SHIFT, NESTED, PTX)  # fmt: skip
        else:
            scale = _tile_scales(absmax_ptr, code2_ptr, absmax2_ptr, offset, rows, step * BLOCK_K + within,
                                 K, BLOCK_SHIFT, BLOCK2_SHIFT, NESTED, PTX)  # fmt: skip
        if not PTX:
            e = ()
            for i in tl.static_range(8):
                nibble = (words >> (8 * (i // 2) + 4 - 4 * (i % 2))) & 15
                value = _product(tl.load(code_ptr + nibble), tl.broadcast_to(scale, [BLOCK_N, WIDTHS, 8]), False)
                e = e + (value.to(dtype),)  # noqa: RUF005
            weight = _interleave(e[0], e[1], e[2], e[3], e[4], e[5], e[6], e[7], BLOCK_N, BLOCK_K)
            # The interpreter takes the bits of bfloat16 for integers in a dot.
            total = tl.dot(weight.to(tl.float32), x.to(tl.float32), total, input_precision="ieee")
        else:
            if SCALE_SUMS:
                e = tl.inline_asm_elementwise(
                    _LOOKUP_EIGHT, _EIGHT_HALVES, [words, base, lane4], dtype=(tl.int16,) * 8, is_pure=False, pack=1
                )
            else:
                e = tl.inline_asm_elementwise(
                    _DECODE_BF16 if dtype == tl.bfloat16 else _DECODE_FP16,
                    _EIGHT_HALVES_F,
                    [words, code, tl.broadcast_to(scale, [BLOCK_N, WIDTHS, 8])],
                    dtype=(tl.int16,) * 8,
                    is_pure=False,
                    pack=1,
                )
            weight = _interleave(e[0], e[1], e[2], e[3], e[4], e[5], e[6], e[7], BLOCK_N, BLOCK_K).to(
                dtype, bitcast=True
            )
            if SCALE_SUMS:
                total += tl.dot(weight, x) * tl.reshape(scale, [BLOCK_N, 1])
            else:
                total = tl.dot(weight, x, total)
    if PTX and SCALE_SUMS:
        total = total * INVERSE
    inside = (row[:, None] < N) & (token[None, :] < M)
    where = token[None, :].to(tl.int64) * N + row[:, None]
    if SPLIT == 1:
        if BIAS:
            total += tl.load(bias_ptr + known).to(tl.float32)[:, None]
        tl.store(out_ptr + where, total.to(dtype), mask=inside)
    else:
        tl.store(out_ptr + (part.to(tl.int64) * M) * N + where, total, mask=inside)


@triton.jit(do_not_specialize=["n", "N"])
def sum_kernel(
    parts_ptr,  # fp32 [SPLIT, n]
    bias_ptr,
    out_ptr,  # [n]
    n,
    N,
    SPLIT: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP:
        tl.inline_asm_elementwise(_WAIT, "=r", [], dtype=tl.int32, is_pure=False, pack=1)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    total = tl.zeros([BLOCK], tl.float32)
    for part in tl.static_range(SPLIT):
        total += tl.load(parts_ptr + part * n.to(tl.int64) + at, mask=inside, other=0.0)
    if BIAS:
        total += tl.load(bias_ptr + at % N, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=inside)
