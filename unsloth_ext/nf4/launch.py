"""Launching the kernel (cut up by `table.py`): a launch that costs a microsecond or two instead of ten.

Triton binds, hashes and looks up every argument of `kernel[grid](...)` on every call. Here that happens once for each `Variant`;
afterwards the compiled kernel goes through Triton's own C launcher, with addresses read afresh by the caller. How that launcher
wants to be called is Triton's private matter and has changed, so only conventions that were read in Triton's source are used
(`_CONVENTIONS`); with any other Triton, and while a profiler hooks launches, `kernel[grid]` does it.
"""

from __future__ import annotations

import functools

import torch
import triton

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


def _convention_3_6(run, function, metadata, constants):
    # CudaLauncher of Triton 3.6: a C function for each signature; constexpr arguments are passed along and ignored.
    call, cooperative, pdl = run.launch, run.launch_cooperative_grid, run.launch_pdl
    tail = (None,) * constants

    def go(grid, stream, packed, absmax, code2, absmax2, offset, code, out, n):
        call(
            grid, 1, 1, stream, function, cooperative, pdl, None, None, metadata, None, None, None,
            packed, absmax, code2, absmax2, offset, code, out, n, *tail,
        )  # fmt: skip

    return go


def _convention_3_9(run, function, metadata, constants):
    # CudaLauncher of Triton 3.9: one C function, which is told the signature and takes the arguments as a tuple.
    call, cooperative, pdl = run.launch, run.launch_cooperative_grid, run.launch_pdl
    head = (cooperative, pdl, metadata, None, None, None, None, None, run.arg_annotations, run.kernel_signature)
    tail = (None,) * constants

    def go(grid, stream, *arguments):
        call(grid, 1, 1, stream, function, *head, (*arguments, *tail))

    return go


_CONVENTIONS = {"3.6": _convention_3_6, "3.9": _convention_3_9}
_RUNTIME_ARGUMENTS = 8


@functools.cache
def hooks():
    """The two hook chains that profilers add themselves to, or None where this Triton keeps them elsewhere."""
    runtime = getattr(getattr(triton, "knobs", None), "runtime", None)
    chains = getattr(runtime, "launch_enter_hook", None), getattr(runtime, "launch_exit_hook", None)
    return chains if all(hasattr(chain, "calls") for chain in chains) else None


def direct(compiled, constants=None):
    """go(grid, stream, packed, absmax, code2, absmax2, offset, code, out, n) with addresses as integers, for a compiled kernel
    on its own device; None where this Triton's launcher is not one that we know. constants: how many constexprs the kernel has."""
    convention = _CONVENTIONS.get(".".join(triton.__version__.split(".")[:2]))
    if convention is None or hooks() is None:
        return None
    metadata = compiled.metadata
    if metadata.global_scratch_size or metadata.profile_scratch_size or getattr(compiled.run, "gsan_enabled", False):
        return None
    if constants is None:
        constants = len(dequantize_kernel.arg_names) - _RUNTIME_ARGUMENTS
    return convention(compiled.run, compiled.function, compiled.packed_metadata, constants)
