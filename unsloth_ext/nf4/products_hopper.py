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
from .matmul_cuda import _CONFIG, _INVALID_CONTEXT, _driver, _must

_log = logging.getLogger(__name__)
SEGMENTS = 4  # products in one sum
_BM, _BN, _BK, _STAGES = 128, 256, 64, 4  # as in the kernel
_SHARED = 2048 + _STAGES * (_BM + _BN) * _BK * 2 + 2 * 2 * 64 * 64 * 2
_THREADS = 384
_NARROW = 128  # columns, of what LoRA adds: a copy of it is no cost
_BUSY = 0.8  # of what the programs multiply: where tiles leave more of it empty, cuBLAS has better ones
_DTYPES = {torch.float16: 6, torch.bfloat16: 9}  # CUtensorMapDataType
_MAP, _ZEROS = 128, bytes(128)  # bytes of a CUtensorMap
_PROBLEM = f"{_MAP}s" * (2 * SEGMENTS + 1) + f"{SEGMENTS}i2i40x"
_loading = threading.Lock()


def kernel_for(xs, weights, transposed: bool, columns: int):
    """kernel(xs, weights, y) that writes the sum into y, or None where the products are to be added one by one."""
    x = xs[0]
    if not 1 < len(xs) <= SEGMENTS or x.dtype not in _DTYPES or not _is_hopper(x.device.index):
        return None
    if not _fills(x.shape[0], columns, x.device.index) or columns % 8:
        return None
    if not all(t.shape[1] <= _NARROW or _has_map(t) for t in (*xs, *weights)):
        return None
    return _kernel(x.device.index, x.dtype, transposed)


@functools.cache
def _is_hopper(index: int) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(index) == (9, 0)


@functools.cache
def _clusters(index: int) -> int:
    """Pairs of programs that run at a time; a kernel, once loaded, asks the driver."""
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
    _must(
        _driver().cuTensorMapEncodeTiled(
            ctypes.c_void_p(at), _DTYPES[dtype], 2, ctypes.c_void_p(address), (u64 * 2)(columns, rows), (u64 * 1)(2 * pitch),
            (u32 * 2)(64, box_rows), (u32 * 2)(1, 1), 0, swizzle_128, promote_256, 0,
        )
    )  # fmt: skip
    return ctypes.string_at(at, _MAP)


