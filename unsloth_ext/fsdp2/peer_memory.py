"""Memory of one process that the other processes of the host read directly.

On CUDA cards it is the driver's inter-process memory (cuIpcGetMemHandle, cuIpcOpenMemHandle: CUDA Driver API, "Memory Management"):
another rank's allocation gets an address here, and a copy from it is made by this card's copy engines over NVLink or PCIe, without
a multiprocessor and without the other rank's doing. Only memory of cudaMalloc can be shared so, not PyTorch's expandable segments
(which Unsloth turns on), so `allocate` takes it from a pool of its own, made while they are off. It counts in torch's statistics as
all memory does. On the CPU it is a mapped file.

What cudaMalloc gives is a multiple of 2 MiB, and torch leaves up to 1 MiB of that with the tensor: of the 53.65 MiB that a layer of
Llama 3.1 8B has on one of two ranks it made 54, 11 MiB in all layers. So `allocate` cuts several tensors out of one piece of memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import tempfile
import time
from pathlib import Path

import torch

__all__ = ["HostMemory", "PeerMemory", "of_device", "streams_can_wait"]

_LAZY_PEER_ACCESS = 1  # CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
_GREATER_OR_EQUAL = (
    0  # CU_STREAM_WAIT_VALUE_GEQ: of the difference as a signed number, so it goes on where the numbers begin anew
)
_FLUSH = 1 << 30  # CU_STREAM_WAIT_VALUE_FLUSH
_CAN_FLUSH = 98  # CU_DEVICE_ATTRIBUTE_CAN_FLUSH_REMOTE_WRITES
_SEGMENT = 640 << 20  # bytes of a piece of memory: about what is there twice while tensors move into it
_MULTIPLE = 2 << 20  # what cudaMalloc's pieces are multiples of
_ALIGNED = 256
_PATIENCE = 600.0  # seconds that a process on a CPU waits for another, unless told


def of_device(device: torch.device, patience: float | None = None):
    """patience: seconds that a process on a CPU waits for another. Raises RuntimeError for a device whose memory cannot be shared so, OSError without the driver's library."""
    if device.type == "cpu":
        return HostMemory(_PATIENCE if patience is None else patience)
    if device.type != "cuda" or torch.version.cuda is None:  # ROCm's devices are called "cuda" too
        raise RuntimeError(
            f"only NVIDIA cards and CPUs share memory between processes here, not {device.type} of this torch"
        )
    return PeerMemory(device)


def streams_can_wait(device: torch.device) -> bool:
    """Whether `write_number` and `wait_for_number` work there: tried, as not every driver that has them lets them be used."""
    if device.type != "cuda" or torch.version.cuda is None:
        return device.type == "cpu"
    try:
        number, stream = torch.zeros(1, dtype=torch.int32, device=device), torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.device(device):
            PeerMemory.write_number(number.data_ptr(), [], 7, stream.cuda_stream)
            PeerMemory.wait_for_number(number.data_ptr(), 7, stream.cuda_stream, 0)
        stream.synchronize()
        return number.item() == 7
    except (AttributeError, OSError, RuntimeError):
        return False


