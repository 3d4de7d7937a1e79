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
_WITH_LOW = f"{_MAP}s" * (3 * SEGMENTS + 1) + f"{SEGMENTS}i3i3iQQ8x"
_RANKS = 64  # columns of low
_COUNTERS = 16 * 4096  # bytes of a stream: 4 numbers for each 256 rows
_STREAMS = 32  # that have counters of their own; later ones get new ones for each call
_SHARE = 0.35  # of a tile of y, the time of a tile of low
_LATE = 0.2  # of a tile of y, how much later a call may end for low: less than low alone takes
_ATTRIBUTE = "<I4xI60x"  # CUlaunchAttribute: which, a value of 64 bytes
_COOPERATIVE = 2  # all programs run at the same time, or none
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


def kernel_with_low(xs, downs, weights, up, transposed: bool, columns: int):
    """kernel(xs, downs, low, weights, up, y) that writes low = the sum of x_i D_i too, and y on top of low U; None where that is not to be had.
    weights and up: None for kernel(xs, downs, low), which writes low alone, the same bits of it as beside `columns` columns of y."""
    x, rank = xs[0], downs[0].shape[0 if transposed else 1]
    if not 0 < len(xs) < SEGMENTS or x.dtype not in _DTYPES or not _is_hopper(x.device.index):
        return None
    if not x.shape[0] or not columns or any(not one.shape[1] for one in xs) or rank % 8 or not 0 < rank <= _RANKS:
        return None
    if (
        not _fills(x.shape[0], columns, x.device.index)
        or columns % 8
        or not _is_beside(x.shape[0], columns, x.device.index)
    ):
        return None
    if not all(map(_has_map, (*xs, *(weights or ())))) or not (up is None or up.shape[1 if transposed else 0]):
        return None
    return _kernel(x.device.index, x.dtype, transposed, True)


