"""A unit's all-gather by copy engines: what FSDP2's collective still carried, the adapters and the tokens of peer_gather.py.

An all-gather of 5 MB moves for some microseconds, but its NCCL kernel holds two dozen multiprocessors from when the first rank comes to
it until the last one has got its multiprocessors too, which a matrix product that is persistent on all of them gives only at its end. On
two H200 that was 3 ms in each layer's forward, and the products beside it took 17 ms a step more than alone (benchmarks/NOTES.md, with
what is not known of it). Copies take no multiprocessor, and neither does waiting for another rank: the driver's stream memory operations (cuStreamWaitValue32: CUDA Driver API)
let a stream wait until a number in memory has been reached.

All ranks go through a ring of few slots, in memory that the others read (peer_memory.py), gather after gather in the same order, as
a collective wants it. FSDP2 (`FSDPModule.set_custom_all_gather`) gets the slot as the gather's output, and copies this rank's share
into it. Then on its stream:

* "ready": write the gather's number to each other rank, wait for theirs, copy their shares from their slots;
* "read": write the number to each other rank, wait for theirs. So who has passed a unit's gather knows, as after a collective, that all
  have read what it offered, the NF4 weights before it included, and may end.

A slot is taken again when FSDP2 has let its tensor go, which it does when the copies out of it are in stream order. What finds no slot
free, does not fit, or is asked for with `async_op` goes by the process group: all ranks do the same in the same order, so it is
the same gathers on each. A wait for another rank has no time limit of its own: where a rank dies the launcher must end the others, as
torchrun does, or the time limit of the next collective.
"""

from __future__ import annotations

import weakref

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from .nf4_parameter import NF4Shard

__all__ = ["RingGather", "ring_for"]

_SLOTS = 4  # the gather that is copied out, the one before it that waits to be let go, and two ahead
_MOST = 64 << 20  # bytes of a gathered unit; what is larger has adapters of a full weight's size
_ALIGNED = 256
_NUMBER = 4  # bytes


def ring_for(layers: list[nn.Module], world: int, param_dtype: torch.dtype | None) -> RingGather | None:
    """A ring for the gathers of these sharded layers; None where none of them is small enough, or this torch has no place for it."""
    if world == 1 or not all(hasattr(layer, "set_custom_all_gather") for layer in layers):
        return None
    sizes = [_gathered_bytes(layer, world, param_dtype) for layer in layers]
    fitting = [size for size in sizes if size <= _MOST]
    return RingGather(layers, max(fitting), world) if fitting else None


def _gathered_bytes(layer: nn.Module, world: int, param_dtype: torch.dtype | None) -> int:
    """At most what FSDP2 gathers of a unit; NF4 weights are read where they lie."""
    size = 0
    for parameter in layer.parameters():
        if not isinstance(parameter, DTensor):
            continue
        if isinstance(parameter._local_tensor, NF4Shard):
            size += 16 * world
            continue
        width = max(parameter.itemsize, 0 if param_dtype is None else param_dtype.itemsize)
        rows = parameter.shape[0] if parameter.ndim else 1
        size += -(-rows // world) * world * (parameter.numel() // max(rows, 1)) * width
    return size


class RingGather:
    """FSDP2's all-gather (`torch.distributed.fsdp._fully_shard._fsdp_api.AllGather`) for units that share a ring of slots.

    What peer_gather.connect makes of it: `part`, then `read_from`.
    """

    def __init__(self, layers: list[nn.Module], size: int, world: int):
        self.layers, self.world, self.size = layers, world, -(-size // _ALIGNED) * _ALIGNED
        self.memory = self.part = None
        self.count = 0  # gathers so far
        self.waiting: int | None = None  # the slot that `allocate` has given out for the next call
        self.taken: list = [_nothing] * _SLOTS  # weak references to the tensors of a slot
        self.numbers = -(-(2 * _SLOTS * world + 2 * _SLOTS) * _NUMBER // _ALIGNED) * _ALIGNED
        self.size_here = self.numbers + _SLOTS * self.size

    def move_in(self) -> None:
        self.part = self.memory.allocate(self.size_here)
        self.part[: self.numbers].zero_()

    def read_from(self, addresses: list[int], rank: int) -> None:
        """From now on gather so. addresses: of each rank's `part`, in this process."""
        self.rank, self.addresses = rank, addresses
        self.others = [(rank + 1 + i) % self.world for i in range(self.world - 1)]
        for layer in self.layers:
            layer.set_custom_all_gather(self)
        self.layers = []

    # Where things are: ready[slot][rank], read[slot][rank], a number to send of each kind and slot, slots.

    def _number(self, of: int, kind: int, slot: int, rank: int) -> int:
        return self.addresses[of] + ((kind * _SLOTS + slot) * self.world + rank) * _NUMBER

    def _to_send(self, kind: int, slot: int) -> int:
        return self.addresses[self.rank] + (2 * _SLOTS * self.world + kind * _SLOTS + slot) * _NUMBER

    def allocate(self, size, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        number = torch.Size(size).numel() * dtype.itemsize
        order = [(self.count + i) % len(self.taken) for i in range(len(self.taken))]
        slot = self.waiting = next((slot for slot in order if self.taken[slot]() is None), None)
        if slot is None or number > self.size or device != self.part.device:
            self.waiting = None
            return torch.empty(size, dtype=dtype, device=device)
        begin = self.numbers + slot * self.size
        return self.part[begin : begin + number].view(dtype).view(size)

    def __call__(self, output_tensor, input_tensor, group, async_op: bool = False):
        slot, self.waiting = self.waiting, None
        if slot is None:
            return dist.all_gather_into_tensor(output_tensor, input_tensor, group=group, async_op=async_op)
        self.taken[slot] = weakref.ref(output_tensor)
        if async_op:  # on the stream of the caller, who does not want it to wait
            return dist.all_gather_into_tensor(output_tensor, input_tensor, group=group, async_op=True)
        self.count += 1
        number, size = self.count & 0xFFFFFFFF, input_tensor.numel() * input_tensor.itemsize
        here = torch.cuda.current_stream(self.part.device).cuda_stream if self.part.is_cuda else 0
        begin = self.numbers + slot * self.size
        self._tell(0, slot, number, here)
        for other in self.others:
            self._wait(0, slot, other, number, here)
            there = self.addresses[other] + begin + other * size
            self.memory.copy([(begin + other * size, there, size)], self.addresses[self.rank], here)
        self._tell(1, slot, number, here)
        for other in self.others:
            self._wait(1, slot, other, number, here)
        return None  # its stream has it: FSDP2 waits for the stream

    def _tell(self, kind: int, slot: int, number: int, stream: int) -> None:
        targets = [self._number(other, kind, slot, self.rank) for other in self.others]
        self.memory.write_number(self._to_send(kind, slot), targets, number, stream)

    def _wait(self, kind: int, slot: int, other: int, number: int, stream: int) -> None:
        self.memory.wait_for_number(self._number(self.rank, kind, slot, other), number, stream, other)


def _nothing() -> None:
    return None
