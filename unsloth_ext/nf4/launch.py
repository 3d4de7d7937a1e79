"""Launching the kernel (cut up by `table.py`): a launch that costs a microsecond or two instead of ten (direct_launch.py), once a
`Variant` has been compiled, with addresses read afresh by the caller.
"""

from __future__ import annotations

import functools

import torch

from .. import direct_launch
from ..direct_launch import hooks
from .kernel import dequantize_kernel
from .reference import CODE
from .table import TABLES, Shape, Table, Variant, capability, constexprs, options, shape_for, supported, variant_for

__all__ = [
    "TABLES",
    "Shape",
    "Table",
    "Variant",
    "capability",
    "codes",
    "constexprs",
    "direct",
    "hooks",
    "launch",
    "options",
    "shape_for",
    "supported",
    "variant_for",
]


@functools.cache
def codes(device_index: int) -> torch.Tensor:
    """The 16 codes on a device. Made once, complete when returned (the copy from the host waits), never moved."""
    with torch.inference_mode(False):
        return torch.tensor(CODE, dtype=torch.float32, device=torch.device("cuda", device_index))


def launch(variant: Variant, packed, absmax, code2, absmax2, offset, out, n: int):
    """Run the kernel through Triton, compiling it if need be, on the current stream. Returns Triton's compiled kernel."""
    with torch.cuda.device(variant.device_index):
        grid = (-(-n // variant.tile),)
        # Fields that the variant does not read get an address that is one.
        arguments = (absmax, *(absmax if field is None else field for field in (code2, absmax2, offset)))
        packed = packed.view(torch.uint8) if packed.dtype != torch.uint8 else packed
        return dequantize_kernel[grid](
            packed, *arguments, codes(variant.device_index), out, n, **constexprs(variant), **options(variant)
        )


_RUNTIME_ARGUMENTS = 8


def direct(compiled, constants=None):
    """go(grid, stream, packed, absmax, code2, absmax2, offset, code, out, n) with addresses as integers, for a compiled kernel
    on its own device; None where this Triton's launcher is not one that we know. constants: how many constexprs the kernel has."""
    if constants is None:
        constants = len(dequantize_kernel.arg_names) - _RUNTIME_ARGUMENTS
    go = direct_launch.direct(compiled, constants)
    return None if go is None else lambda programs, *arguments: go((programs, 1, 1), *arguments)