@functools.lru_cache(maxsize=4096)
def _is_beside(rows: int, columns: int, index: int) -> bool:
    """Whether tiles of low fit beside those of y: in the time of the pairs of programs that have a tile of y less (`programs_for_low` in the
    kernel)."""
    pairs, every = -(-rows // (2 * _BM)), _clusters(index)
    tiles = pairs * -(-columns // _BN)
    idle = every - tiles % every if tiles % every else every
    takers = idle if 3 * idle >= pairs else every
    if 16 * pairs > _COUNTERS:
        return False
    loads = (tiles // every + (c >= idle) + _SHARE * -(-(pairs - c) // takers) for c in range(min(takers, pairs)))
    return max(loads) <= -(-tiles // every) + _LATE


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

    problem = _PROBLEM

    def __init__(self, index: int, dtype: torch.dtype, transposed: bool, **macros: int):
        macros |= {"WT": int(transposed)} | ({"FP16": 1} if dtype == torch.float16 else {})
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
        ones = _memory(torch.eye(_BN, dtype=dtype).view(torch.int16).numpy().tobytes())
        self.identity = _map(ones, _BN, _BN, _BN, _BN // 2 if transposed else 64, dtype)

    def _block(self):
        """(memory, address of the launch's configuration, of the pointer to the argument, where in the memory the argument is)"""
        first, size = struct.calcsize(CONFIG), struct.calcsize(self.problem)
        block = ctypes.create_string_buffer(first + 8 + struct.calcsize(_ATTRIBUTE) + 64 + size)
        start = ctypes.addressof(block)
        at = -(-(start + first + 8 + struct.calcsize(_ATTRIBUTE)) // 64) * 64 - start
        struct.pack_into("<Q", block, first, start + at)
        struct.pack_into(_ATTRIBUTE, block, first + 8, _COOPERATIVE, 1)
        return block, start, start + first, at

    def __call__(self, xs, weights, y, onto=None, programs: int | None = None) -> None:
        """programs: an even number, or as many as the card runs at a time."""
        xs = list(map(_placed, xs if onto is None else [*xs, onto]))  # a copy lives until the launch is queued
        weights = list(map(_placed, weights))
        of_weights, widths, added = self._of_weights(weights), self._widths(weights), -1
        if onto is not None:
            of_weights, widths, added = [*of_weights, self.identity], [*widths, _BN], len(weights)
        maps = *_filled(self._of_xs(xs), _ZEROS), *_filled(of_weights, _ZEROS), self._of_y(y)
        self._run(programs, *maps, *_filled(widths, 0), *y.shape, added)

    def _of_xs(self, xs):
        return [_map(x.data_ptr(), *x.shape, x.stride(0), _BM, self.dtype) for x in xs]

    def _of_weights(self, weights):
        rows = _BN // 2 if self.transposed else 64
        return [_map(w.data_ptr(), *w.shape, w.stride(0), rows, self.dtype) for w in weights]

    def _of_y(self, y):
        return _map(y.data_ptr(), *y.shape, y.stride(0), 64, self.dtype)

    def _widths(self, weights):
        return [w.shape[1 if self.transposed else 0] for w in weights]

    def _run(self, programs, *argument, attributes: int = 0) -> None:
        try:
            taken = self.free.pop()
        except IndexError:
            taken = self._block()
        block, config, pointers, at = taken
        struct.pack_into(self.problem, block, at, *argument)
        numbers = programs or self.programs, 1, 1, _THREADS, 1, 1, _SHARED
        if torch.cuda.current_device() == self.index:
            code = self._launch(block, config, pointers, numbers, attributes)
        else:
            with torch.cuda.device(self.index):
                code = self._launch(block, config, pointers, numbers, attributes)
        self.free.append(taken)
        must(code)

    def _launch(self, block, config, pointers, numbers, attributes) -> int:
        stream, launch = torch._C._cuda_getCurrentRawStream(self.index), driver().cuLaunchKernelEx
        struct.pack_into(CONFIG, block, 0, *numbers, stream, pointers + 8 if attributes else 0, attributes)
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


class _KernelWithLow(_Kernel):
    """kernel(xs, downs, low) and kernel(xs, downs, low, weights, up, y): see `kernel_with_low`."""

    problem = _WITH_LOW

    def __init__(self, index: int, dtype: torch.dtype, transposed: bool):
        super().__init__(index, dtype, transposed, LOW=1)
        first = _memory(bytes(_STREAMS * _COUNTERS))
        self.unused = [first + i * _COUNTERS for i in range(_STREAMS)]
        self.counters: dict[int, int] = {}  # of each stream, whose calls come one after the other

    def __call__(self, xs, downs, low, weights=(), up=None, y=None, programs: int | None = None) -> None:
        xs, downs, weights = (list(map(_placed, some)) for some in (xs, downs, weights))
        of_xs, widths, of_y, columns = self._of_xs(xs), self._widths(downs), _ZEROS, 0
        counters, kept = 0, None
        if y is not None:
            up = _placed(up)
            weights, (rank,) = [*weights, up], self._widths([up])
            of_xs = [*of_xs, _map(low.data_ptr(), low.shape[0], rank, low.stride(0), _BM, self.dtype)]  # zeros beyond
            widths, of_y, columns = [*widths, rank], self._of_y(y), y.shape[1]
            counters, kept = self._counters(low.shape[0])
        of_downs = [_map(d.data_ptr(), *d.shape, d.stride(0), 64, self.dtype) for d in downs]
        maps = (some for part in (of_xs, self._of_weights(weights)) for some in _filled(part, _ZEROS))
        numbers = low.shape[0], columns, -1, len(xs), low.stride(0), low.shape[1], low.data_ptr(), counters
        argument = *maps, of_y, *_filled(of_downs, _ZEROS), *_filled(widths, 0), *numbers
        self._run(programs, *argument, attributes=0 if y is None else 1)
        del kept

    def _counters(self, rows: int):
        """(their address, what must live until the launch is queued): a stream's own, or a graph's, which may run beside the stream."""
        with torch.cuda.device(self.index):
            capturing, stream = torch.cuda.is_current_stream_capturing(), torch._C._cuda_getCurrentRawStream(self.index)
        if not capturing:
            if stream not in self.counters and self.unused:
                self.counters.setdefault(stream, self.unused.pop())
            if stream in self.counters:
                return self.counters[stream], None
        own = torch.zeros(4 * -(-rows // (2 * _BM)), dtype=torch.int32, device=torch.device("cuda", self.index))
        return own.data_ptr(), own

    def check(self) -> None:
        """As the other kernel's, and a second time with all programs, which wait for each other, on counters that have been used."""
        device, rows, columns, rank = torch.device("cuda", self.index), 1300, 520, 24
        generator = torch.Generator(device).manual_seed(0)

        def random(*shape):
            return torch.randn(*shape, device=device, dtype=self.dtype, generator=generator)

        xs, sizes = [random(rows, 592)[:, 8:], random(rows, 72)], (584, 72)
        weights, downs, up = (
            [random(columns, n) for n in sizes],
            [random(rank, n) / 8 for n in sizes],
            random(columns, 16),
        )
        if not self.transposed:
            weights, downs, up = (
                [w.t().contiguous() for w in weights],
                [d.t().contiguous() for d in downs],
                up.t().contiguous(),
            )
        for programs in (2, None, None):
            y, low = (torch.full((rows, n), float("nan"), device=device, dtype=self.dtype) for n in (columns, rank))
            alone = torch.full_like(low, float("nan"))
            self(xs, downs, low, weights, up, y, programs)
            self(xs, downs, alone, programs=programs)
            if not torch.equal(alone, low):
                raise RuntimeError("what it computes beside the rest differs from what it computes alone")
            for found, pairs in (
                (low, zip(xs, downs, strict=True)),
                (y, zip([*xs, low[:, :16]], [*weights, up], strict=True)),
            ):
                exact = sum(x.double() @ (w.double().t() if self.transposed else w.double()) for x, w in pairs)
                off = ((found.double() - exact).norm() / exact.norm()).item()
                if not off < 4e-3:
                    raise RuntimeError(f"its first result was off by {off:.1e}")


def _filled(some: list, nothing) -> list:
    return [*some, *[nothing] * (SEGMENTS - len(some))]


def _memory(content: bytes) -> int:
    """Its address on the current device. By the driver, for good: an allocation of torch's could be in the pool of a CUDA graph."""
    address = ctypes.c_uint64()
    must(driver().cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(len(content))))
    must(driver().cuMemcpyHtoD_v2(address, content, ctypes.c_size_t(len(content))))
    must(
        driver().cuStreamSynchronize(None)
    )  # the copy may return before it is there, and is on a stream that others do not wait for
    return address.value


_kernels: dict[tuple, _Kernel | None] = {}


def _kernel(index: int, dtype: torch.dtype, transposed: bool, low: bool = False) -> _Kernel | None:
    """The kernel, compiled, loaded and tried once. None, with a warning, where that fails, and while a first use would be recorded: a
    graph that is recorded before anything ran has the products one by one."""
    key = index, dtype, transposed, low
    if key in _kernels:
        return _kernels[key]
    with torch.cuda.device(index):
        if torch.cuda.is_current_stream_capturing():
            return None
        with _loading, torch.inference_mode(False), torch.no_grad():
            if key in _kernels:  # another thread was quicker
                return _kernels[key]
            try:
                found = (_KernelWithLow if low else _Kernel)(index, dtype, transposed)
                found.check()
            except torch.OutOfMemoryError:  # says nothing about the kernel
                raise
            except Exception as why:  # whatever it is, there is another way to the same sum
                _log.warning("sums of products on cuda:%d are computed one product after the other: %s", index, why)
                found = None
            _kernels[key] = found
    return found
