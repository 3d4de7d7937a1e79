"""How many rows of logits to hold at once.

A chunk of n rows costs n * V logits. In plain torch about four copies of it live at the peak (the head's output, its
fp32 upcast, the softmax and the gradient), so "auto" keeps one fp32 copy within `LOGITS_BYTES`, and an eighth of all
rows where that is less: below `ENOUGH_ROWS` a matmul becomes slower, above it there is little to gain.

Fewer rows are not free where the head is trained: each chunk reads and writes the fp32 gradient of the whole weight
[V, D]. With D / 2 rows the chunk's four fp32 copies are twice that gradient, or half of it where the loss is compiled (the head's
output and its gradient are then all there is), and "auto" takes at least that many rows: on an H200 at D = 4096, V = 128256 they
took 95.5 ms and 3.6 GiB, D / 4 rows 111.5 ms and 3.3 GiB, D rows 88.8 ms and 4.1 GiB. Where a CUDA card has little memory left, it takes fewer: the
copies may use an eighth of what is free. That is rounded down to a power of two, so that the size stays the same from
step to step; asking for it does not wait for the card. A traced graph is used later, in other conditions: there free
memory is not asked for.
"""

from __future__ import annotations

import math
import operator

import torch

from .. import card_memory

# One fp32 copy of a chunk's logits. It is the whole rule where free memory is not known (CPU).
LOGITS_BYTES = 256 << 20
ENOUGH_ROWS = 512
ROWS = 128  # tiles of a matmul: "auto" gives multiples of it
_COPIES = 4


def rows_per_chunk(chunk_size, rows: int, vocab_size: int, hidden_size: int, trained: bool, device) -> int:
    """The rows of a chunk, at least 1. `chunk_size` is "auto" or a positive int, which is taken as it is.

    Raises TypeError for another type and ValueError for another string or a number below 1.
    """
    if isinstance(chunk_size, str):
        if chunk_size != "auto":
            raise ValueError(f'chunk_size must be "auto" or a number of rows, got {chunk_size!r}')
        if torch.compiler.is_compiling():
            return _automatic(None, vocab_size, hidden_size, trained, device)
        size = _automatic(rows, vocab_size, hidden_size, trained, device)
        # Even chunks: one that is nearly empty costs as much weight traffic as a full one.
        chunks = max(1, math.ceil(rows / size))
        size = min(size, math.ceil(rows / chunks / ROWS) * ROWS)
    else:
        try:
            size = operator.index(chunk_size)
        except TypeError:
            size = None
        if size is None or isinstance(chunk_size, bool):
            raise TypeError(f'chunk_size must be "auto" or an int, got {type(chunk_size).__name__}') from None
        if size < 1:
            raise ValueError(f"chunk_size must be positive, got {size}")
    # Traced, the number of rows may be symbolic, and a size that depends on it would tie the graph to it.
    return size if torch.compiler.is_compiling() else max(1, min(size, rows))


def _automatic(rows: int | None, vocab_size: int, hidden_size: int, trained: bool, device) -> int:
    vocab_size = max(vocab_size, 1)
    size = LOGITS_BYTES // (4 * vocab_size)
    if rows is not None:
        size = min(size, max(rows // 8, ENOUGH_ROWS))
    if trained:
        size = max(size, hidden_size // 2)
    if device.type == "cuda" and not torch.compiler.is_compiling():
        row = _COPIES * 4 * vocab_size
        enough = 8 << (size * row - 1).bit_length()  # with as much the size stays
        budget = 1 << max(card_memory.free_bytes(device, enough) // 8, 1).bit_length() - 1
        size = min(size, budget // row)
    return max(size // ROWS * ROWS, ROWS)
