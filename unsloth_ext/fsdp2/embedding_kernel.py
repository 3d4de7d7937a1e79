"""The lookup of embedding_rows.py on a card: a program for each token copies its row from the rank's memory that has it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["read_rows"]

_BLOCK = 1024


def read_rows(ids: torch.Tensor, table: torch.Tensor, out: torch.Tensor, each: int, count: int) -> None:
    """out[i] = row ids[i] of a [count, width] matrix whose rows [r * each, (r + 1) * each) begin at the address table[r], a multiple of 16.

    ids: int64 or int32, any shape; table: int64 [ranks]; out: [*ids.shape, width], contiguous, of the matrix's dtype."""
    if ids.numel():
        _read_rows[(ids.numel(),)](ids.contiguous(), table, out, each, count, out.shape[-1], BLOCK=_BLOCK, num_warps=4)


@triton.jit
def _read_rows(ids, table, out, each, count, width, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    row = tl.load(ids + token).to(tl.int64)
    known = (row >= 0) & (row < count)
    row, there = tl.where(known, row, 0), tl.where(known, width, 0)
    rank = row // each
    # Nothing else says that these addresses are aligned, and loads of one element each would go through the link.
    rows = tl.multiple_of(tl.load(table + rank).to(tl.pointer_type(out.dtype.element_ty)), 16)
    rows += (row - rank * each) * width
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        values = tl.load(rows + columns, mask=columns < there, other=float("nan"))
        tl.store(out + token * width + columns, values, mask=columns < width)