class _Kernel:
    def __init__(self, index: int, dtype: torch.dtype, transposed: bool):
        macros = {"WT": int(transposed)} | ({"FP16": 1} if dtype == torch.float16 else {})
        image = matmul_nvrtc.cubin("sum_of_products", macros)
        torch.cuda.current_stream(index).synchronize()  # makes the device's context this thread's own
        driver, self.module, self.function, self.context = _driver(), *(ctypes.c_void_p() for _ in range(3))
        _must(driver.cuModuleLoadData(ctypes.byref(self.module), image))
        _must(driver.cuModuleGetFunction(ctypes.byref(self.function), self.module, b"sum_of_products"))
        _must(driver.cuFuncSetAttribute(self.function, 8, _SHARED))  # MAX_DYNAMIC_SHARED_SIZE_BYTES
        _must(driver.cuCtxGetCurrent(ctypes.byref(self.context)))
        self.index, self.dtype, self.transposed, self.free = index, dtype, transposed, []
        config = struct.pack(_CONFIG, 2 * _clusters(index), 1, 1, _THREADS, 1, 1, _SHARED, 0, 0, 0)
        found = ctypes.c_int()
        _must(driver.cuOccupancyMaxActiveClusters(ctypes.byref(found), self.function, config))
        if not found.value:
            raise RuntimeError("no cluster of two programs fits on this card")
        self.programs = 2 * min(found.value, _clusters(index))

    def _block(self):
        """(memory, addresses of the launch's configuration, of the pointer to the argument, where the argument is)"""
        first, size = struct.calcsize(_CONFIG), struct.calcsize(_PROBLEM)
        block = ctypes.create_string_buffer(first + 8 + 64 + size)
        start = ctypes.addressof(block)
        at = -(-(start + first + 8) // 64) * 64 - start
        struct.pack_into("<Q", block, first, start + at)
        return block, start, start + first, at

    def __call__(self, xs, weights, y) -> None:
        (rows, columns), dtype, none = y.shape, self.dtype, SEGMENTS - len(xs)
        of_weight = _BN // 2 if self.transposed else 64
        xs, weights = list(map(_placed, xs)), list(map(_placed, weights))  # a copy lives until the launch is queued
        maps = [_map(x.data_ptr(), *x.shape, x.stride(0), _BM, dtype) for x in xs] + [_ZEROS] * none
        maps += [_map(w.data_ptr(), *w.shape, w.stride(0), of_weight, dtype) for w in weights] + [_ZEROS] * none
        maps.append(_map(y.data_ptr(), rows, columns, y.stride(0), 64, dtype))
        widths = [x.shape[1] for x in xs] + [0] * none
        try:
            taken = self.free.pop()
        except IndexError:
            taken = self._block()
        block, config, pointers, at = taken
        if torch.cuda.current_device() == self.index:
            code = self._launch(block, config, pointers, at, maps, widths, rows, columns)
        else:
            with torch.cuda.device(self.index):
                code = self._launch(block, config, pointers, at, maps, widths, rows, columns)
        self.free.append(taken)
        _must(code)

    def _launch(self, block, config, pointers, at, maps, widths, rows, columns) -> int:
        stream, driver = torch._C._cuda_getCurrentRawStream(self.index), _driver()
        struct.pack_into(_CONFIG, block, 0, self.programs, 1, 1, _THREADS, 1, 1, _SHARED, stream, 0, 0)
        struct.pack_into(_PROBLEM, block, at, *maps, *widths, rows, columns)
        config, pointers = ctypes.c_void_p(config), ctypes.c_void_p(pointers)
        code = driver.cuLaunchKernelEx(config, self.function, pointers, None)
        if code == _INVALID_CONTEXT:  # a thread that has done nothing on the card yet
            _must(driver.cuCtxSetCurrent(self.context))
            code = driver.cuLaunchKernelEx(config, self.function, pointers, None)
        return code

    def check(self) -> None:
        """Raises RuntimeError if it does not multiply as torch does, tiles that are not full among them."""
        device, rows, columns = torch.device("cuda", self.index), 300, 520
        generator = torch.Generator(device).manual_seed(0)

        def random(*shape):
            return torch.randn(*shape, device=device, dtype=self.dtype, generator=generator)

        xs, weights = [random(rows, 200)[:, 8:], random(rows, 12)], [random(columns, 192), random(columns, 12)]
        if not self.transposed:
            weights = [weight.t().contiguous() for weight in weights]
        y = torch.full((rows, columns), float("nan"), device=device, dtype=self.dtype)
        self(xs, weights, y)
        pairs = zip(xs, weights, strict=True)
        exact = sum(x.double() @ (w.double().t() if self.transposed else w.double()) for x, w in pairs)
        off = ((y.double() - exact).norm() / exact.norm()).item()
        if not off < 4e-3:
            raise RuntimeError(f"its first result was off by {off:.1e}")


def _kernel(index: int, dtype: torch.dtype, transposed: bool):
    """The kernel, compiled, loaded and tried once; None, with a warning, where that fails, and while a first use would be recorded."""
    found = _kernels.get((index, dtype, transposed), _kernels)
    if found is not _kernels:
        return found
    if torch.cuda.is_current_stream_capturing():
        return None
    with _loading, torch.inference_mode(False), torch.no_grad():
        try:
            found = _Kernel(index, dtype, transposed)
            found.check()
        except (OSError, RuntimeError, AttributeError) as why:
            _log.warning("sums of products on cuda:%d are computed one product after the other: %s", index, why)
            found = None
        _kernels[index, dtype, transposed] = found
    return found


_kernels: dict = {}
