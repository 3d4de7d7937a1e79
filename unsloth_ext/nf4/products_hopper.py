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
_COUNTERS = 4 * 16384  # bytes
_SHARE = 0.35  # of a tile of y, the time of a tile of low
_LATE = 0.2  # of a tile of y, how much later a call may end for low: less than low alone takes
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
    """kernel(xs, downs, low, weights, up, y, onto) that writes low = the sum of x_i D_i too, and y on top of low U; None where that is not to be had.
    weights and up: None for kernel(xs, downs, low), which writes low alone, the same bits of it as beside `columns` columns of y."""
    x, rank = xs[0], downs[0].shape[0 if transposed else 1]
    if not 0 < len(xs) < SEGMENTS or x.dtype not in _DTYPES or not _is_hopper(x.device.index):
        return None
    if not x.shape[0] or not columns or any(not one.shape[1] for one in xs) or rank % 8 or not 0 < rank <= _RANKS:
        return None
    size = x.shape[0], columns, x.device.index
    if columns % 8 or not _fills(*size) or not _is_beside(*size):
        return None
    if not all(map(_has_map, (*xs, *(weights or ())))) or not (up is None or up.shape[1 if transposed else 0]):
        return None
    return _kernel(x.device.index, x.dtype, transposed, True)


def is_room_for(onto: torch.Tensor, xs) -> bool:
    """Whether the kernel of `kernel_with_low` takes that along too."""
    return len(xs) + 2 <= SEGMENTS and _has_map(onto)


