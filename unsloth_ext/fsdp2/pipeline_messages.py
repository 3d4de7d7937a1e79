"""Messages between pipeline stages by the cards' copy engines, in place of NCCL's sends and receives.

torch's schedules queue every send and receive of a rank on one NCCL stream, in one order: a send of what is done waits behind a
receive of what is not, and NCCL's kernels hold multiprocessors from when they begin to wait, beside matrix products that want all
of them. Here each direction between two neighbouring stages is an edge of its own. The sender's card copies a finished tensor into
one of a few slots of the receiver's memory (peer_memory.py) on the edge's own stream, and then its number; the receiver's stream
waits for that number where the tensor is needed, copies it out of the slot, and writes back that the slot is free. Nothing is
received ahead of time, and no multiprocessor waits.

What is held for messages is a few tensors an edge, where torch keeps a buffer for each microbatch of each stage: as many as ranks need
that go on only once what they send has a place (`pipeline_schedules.slots_needed`), so that nothing that makes a card wait for all
of its streams, an allocation that finds no memory or a first compile, can make two ranks wait for each other.

Waits on a card have no time limit. A rank that ends leaves the others' cards waiting until their launcher ends them, as torchrun does.
"""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage, stage

from . import peer_memory
from .peer_gather import connect
from .team import Team

__all__ = ["Messages", "StageWithMessages", "connected"]

_LEAST_SLOTS = 2  # tensors on the way to a stage: one that is being read, one that is being written
_ALIGNED = 256
_NUMBER = 4  # bytes
# Kinds of numbers; the last two are what is copied to the other rank.
_ARRIVED, _TAKEN, _ARRIVED_HERE, _TAKEN_HERE = range(4)
_PAST_ALL = 1 << 30  # more messages than any edge will see
# From torch 2.15 on a stage lets go of what it has received as it reads it, and minds buffers that are there before a next step.
_LETS_GO_ITSELF = hasattr(getattr(stage, "_RecvInfo", None), "take_buffer")


