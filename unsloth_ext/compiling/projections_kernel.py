"""SwiGLU for a card, with what of LoRA can be had of what it has in its registers: forward and backward.

Forward: a program takes some rows and goes along a part of them, so that its part of h A^T stays in its registers, and h is not read once
more for A.

Backward: Inductor would compute a concatenation of pointwise results by one kernel of the concatenation's size, whose halves each read all
that both need; here everything is read once, and written as columns of one matrix. The gradients of gate's and up's B and of down's A are
sums over the rows, of de, dg and h, which are here already: a program takes some columns and goes down the rows, so those sums
stay in its registers, three quarters of a gigabyte a layer (8B, 8192 tokens) are not read once more for them, and h is never written.
"""

from __future__ import annotations

import functools
import os

import torch
import triton
import triton.language as tl

from ..direct_launch import Quick

MOST_RANK = 64  # beyond, the sums would not stay in registers
_BLOCK = 1024  # 8 elements a thread: 16 bytes a load
_LOW = 512  # numbers of a program of `low_kernel`
_PROGRAMS = 1024  # about; each split of the rows, or in the forward of the columns, writes its sums
_FORWARD = {
    "ROWS": 32,
    "COLUMNS": 128,
    "num_warps": 4,
    "num_stages": 3,
}  # of a step of the forward: measured on an H200
_PTX = os.environ.get("TRITON_INTERPRET") != "1"


@triton.jit
def _sigmoid(x, PTX: tl.constexpr):
    """To 2^-21. The division and the exponential of Triton also mind what is too small for 16 bits to see: a third of all instructions.

    Said not to be pure, or Triton computes it, and all that comes from it, once for the stores and once for the products, whose
    operands lie otherwise in the registers: 616 instructions a step of the backward, where 397 are enough."""
    if PTX:
        return tl.inline_asm_elementwise(
            "{ .reg .f32 t; mul.f32 t, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 t, t; add.f32 t, t, 0f3F800000; rcp.approx.ftz.f32 $0, t; }",
            "=f,f", [x], dtype=tl.float32, is_pure=False, pack=1,
        )  # fmt: skip
    return tl.sigmoid(x)


