"""The frozen input embedding, read by rows from where they lie: a batch needs a few thousand of its rows, never the whole.

Gathered whole it is the largest unit of many models (1 GiB of Llama 3.1 8B), the first that a step waits for, and its forward copies a
hundredth of it. Among the cards of one host, where 4-bit weights come by copies (peer_gather.py), every rank already reads the others'
memory: here a kernel reads each token's row from the rank that has it. Nothing is gathered, and no rank takes part in another's read.
From the second layer on, copies wait for what the compute stream has done: who has passed their gather knows that all have read.

The parameter is a DTensor like those of FSDP2, cut like theirs, but no unit of FSDP2: saving, loading and counting see no difference.
"""

from __future__ import annotations

import contextlib

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from .row_shard import RowShard, rows_of

__all__ = ["EmbeddingRows", "can_be_read_by_rows"]


def can_be_read_by_rows(embedding: nn.Module) -> bool:
    """Whether this is a plain lookup in a frozen matrix, and nothing else."""
    weight = getattr(embedding, "weight", None)
    return (
        type(embedding).forward is nn.Embedding.forward
        and "forward" not in vars(embedding)
        and [id(p) for p in embedding.parameters()] == [id(weight)]
        and weight.ndim == 2
        and not weight.requires_grad
        and embedding.max_norm is None  # which writes into the weight
    )


class EmbeddingRows:
    """A rank's rows of an embedding in memory that the others read. What peer_gather.connect makes of it: `part`, then `read_from`.

    embedding: frozen, whole on this rank or a `RowShard`; from here on with this rank's rows only. dtype: of what it gives, or None.
    """

    def __init__(self, embedding: nn.Module, mesh: DeviceMesh, rank: int, world: int, device: torch.device, dtype=None):
        weight = embedding.weight
        self.embedding, self.mesh, self.rank, self.world, self.dtype = embedding, mesh, rank, world, dtype
        self.count, self.width = weight.shape
        if isinstance(weight, RowShard):
            rows = weight.rows
        else:
            start, stop = rows_of(rank, world, self.count)
            rows = weight.detach()[start:stop].clone()
        self.each = -(-self.count // world)
        self.memory = self.part = None
        self.views: list[torch.Tensor] = []  # on a CPU: all ranks' rows
        self.table = torch.zeros(world, dtype=torch.int64, device=device)
        self.rows = rows.to(device)
        self.size_here = max(rows.numel() * rows.itemsize, 256)  # the last ranks may have none
        embedding.weight = self.parameter()

    def parameter(self) -> nn.Parameter:
        """Cut as FSDP2 cuts, so that it can have the rest of the model's parameters."""
        return nn.Parameter(RowShard(self.rows, (self.count, self.width), self.rank, self.world), requires_grad=False)

    def move_in(self) -> None:
        size = self.rows.numel() * self.rows.itemsize
        self.part = self.memory.allocate(self.size_here)
        moved = self.part[:size].view(self.rows.dtype).view(self.rows.shape)
        self.rows = moved.copy_(self.rows)
        self.embedding.weight = self.parameter()  # the rows that were are free

    def read_from(self, addresses: list[int], rank: int) -> None:
        """addresses: of each rank's `part`, in this process. The embedding's forward is the lookup from here on."""
        mesh, shape = self.mesh, torch.Size((self.count, self.width))
        placements = [*[Replicate()] * (mesh.ndim - 1), Shard(0)]
        local = DTensor.from_local(self.rows, mesh, placements, run_check=False, shape=shape, stride=(self.width, 1))
        self.embedding.weight = nn.Parameter(local, requires_grad=False)
        self.table.copy_(torch.tensor(addresses, dtype=torch.int64))
        if self.table.device.type == "cpu":
            self.views = [self._view(address, other) for other, address in enumerate(addresses)]
        self.embedding._unsloth_ext_rows = self
        self.embedding.forward = self.lookup
        self.embedding = None  # which has this: without a cycle of references the memory goes with the embedding

    def _view(self, address: int, rank: int) -> torch.Tensor:
        """Rows of another process: of memory that `HostMemory` has mapped, and holds."""
        import ctypes

        start, stop = rows_of(rank, self.world, self.count)
        size = (stop - start) * self.width * self.rows.itemsize
        flat = torch.frombuffer((ctypes.c_ubyte * max(size, 1)).from_address(address), dtype=torch.uint8)[:size]
        return flat.view(self.rows.dtype).view(stop - start, self.width)

    @torch.compiler.disable
    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        """ids: int64 or int32 [...] on this rank's device. Returns [..., width]. A row of an id that is out of range is NaN."""
        if ids.dtype not in (torch.int64, torch.int32):
            raise RuntimeError(f"token ids must be int64 or int32, got {ids.dtype}")
        ids = ids.to(self.table.device)  # as FSDP2 does for its root
        out = torch.empty(*ids.shape, self.width, dtype=self.rows.dtype, device=ids.device)
        if self.views:
            for rank, rows in enumerate(self.views):
                mine = (ids >= rank * self.each) & (ids < rank * self.each + rows.shape[0])
                out[mine] = rows[ids[mine] - rank * self.each]
            out[(ids < 0) | (ids >= self.count)] = float("nan")
        else:
            from .embedding_kernel import read_rows

            read_rows(ids, self.table, out, self.each, self.count)
        return out if self.dtype is None else out.to(self.dtype)

    @contextlib.contextmanager
    def whole(self, embedding: nn.Module):
        """Within it this embedding's parameter is the whole weight, for code that reads it. A collective."""
        own = embedding.weight
        if isinstance(own, DTensor):  # else it is whole already
            full = own.detach().full_tensor()
            embedding.weight = nn.Parameter(full.to(self.dtype or full.dtype), requires_grad=False)
        try:
            yield
        finally:
            embedding.weight = own

    def __reduce_ex__(self, protocol):
        raise TypeError(
            "rows of an embedding that other processes read cannot be copied or pickled, as all of a sharded model"
        )
