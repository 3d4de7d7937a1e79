"""`rope.rotate` for a card: some heads of a token a program.

In fp32 the product of two 16-bit numbers is exact, so that the sum of two is rounded once, fused multiply-add or not: the kernel and plain
torch agree in every bit.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from ..direct_launch import Quick

_HEADS = 1024  # about so many elements a program


@triton.jit
def rotate_kernel(
    x_ptr,  # [B, S, H, 2 * half], any strides but 1 in the last dimension
    out_ptr,  # the same, contiguous
    cos_ptr,  # [rows, at least half]
    sin_ptr,
    positions_ptr,  # [B * S], integers; not read without POSITIONS
    length,
    heads,
    x_batch,
    x_token,
    x_head,
    cos_row,
    sin_row,
    half: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    POSITIONS: tl.constexpr,
    BACK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    batch, position = token // length, token % length
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS)).to(tl.int64)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (head < heads) & (column < half)
    row = tl.load(positions_ptr + token).to(tl.int64) if POSITIONS else position
    cos = tl.load(cos_ptr + row * cos_row + column, mask=column < half, other=0).to(tl.float32)
    sin = tl.load(sin_ptr + row * sin_row + column, mask=column < half, other=0).to(tl.float32)
    if BACK:
        sin = -sin
    here = x_ptr + batch * x_batch + position * x_token + head * x_head + column
    left = tl.load(here, mask=inside, other=0).to(tl.float32)
    right = tl.load(here + half, mask=inside, other=0).to(tl.float32)
    there = out_ptr + (token * heads + head) * 2 * half + column
    tl.store(there, (left * cos - right * sin).to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(there + half, (right * cos + left * sin).to(out_ptr.dtype.element_ty), mask=inside)


_rotate = Quick(rotate_kernel)
_power = functools.cache(triton.next_power_of_2)


def rotate(x, cos, sin, positions, back: bool) -> torch.Tensor:
    """As `rope.rotate`; x's last dimension dense. back: by the negative angle."""
    batch, length, heads, width = x.shape
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    block = _power(width // 2)
    together = max(1, min(_power(heads), _HEADS // block))
    if out.numel():
        _rotate(
            (batch * length, -(-heads // together), 1),
            (x, out, cos, sin, cos if positions is None else positions),
            (length, heads, *x.stride()[:3], cos.stride(0), sin.stride(0)),
            half=width // 2, BLOCK=block, HEADS=together, POSITIONS=positions is not None, BACK=back,
        )  # fmt: skip
    return out
