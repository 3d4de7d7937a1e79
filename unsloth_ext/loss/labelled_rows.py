"""The rows whose label counts, found without leaving the card idle for longer than it takes to launch a kernel.

Rows without a label (prompts, padding) cost as much as others unless they are left out, and to leave them out the host has to
know how many there are. Up to there it may be a whole forward ahead of the card; once it has waited, the card waits for the host.
So the count is asked for before anything else, and everything that does not depend on it is done before the answer is taken:
checks, casts, the divisor, how much memory there is, the way into the operator.
"""

from __future__ import annotations

import torch

_MOST_LABELLED = 0.9  # of the rows: with more, copying the labelled ones together saves no time and costs memory


class LabelledRows:
    """Made with keep [T], of bool; `indices` waits for the card. A compiler, and the capture of a CUDA graph, cannot wait: `of`."""

    def __init__(self, keep: torch.Tensor):
        self._arrived, self.total = None, keep.numel()
        if not self.total:
            return
        places = keep.cumsum(0)
        self._count = places[-1].to("cpu", non_blocking=keep.is_cuda)
        if keep.is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(keep.device))
        # The k-th row to keep is the first at which k of them have come. What comes after the last one is cut off.
        self._rows = torch.searchsorted(places, torch.arange(1, self.total + 1, device=keep.device))

    @classmethod
    def of(cls, keep: torch.Tensor) -> LabelledRows | None:
        """None where all rows have to be taken because nobody may wait."""
        if torch.compiler.is_compiling() or (keep.is_cuda and torch.cuda.is_current_stream_capturing()):
            return None
        return cls(keep)

    def indices(self) -> torch.Tensor | None:
        """Ascending, int64 [number of rows to keep], or None where all rows should be taken: nearly all count, or none does."""
        if not self.total:
            return None
        if self._arrived is not None:
            self._arrived.synchronize()
        count = int(self._count)
        return self._rows[:count] if 0 < count < _MOST_LABELLED * self.total else None
