"""`RowShard`: one rank's rows of a weight that is not quantised, as a parameter that FSDP2 can take over.

FSDP2 cuts a whole parameter by `torch.chunk` along its first dimension. A `RowShard` claims the shape of the whole and holds the
rows that the cut gives this rank; cutting it gives them out as a plain tensor, with empty stand-ins for the other ranks. From
then on the parameter is an ordinary one of FSDP2. So an embedding of gigabytes is read by rows and is never whole.
"""

from __future__ import annotations

import torch

__all__ = ["RowShard", "rows_of"]


def rows_of(rank: int, world: int, rows: int) -> tuple[int, int]:
    """[start, stop) of the rows that torch.chunk gives `rank`; empty for the last ranks where they run out."""
    each = -(-rows // world)
    return min(rank * each, rows), min((rank + 1) * each, rows)


class RowShard(torch.Tensor):
    """rows: this rank's rows, [stop - start, ...]; shape: of the whole weight. Raises ValueError if they do not fit."""

    @staticmethod
    def __new__(cls, rows, shape, rank: int, world: int, requires_grad: bool = False):
        return torch.Tensor._make_wrapper_subclass(
            cls, tuple(shape), dtype=rows.dtype, device=rows.device, requires_grad=requires_grad
        )

    def __init__(self, rows, shape, rank: int, world: int, requires_grad: bool = False):
        start, stop = rows_of(rank, world, shape[0])
        if tuple(rows.shape) != (stop - start, *shape[1:]):
            raise ValueError(
                f"rank {rank} of {world} holds rows {start} to {stop} of a weight {tuple(shape)}, got {tuple(rows.shape)}"
            )
        self.rows, self.rank, self.world = rows, rank, world

    def __repr__(self, *, tensor_contents=None) -> str:
        return (
            f"RowShard({tuple(self.shape)}, {self.dtype}, rank {self.rank} of {self.world}, {self.rows.shape[0]} rows)"
        )

    def data_ptr(self) -> int:
        """Where the rows are. Unsloth and accelerate take parameters with the same address for tied ones, and a wrapper has none."""
        return self.rows.data_ptr() or id(self.rows)

    def __deepcopy__(self, memo):
        """Done here, as torch knows by an address of 0 what it has to copy as a wrapper. peft copies what it will train."""
        copied = memo[id(self)] = self._with(self.rows.clone())
        if isinstance(self, torch.nn.Parameter):
            copied = memo[id(self)] = torch.nn.Parameter(copied, requires_grad=self.requires_grad)
        return copied

    def bytes_held(self) -> int:
        return self.rows.numel() * self.rows.itemsize

    def _with(self, rows) -> RowShard:
        return RowShard(rows, self.shape, self.rank, self.world)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs, aten, self = kwargs or {}, torch.ops.aten, args[0]
        if func in (aten.detach.default, aten.alias.default):
            return self._with(self.rows)
        if func in (aten.clone.default, aten._to_copy.default):
            return self._with(func(self.rows, **kwargs))
        if func is aten.split.Tensor and (len(args) < 3 or args[2] == 0):
            each, rows = args[1], self.shape[0]
            if each != -(-rows // self.world):
                raise RuntimeError(f"{self} was cut for {self.world} ranks and cannot be cut again, by {each} rows")
            # FSDP2 reads the size of the first piece, whoever owns it: stand-ins have one, and no memory.
            nothing, sizes = self.rows.new_empty(()), [min(each, rows - at) for at in range(0, rows, each)]
            return [
                self.rows.detach() if i == self.rank else nothing.expand(size, *self.shape[1:])
                for i, size in enumerate(sizes)
            ]
        if func is aten.select.int and args[1] == 0 and -self.shape[0] <= args[2] < self.shape[0]:
            return _Row(self, args[2] % self.shape[0])
        if func is aten.new_zeros.default:
            return torch.zeros(
                args[1], dtype=kwargs.get("dtype") or self.dtype, device=kwargs.get("device") or self.device
            )
        raise _too_soon(func)


def _too_soon(func) -> NotImplementedError:
    return NotImplementedError(
        f"{func} on one rank's rows of a weight: call unsloth_ext.fsdp2.shard(model) before using the model"
    )


class _Row(torch.Tensor):
    """One row, which can be overwritten and nothing else: by the rank that has it. Unsloth zeroes the padding token's row so."""

    @staticmethod
    def __new__(cls, shard: RowShard, index: int):
        return torch.Tensor._make_wrapper_subclass(cls, shard.shape[1:], dtype=shard.dtype, device=shard.device)

    def __init__(self, shard: RowShard, index: int):
        start, stop = rows_of(shard.rank, shard.world, shard.shape[0])
        self.row = shard.rows[index - start] if start <= index < stop else None

    def __repr__(self, *, tensor_contents=None) -> str:
        return f"_Row({tuple(self.shape)}, {'here' if self.row is not None else 'of another rank'})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        aten = torch.ops.aten
        writes = (aten.fill_.Scalar, aten.fill_.Tensor, aten.zero_.default, aten.copy_.default)
        if func not in writes or any(isinstance(other, _Row) for other in args[1:]):
            raise _too_soon(func)
        if args[0].row is not None:
            func(args[0].row, *args[1:], **(kwargs or {}))
        return args[0]
