"""When `cuda/sum_of_products.cu` multiplies, and its launch: compute capability 9.0, 16 bits, results of some size.

A launch is one call of cuLaunchKernelEx with one argument, the tensor maps of all matrices (CUtensorMap, which the driver encodes and which
are remembered by address and shape) and the sizes.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import struct
import threading

import torch

from . import matmul_nvrtc
from .driver import CONFIG, INVALID_CONTEXT, MAX_DYNAMIC_SHARED_SIZE_BYTES, driver, must

_log = logging.getLogger(__name__)
SEGMENTS = 4  # products in one sum
_BM, _BN, _BK, _STAGES = 128, 256, 64, 4  # as in the kernel
_SHARED = 2048 + _STAGES * (_BM + _BN) * _BK * 2 + 2 * 2 * 64 * 64 * 2
_THREADS = 384
_NARROW = 128  # columns, of what LoRA adds: a copy of it is no cost
_BUSY = 0.8  # of what the programs multiply: where tiles leave more of it empty, cuBLAS has better ones
_DTYPES = {torch.float16: 6, torch.bfloat16: 9}  # CUtensorMapDataType
_MAP, _ZEROS = 128, bytes(128)  # bytes of a CUtensorMap
_PROBLEM = f"{_MAP}s" * (2 * SEGMENTS + 1) + f"{SEGMENTS}i3i36x"
_loading = threading.Lock()


def kernel_for(xs, weights, transposed: bool, columns: int, onto: torch.Tensor | None = None):
    """kernel(xs, weights, y, onto) that writes the sum into y, or None where the products are to be added one by one."""
    x, summands = xs[0], (*xs, *([] if onto is None else [onto]))
    if not 1 < len(summands) <= SEGMENTS or x.dtype not in _DTYPES or not _is_hopper(x.device.index):
        return None
    if not x.shape[0] or not columns or any(not one.shape[1] for one in xs):  # nothing has no map
        return None
    if not _fills(x.shape[0], columns, x.device.index) or columns % 8:
        return None
    if not all(t.shape[1] <= _NARROW or _has_map(t) for t in (*summands, *weights)):
        return None
    return _kernel(x.device.index, x.dtype, transposed)


@functools.cache
def _is_hopper(index: int) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(index) == (9, 0)


@functools.cache
def _clusters(index: int) -> int:
    """Pairs of programs that run at a time on a whole card. (A launch asks the driver, which knows of shared ones.)"""
    return torch.cuda.get_device_properties(index).multi_processor_count // 2


@functools.lru_cache(maxsize=4096)
def _fills(rows: int, columns: int, index: int) -> bool:
    tiles, at_once = -(-rows // (2 * _BM)) * -(-columns // _BN), _clusters(index)
    return rows * columns >= _BUSY * at_once * -(-tiles // at_once) * (2 * _BM * _BN)


def _has_map(t: torch.Tensor) -> bool:
    """Rows in one piece each, which begin at 16 bytes, as the copy engine wants them."""
    (rows, columns), (pitch, step) = t.shape, t.stride()
    return rows > 0 and columns > 0 and step == 1 and pitch % 8 == 0 and pitch >= columns and t.data_ptr() % 16 == 0


def _placed(t: torch.Tensor) -> torch.Tensor:
    """The matrix, or where it is narrow and has no map a copy that has one."""
    if _has_map(t):
        return t
    return t.new_empty(t.shape[0], -(-t.shape[1] // 8) * 8)[:, : t.shape[1]].copy_(t)


@functools.lru_cache(maxsize=16384)
def _map(address: int, rows: int, columns: int, pitch: int, box_rows: int, dtype: torch.dtype) -> bytes:
    """The CUtensorMap of a matrix whose rows are `pitch` elements apart, read in boxes of 64 columns, with zeros beyond its end."""
    raw = ctypes.create_string_buffer(_MAP + 63)
    at = -(-ctypes.addressof(raw) // 64) * 64
    u64, u32 = ctypes.c_uint64, ctypes.c_uint32
    swizzle_128, promote_256 = 3, 3
    must(
        driver().cuTensorMapEncodeTiled(
            ctypes.c_void_p(at), _DTYPES[dtype], 2, ctypes.c_void_p(address), (u64 * 2)(columns, rows), (u64 * 1)(2 * pitch),
            (u32 * 2)(64, box_rows), (u32 * 2)(1, 1), 0, swizzle_128, promote_256, 0,
        )
    )  # fmt: skip
    return ctypes.string_at(at, _MAP)


class _Kernel:
    """kernel(xs, weights, y, onto): y = the sum, on top of `onto`. To be made, and tried with `check`, with its device as the current one."""

    def __init__(self, index: int, dtype: torch.dtype, transposed: bool):
        macros = {"WT": int(transposed)} | ({"FP16": 1} if dtype == torch.float16 else {})
        image = matmul_nvrtc.cubin("sum_of_products", macros)
        torch.cuda.current_stream(index).synchronize()  # makes the device's context this thread's own
        self.module, self.function, self.context = (ctypes.c_void_p() for _ in range(3))
        must(driver().cuModuleLoadData(ctypes.byref(self.module), image))
        must(driver().cuModuleGetFunction(ctypes.byref(self.function), self.module, b"sum_of_products"))
        must(driver().cuFuncSetAttribute(self.function, MAX_DYNAMIC_SHARED_SIZE_BYTES, _SHARED))
        must(driver().cuCtxGetCurrent(ctypes.byref(self.context)))
        self.index, self.dtype, self.transposed, self.free = index, dtype, transposed, []
        config = struct.pack(CONFIG, 2 * _clusters(index), 1, 1, _THREADS, 1, 1, _SHARED, 0, 0, 0)
        found = ctypes.c_int()
        must(driver().cuOccupancyMaxActiveClusters(ctypes.byref(found), self.function, config))
        if not found.value:
            raise RuntimeError("no cluster of two programs fits on this card")
        self.programs = 2 * min(found.value, _clusters(index))
        # By the driver, for good: an allocation of torch's could be in the pool of a CUDA graph.
        ones, address = torch.eye(_BN, dtype=dtype).view(torch.int16).numpy().tobytes(), ctypes.c_uint64()
        must(driver().cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(len(ones))))
        must(driver().cuMemcpyHtoD_v2(address, ones, ctypes.c_size_t(len(ones))))
        self.identity = _map(address.value, _BN, _BN, _BN, _BN // 2 if transposed else 64, dtype)

    def _block(self):
        """(memory, address of the launch's configuration, of the pointer to the argument, where in the memory the argument is)"""
        first, size = struct.calcsize(CONFIG), struct.calcsize(_PROBLEM)
        block = ctypes.create_string_buffer(first + 8 + 64 + size)
        start = ctypes.addressof(block)
        at = -(-(start + first + 8) // 64) * 64 - start
        struct.pack_into("<Q", block, first, start + at)
        return block, start, start + first, at

    def __call__(self, xs, weights, y, onto=None, programs: int | None = None) -> None:
        """programs: an even number, or as many as the card runs at a time."""
        xs = xs if onto is None else [*xs, onto]
        (rows, columns), dtype, none = y.shape, self.dtype, SEGMENTS - len(xs)
        of_weight = _BN // 2 if self.transposed else 64
        xs, weights = list(map(_placed, xs)), list(map(_placed, weights))  # a copy lives until the launch is queued
        maps = [_map(x.data_ptr(), *x.shape, x.stride(0), _BM, dtype) for x in xs] + [_ZEROS] * none
        maps += [_map(w.data_ptr(), *w.shape, w.stride(0), of_weight, dtype) for w in weights]
        maps += ([] if onto is None else [self.identity]) + [_ZEROS] * none
        maps.append(_map(y.data_ptr(), rows, columns, y.stride(0), 64, dtype))
        widths, added = [w.shape[1 if self.transposed else 0] for w in weights], -1
        if onto is not None:
            widths, added = [*widths, _BN], len(weights)
        widths += [0] * none
        try:
            taken = self.free.pop()
        except IndexError:
            taken = self._block()
        block, config, pointers, at = taken
        struct.pack_into(_PROBLEM, block, at, *maps, *widths, rows, columns, added)
        numbers = programs or self.programs, 1, 1, _THREADS, 1, 1, _SHARED
        if torch.cuda.current_device() == self.index:
            code = self._launch(block, config, pointers, numbers)
        else:
            with torch.cuda.device(self.index):
                code = self._launch(block, config, pointers, numbers)
        self.free.append(taken)
        must(code)

    def _launch(self, block, config, pointers, numbers) -> int:
        stream, launch = torch._C._cuda_getCurrentRawStream(self.index), driver().cuLaunchKernelEx
        struct.pack_into(CONFIG, block, 0, *numbers, stream, 0, 0)
        code = launch(config, self.function, pointers, None)
        if code == INVALID_CONTEXT:  # a thread that has done nothing on the card yet
            must(driver().cuCtxSetCurrent(self.context))
            code = launch(config, self.function, pointers, None)
        return code

    def check(self) -> None:
        """Raises RuntimeError if it does not multiply as torch does. Two programs take all tiles, those at the edges among them, so
        that the ring of stages goes round and results are written while the next tile comes."""
        device, rows, columns = torch.device("cuda", self.index), 300, 520
        generator = torch.Generator(device).manual_seed(0)  # leaves the user's random state alone

        def random(*shape):
            return torch.randn(*shape, device=device, dtype=self.dtype, generator=generator)

        xs, weights = [random(rows, 592)[:, 8:], random(rows, 12)], [random(columns, 584), random(columns, 12)]
        if not self.transposed:
            weights = [weight.t().contiguous() for weight in weights]
        y, onto = torch.full((rows, columns), float("nan"), device=device, dtype=self.dtype), 32 * random(rows, columns)
        self(xs, weights, y, onto, programs=2)
        pairs = zip(xs, weights, strict=True)
        exact = onto.double() + sum(x.double() @ (w.double().t() if self.transposed else w.double()) for x, w in pairs)
        off = ((y.double() - exact).norm() / exact.norm()).item()
        if not off < 4e-3:
            raise RuntimeError(f"its first result was off by {off:.1e}")


_kernels: dict[tuple, _Kernel | None] = {}


def _kernel(index: int, dtype: torch.dtype, transposed: bool) -> _Kernel | None:
    """The kernel, compiled, loaded and tried once. None, with a warning, where that fails, and while a first use would be recorded: a
    graph that is recorded before anything ran has the products one by one."""
    key = index, dtype, transposed
    if key in _kernels:
        return _kernels[key]
    with torch.cuda.device(index):
        if torch.cuda.is_current_stream_capturing():
            return None
        with _loading, torch.inference_mode(False), torch.no_grad():
            if key in _kernels:  # another thread was quicker
                return _kernels[key]
            try:
                found = _Kernel(*key)
                found.check()
            except torch.OutOfMemoryError:  # says nothing about the kernel
                raise
            except Exception as why:  # whatever it is, there is another way to the same sum
                _log.warning("sums of products on cuda:%d are computed one product after the other: %s", index, why)
                found = None
            _kernels[key] = found
    return found
