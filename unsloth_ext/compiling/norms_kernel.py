"""RMS norms that also do the addition beside them, for a card: a row's sum is made, written and normed by the program that reads it.

A decoder layer adds to its residual stream right before each norm, and to the stream's gradient right after each norm's backward. As
passes of their own those additions read and write rows that the norm has in its registers: forward four rows move instead of five (a, b,
the sum and y; the sum once more), backward four instead of six (dy, x, the other gradient and the result; dx twice).

The bits are those of the passes one by one, which is the condition for all that compares with Unsloth's kernel: one program a row, its
block and its warps, which decide in what order the row's squares are summed, the same operations in the same order, contracted as there
(`enable_fp_fusion`, whose default Triton 3.10 is to change), and each thing that went through memory rounded as memory had it. Only 16-bit
dtypes: where rounding to memory's dtype does nothing, the compiler could contract the backward's last product and the addition to one
operation.

What is computed is arXiv 1910.07467, in fp32 as transformers' LlamaRMSNorm does.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from ..direct_launch import Quick

_WARPS = {((9, 0), 5120): 4}  # where Unsloth has measured others than `settings` gives, by compute capability and width


@triton.jit
def rms_norm_kernel(
    x_ptr,  # [T, WIDTH], contiguous, as all matrices here
    beside_ptr,  # what is added to x before
    weight_ptr,  # [WIDTH]
    sum_ptr,
    y_ptr,
    rstd_ptr,  # fp32 [T]
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    here = row * WIDTH
    x = tl.load(x_ptr + here + column, mask=inside, other=0).to(tl.float32)
    if ADD:
        x += tl.load(beside_ptr + here + column, mask=inside, other=0).to(tl.float32)
        rounded = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + here + column, rounded, mask=inside)
        x = rounded.to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=inside, other=0)
    rstd = tl.math.rsqrt(tl.sum(x * x, axis=0) / WIDTH + eps)
    tl.store(rstd_ptr + row, rstd)
    tl.store(y_ptr + here + column, (x * rstd).to(weight.dtype) * weight, mask=inside)


@triton.jit
def rms_norm_backward_kernel(
    dy_ptr,  # [T, WIDTH], contiguous, as all matrices here
    x_ptr,
    weight_ptr,  # [WIDTH]
    rstd_ptr,  # fp32 [T]
    other_ptr,  # what is added to dx
    dx_ptr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    here = row * WIDTH
    dy = tl.load(dy_ptr + here + column, mask=inside, other=0).to(tl.float32)
    x = tl.load(x_ptr + here + column, mask=inside, other=0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=inside, other=0).to(tl.float32)
    rstd = tl.load(rstd_ptr + row)
    if ADD:  # on its way while the row is summed
        other = tl.load(other_ptr + here + column, mask=inside, other=0)
    normed = x * rstd
    scaled = dy * weight
    along = tl.sum(scaled * normed, axis=0)
    dx = rstd / WIDTH * (WIDTH * scaled - normed * along)
    if ADD:
        dx = dx.to(dx_ptr.dtype.element_ty).to(tl.float32) + other.to(tl.float32)
    tl.store(dx_ptr + here + column, dx, mask=inside)


def settings(width: int, capability: tuple[int, int] | None) -> tuple[int, int]:
    """(elements of a program's block, its warps): Unsloth's, for a compute capability or None for no card."""
    block = triton.next_power_of_2(width)
    warps = 32 if block >= 32768 else 16 if block >= 8192 else 8 if block >= 2048 else 4
    return block, _WARPS.get((capability, width), warps)


_forward, _backward = Quick(rms_norm_kernel), Quick(rms_norm_backward_kernel)


@functools.cache
def _settings(width: int, device: torch.device) -> tuple[int, int]:
    return settings(width, torch.cuda.get_device_capability(device) if device.type == "cuda" else None)


def rms_norm(x, beside, weight, eps, total, y, rstd) -> None:
    """y = norm(x) weight and rstd = 1 / sqrt(mean of x squared + eps); beside, not None: total = x + beside, and of total then.

    x, beside, total, y: contiguous, of one shape and dtype, rows of at most norms_operators.WIDEST. weight: [WIDTH]. rstd: fp32 [T].
    """
    width, rows = x.shape[-1], rstd.shape[0]
    if rows:
        block, warps = _settings(width, x.device)
        add = beside is not None
        tensors = x, beside if add else x, weight, total if add else y, y, rstd
        _forward(
            (rows, 1, 1), tensors, (eps,), WIDTH=width, BLOCK=block, ADD=add, num_warps=warps, enable_fp_fusion=True
        )


def rms_norm_backward(dy, x, weight, rstd, other, dx) -> None:
    """dx of `rms_norm`; other, not None: dx, rounded to its dtype, plus other. dy, x, other, dx: contiguous, of one dtype and size."""
    width, rows = x.shape[-1], rstd.shape[0]
    if rows:
        block, warps = _settings(width, x.device)
        add = other is not None
        tensors = dy, x, weight, rstd, other if add else dy, dx
        _backward((rows, 1, 1), tensors, (), WIDTH=width, BLOCK=block, ADD=add, num_warps=warps, enable_fp_fusion=True)
