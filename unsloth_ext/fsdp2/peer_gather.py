"""Gathering frozen weights by copies from where they lie, in place of a collective.

A frozen shard never changes, so no rank has to take part when another reads it. On one host every rank maps the others' shards once
(peer_memory.py); from then on a gather is a few copies, made by the card's copy engines beside the layer that runs. What a
collective costs for these bytes goes away with it: the multiprocessors that NCCL's kernels take from the matrix products, the copy
into the collective's input and the one out of its output, and those two buffers.

FSDP2 still decides when a unit is gathered and freed, and still gathers what is trained: a small gather stays for each unit, by the
process group or, for layers, by copies as well (staged_collectives.py), in which the ranks wait for each other as before. Per weight it
carries a token of 16 bytes; its stream order does the rest:

* FSDP2 asks for a weight's input (`fsdp_pre_all_gather`) on its copy-in stream. There the unit's copies are queued, behind what
  the compute stream has been given so far: the memory may have been a freed tensor of that stream a moment ago.
* The gather of tokens and adapters comes after the copies on every rank, and the compute stream waits for it. So who has
  passed a unit's collective knows that all have read its shards, and may end.
* All weights of a unit are one buffer, made and freed as one.
"""

from __future__ import annotations

import contextlib
import os
import socket
import weakref
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from . import peer_memory
from .nf4_parameter import NF4Shard
from .processes import device_of, position
from .team import Team

__all__ = ["UnitGather", "connect"]

_ALIGNED = 256
_compute: dict[torch.device, torch.cuda.Stream] = {}  # the stream that weights were last computed with