class Messages:
    """One rank's end of all edges; what `peer_gather.connect` connects.

    rank_of: the rank of each stage. size: bytes of the largest message. slots: of an edge.
    """

    def __init__(self, rank_of: list[int], rank: int, size: int, slots: int):
        self.rank_of, self.rank, self.slots = rank_of, rank, slots
        self.slot = -(-size // _ALIGNED) * _ALIGNED
        self.numbers = -(-2 * len(rank_of) * 4 * _NUMBER // _ALIGNED) * _ALIGNED
        self.size_here = self._place(rank, len(rank_of) * 2, 0)
        self.count: dict[tuple[int, int], int] = {}  # (edge, what this rank does there): messages so far
        self.streams: dict[int, torch.cuda.Stream] = {}
        self.flush = False  # see `PeerMemory.can_flush`
        self.memory = self.part = None

    # An edge is 2 s for stage s to s + 1, and 2 s + 1 for the way back.

    def ends(self, edge: int) -> tuple[int, int]:
        """(rank that sends, rank that receives)"""
        near, far = self.rank_of[edge // 2], self.rank_of[edge // 2 + 1]
        return (far, near) if edge % 2 else (near, far)

    def between_ranks(self, edge: int) -> bool:
        return 0 <= edge < 2 * (len(self.rank_of) - 1) and len(set(self.ends(edge))) == 2

    def _place(self, rank: int, edge: int, slot: int) -> int:
        """Offset of a slot in the memory of the rank that receives."""
        before = sum(self.between_ranks(e) and self.ends(e)[1] == rank for e in range(edge))
        return self.numbers + (before * self.slots + slot) * self.slot

    def _number(self, rank: int, edge: int, kind: int) -> int:
        return self.addresses[rank] + (edge * 4 + kind) * _NUMBER

    def move_in(self) -> None:
        self.part = self.memory.allocate(self.size_here)
        self.part[: self.numbers].zero_()

    def read_from(self, addresses: list[int], rank: int) -> None:
        """addresses: of each rank's `part`, in this process."""
        self.addresses, self.flush = addresses, self.memory.can_flush()

    def give_up(self) -> None:
        """End all waits of this rank's card, whose results nobody will use. The edges cannot be used any more."""
        if self.part is not None and self.part.is_cuda:
            aside = torch.cuda.Stream(self.part.device)  # the others may be waiting
            with torch.cuda.stream(aside):
                self.part[: self.numbers].view(torch.int32).fill_(_PAST_ALL)
            aside.synchronize()

    def _next(self, edge: int, kind: int) -> int:
        count = self.count[edge, kind] = self.count.get((edge, kind), 0) + 1
        return count

    def send(self, edge: int, tensor: torch.Tensor) -> None:
        """Queue a contiguous tensor, which may be let go then."""
        size, (here, there) = tensor.numel() * tensor.itemsize, self.ends(edge)
        if size > self.slot or not tensor.is_contiguous():
            raise ValueError(f"a message is at most {self.slot} contiguous bytes, got {size}")
        count = self._next(edge, _ARRIVED)
        stream = 0
        if tensor.is_cuda:
            if edge not in self.streams:
                self.streams[edge] = torch.cuda.Stream(tensor.device)
            self.streams[edge].wait_stream(torch.cuda.current_stream(tensor.device))
            tensor.record_stream(self.streams[edge])
            stream = self.streams[edge].cuda_stream
        if count > self.slots:
            self.memory.wait_for_number(
                self._number(here, edge, _TAKEN), count - self.slots & 0xFFFFFFFF, stream, there
            )
        place = self.addresses[there] + self._place(there, edge, (count - 1) % self.slots)
        self.memory.copy([(0, tensor.data_ptr(), size)], place, stream)
        self.memory.write_number(
            self._number(here, edge, _ARRIVED_HERE), [self._number(there, edge, _ARRIVED)], count & 0xFFFFFFFF, stream
        )

    def take(self, edge: int, into: torch.Tensor) -> torch.Tensor:
        """The next message of an edge, copied `into` a contiguous tensor on the current stream."""
        there, here = self.ends(edge)
        count = self._next(edge, _TAKEN)
        stream = torch.cuda.current_stream(into.device).cuda_stream if into.is_cuda else 0
        self.memory.wait_for_number(self._number(here, edge, _ARRIVED), count & 0xFFFFFFFF, stream, there, self.flush)
        place = self._place(here, edge, (count - 1) % self.slots)
        size = into.numel() * into.itemsize
        into.view(torch.uint8).view(-1).copy_(self.part[place : place + size])
        self.memory.write_number(
            self._number(here, edge, _TAKEN_HERE), [self._number(there, edge, _TAKEN)], count & 0xFFFFFFFF, stream
        )
        return into


class StageWithMessages(PipelineStage):
    """torch's stage, which has nothing to send or receive for the schedule: it does so itself, where a tensor is made and needed.

    A message is told by its place in the order, so an edge's microbatches come in the same order at both ends: in that of their
    numbers, in every schedule of torch.
    """

    messages: Messages
    travels: torch.Tensor  # on meta: what a message is like

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list:
        return []

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list:
        return []

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list:
        return []

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list:
        self.bwd_cache.pop(bwd_chunk_id, None)
        return []

    def forward_one_chunk(self, fwd_chunk_id: int, *arguments, **keywords):
        messages, number = self.messages, self.stage_index
        if fwd_chunk_id == 0:
            self._let_go()
        if messages.between_ranks(2 * number - 2):
            self.set_local_fwd_input(messages.take(2 * number - 2, self._empty()), fwd_chunk_id)
        output = super().forward_one_chunk(fwd_chunk_id, *arguments, **keywords)
        if not self.has_backward and messages.between_ranks(2 * number - 2):
            self._forget_input(fwd_chunk_id)
        if messages.between_ranks(2 * number):
            messages.send(2 * number, output.detach().contiguous())
        return output

    def backward_one_chunk(self, bwd_chunk_id: int, *arguments, **keywords):
        if not self.has_backward:
            return
        messages, number = self.messages, self.stage_index
        if receives := messages.between_ranks(2 * number + 1):
            self.set_local_bwd_input((messages.take(2 * number + 1, self._empty()),), bwd_chunk_id)
        super().backward_one_chunk(bwd_chunk_id, *arguments, **keywords)
        if receives and not _LETS_GO_ITSELF:
            self.set_local_bwd_input((self._nothing(),), bwd_chunk_id)
        if messages.between_ranks(2 * number - 1):
            messages.send(2 * number - 1, self.get_local_bwd_output(bwd_chunk_id)[0].contiguous())
            self._forget_input(bwd_chunk_id)

    def _forget_input(self, chunk_id: int) -> None:
        if not _LETS_GO_ITSELF:
            self.set_local_fwd_input(self._nothing(), chunk_id)

    def _empty(self) -> torch.Tensor:
        return torch.empty(self.travels.shape, dtype=self.travels.dtype, device=self.device)

    def _nothing(self) -> torch.Tensor:
        return torch.empty(0, dtype=self.travels.dtype, device=self.device)

    def _let_go(self) -> None:
        """Of the buffers that torch has made for what each microbatch receives."""
        received = ((self.args_recv_info, 2 * self.stage_index - 2), (self.grad_recv_info, 2 * self.stage_index + 1))
        for infos in (infos for infos, edge in received if self.messages.between_ranks(edge)):
            for info in (info for found in infos.values() for info in found):
                if getattr(info, "buffer", None) is not None:
                    info.buffer = torch.empty(0, dtype=info.buffer.dtype, device=self.device)


def connected(
    rank_of: list[int], rank: int, size: int, slots: int, mesh: DeviceMesh, device: torch.device, timeout
) -> Messages | str:
    """A collective. `Messages` of all ranks, or what stands against them on some rank. slots: see `pipeline_schedules.slots_needed`."""
    team = Team("connecting the pipeline's stages", timeout)
    if not all(team.gather(peer_memory.streams_can_wait(device))):
        return "streams cannot wait for numbers in memory on some rank"
    messages = Messages(rank_of, rank, size, max(slots, _LEAST_SLOTS))
    return connect([], mesh, timeout, [messages]) or messages
