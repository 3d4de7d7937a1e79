"""Launching the matmul kernels: through Triton the first time, then through its C launcher, as in `launch.py`."""

from __future__ import annotations

import functools

import torch

from ..direct_launch import direct as _direct
from .launch import codes
from .matmul_kernel import few_rows_kernel, many_rows_kernel, sum_kernel
from .matmul_table import FACTORS, Few, Variant
from .reference import CODE


@functools.cache
def pairs(device_index: int, dtype: torch.dtype) -> torch.Tensor:
    """int32 [256]: the two codes of each byte, times FACTORS[dtype] and rounded to `dtype`, the first in the low half."""
    code = torch.tensor(CODE, dtype=torch.float64) * FACTORS[dtype]
    code = code.to(torch.float32).to(dtype).view(torch.int16).to(torch.int32) & 0xFFFF
    byte = torch.arange(256)
    both = (code[byte >> 4].to(torch.int64) | (code[byte & 15].to(torch.int64) << 16)).to(torch.int32)
    with torch.inference_mode(False):
        return both.to(torch.device("cuda", device_index))


def _shared(variant: Variant) -> dict:
    return {
        "K": variant.columns,
        "BLOCK_SHIFT": variant.blocksize.bit_length() - 1,
        "BLOCK2_SHIFT": max(0, variant.blocksize2.bit_length() - 1),
        "NESTED": variant.blocksize2 > 0,
        "INVERSE": 1.0 / FACTORS[variant.dtype],
        "OVERLAP": variant.overlap,
    }


def constexprs(variant: Variant) -> dict:
    shape = variant.shape
    if isinstance(shape, Few):
        return _shared(variant) | {
            "BIAS": variant.bias,
            "GROUPS": 2 if variant.rows > 8 else 1,
            "WIDE": variant.rows <= 4,
            "WARPS": shape.warps,
            "FETCH": shape.fetch,
        }
    return _shared(variant) | {
        "BIAS": variant.bias and shape.split == 1,
        "BLOCK_N": shape.block_n,
        "BLOCK_M": shape.block_m,
        "BLOCK_K": shape.block_k,
        "SPLIT": shape.split,
        "SCALE_SUMS": shape.scale_sums,
        "THREADS": 32 * shape.warps,
        "STAGES": shape.stages,
        "PTX": True,
    }


def _sum_constexprs(variant: Variant) -> dict:
    return {"SPLIT": variant.shape.split, "BIAS": variant.bias, "BLOCK": 1024, "OVERLAP": variant.overlap}


def _options(variant: Variant, warps: int) -> dict:
    found = {"num_warps": warps} | ({"launch_pdl": True} if variant.overlap else {})
    if registers := getattr(variant.shape, "registers", 0):
        found["maxnreg"] = registers
    return found


def grid(variant: Variant, m: int, n: int) -> tuple[int, int, int]:
    shape = variant.shape
    if isinstance(shape, Few):
        return -(-n // 16), 1, 1
    return -(-m // shape.block_m), -(-n // shape.block_n), shape.split


def launch(variant: Variant, x, packed, absmax, code2, absmax2, offset, bias, out):
    """Run the kernels, compiling them if need be, on the current stream: through Triton, or of a variant in CUDA C++ its check.
    Returns the compiled kernels."""
    index, (m, n) = variant.device_index, out.shape
    if variant.cuda:
        from . import matmul_cuda

        compiled = matmul_cuda.kernel(variant)
        compiled.check(x, packed, absmax, code2, absmax2, offset, bias, out)
        return compiled
    with torch.cuda.device(index):
        # Fields that the variant does not read get an address that is one.
        fields = (absmax, *(absmax if field is None else field for field in (code2, absmax2, offset)))
        packed = packed.reshape(-1).view(torch.uint8)
        if isinstance(variant.shape, Few):
            arguments = (x, packed, *fields, pairs(index, x.dtype), x if bias is None else bias, out, m, n)
            kernel = few_rows_kernel[grid(variant, m, n)]
            return (kernel(*arguments, **constexprs(variant), **_options(variant, variant.shape.warps)),)
        split = variant.shape.split
        target = out if split == 1 else torch.empty(split, m, n, dtype=torch.float32, device=out.device)
        tables = (pairs(index, x.dtype), codes(index))
        arguments = (x, packed.view(torch.int32), *fields, *tables, x if bias is None else bias, target, m, n)
        kernel = many_rows_kernel[grid(variant, m, n)]
        compiled = kernel(*arguments, **constexprs(variant), **_options(variant, variant.shape.warps))
        if split == 1:
            return (compiled,)
        kernel = sum_kernel[(-(-m * n // 1024),)]
        arguments = (target, out if bias is None else bias, out, m * n, n)
        return compiled, kernel(*arguments, **_sum_constexprs(variant), **_options(variant, 4))


def direct(variant: Variant, compiled):
    """go(stream, x, packed, absmax, code2, absmax2, offset, bias, out, m, n) with addresses as integers (bias 0 for none), on
    the kernels' own device; None where this Triton must launch."""
    if variant.cuda:
        return compiled.go
    index = variant.device_index
    first = _direct(compiled[0], len(constexprs(variant)))
    if first is None:
        return None
    pairs_at = pairs(index, variant.dtype).data_ptr()
    if isinstance(variant.shape, Few):

        def go(stream, x, packed, absmax, code2, absmax2, offset, bias, out, m, n):
            at = ((n + 15) >> 4, 1, 1)
            first(at, stream, x, packed, absmax, code2, absmax2, offset, pairs_at, bias or x, out, m, n)

        return go
    shape, codes_at = variant.shape, codes(index).data_ptr()
    second = _direct(compiled[1], len(_sum_constexprs(variant))) if shape.split > 1 else None
    if shape.split > 1 and second is None:
        return None

    def go(stream, x, packed, absmax, code2, absmax2, offset, bias, out, m, n):
        target, parts = out, None
        if second is not None:
            parts = torch.empty(shape.split * m * n, dtype=torch.float32, device=torch.device("cuda", index))
            target = parts.data_ptr()
        at = grid(variant, m, n)
        first(at, stream, x, packed, absmax, code2, absmax2, offset, pairs_at, codes_at, bias or x, target, m, n)
        if second is not None:
            second((-(-m * n // 1024), 1, 1), stream, target, bias or out, out, m * n, n)

    return go
