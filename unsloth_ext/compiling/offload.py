"""Saved tensors in pinned host memory, copied out behind the forward and back ahead of the backward.

One side stream does all copies, so a host buffer may be given to the next tensor as soon as its copy back is queued: the copies
that follow wait for it in the stream. Device memory is only ever allocated on the stream that computes; the side stream waits
for that stream before it writes, and the reader waits for the copy (where nobody reads, the value's end does), so the allocator
needs no `record_stream`.

A storage that is on its way out stays alive until its copy has ended. A layer's copies have the next layer's forward for it: at
the end of that the computing stream waits for what is left of them (the host never waits), so that a layer's bytes at most are
under way, which is what the plan counts.

On a CPU the "host" is the same memory: the copies are made at once, which keeps the numbers of bytes and the order testable.
"""

from __future__ import annotations

from collections import deque

import torch

from .recompute import Value

ROUND = 2 * 2**20  # host buffers come in multiples of this: batches of nearly the same length share them


class HostMemory:
    """Buffers of pinned memory, reused. Pinning is slow (seconds for 10 GB), so nothing is given back before `clear`."""

    def __init__(self, pinned: bool):
        self.pinned, self.free, self.total = pinned, {}, 0

    def take(self, nbytes: int) -> torch.Tensor:
        size = -(-nbytes // ROUND) * ROUND
        for candidate in (size, *(k for k in sorted(self.free) if size < k <= size * 5 // 4)):
            if self.free.get(candidate):
                return self.free[candidate].pop()
        buffer = torch.empty(size, dtype=torch.uint8, pin_memory=self.pinned)
        self.total += size
        return buffer

    def give(self, buffer: torch.Tensor) -> None:
        self.free.setdefault(buffer.numel(), []).append(buffer)

    def clear(self) -> None:
        self.total -= sum(size * len(buffers) for size, buffers in self.free.items())
        self.free.clear()


class OnHost:
    """The bytes of one value in host memory."""

    __slots__ = ("buffer", "nbytes", "offloader")

    def __init__(self, offloader: Offloader, buffer: torch.Tensor, nbytes: int):
        self.offloader, self.buffer, self.nbytes = offloader, buffer, nbytes

    def fetch(self, value: Value) -> None:
        self.offloader.fetch(value)

    def __del__(self):
        self.offloader.memory.give(self.buffer)


class Offloader:
    def __init__(self, device: torch.device):
        self.device, self.cuda = device, device.type == "cuda"
        self.memory = HostMemory(pinned=self.cuda)
        self.stream = torch.cuda.Stream(device) if self.cuda else None
        self.leaving: deque = deque()  # (event, value) of copies that are under way

    def send(self, value: Value) -> None:
        """Start the copy to the host; the storage is let go when the copy has ended."""
        source = torch.empty(0, dtype=torch.uint8, device=value.device).set_(value.storage)
        buffer = self.memory.take(value.nbytes)
        target = buffer[: value.nbytes]
        value.host = OnHost(self, buffer, value.nbytes)
        if not self.cuda:
            target.copy_(source)
            value.storage = None
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
            event = self.stream.record_event()
        self.leaving.append((event, value))

    def drain(self) -> None:
        """Let go of everything that is on its way out: what computes next waits until it has left."""
        while self.leaving:
            event, value = self.leaving.popleft()
            if not event.query():
                torch.cuda.current_stream(self.device).wait_event(event)
            value.storage = None

    def call_off(self, value: Value) -> bool:
        """Keep a value that is still on its way out, because it is wanted. Whether it was."""
        if value.storage is None:
            return False
        self.leaving = deque(pair for pair in self.leaving if pair[1] is not value)
        value.host = None
        return True

    def fetch(self, value: Value) -> None:
        """Start the copy back; `value.ready` waits for it."""
        if not self.cuda:
            back = torch.empty(value.nbytes, dtype=torch.uint8)
            back.copy_(value.host.buffer[: value.nbytes])
            value.restored = back.untyped_storage()
            return
        computing = torch.cuda.current_stream(self.device)
        back = torch.empty(value.nbytes, dtype=torch.uint8, device=self.device)
        self.stream.wait_stream(computing)
        with torch.cuda.stream(self.stream):
            back.copy_(value.host.buffer[: value.nbytes], non_blocking=True)
            event = self.stream.record_event()
        value.restored = back.untyped_storage()
        value.ready = lambda: torch.cuda.current_stream(self.device).wait_event(event)

    def bandwidth(self, nbytes: int = 2**26) -> tuple[float, float]:
        """Bytes a second to the host and back, measured."""
        if not self.cuda:
            return 1e10, 1e10
        there, here = self.memory.take(nbytes), torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        speeds = []
        for target, source in ((there[:nbytes], here), (here, there[:nbytes])):
            times = []
            for _ in range(4):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                target.copy_(source, non_blocking=True)
                end.record()
                end.synchronize()
                times.append(start.elapsed_time(end) / 1e3)
            speeds.append(nbytes / min(times))
        self.memory.give(there)
        return speeds[0], speeds[1]