def _aligned(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED


def segments(sizes: list[int]) -> list[int]:
    """Bytes of the pieces that tensors of these sizes go into, one after another, so that rounding up costs the least.

    A piece is at most `_SEGMENT`, or one tensor that is larger.
    """
    best = [(0, 0, 0)]  # for the first n tensors: bytes rounded up, minus where the last piece begins, its bytes
    for end in range(1, len(sizes) + 1):
        found, total = [], 0
        for begin in range(end - 1, -1, -1):
            total += _aligned(sizes[begin])
            if total > _SEGMENT and begin < end - 1:
                break
            found.append((best[begin][0] + -(-total // _MULTIPLE) * _MULTIPLE, -begin, total))
        best.append(min(found))
    pieces, end = [], len(sizes)
    while end:
        _, begin, total = best[end]
        pieces.append(total)
        end = -begin
    return pieces[::-1]


class _Handle(ctypes.Structure):
    _fields_ = (("bytes", ctypes.c_ubyte * 64),)  # CUipcMemHandle


@functools.cache
def _driver():
    # Its calls here return at once: to let other threads run in between would cost more than they do.
    driver = ctypes.PyDLL("libcuda.so.1")
    driver.cuMemcpyAsync.argtypes = [ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p]
    driver.cuIpcOpenMemHandle_v2.argtypes = [ctypes.POINTER(ctypes.c_uint64), _Handle, ctypes.c_uint]
    driver.cuIpcCloseMemHandle.argtypes = [ctypes.c_uint64]
    for name in ("cuStreamWriteValue32_v2", "cuStreamWaitValue32_v2"):
        if hasattr(driver, name):
            getattr(driver, name).argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint]
    driver.cuMemGetAddressRange_v2.argtypes = [
        ctypes.POINTER(ctypes.c_uint64), ctypes.POINTER(ctypes.c_size_t), ctypes.c_uint64,
    ]  # fmt: skip
    return driver


def _must(code: int, what: str) -> None:
    if code:
        text = ctypes.c_char_p()
        _driver().cuGetErrorName(code, ctypes.byref(text))
        raise RuntimeError(f"{what}: {(text.value or b'unknown').decode()} ({code})")


@functools.cache
def _pool():
    return torch.cuda.MemPool()


@contextlib.contextmanager
def _plain_segments():
    """Without expandable segments, where the allocator's settings ask for them: before torch 2.13 only those of the environment are known."""
    known = getattr(torch._C, "_accelerator_getAllocatorSettings", lambda: "")
    wished = known() or os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or ""
    change = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    change = change or torch._C._cuda_cudaCachingAllocator_set_allocator_settings  # torch 2.10 and older
    if "expandable_segments:true" not in wished.lower().replace(" ", ""):
        yield
        return
    change("expandable_segments:False")
    try:
        yield
    finally:
        change(wished)


class PeerMemory:
    """Of the ranks' cards in one host."""

    def __init__(self, device: torch.device):
        self.device = device
        self.expected: list[int] = []  # bytes of the pieces that are still to be made
        self.rest: torch.Tensor | None = None  # of the last one
        _driver()

    def identity(self) -> str:
        """What the others know this rank's card by."""
        return str(torch.cuda.get_device_properties(self.device).uuid)

    def out_of_reach(self, identities: list[str]) -> str | None:
        """Why this card cannot read the memory of one of these; None if it can."""
        visible = {str(torch.cuda.get_device_properties(i).uuid): i for i in range(torch.cuda.device_count())}
        mine = self.device.index
        for identity in identities:
            if identity not in visible:
                return "a rank does not see the cards of the others (CUDA_VISIBLE_DEVICES)"
            if visible[identity] != mine and not torch.cuda.can_device_access_peer(mine, visible[identity]):
                return f"card {mine} has no peer access to card {visible[identity]}"
        return None

    def expect(self, sizes: list[int]) -> None:
        """The sizes that `allocate` will be asked for, in this order."""
        self.expected, self.rest = segments(sizes), None

    def allocate(self, size: int) -> torch.Tensor:
        """uint8 [size] that `offer` can offer. Its memory is free again with the last tensor of the same piece."""
        whole = _aligned(size)
        if self.rest is None:
            self.rest = self._piece(max(self.expected.pop(0) if self.expected else 0, whole))
        if whole > self.rest.numel():
            raise ValueError(f"{size} bytes were not expected here, {self.rest.numel()} are left")
        given, rest = self.rest[:size], self.rest[whole:]
        self.rest = rest if rest.numel() else None
        return given

    def _piece(self, size: int) -> torch.Tensor:
        with _plain_segments(), torch.cuda.use_mem_pool(_pool(), self.device):
            return torch.empty(size, dtype=torch.uint8, device=self.device)

    def offer(self, tensor: torch.Tensor):
        """What another rank's `open` makes an address of, once this rank's streams have been waited for. Raises RuntimeError."""
        base, size, handle = ctypes.c_uint64(), ctypes.c_size_t(), _Handle()
        _must(
            _driver().cuMemGetAddressRange_v2(ctypes.byref(base), ctypes.byref(size), tensor.data_ptr()),
            "address range",
        )
        _must(_driver().cuIpcGetMemHandle(ctypes.byref(handle), ctypes.c_uint64(base.value)), "sharing memory")
        return bytes(handle.bytes), tensor.data_ptr() - base.value

    def open(self, offered) -> tuple[int, tuple[torch.device, int]]:
        """(address, what `close` takes). The memory stays the other rank's."""
        handle, offset = offered
        base = ctypes.c_uint64()
        torch.cuda.current_stream(self.device)  # makes sure that the card's context is the current one
        _must(
            _driver().cuIpcOpenMemHandle_v2(ctypes.byref(base), _Handle.from_buffer_copy(handle), _LAZY_PEER_ACCESS),
            "opening another rank's memory",
        )
        return base.value + offset, (self.device, base.value)

    @staticmethod
    def close(opened) -> None:
        """Once no copy from it is under way. Within a capture of a CUDA graph, which would not survive a wait, it stays open."""
        if torch.cuda.is_current_stream_capturing():
            return
        for device in {device for device, _ in opened}:
            torch.cuda.synchronize(device)
        for device, base in opened:
            with torch.cuda.device(device):
                _driver().cuIpcCloseMemHandle(base)

    @staticmethod
    def copy(copies, at: int, stream: int) -> None:
        """copies: (offset from `at`, address to copy from, bytes), queued on a stream. Raises RuntimeError."""
        queue = _driver().cuMemcpyAsync
        for offset, source, size in copies:
            if code := queue(at + offset, source, size, stream):
                _must(code, "copying from another rank's memory")

    @staticmethod
    def write_number(at: int, targets: list[int], number: int, stream: int) -> None:
        """Write a 32-bit number here, and from here to addresses of other ranks, in stream order."""
        driver = _driver()
        _must(driver.cuStreamWriteValue32_v2(stream, at, number, 0), "writing a number")
        for target in targets:
            _must(driver.cuMemcpyAsync(target, at, 4, stream), "writing a number to another rank")

    @staticmethod
    def wait_for_number(at: int, number: int, stream: int, rank: int, flush: bool = False) -> None:
        """Let the stream wait until the number here is `number` or has passed it, for as long as this process lives.

        flush: what another card wrote here before it wrote the number is seen after it too, on cards where that is not so by itself.
        """
        how = _GREATER_OR_EQUAL | (_FLUSH if flush else 0)
        _must(_driver().cuStreamWaitValue32_v2(stream, at, number, how), "waiting for another rank")

    def can_flush(self) -> bool:
        """Whether `wait_for_number` can flush here: said by the driver, and tried."""
        card, has, driver = ctypes.c_int(), ctypes.c_int(), _driver()
        if driver.cuDeviceGet(ctypes.byref(card), self.device.index):
            return False
        if driver.cuDeviceGetAttribute(ctypes.byref(has), _CAN_FLUSH, card) or not has.value:
            return False
        number, stream = torch.ones(1, dtype=torch.int32, device=self.device), torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        try:
            with torch.cuda.device(self.device):
                self.wait_for_number(number.data_ptr(), 1, stream.cuda_stream, 0, flush=True)
            stream.synchronize()
        except (AttributeError, OSError, RuntimeError):
            return False
        return True


class HostMemory:
    """The same for processes on CPUs. Numbers and what they announce are seen in the order of their writing on x86, nowhere else."""

    def __init__(self, patience: float = _PATIENCE):
        self.files: dict[int, str] = {}
        self.patience = patience

    def identity(self) -> str:
        return "cpu"

    def out_of_reach(self, identities: list[str]) -> str | None:
        return None

    def expect(self, sizes: list[int]) -> None:
        """Nothing: a file is as large as it is asked to be."""

    def allocate(self, size: int) -> torch.Tensor:
        folder = "/dev/shm" if os.path.isdir("/dev/shm") else None
        number, name = tempfile.mkstemp(prefix=f"unsloth_ext-{os.getpid()}-", dir=folder)
        try:
            if hasattr(os, "posix_fallocate"):  # else, where /dev/shm is too small, the first write kills the process
                os.posix_fallocate(number, 0, size)
            tensor = torch.from_file(name, shared=True, size=size, dtype=torch.uint8)
        except BaseException:
            os.unlink(name)
            raise
        finally:
            os.close(number)
        self.files[tensor.data_ptr()] = name
        return tensor

    def offer(self, tensor: torch.Tensor):
        return self.files[tensor.data_ptr()], tensor.numel()

    def open(self, offered):
        name, size = offered
        if os.stat(name).st_size != size:  # torch would make a file that is missing, of zeros
            raise RuntimeError(f"{name} has {os.stat(name).st_size} bytes, not {size}")
        tensor = torch.from_file(name, shared=True, size=size, dtype=torch.uint8)
        return tensor.data_ptr(), tensor

    @staticmethod
    def close(opened) -> None:
        """Nothing: the mappings go with the tensors."""

    def forget(self) -> None:
        """The files' names go; the memory stays for those that have it."""
        for name in self.files.values():
            Path(name).unlink(missing_ok=True)
        self.files.clear()

    @staticmethod
    def copy(copies, at: int, stream: int) -> None:
        for offset, source, size in copies:
            ctypes.memmove(at + offset, source, size)

    @staticmethod
    def write_number(at: int, targets: list[int], number: int, stream: int) -> None:
        for target in targets:
            ctypes.c_uint32.from_address(target).value = number

    def wait_for_number(self, at: int, number: int, stream: int, rank: int, flush: bool = False) -> None:
        """Raises RuntimeError, naming the rank, after `patience` seconds."""
        seen, end = ctypes.c_uint32.from_address(at), time.monotonic() + self.patience
        while ((seen.value - number) & 0xFFFFFFFF) >= 1 << 31:
            if time.monotonic() > end:
                raise RuntimeError(f"rank {rank} has not come to this exchange within {self.patience:g} s")
            time.sleep(2e-5)

    def can_flush(self) -> bool:
        return False
