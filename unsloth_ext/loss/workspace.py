"""Where a row chunk's logits and products live while they are needed.

The results themselves are the largest buffers of this computation, and most of each is still empty while it is being made: rows
of the hidden states' gradient that come later hold the logits of earlier rows, and what is left of a weight's gradient holds the
logits that make the next part of it. Only the last chunks need memory of their own, `extra` bytes of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

ALIGN = 256  # bytes: what the matmul kernels like, and more than any dtype asks for
MIN_COLUMNS = 2048  # narrower tiles of the vocabulary leave the card idle
CHUNKS = (4096, 2048, 1024, 512, 256, 128, 64, 16)


def aligned(n: int, to: int = ALIGN) -> int:
    return -(-n // to) * to


@dataclass(frozen=True)
class RowChunk:
    """Rows [start, start + rows), taken `columns` of the vocabulary at a time; in which region the logits and the product are."""

    start: int
    rows: int
    columns: int
    logits_in_tail: bool
    product_in_tail: bool


def row_chunks(
    rows, hidden_size, vocab_size, *, logit_bytes, acc_bytes, row_bytes, extra, most_rows, most_columns
) -> Iterator[RowChunk]:
    """Cut `rows` into the fewest chunks that fit. One by one: while the card has the first, the host finds the next.

    row_bytes: of a row of the result that is still to be written, 0 if none is; acc_bytes: of an element of the product, 0 if there is none.
    """
    start = 0
    floor = min(vocab_size, MIN_COLUMNS)
    while start < rows:
        left = rows - start
        for size in (s for s in CHUNKS if s <= most_rows or s == CHUNKS[-1]):
            size = min(size, left)
            tail = (left - size) * row_bytes - 2 * ALIGN  # a region may start anywhere
            product = aligned(size * hidden_size * acc_bytes)
            best = (0, False, False)
            for logits_in_tail in (True, False):
                for product_in_tail in (True, False):
                    if (product_in_tail and product > tail) or (not product_in_tail and product > extra):
                        continue
                    room = tail if logits_in_tail else extra
                    room -= product if product_in_tail == logits_in_tail else 0
                    columns = max(room, 0) // (size * logit_bytes)
                    columns = vocab_size if columns >= aligned(vocab_size, 8) else columns // 256 * 256
                    best = max(best, (min(columns, most_columns), logits_in_tail, product_in_tail))
            if best[0] >= floor or size <= CHUNKS[-1]:
                break
        columns = max(best[0], min(vocab_size, 256))
        columns = min(columns, aligned(-(-vocab_size // -(-vocab_size // columns)), 256))  # even tiles
        yield RowChunk(start, size, columns, best[1] and best[0] > 0, best[2] and best[0] > 0)
        start += size


class Region:
    """Bytes to be cut into tensors, one after the other."""

    def __init__(self, buffer: torch.Tensor):
        self.bytes = buffer.view(-1).view(torch.uint8)
        self.at = 0

    def left(self) -> int:
        """Bytes that a tensor may still have."""
        return self.bytes.numel() - self.at - 2 * ALIGN

    def take(self, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        """A tensor [rows, columns] whose rows start at multiples of 16 bytes."""
        stride = aligned(columns, 16 // dtype.itemsize)
        start = aligned(self.bytes.data_ptr() + self.at) - self.bytes.data_ptr()
        size = rows * stride * dtype.itemsize
        self.at = start + size
        if self.at > self.bytes.numel():
            raise RuntimeError(f"workspace: {self.at} bytes of {self.bytes.numel()}")
        return self.bytes[start : self.at].view(dtype).view(rows, stride)[:, :columns]
