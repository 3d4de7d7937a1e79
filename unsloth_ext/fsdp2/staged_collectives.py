"""A unit's all-gather and reduce-scatter by copy engines: what FSDP2's collectives still carried, the adapters, their gradients and
the tokens of peer_gather.py.

An all-gather of 5 MB moves for some microseconds, but its NCCL kernel holds two dozen multiprocessors from when the first rank comes to
it until the last one has got its multiprocessors too, which a matrix product that is persistent on all of them gives only at its end. On
two H200 that was 3 ms in each layer's forward, and the products beside it took 17 ms a step more than alone (benchmarks/NOTES.md, with
what is not known of it). Copies between cards take no multiprocessor, and neither does waiting for another rank: the driver's stream
memory operations (cuStreamWaitValue32: CUDA Driver API) let a stream wait until a number in memory has been reached.

Each kind of exchange goes, in the same order on each rank as a collective wants it, through some memory of each rank that the others
read (peer_memory.py), large enough for one of them. On the stream that FSDP2 calls it on:

* what this rank brings for the others is copied to where they read it;
* "ready": write the exchange's number to each other rank, wait for theirs, copy what they bring;
* "read": write the number to each other rank, wait for theirs. So who has passed an exchange knows, as after a collective, that all
  have read what it offered, the NF4 weights before it included: the next one may offer its own, or the process end.

Nothing of this depends on what a process alone knows, such as when FSDP2 lets a tensor go. What does not fit, or is asked for with
`async_op`, goes by the process group, and does so on each rank. A wait for another rank has no time limit of its own: where a rank
dies the launcher must end the others, as torchrun does, or the time limit of the next collective.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from .nf4_parameter import NF4Shard

__all__ = ["StagedAllGather", "StagedReduceScatter", "staged_collectives"]

_MOST = 64 << 20  # bytes of a gathered unit; what is larger has adapters of a full weight's size
_ALIGNED = 256
_NUMBER = 4  # bytes
_READY, _READ = 0, 1


def staged_collectives(layers: list[nn.Module], world: int, policy) -> list[_Staged]:
    """For the adapters of these sharded layers; [] where none of them is small enough, or this torch has no place for it.

    policy: FSDP2's `MixedPrecisionPolicy` of the layers.
    """
    wanted = ("set_custom_all_gather", "set_custom_reduce_scatter")
    if world == 1 or not all(hasattr(layer, name) for layer in layers for name in wanted):
        return []
    made: list[_Staged] = []
    shares = [_share_bytes(layer, world, policy.param_dtype) for layer in layers]
    if fitting := [share for share in shares if share * world <= _MOST]:
        made.append(StagedAllGather(layers, max(fitting), world))
    shares = [_share_bytes(layer, world, policy.reduce_dtype, trained=True) for layer in layers]
    if fitting := [share for share in shares if 0 < share * world <= _MOST]:
        made.append(StagedReduceScatter(layers, max(fitting) * (world - 1), world))
    return made


def _share_bytes(layer: nn.Module, world: int, dtype: torch.dtype | None, trained: bool = False) -> int:
    """At most what a rank's share of FSDP2's exchange for a unit is; NF4 weights are read where they lie."""
    size = 0
    for parameter in layer.parameters():
        if not isinstance(parameter, DTensor) or (trained and not parameter.requires_grad):
            continue
        if isinstance(parameter._local_tensor, NF4Shard):
            size += 16
            continue
        width = max(parameter.itemsize, 0 if dtype is None else dtype.itemsize)
        rows = parameter.shape[0] if parameter.ndim else 1
        size += -(-rows // world) * (parameter.numel() // max(rows, 1)) * width
    return size


class _Staged:
    """Exchanges of one kind for all units that share the memory. What peer_gather.connect makes of it: `part`, then `read_from`.

    staged: bytes that a rank brings for the others to one of them, at most.
    """

    def __init__(self, layers: list[nn.Module], staged: int, world: int):
        self.layers, self.world, self.staged = layers, world, staged
        self.memory = self.part = None
        self.count = 0  # exchanges so far
        self.stream: torch.cuda.Stream | None = None  # of the last one
        self.numbers = -(-2 * (world + 1) * _NUMBER // _ALIGNED) * _ALIGNED
        self.size_here = self.numbers + staged

    def move_in(self) -> None:
        self.part = self.memory.allocate(self.size_here)
        self.part[: self.numbers].zero_()

    def read_from(self, addresses: list[int], rank: int) -> None:
        """From now on do it so. addresses: of each rank's `part`, in this process."""
        self.rank, self.addresses = rank, addresses
        self.others = [(rank + 1 + i) % self.world for i in range(self.world - 1)]
        for layer in self.layers:
            self._serve(layer)
        self.layers = []

    @staticmethod
    def allocate(size, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    def _fits(self, tensor: torch.Tensor, size: int, async_op: bool) -> bool:
        # async_op: on the stream of the caller, who does not want it to wait
        return not async_op and size <= self.staged and tensor.device == self.part.device

    def _place(self, rank: int) -> int:
        """Address in this process of what a rank brings."""
        return self.addresses[rank] + self.numbers

    def _exchange(self, brought, take) -> None:
        """brought: copies (see `PeerMemory.copy`) to this rank's place; take(other, stream) queues the copies of what another brings."""
        here = self._stream()
        self.count += 1
        number = self.count & 0xFFFFFFFF
        self.memory.copy(brought, self._place(self.rank), here)
        self._tell(_READY, number, here)
        for other in self.others:
            self._wait(_READY, other, number, here)
            take(other, here)
        self._tell(_READ, number, here)
        for other in self.others:
            self._wait(_READ, other, number, here)

    def _stream(self) -> int:
        """The current stream, behind the exchange before this one."""
        if not self.part.is_cuda:
            return 0
        here = torch.cuda.current_stream(self.part.device)
        if self.stream is not None and self.stream != here:
            here.wait_stream(self.stream)
        self.stream = here
        return here.cuda_stream

    def _number(self, of: int, kind: int, rank: int) -> int:
        """Address in `of`'s part. Of each kind there are a number of each rank and, last, the one that `of` sends."""
        return self.addresses[of] + (kind * (self.world + 1) + rank) * _NUMBER

    def _tell(self, kind: int, number: int, stream: int) -> None:
        targets = [self._number(other, kind, self.rank) for other in self.others]
        self.memory.write_number(self._number(self.rank, kind, self.world), targets, number, stream)

    def _wait(self, kind: int, other: int, number: int, stream: int) -> None:
        self.memory.wait_for_number(self._number(self.rank, kind, other), number, stream, other)


class StagedAllGather(_Staged):
    """FSDP2's `AllGather` (torch.distributed.fsdp._fully_shard._fsdp_api)."""

    def _serve(self, layer) -> None:
        layer.set_custom_all_gather(self)

    def __call__(self, output_tensor, input_tensor, group, async_op: bool = False):
        size = input_tensor.numel() * input_tensor.itemsize
        if not self._fits(output_tensor, size, async_op):
            return dist.all_gather_into_tensor(output_tensor, input_tensor, group=group, async_op=async_op)
        source, output = input_tensor.data_ptr(), output_tensor.data_ptr()

        def take(other: int, stream: int) -> None:
            self.memory.copy([(other * size, self._place(other), size)], output, stream)

        self._exchange([(0, source, size)], take)
        if source != output + self.rank * size:  # FSDP2 brings it in its place
            output_tensor.view(self.world, -1)[self.rank].copy_(input_tensor.view(-1))
        return None  # its stream has it: FSDP2 waits for the stream


class StagedReduceScatter(_Staged):
    """FSDP2's `ReduceScatter` (torch.distributed.fsdp._fully_shard._fsdp_api). A sum begins with this rank's own, then the next one's."""

    def _serve(self, layer) -> None:
        layer.set_custom_reduce_scatter(self)

    def __call__(self, output_tensor, input_tensor, group, op, async_op: bool = False):
        size = output_tensor.numel() * output_tensor.itemsize
        known = op in (dist.ReduceOp.SUM, dist.ReduceOp.AVG) and output_tensor.is_floating_point()
        if not known or not self._fits(output_tensor, size * (self.world - 1), async_op):
            return dist.reduce_scatter_tensor(output_tensor, input_tensor, op=op, group=group, async_op=async_op)
        source, shares = input_tensor.data_ptr(), input_tensor.view(self.world, -1)
        theirs = torch.empty_like(shares[: self.world - 1])

        def take(other: int, stream: int) -> None:
            # What `other` brings is in the order of the ranks, without its own.
            place = self._place(other) + (self.rank - (self.rank > other)) * size
            self.memory.copy([(self.others.index(other) * size, place, size)], theirs.data_ptr(), stream)

        before, after = self.rank * size, (self.world - 1 - self.rank) * size
        brought = [(0, source, before), (before, source + before + size, after)]
        self._exchange([copy for copy in brought if copy[2]], take)
        # Divided first, as NCCL does: what is summed does not overflow then.
        scale = 1 / self.world if op == dist.ReduceOp.AVG else 1
        torch.mul(shares[self.rank], scale, out=output_tensor.view(-1))
        for share in theirs:
            output_tensor.view(-1).add_(share, alpha=scale)
        return None
