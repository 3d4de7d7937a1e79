"""A unit's all-gather by copy engines: what FSDP2's collective still carried, the adapters and the tokens of peer_gather.py.

An all-gather of 5 MB moves for some microseconds, but its NCCL kernel holds two dozen multiprocessors from when the first rank comes to
it until the last one has got its multiprocessors too, which a matrix product that is persistent on all of them gives only at its end. On
two H200 that was 3 ms in each layer's forward, and the products beside it took 17 ms a step more than alone (benchmarks/NOTES.md, with
what is not known of it). Copies between cards take no multiprocessor, and neither does waiting for another rank: the driver's stream
memory operations (cuStreamWaitValue32: CUDA Driver API) let a stream wait until a number in memory has been reached.

All gathers go, in the same order on each rank as a collective wants it, through one share's worth of memory that the other ranks read
(peer_memory.py). FSDP2 (`FSDPModule.set_custom_all_gather`) brings an output tensor with this rank's share in it. On its stream:

* this rank's share is copied to where the others read it;
* "ready": write the gather's number to each other rank, wait for theirs, copy their shares into the output;
* "read": write the number to each other rank, wait for theirs. So who has passed a unit's gather knows, as after a collective, that all
  have read what it offered, the NF4 weights before it included: the next gather may offer its own, or the process end.

Nothing of this depends on what a process alone knows, such as when FSDP2 lets a tensor go. A gather that does not fit or is asked for
with `async_op` goes by the process group, and does so on each rank. A wait for another rank has no time limit of its own: where a rank
dies the launcher must end the others, as torchrun does, or the time limit of the next collective.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from .nf4_parameter import NF4Shard

__all__ = ["RingGather", "ring_for"]

_MOST = 64 << 20  # bytes of a gathered unit; what is larger has adapters of a full weight's size
_ALIGNED = 256
_NUMBER = 4  # bytes
_READY, _READ = 0, 1


def ring_for(layers: list[nn.Module], world: int, param_dtype: torch.dtype | None) -> RingGather | None:
    """A ring for the gathers of these sharded layers; None where none of them is small enough, or this torch has no place for it."""
    if world == 1 or not all(hasattr(layer, "set_custom_all_gather") for layer in layers):
        return None
    sizes = [_share_bytes(layer, world, param_dtype) for layer in layers]
    fitting = [size for size in sizes if size * world <= _MOST]
    return RingGather(layers, max(fitting), world) if fitting else None


def _share_bytes(layer: nn.Module, world: int, param_dtype: torch.dtype | None) -> int:
    """At most what a rank brings to FSDP2's gather of a unit; NF4 weights are read where they lie."""
    size = 0
    for parameter in layer.parameters():
        if not isinstance(parameter, DTensor):
            continue
        if isinstance(parameter._local_tensor, NF4Shard):
            size += 16
            continue
        width = max(parameter.itemsize, 0 if param_dtype is None else param_dtype.itemsize)
        rows = parameter.shape[0] if parameter.ndim else 1
        size += -(-rows // world) * (parameter.numel() // max(rows, 1)) * width
    return size


class RingGather:
    """FSDP2's all-gather (`torch.distributed.fsdp._fully_shard._fsdp_api.AllGather`) for all units that go through the same memory.

    share: bytes that a rank brings to a gather, at most. What peer_gather.connect makes of it: `part`, then `read_from`.
    """

    def __init__(self, layers: list[nn.Module], share: int, world: int):
        self.layers, self.world, self.share = layers, world, share
        self.memory = self.part = None
        self.count = 0  # gathers so far
        self.stream: torch.cuda.Stream | None = None  # of the last one
        self.numbers = -(-2 * (world + 1) * _NUMBER // _ALIGNED) * _ALIGNED
        self.size_here = self.numbers + share

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

    def _number(self, of: int, kind: int, rank: int) -> int:
        """Address in `of`'s part. Of each kind there are a number of each rank and, last, the one that `of` sends."""
        return self.addresses[of] + (kind * (self.world + 1) + rank) * _NUMBER

    @staticmethod
    def allocate(size, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    def __call__(self, output_tensor, input_tensor, group, async_op: bool = False):
        size = input_tensor.numel() * input_tensor.itemsize
        # async_op: on the stream of the caller, who does not want it to wait
        if async_op or size > self.share or output_tensor.device != self.part.device:
            return dist.all_gather_into_tensor(output_tensor, input_tensor, group=group, async_op=async_op)
        here = self._stream()
        self.count += 1
        number, copy = self.count & 0xFFFFFFFF, self.memory.copy
        output, share = output_tensor.data_ptr(), self.addresses[self.rank] + self.numbers
        copy([(0, input_tensor.data_ptr(), size)], share, here)
        if input_tensor.data_ptr() != output + self.rank * size:
            copy([(self.rank * size, input_tensor.data_ptr(), size)], output, here)
        self._tell(_READY, number, here)
        for other in self.others:
            self._wait(_READY, other, number, here)
            copy([(other * size, self.addresses[other] + self.numbers, size)], output, here)
        self._tell(_READ, number, here)
        for other in self.others:
            self._wait(_READ, other, number, here)
        return None  # its stream has it: FSDP2 waits for the stream

    def _stream(self) -> int:
        """The current stream, behind the gather before this one."""
        if not self.part.is_cuda:
            return 0
        here = torch.cuda.current_stream(self.part.device)
        if self.stream is not None and self.stream != here:
            here.wait_stream(self.stream)
        self.stream = here
        return here.cuda_stream

    def _tell(self, kind: int, number: int, stream: int) -> None:
        targets = [self._number(other, kind, self.rank) for other in self.others]
        self.memory.write_number(self._number(self.rank, kind, self.world), targets, number, stream)

    def _wait(self, kind: int, other: int, number: int, stream: int) -> None:
        self.memory.wait_for_number(self._number(self.rank, kind, other), number, stream, other)
