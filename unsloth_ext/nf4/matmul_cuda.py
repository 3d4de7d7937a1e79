"""Loading and launching the CUDA C++ kernels that `matmul_hopper.py` chooses, through the driver.

A launch is one call of cuLaunchKernelEx, with programmatic dependent launch: the arguments are packed into a block of memory
whose addresses were worked out once. Blocks are taken from a list and put back, so threads never share one.

What programs of a call share (partial sums, x in the order of the tensor cores) is allocated for each call, from torch's
allocator, which knows streams and graphs. The counters by which they find the last of them must be zero before and are zero
after: there are some for each stream, and for each capture, where a graph zeroes its own.
"""

from __future__ import annotations

import collections
import ctypes
import functools
import struct
import threading

import torch

from . import dequantization, matmul_nvrtc, matmul_table
from .driver import CONFIG, INVALID_CONTEXT, MAX_DYNAMIC_SHARED_SIZE_BYTES, driver, must
from .matmul_hopper import COUNTERS, FewRows
from .matmul_launch import pairs
from .matmul_table import FACTORS

_OVERLAP = struct.pack("<I4xI60x", 6, 1)  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION: allowed


class _Function:
    """A kernel of a loaded module: call(grid, stream, *arguments), of the struct format given."""

    def __init__(self, module, name: str, threads: int, shared: int, arguments: str):
        self.function, self.context = ctypes.c_void_p(), ctypes.c_void_p()
        must(driver().cuModuleGetFunction(ctypes.byref(self.function), module, name.encode()))
        if shared:
            must(driver().cuFuncSetAttribute(self.function, MAX_DYNAMIC_SHARED_SIZE_BYTES, shared))
        must(driver().cuCtxGetCurrent(ctypes.byref(self.context)))
        self.module, self.threads, self.shared = module, threads, shared
        slots = "".join(letter if letter == "Q" else letter + "4x" for letter in arguments)
        self.pack_into, self.count = struct.Struct(CONFIG + slots).pack_into, len(arguments)
        self.at = len(_OVERLAP)
        self.launch, self.free = driver().cuLaunchKernelEx, []

    def _block(self):
        first = self.at + struct.calcsize(CONFIG)
        block = ctypes.create_string_buffer(first + 16 * self.count)
        start = ctypes.addressof(block)
        block[: self.at] = _OVERLAP
        pointers = struct.pack(f"<{self.count}Q", *(start + first + 8 * i for i in range(self.count)))
        block[first + 8 * self.count :] = pointers
        return block, start, start + self.at, start + first + 8 * self.count

    def __call__(self, x, y, z, stream, *arguments):
        free = self.free
        try:
            taken = free.pop()
        except IndexError:
            taken = self._block()
        block, attributes, config, pointers = taken
        self.pack_into(block, self.at, x, y, z, self.threads, 1, 1, self.shared, stream, attributes, 1, *arguments)
        code = self.launch(config, self.function, pointers, None)
        if code == INVALID_CONTEXT:  # a thread that has done nothing on the card yet
            must(driver().cuCtxSetCurrent(self.context))
            code = self.launch(config, self.function, pointers, None)
        free.append(taken)
        if code:
            must(code)


class Counters:
    """The zeros of one device."""

    def __init__(self, index: int):
        self.device, self.lock = torch.device("cuda", index), threading.Lock()
        self.streams: dict[int, torch.Tensor] = {}
        self.captures: collections.OrderedDict = collections.OrderedDict()

    def _zeros(self):
        with torch.inference_mode(False):
            return torch.zeros(COUNTERS, dtype=torch.int32, device=self.device)

    def __call__(self, stream: int) -> torch.Tensor:
        """Those of a stream. On the device itself; the caller keeps what is returned until it has launched."""
        if torch.cuda.is_current_stream_capturing():
            return self._captured(stream)
        if (found := self.streams.get(stream)) is None:
            found = self.streams[stream] = self._zeros()  # zeroed on this very stream
        return found

    def _captured(self, stream: int) -> torch.Tensor:
        # Zeroed in the graph, once, where it is first needed on this stream of it; later nodes leave zeros. Graphs may run at
        # the same time and so share nothing.
        status, number = ctypes.c_int(), ctypes.c_ulonglong()
        try:
            code = driver().cuStreamGetCaptureInfo_v2(
                ctypes.c_void_p(stream), ctypes.byref(status), ctypes.byref(number), None, None, None
            )
        except AttributeError:
            code = 1
        if code:
            return self._zeros()
        key = stream, number.value
        with self.lock:
            found = self.captures.get(key)
            if found is None:
                found = self.captures[key] = self._zeros()
                while len(self.captures) > 8:  # of captures that are long over, most likely; else it is zeroed again
                    self.captures.popitem(last=False)
            return found


