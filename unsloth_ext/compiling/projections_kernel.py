"""SwiGLU's backward that writes the two gradients as columns of one matrix, for a card.

Inductor would compute a concatenation of pointwise results by one kernel of the concatenation's size, whose halves each read all
that both need, beside another kernel for h; here everything is read once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 1024  # 8 elements a thread: 16 bytes a load


@triton.jit
def swiglu_backward_kernel(
    dh_ptr,  # [T, width], contiguous; h when it is done
    e_ptr,  # [T, width], contiguous
    g_ptr,  # [T, width], contiguous
    wide_ptr,  # [T, pitch]: de, then dg
    width,
    pitch,
    blocks,  # of a row
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    at = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    here = row * width + at
    # In fp32, where the product of two 16-bit numbers is exact, and rounded where a 16-bit product would be.
    dh = tl.load(dh_ptr + here, mask=inside, other=0).to(tl.float32)
    e = tl.load(e_ptr + here, mask=inside, other=0).to(tl.float32)
    g = tl.load(g_ptr + here, mask=inside, other=0).to(tl.float32)
    dtype: tl.constexpr = dh_ptr.dtype.element_ty
    sigmoid = tl.sigmoid(e)
    f = (sigmoid * e).to(dtype).to(tl.float32)
    de = (dh * g).to(dtype).to(tl.float32) * sigmoid * (1.0 + e * (1.0 - sigmoid))
    there = wide_ptr + row * pitch + at
    tl.store(dh_ptr + here, (f * g).to(dtype), mask=inside)
    tl.store(there, de.to(dtype), mask=inside)
    tl.store(there + width, (dh * f).to(dtype), mask=inside)


def swiglu_backward(dh: torch.Tensor, e: torch.Tensor, g: torch.Tensor, wide: torch.Tensor) -> None:
    """wide[:, :2I] = [de | dg] and dh = h, for contiguous 16-bit [T, I]; wide's rows may be longer."""
    rows, width = dh.shape
    blocks = triton.cdiv(width, _BLOCK)
    if rows * blocks:
        swiglu_backward_kernel[(rows * blocks,)](dh, e, g, wide, width, wide.stride(0), blocks, BLOCK=_BLOCK)
