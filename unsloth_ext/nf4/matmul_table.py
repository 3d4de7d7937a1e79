"""How a matmul with an NF4 weight is cut up: which kernel, which tiles, by card and size; and where dequantise + cuBLAS is taken."""

from __future__ import annotations

import functools
import warnings
from typing import NamedTuple

import torch

from ..switches import OFF, said
from . import matmul_hopper, matmul_nvrtc
from .matmul_hopper import FewRows, Tiles
from .table import capability

# The 16 codes are kept in 16 bits, times a common factor that brings all of them close to numbers of that format: the root mean
# square of what rounding changes is 3.2e-4 of the largest code in bfloat16 (8.5e-4 where `code * scale` is rounded, as a dense
# weight is) and 3.2e-5 in float16 (1.1e-4). Found by trying two million factors from 1 to 2.
FACTORS = {torch.bfloat16: 1.437006, torch.float16: 1.6776895}
ROWS = 16  # of x that `few_rows_kernel` takes


class Few(NamedTuple):
    """A launch of `few_rows_kernel`."""

    warps: int = 4  # 4, 8 or 16; K is split over them
    fetch: bool = True  # bring the tile into L2 before anything else
    registers: int = 128  # a thread at most: 4 programs of 4 warps fit on a processor


class Many(NamedTuple):
    """A launch of `many_rows_kernel`, and of `sum_kernel` where `split` is more than 1."""

    block_n: int
    block_m: int
    block_k: int = 64
    split: int = 1
    scale_sums: bool = False
    warps: int = 4
    stages: int = 3


class Variant(NamedTuple):
    """What a compiled kernel depends on."""

    device_index: int
    dtype: torch.dtype
    columns: int  # K
    blocksize: int
    blocksize2: int  # 0: absmax is not quantised
    bias: bool
    rows: int  # of x at most: 4, 8 or 16, or a tile's; 0 for many rows
    overlap: bool
    shape: Few | Many | FewRows | Tiles

    @property
    def cuda(self) -> bool:
        """Is it a kernel in CUDA C++, not in Triton?"""
        return isinstance(self.shape, (FewRows, Tiles))


def _few(rows: int, n: int, k: int) -> Few:
    return Few(fetch=rows > 4 or k <= 2048)


def _many(rows: int, n: int, k: int, blocksize: int) -> Many | None:
    """None where dequantise + cuBLAS is faster."""
    if n * k <= 1 << 22 or (rows > 64 and n < 14336):
        return None
    if rows > 64:
        return Many(128, 128 if rows <= 128 else 256, warps=8)
    # Shared memory beside Triton's own is only granted where Triton itself asks for more than 48 KiB: so 5 stages.
    shape = Many(128, 32 if rows <= 32 else 64, stages=5) if n >= 2048 else Many(64, 64, stages=5)
    split = 1
    while split < 8 and -(-n // shape.block_n) * split * 2 <= 264 and k >= 512 * split:
        split *= 2
    return shape._replace(split=split, scale_sums=blocksize >= 64)


# Compute capability -> what was measured, by bench_nf4_matmul.py. Elsewhere `linear` dequantises.
CARDS = {(9, 0): "an H200"}
MOST_ROWS = 256  # of x that any variant takes


def _wanted() -> str:
    return said("UNSLOTH_EXT_NF4_MATMUL")


@functools.cache
def enabled(device_index: int) -> bool:
    """Are the kernels to be used on a card? On those of CARDS; UNSLOTH_EXT_NF4_MATMUL=all says everywhere from
    Ampere on, 0 (no, off, false) nowhere. Read once for each card."""
    wanted = _wanted()
    if torch.version.hip is not None or wanted in OFF or capability(device_index) < (8, 0):
        return False
    return wanted == "all" or capability(device_index) in CARDS


@functools.cache
def processors(device_index: int) -> int:
    """Of a card that the kernels in CUDA C++ run on, sm_90; 0 elsewhere, with UNSLOTH_EXT_NF4_MATMUL=triton, and, with one warning,
    where there is no compiler for them. Read once."""
    if capability(device_index) != (9, 0) or _wanted() == "triton":
        return 0
    try:
        matmul_nvrtc.library()
    except OSError as error:
        warnings.warn(
            f"unsloth_ext: NF4 weights are multiplied by Triton's kernels, which are slower than those in CUDA C++: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return 0
    return torch.cuda.get_device_properties(device_index).multi_processor_count


def may_take(x: torch.Tensor) -> bool:
    """Is it worth looking at the weight at all?"""
    return x.is_cuda and 0 < x.numel() <= MOST_ROWS * x.shape[-1] and enabled(x.get_device())


def variant_for(
    device_index: int, dtype: torch.dtype, rows: int, state, bias: bool, cuda: bool = True
) -> Variant | None:
    """The variant for a weight and so many rows of x; None where dequantise + matmul is to be taken. Without `cuda`: in Triton."""
    if dtype not in FACTORS or not 0 < rows <= MOST_ROWS or not enabled(device_index):
        return None
    n, k = state.shape
    if k % 64:
        return None
    blocksize2 = state.blocksize2 if state.code2 is not None else 0
    if cuda and (state.blocksize, blocksize2) == (64, 256) and (count := processors(device_index)):
        if (shape := matmul_hopper.shape_for(rows, n, k, count)) is not None:  # these take a bias or none
            return Variant(device_index, dtype, k, 64, 256, True, shape.rows, True, shape)
    hopper = capability(device_index) >= (9, 0)  # for programmatic dependent launch and bulk prefetches
    if rows <= ROWS and state.blocksize >= 64:
        shape, most = _few(rows, n, k), 4 if rows <= 4 else 8 if rows <= 8 else 16
        shape = shape if hopper else shape._replace(fetch=False)
    else:
        shape, most = _many(rows, n, k, state.blocksize), 0
        if shape is None:
            return None
    return Variant(device_index, dtype, k, state.blocksize, blocksize2, bias, most, hopper, shape)
