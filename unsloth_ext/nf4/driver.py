"""What launches of our own machine code have in common: the CUDA driver by ctypes, and the layout of a launch's configuration."""

from __future__ import annotations

import ctypes
import functools

CONFIG = "<7I4xQQI4x"  # CUlaunchConfig: grid, block, shared memory, stream, attributes, their number
INVALID_CONTEXT = 201
MAX_DYNAMIC_SHARED_SIZE_BYTES = 8  # CUfunction_attribute


@functools.cache
def driver():
    """libcuda. Raises OSError where there is none."""
    library = ctypes.CDLL("libcuda.so.1")
    library.cuLaunchKernelEx.argtypes = [ctypes.c_void_p] * 4
    return library


def must(code: int) -> None:
    """Raises RuntimeError for a CUresult that is not success."""
    if code:
        text = ctypes.c_char_p()
        driver().cuGetErrorName(code, ctypes.byref(text))
        raise RuntimeError(f"CUDA driver: {(text.value or b'').decode()} ({code})")