@triton.jit
def swiglu_lora_kernel(
    e_ptr,  # [T, width], contiguous
    g_ptr,  # [T, width], contiguous
    a_ptr,  # [rank, width], contiguous
    h_ptr,  # [T, width], contiguous
    sums_ptr,  # fp32 [splits, T, rank]: h A^T of each split's columns
    many,  # T
    width,
    rank,
    share,  # columns of a split, a multiple of COLUMNS
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,  # at least the rank
    PTX: tl.constexpr,  # False in the interpreter
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)[:, None]
    split = tl.program_id(1)
    dtype: tl.constexpr = h_ptr.dtype.element_ty
    ranks = tl.arange(0, RANK)[None, :]
    low = tl.zeros((ROWS, RANK), tl.float32)
    for start in range(split * share, tl.minimum(split * share + share, width), COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        inside = (rows < many) & (columns[None, :] < width)
        here = rows * width + columns[None, :]
        e = tl.load(e_ptr + here, mask=inside, other=0).to(tl.float32)
        g = tl.load(g_ptr + here, mask=inside, other=0).to(tl.float32)
        a = tl.load(a_ptr + ranks * width + columns[:, None], mask=(columns[:, None] < width) & (ranks < rank), other=0)
        h = ((_sigmoid(e, PTX) * e).to(dtype).to(tl.float32) * g).to(dtype)
        tl.store(h_ptr + here, h, mask=inside)
        low = tl.dot(h, a, low)
    tl.store(sums_ptr + (split.to(tl.int64) * many + rows) * rank + ranks, low, mask=(rows < many) & (ranks < rank))


@triton.jit
def low_kernel(
    sums_ptr,  # fp32 [splits, numbers]
    low_ptr,  # [numbers]: their sum
    numbers,
    splits,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    inside = at < numbers
    low = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        low += tl.load(sums_ptr + split * numbers + at, mask=inside, other=0)
    tl.store(low_ptr + at, low.to(low_ptr.dtype.element_ty), mask=inside)


_swiglu_lora, _low = Quick(swiglu_lora_kernel), Quick(low_kernel)
_power = functools.cache(triton.next_power_of_2)


def _parts(number: int, each: int) -> int:
    return -(-number // each)


def swiglu_lora(e: torch.Tensor, g: torch.Tensor, a: torch.Tensor, h: torch.Tensor, low: torch.Tensor) -> None:
    """h = silu(e) g and low = h A^T, for contiguous 16-bit e, g, h [T, I], a [rank, I] and low [T, rank]. No rank may be above `MOST_RANK`."""
    (rows, width), rank = e.shape, a.shape[0]
    if rows == 0:
        return
    blocks = _parts(rows, _FORWARD["ROWS"])
    splits = max(1, min(_parts(width, _FORWARD["COLUMNS"]), _PROGRAMS // blocks))
    share = _parts(_parts(width, splits), _FORWARD["COLUMNS"]) * _FORWARD["COLUMNS"]
    splits = _parts(width, share)
    sums = e.new_empty(splits, rows, rank, dtype=torch.float32)
    _swiglu_lora(
        (blocks, splits, 1),
        (e, g, a, h, sums),
        (rows, width, rank, share),
        RANK=_power(max(16, rank)),
        PTX=_PTX,
        **_FORWARD,
    )
    _low((_parts(rows * rank, _LOW), 1, 1), (sums, low), (rows * rank, splits), BLOCK=_LOW)


@triton.jit
def _swiglu_backward_of(dh, e, g, dtype: tl.constexpr, PTX: tl.constexpr):
    """(de, dg, h) of fp32 tiles, where the product of two 16-bit numbers is exact; rounded where a 16-bit product would be."""
    sigmoid = _sigmoid(e, PTX)
    f = (sigmoid * e).to(dtype).to(tl.float32)
    de = (dh * g).to(dtype).to(tl.float32) * sigmoid * (1.0 + e * (1.0 - sigmoid))
    return de.to(dtype), (dh * f).to(dtype), (f * g).to(dtype)


@triton.jit
def swiglu_backward_kernel(
    dh_ptr,  # [T, width], contiguous
    e_ptr,  # [T, width], contiguous
    g_ptr,  # [T, width], contiguous
    h_ptr,  # [T, width], contiguous
    wide_ptr,  # [T, pitch]: de, then dg
    width,
    pitch,
    blocks,  # of a row
    BLOCK: tl.constexpr,
    PTX: tl.constexpr,  # False in the interpreter
):
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    at = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    here = row * width + at
    dh = tl.load(dh_ptr + here, mask=inside, other=0).to(tl.float32)
    e = tl.load(e_ptr + here, mask=inside, other=0).to(tl.float32)
    g = tl.load(g_ptr + here, mask=inside, other=0).to(tl.float32)
    de, dg, h = _swiglu_backward_of(dh, e, g, dh_ptr.dtype.element_ty, PTX)
    there = wide_ptr + row * pitch + at
    tl.store(h_ptr + here, h, mask=inside)
    tl.store(there, de, mask=inside)
    tl.store(there + width, dg, mask=inside)


_swiglu_backward = Quick(swiglu_backward_kernel)


def swiglu_backward(dh: torch.Tensor, e: torch.Tensor, g: torch.Tensor, wide: torch.Tensor) -> torch.Tensor:
    """wide[:, :2I] = [de | dg], for contiguous 16-bit [T, I]; wide's rows may be longer. Returns h = silu(e) g."""
    (rows, width), h = dh.shape, torch.empty_like(dh)
    blocks = _parts(width, _BLOCK)
    if rows * blocks:
        numbers = width, wide.stride(0), blocks
        _swiglu_backward((rows * blocks, 1, 1), (dh, e, g, h, wide), numbers, BLOCK=_BLOCK, PTX=_PTX)
    return h


@triton.jit
def _narrow_transposed(pointer, rows, many, pitch, rank, RANK: tl.constexpr):
    """[RANK, rows] of a matrix of `many` rows and `rank` columns, zeros beyond."""
    column = tl.arange(0, RANK)
    inside = (rows[None, :] < many) & (column[:, None] < rank)
    return tl.load(pointer + rows[None, :] * pitch + column[:, None], mask=inside, other=0)


@triton.jit
def swiglu_lora_backward_kernel(
    dh_ptr,  # [T, width], contiguous
    e_ptr,  # [T, width], contiguous
    g_ptr,  # [T, width], contiguous
    wide_ptr,  # [T, pitch]: de, then dg
    low_ptr,  # [T, low_pitch]: gate_rank columns, then up_rank
    p_ptr,  # [T, p_pitch]: down_rank columns
    sums_ptr,  # fp32 [splits, gate_rank + up_rank + down_rank, width]: low_gate^T de, low_up^T dg, p^T h
    many,  # T
    width,
    pitch,
    low_pitch,
    p_pitch,
    gate_rank,
    up_rank,
    down_rank,
    share,  # rows of a split, a multiple of ROWS
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,  # at least each of the ranks
    PTX: tl.constexpr,  # False in the interpreter
):
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    split = tl.program_id(1)
    valid = columns[None, :] < width
    dtype: tl.constexpr = dh_ptr.dtype.element_ty
    gate_sum = tl.zeros((RANK, COLUMNS), tl.float32)
    up_sum = tl.zeros((RANK, COLUMNS), tl.float32)
    down_sum = tl.zeros((RANK, COLUMNS), tl.float32)
    for start in range(split * share, tl.minimum(split * share + share, many), ROWS):
        rows = start + tl.arange(0, ROWS).to(tl.int64)
        inside = valid & (rows[:, None] < many)
        here = rows[:, None] * width + columns[None, :]
        dh = tl.load(dh_ptr + here, mask=inside, other=0).to(tl.float32)
        e = tl.load(e_ptr + here, mask=inside, other=0).to(tl.float32)
        g = tl.load(g_ptr + here, mask=inside, other=0).to(tl.float32)
        gate_low = _narrow_transposed(low_ptr, rows, many, low_pitch, gate_rank, RANK)
        up_low = _narrow_transposed(low_ptr + gate_rank, rows, many, low_pitch, up_rank, RANK)
        down_p = _narrow_transposed(p_ptr, rows, many, p_pitch, down_rank, RANK)
        de, dg, h = _swiglu_backward_of(dh, e, g, dtype, PTX)
        there = wide_ptr + rows[:, None] * pitch + columns[None, :]
        tl.store(there, de, mask=inside)
        tl.store(there + width, dg, mask=inside)
        gate_sum = tl.dot(gate_low, de, gate_sum)
        up_sum = tl.dot(up_low, dg, up_sum)
        down_sum = tl.dot(down_p, h, down_sum)
    rank = tl.arange(0, RANK)[:, None]
    at = sums_ptr + (split.to(tl.int64) * (gate_rank + up_rank + down_rank) + rank) * width + columns[None, :]
    tl.store(at, gate_sum, mask=valid & (rank < gate_rank))
    tl.store(at + gate_rank * width, up_sum, mask=valid & (rank < up_rank))
    tl.store(at + (gate_rank + up_rank) * width, down_sum, mask=valid & (rank < down_rank))


_swiglu_lora_backward = Quick(swiglu_lora_backward_kernel)


def step_for(rank: int) -> dict[str, int]:
    """Rows of a step of the backward, columns of a program, steps in shared memory at a time: measured on an H200."""
    rows, columns = (16, 128) if rank <= 16 else (32, 64)
    return {"ROWS": rows, "COLUMNS": columns, "num_warps": 4, "num_stages": 3}


def swiglu_lora_backward(
    dh: torch.Tensor,
    e: torch.Tensor,
    g: torch.Tensor,
    low: torch.Tensor,
    p: torch.Tensor,
    ranks: tuple[int, int],
    wide: torch.Tensor,
) -> torch.Tensor:
    """As `swiglu_backward`, but h is not kept. Returns the sums over the rows: fp32 [ranks + columns of p, I], low_gate^T de, low_up^T dg
    and p^T h.

    low: [T, sum of ranks], 16 bits, gate's columns and up's; p: [T, rank]. No rank may be above `MOST_RANK`.
    """
    (rows, width), gate_rank, up_rank, down_rank = dh.shape, *ranks, p.shape[1]
    rank = _power(max(16, gate_rank, up_rank, down_rank))
    step = step_for(rank)
    strips = _parts(width, step["COLUMNS"])
    splits = max(1, min(_parts(rows, step["ROWS"]), _PROGRAMS // strips))
    share = _parts(_parts(rows, splits), step["ROWS"]) * step["ROWS"]
    sums = dh.new_empty(splits, gate_rank + up_rank + down_rank, width, dtype=torch.float32)
    if sums.numel():
        _swiglu_lora_backward(
            (strips, splits, 1), (dh, e, g, wide, low, p, sums),
            (rows, width, wide.stride(0), low.stride(0), p.stride(0), gate_rank, up_rank, down_rank, share),
            RANK=rank, PTX=_PTX, **step,
        )  # fmt: skip
    return sums[0] if splits == 1 else sums.sum(0)
