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
        if func is aten.new_zeros.default:
            return torch.zeros(
                args[1], dtype=kwargs.get("dtype") or self.dtype, device=kwargs.get("device") or self.device
            )
        raise NotImplementedError(
            f"{func} on one rank's rows of a weight: call unsloth_ext.fsdp2.shard(model) before using the model"
        )