@functools.cache
def counters(index: int) -> Counters:
    return Counters(index)


class Kernel:
    """A compiled variant on its device: go(stream, x, packed, absmax, code2, absmax2, offset, bias, out, m, n), addresses as integers."""

    def __init__(self, variant):
        self.variant, self.shape, index = variant, variant.shape, variant.device_index
        shape, macros = variant.shape, variant.shape.macros(variant.columns)
        if variant.dtype == torch.float16:
            macros["FP16"] = 1
        image = matmul_nvrtc.cubin(shape.kernel, macros)
        torch.cuda.current_stream(index).synchronize()  # makes the device's context this thread's own
        module = ctypes.c_void_p()
        must(driver().cuModuleLoadData(ctypes.byref(module), image))
        few = isinstance(shape, FewRows)
        self.function = _Function(module, shape.kernel, shape.threads, shape.end - 0x400, "Q" * 10 + "iifQ")
        self.permute = None if few else _Function(module, "permute", 256, 0, "QQiii")
        self.pairs, self.inverse = pairs(index, variant.dtype).data_ptr(), 1.0 / FACTORS[variant.dtype]
        self.go = self._few() if few else self._tiles()

    def _room(self):
        """room(floats) -> a new tensor of that many fp32 numbers."""
        index, makers = self.variant.device_index, {}

        def room(floats):
            if (make := makers.get(floats)) is None:
                if len(makers) > 256:
                    makers.clear()
                make = makers[floats] = dequantization._allocator((floats,), torch.float32, index)
            return make()

        return room

    def _few(self, programs: int | None = None):
        shape, function, pairs_at, inverse = self.shape, self.function, self.pairs, self.inverse
        index, per_tile = self.variant.device_index, 16 * shape.rg
        most = matmul_table.processors(index) if programs is None else programs
        shared, room, zeros = shape.shared_sums, self._room(), counters(index)
        sums = shape.slices if shared else 1  # a program at least has one

        def go(stream, x, packed, absmax, code2, absmax2, offset, bias, out, m, n):
            tiles = -(-n // per_tile)
            parts = counts = None
            if shared:
                parts, counts = room(tiles * shape.slices * shape.groups * shape.rg * 128), zeros(stream)
            function(
                min(most, tiles * sums), 1, 1, stream,
                x, packed, absmax, code2, absmax2, offset, pairs_at, out,
                0 if parts is None else parts.data_ptr(), 0 if counts is None else counts.data_ptr(), m, n, inverse, bias,
            )  # fmt: skip

        return go

    def _tiles(self):
        shape, function, permute = self.shape, self.function, self.permute
        pairs_at, inverse, k = self.pairs, self.inverse, self.variant.columns
        per_tile, rows, split = 64 * shape.nwg, shape.rows, shape.split
        room, zeros = self._room(), counters(self.variant.device_index)
        blocks, of_x = -(-k * rows // 8 // 256), k * rows // 2  # fp32 numbers' room that a tile of x takes

        def go(stream, x, packed, absmax, code2, absmax2, offset, bias, out, m, n):
            tiles, of_m = -(-n // per_tile), -(-m // rows)
            shared = tiles * of_m * split * per_tile * rows if split > 1 else 0
            space = room(of_m * of_x + shared)
            counts = zeros(stream) if shared else None
            at = space.data_ptr()
            permute(blocks, of_m, 1, stream, x, at, m, rows, k)
            function(
                tiles, split, of_m, stream,
                at, packed, absmax, code2, absmax2, offset, pairs_at, out,
                at + 4 * of_m * of_x, 0 if counts is None else counts.data_ptr(), m, n, inverse, bias,
            )  # fmt: skip

        return go

    def check(self, x, packed, absmax, code2, absmax2, offset, bias, out) -> None:
        """For a first use: as `go`, on tensors. Two programs only take all of `few_*`, so that each goes round its buffers."""
        go = self._few(2) if isinstance(self.shape, FewRows) else self.go
        tensors = (x, packed, absmax, code2, absmax2, offset.reshape(-1))
        with torch.cuda.device(self.variant.device_index):
            stream = torch._C._cuda_getCurrentRawStream(self.variant.device_index)
            at = 0 if bias is None else bias.data_ptr()
            go(stream, *(t.data_ptr() for t in tensors), at, out.data_ptr(), *out.shape)


@functools.lru_cache(maxsize=256)
def kernel(variant) -> Kernel:
    """Raises OSError or RuntimeError where it cannot be compiled or loaded."""
    return Kernel(variant)
