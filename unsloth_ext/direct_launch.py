"""Launches of Triton kernels that cost a few microseconds of the host's time instead of thirty.

Triton binds, hashes and looks up every argument of `kernel[grid](...)` on every call. `Quick` does so for the first call with these
numbers, dtypes and constants; afterwards the compiled kernel goes through Triton's own C launcher, with addresses read afresh. How
that launcher wants to be called is Triton's private matter and has changed, so only conventions that were read in Triton's source are
used (`direct`); with any other Triton, and while a profiler hooks launches, `kernel[grid]` does it.
"""

from __future__ import annotations

import functools

import torch
import triton

__all__ = ["Quick", "direct", "hooks"]

_CONVENTIONS = ("3.6", "3.9")
_MOST = 1024  # launchers that a kernel keeps: one for each set of numbers, and lengths may be new with each batch


@functools.cache
def hooks():
    """The two hook chains that profilers add themselves to, or None where this Triton keeps them elsewhere."""
    runtime = getattr(getattr(triton, "knobs", None), "runtime", None)
    chains = getattr(runtime, "launch_enter_hook", None), getattr(runtime, "launch_exit_hook", None)
    return chains if all(hasattr(chain, "calls") for chain in chains) else None


def direct(compiled, constants: int):
    """go((x, y, z), stream, *arguments) for a compiled kernel on its own device; None where this Triton's launcher is not one that we know.

    arguments: the kernel's without its `constants` constexprs, which come last; addresses as integers.
    """
    version = ".".join(triton.__version__.split(".")[:2])
    if version not in _CONVENTIONS or hooks() is None or torch.version.hip is not None:
        return None
    metadata = compiled.metadata
    if metadata.global_scratch_size or metadata.profile_scratch_size or getattr(compiled.run, "gsan_enabled", False):
        return None
    run, function, tail = compiled.run, compiled.function, (None,) * constants
    call, cooperative, pdl = run.launch, run.launch_cooperative_grid, run.launch_pdl
    packed_metadata = compiled.packed_metadata
    if version == "3.6":  # a C function for each signature; constexprs are passed along and ignored
        head = (function, cooperative, pdl, None, None, packed_metadata, None, None, None)

        def go(grid, stream, *arguments):
            call(*grid, stream, *head, *arguments, *tail)

    else:  # one C function, which is told the signature and takes the arguments as a tuple
        head = (function, cooperative, pdl, packed_metadata, None, None, None, None, None, run.arg_annotations)
        head = (*head, run.kernel_signature)

        def go(grid, stream, *arguments):
            call(*grid, stream, *head, (*arguments, *tail))

    go.compiled = compiled  # it unloads its function when it goes
    return go


class Quick:
    """`kernel[grid](*tensors, *numbers, **constants)` for a kernel whose parameters come in this order, with less of the host's time.

    constants: the kernel's constexprs and Triton's options (num_warps, ...). No autotuned kernel: the first configuration would stay.
    """

    def __init__(self, kernel):
        self.kernel = kernel
        self.known: dict = {}  # what a compiled kernel depends on -> its launcher

    def __call__(self, grid, tensors, numbers, **constants) -> None:
        """grid: (x, y, z). Of the tensors' device, on its current stream."""
        device = tensors[0].get_device()
        key = device, numbers, tuple(constants.values()), *[(one.dtype, one.get_device()) for one in tensors]
        go = self.known.get(key)
        if go is not None and torch._C._cuda_getDevice() == device and not _hooked():
            addresses = [tensor.data_ptr() for tensor in tensors]
            together = 0
            for address in addresses:
                together |= address
            if not together & 15:  # Triton compiles for pointers at 16 bytes, or for any
                go(grid, torch._C._cuda_getCurrentRawStream(device), *addresses, *numbers)
                return
        if device < 0:  # the interpreter
            self.kernel[grid](*tensors, *numbers, **constants)
            return
        with torch.cuda.device(device):
            compiled = self.kernel[grid](*tensors, *numbers, **constants)
        if go is None and all(tensor.data_ptr() % 16 == 0 for tensor in tensors) and hasattr(compiled, "metadata"):
            if len(self.known) >= _MOST:
                self.known.clear()
            constexprs = len(self.kernel.arg_names) - len(tensors) - len(numbers)
            if (go := direct(compiled, constexprs)) is not None:
                self.known[key] = go


def _hooked() -> bool:
    enter, leave = hooks()
    return bool(enter.calls or leave.calls)