def _up(number: int) -> int:
    return -(-number // _ALIGNED) * _ALIGNED


class UnitGather:
    """The NF4 weights of one unit: this rank's part in memory that the others read, and the buffer that they are gathered in."""

    def __init__(self, shards: list[NF4Shard], world: int, memory):
        self.shards, self.memory, self.device = shards, memory, shards[0].fields.packed.device
        # Per weight and field: (offset here, offset gathered, bytes a rank).
        self.places: list[list[tuple[int, int, int]]] = []
        here = gathered = 0
        for shard in shards:
            fields = []
            for tensor in shard.fields.tensors():
                size = tensor.numel() * tensor.itemsize
                fields.append((here, gathered, size))
                here, gathered = _up(here + size), _up(gathered + size * world)
            self.places.append(fields)
        self.world, self.size, self.size_here = world, gathered, here
        self.token = torch.zeros(16, dtype=torch.uint8, device=self.device)
        self.copies: tuple[tuple[int, int, int], ...] = ()
        self.buffer = torch.empty(gathered, dtype=torch.uint8, device=self.device)
        self.buffer.untyped_storage().resize_(0)
        self.part = None
        self.owner = self.copier = None  # streams: whose memory the buffer is, and which one the copies were queued on

    def move_in(self) -> None:
        """Move the shards to memory that can be offered."""
        self.part = self.memory.allocate(self.size_here)
        for shard, fields in zip(self.shards, self.places, strict=True):
            place = iter(fields)

            def moved(tensor, place=place):
                offset, _, size = next(place)
                target = self.part[offset : offset + size].view(tensor.dtype).view(tensor.shape)
                return target.copy_(tensor)

            shard._holder.fields = shard.fields.map(moved)

    def read_from(self, addresses: list[int], rank: int) -> None:
        """From now on gather so. addresses: of each rank's part. Each rank begins with the next one's, so that none serves all."""
        self.copies = tuple(
            (gathered + other * size, addresses[other] + here, size)
            for other in ((rank + 1 + i) % self.world for i in range(self.world))
            for fields in self.places
            for here, gathered, size in fields
        )
        for index, shard in enumerate(self.shards):
            shard._holder.unit, shard._holder.index = self, index
        self.shards = []  # a tensor in a cycle of references can outlive all garbage collections

    def start(self) -> None:
        """Queue the copies on the current stream, unless a weight of this unit has done so."""
        storage = self.buffer.untyped_storage()
        here = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        if storage.size():
            if here != self.copier:  # of a gather that was given up: its copies may still be under way
                here.wait_stream(self.copier)
            return
        self.copier = here
        try:
            if here is None:
                storage.resize_(self.size)
            else:
                self.owner = _compute.get(self.device) or torch.cuda.default_stream(self.device)
                with torch.cuda.stream(self.owner):
                    storage.resize_(self.size)
                if here != self.owner:
                    here.wait_stream(self.owner)
            self.memory.copy(self.copies, storage.data_ptr(), 0 if here is None else here.cuda_stream)
        except BaseException:
            if here is not None:
                self.buffer.record_stream(here)
            storage.resize_(0)  # the next gather would take it for a filled one
            raise

    def used(self) -> None:
        """The current stream computes with the buffer."""
        if self.device.type == "cuda":
            now = torch.cuda.current_stream(self.device)
            if now != self.owner:
                self.buffer.record_stream(now)
            _compute[self.device] = now

    def weight(self, index: int) -> list[torch.Tensor]:
        """uint8 views of the buffer: packed, absmax and, if nested, absmax2 of all ranks."""
        return [self.buffer[at : at + size * self.world] for _, at, size in self.places[index]]


def connect(units: list[list[NF4Shard]], mesh: DeviceMesh, timeout=None, others=()) -> str | None:
    """Gather these units by copies. A collective. None, or what stands against it on some rank: then nothing has changed.

    units: sharded NF4 weights by FSDP2 unit, in the same order on every rank. others: what else reads the ranks' memory, `EmbeddingRows`
    and staged collectives: each gets `memory`, allocates its `part` of `size_here` bytes in `move_in()`, and is told of all ranks' in
    `read_from(addresses, rank)`.
    """
    rank, world = position(mesh)
    ranks = dist.get_process_group_ranks(mesh.get_group(mesh.ndim - 1))
    team = Team("sharing memory between ranks", timeout)
    device = units[0][0].fields.packed.device if units and units[0] else device_of(mesh)
    units, others = (units, others) if world > 1 else ([], ())
    memory = identity = reason = None
    try:
        memory = peer_memory.of_device(device, None if timeout is None else timeout.total_seconds())
        identity = memory.identity()
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # copies of an earlier model, whose memory this one may get, have ended then
    except Exception as error:
        reason = _text(error)
    everyone = team.gather((reason, _host(), identity))
    if reason := _first([reason for reason, _, _ in everyone]):
        return reason
    everyone = [everyone[r] for r in ranks]
    if len({host for _, host, _ in everyone}) > 1:
        reason = "the ranks are on several hosts"
    elif units or others:
        try:
            reason = memory.out_of_reach([identity for _, _, identity in everyone])
        except Exception as error:
            reason = _text(error)
    if reason := _first(team.gather(reason)):
        return reason
    try:
        return _connect(units, others, ranks, rank, memory, device, team)
    finally:
        if isinstance(memory, peer_memory.HostMemory):
            memory.forget()


def _connect(units, others, ranks: list[int], rank: int, memory, device: torch.device, team: Team) -> str | None:
    made: list = []
    offers: list | str = []
    try:
        for one in others:
            one.memory = memory
        everything = [*(UnitGather(shards, len(ranks), memory) for shards in units), *others]
        memory.expect([unit.size_here for unit in everything])
        for unit in everything:
            made.append(unit)
            unit.move_in()
            offers.append(memory.offer(made[-1].part))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except Exception as error:
        offers = _text(error)
    offered = team.gather(offers)
    if reason := _first([one for one in offered if isinstance(one, str)]):
        return reason

    opened: list = []
    addresses, reason = [], None
    try:
        for number, unit in enumerate(made):
            there = []
            for other, process in enumerate(ranks):
                if other == rank:
                    there.append(unit.part.data_ptr())
                    continue
                address, handle = memory.open(offered[process][number])
                opened.append(handle)
                there.append(address)
            addresses.append(there)
    except Exception as error:
        reason = _text(error)
    # Every unit has `memory`: what was opened is closed with the last one, of which code may have kept a layer.
    weakref.finalize(memory, _close, type(memory), opened, os.getpid()).atexit = False
    if reason := _first(team.gather(reason)):
        return reason
    for unit, there in zip(made, addresses, strict=True):
        unit.read_from(there, rank)
    return None


def _close(kind, opened: list, process: int) -> None:
    if process == os.getpid():  # not in a worker that was forked
        with contextlib.suppress(RuntimeError):  # of a card that has failed
            kind.close(opened)


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _first(reasons) -> str | None:
    return next((reason for reason in reasons if reason), None)


def _host() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()} {boot.read_text().strip() if boot.is_file() else ''}"
