"""NF4 in plain torch: what the kernel must equal bit for bit.

NF4 (QLoRA, arXiv 2305.14314) keeps a weight as one of 16 codes, the quantiles of a normal distribution, times the largest
magnitude of its block. A byte holds two weights, the first in its high nibble. With double quantisation the block maxima are
themselves 8 bit: an index into a codebook of 256 values, times the largest magnitude of their own blocks, plus one offset.

bitsandbytes rounds where this rounds, and its CUDA code is compiled with fast-math, which turns subnormal factors and products
into zeros of their sign. The offset is added by torch, which keeps them.
"""

from __future__ import annotations

import torch

# bitsandbytes' table, which its kernels use whatever `quant_state.code` says.
CODE = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def flush(x: torch.Tensor) -> torch.Tensor:
    """fp32 subnormals become zeros of their sign."""
    zero = torch.copysign(torch.zeros_like(x), x)
    return torch.where(x.abs() < torch.finfo(torch.float32).tiny, zero, x)


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return flush(flush(a) * flush(b))


def scales(absmax, code2=None, absmax2=None, offset=None, blocksize2=0):
    """fp32 [blocks]: the factor of each block. absmax is uint8 and the other four are given for double quantisation."""
    if code2 is None:
        return absmax
    index = torch.arange(absmax.numel(), device=absmax.device) // blocksize2
    return product(code2[absmax.long()], absmax2[index]) + offset


def dequantize(packed, factor, blocksize, shape, dtype):
    """packed: uint8, two weights a byte; factor: fp32, one a block of `blocksize` weights. A tensor of `shape` and `dtype`."""
    n = torch.Size(shape).numel()
    packed = packed.reshape(-1)
    nibbles = torch.stack([packed >> 4, packed & 15], dim=-1).reshape(-1)[:n]
    code = torch.tensor(CODE, device=packed.device)[nibbles.long()]
    block = torch.arange(n, device=packed.device) // blocksize
    return product(code, factor[block]).to(dtype).reshape(shape)