@functools.lru_cache(maxsize=4096)
def _is_beside(rows: int, columns: int, index: int) -> bool:
    """Whether tiles of low fit beside those of y: in the time of the clusters that have a tile of y less (`clusters_for_low` in the kernel)."""
    pairs, every = -(-rows // (2 * _BM)), _clusters(index)
    tiles = pairs * -(-columns // _BN)
    idle = every - tiles % every if tiles % every else every
    takers = idle if 3 * idle >= pairs else every
    if 4 * _counters(rows) > _COUNTERS:
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
        block = ctypes.create_string_buffer(first + 8 + 64 + size)
        start = ctypes.addressof(block)
        at = -(-(start + first + 8) // 64) * 64 - start
        struct.pack_into("<Q", block, first, start + at)
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

    def _run(self, programs, *argument) -> None:
        try:
            taken = self.free.pop()
        except IndexError:
            taken = self._block()
        block, config, pointers, at = taken
        struct.pack_into(self.problem, block, at, *argument)
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
        random, weight = self._samples()
        xs, weights = [random(300, 592)[:, 8:], random(300, 12)], [weight(520, 584), weight(520, 12)]
        y, onto = torch.full_like(random(300, 520), float("nan")), 32 * random(300, 520)
        self(xs, weights, y, onto, programs=2)
        self._must_be_near(y, xs, weights, onto)

    def _samples(self):
        """(random(rows, columns), weight(N, K) as it is laid out), which leave the user's random state alone."""
        device = torch.device("cuda", self.index)
        generator = torch.Generator(device).manual_seed(0)

        def random(*shape):
            return torch.randn(*shape, device=device, dtype=self.dtype, generator=generator)

        return random, lambda n, k: random(n, k) if self.transposed else random(n, k).t().contiguous()

    def _must_be_near(self, found, xs, weights, onto=None) -> None:
        weights = [w.double().t() if self.transposed else w.double() for w in weights]
        exact = sum(x.double() @ w for x, w in zip(xs, weights, strict=True)) + (0 if onto is None else onto.double())
        off = ((found.double() - exact).norm() / exact.norm()).item()
        if not off < 4e-3:
            raise RuntimeError(f"its first result was off by {off:.1e}")


class _KernelWithLow(_Kernel):
    """kernel(xs, downs, low) and kernel(xs, downs, low, weights, up, y, onto): see `kernel_with_low`."""

    problem = _WITH_LOW

    def __init__(self, index: int, dtype: torch.dtype, transposed: bool):
        super().__init__(index, dtype, transposed, LOW=1)
        self.counters = _memory(bytes(_COUNTERS))

    def __call__(self, xs, downs, low, weights=(), up=None, y=None, onto=None, programs: int | None = None) -> None:
        xs, downs, weights = (list(map(_placed, some)) for some in (xs, downs, weights))
        of_xs, widths, of_y, columns, of_weights, added = self._of_xs(xs), self._widths(downs), _ZEROS, 0, [], -1
        if y is not None:
            up = _placed(up)
            weights, (rank,) = [*weights, up], self._widths([up])
            of_xs = [*of_xs, _map(low.data_ptr(), low.shape[0], rank, low.stride(0), _BM, self.dtype)]  # zeros beyond
            of_weights, widths, of_y, columns = self._of_weights(weights), [*widths, rank], self._of_y(y), y.shape[1]
        if onto is not None:
            onto, added = _placed(onto), len(widths)
            of_xs, of_weights, widths = [*of_xs, *self._of_xs([onto])], [*of_weights, self.identity], [*widths, _BN]
        counters, kept = self._counters(low.shape[0])
        of_downs = [_map(d.data_ptr(), *d.shape, d.stride(0), 64, self.dtype) for d in downs]
        maps = *_filled(of_xs, _ZEROS), *_filled(of_weights, _ZEROS), of_y, *_filled(of_downs, _ZEROS)
        sizes = low.shape[0], columns, added, len(xs), low.stride(0), low.shape[1]
        self._run(programs, *maps, *_filled(widths, 0), *sizes, low.data_ptr(), counters)
        del kept

    def _counters(self, rows: int):
        """(the address of zeros, what must live until the launch is queued): the default stream has them for good, its calls come one after
        the other. Another one gets new ones, and so does a graph, which may run beside the stream that it was recorded on."""
        if not torch._C._cuda_getCurrentRawStream(self.index):
            return self.counters, None
        own = torch.zeros(_counters(rows), dtype=torch.int32, device=torch.device("cuda", self.index))
        return own.data_ptr(), own

    def check(self) -> None:
        """As the other kernel's, and twice with all programs, which wait for each other, on counters that have been used."""
        random, weight = self._samples()
        xs, sizes, up, onto = (
            [random(1300, 592)[:, 8:], random(1300, 72)],
            (584, 72),
            weight(520, 16),
            random(1300, 520),
        )
        weights, downs = [weight(520, n) for n in sizes], [weight(24, n) / 8 for n in sizes]
        for programs in (2, None, None):
            y, low = (torch.full_like(random(1300, n), float("nan")) for n in (520, 24))
            alone = torch.full_like(low, float("nan"))
            self(xs, downs, low, weights, up, y, onto, programs)
            self(xs, downs, alone, programs=programs)
            if not torch.equal(alone, low):
                raise RuntimeError("what it computes beside the rest differs from what it computes alone")
            self._must_be_near(low, xs, downs)
            self._must_be_near(y, [*xs, low[:, :16]], [*weights, up], onto)


def _counters(rows: int) -> int:
    """How many the kernel counts with: 4, and 4 for each cluster's rows."""
    return 4 + 4 * -(-rows // (2 * _BM))


def _filled(some: list, nothing) -> list:
    return [*some, *[nothing] * (SEGMENTS - len(some))]


def _memory(content: bytes) -> int:
    """Its address on the current device. By the driver, for good: an allocation of torch's could be in the pool of a CUDA graph."""
    address = ctypes.c_uint64()
    must(driver().cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(len(content))))
    must(driver().cuMemcpyHtoD_v2(address, content, ctypes.c_size_t(len(content))))
    # The copy may return before it is there, and is on a stream that others do not wait for.
    must(driver().cuStreamSynchronize(None))
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
