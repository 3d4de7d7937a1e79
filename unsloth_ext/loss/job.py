"""One call of `chunked_loss`, as the eager and the traced way share it: how a chunk is computed and how the chunks add up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from . import outputs
from .heads import Head


@dataclass(frozen=True, eq=False)
class Job:
    """Holds no rows: those are saved by autograd, where memory-saving hooks can see them."""

    function: Callable
    head: Head
    arguments: tuple  # for each target (True, index of its rows) or (False, the constant)
    lead: torch.Size
    size: int
    reduction: str | None
    num_items: torch.Tensor | float | None
    rowwise: bool
    extra: tuple[torch.Tensor, ...]

    def bounds(self, rows: int):
        """(start, stop) of each chunk; no rows are one empty chunk, which tells what the function returns."""
        starts = [0]
        while starts[-1] + self.size < rows:  # by comparisons: a traced number of rows stays symbolic
            starts.append(starts[-1] + self.size)
        return list(zip(starts, [*starts[1:], rows], strict=True))

    def evaluate(self, call, rows) -> outputs.Output:
        """The function on one chunk. rows: the chunk of hidden, then those of the targets."""
        n = rows[0].shape[0]
        # A view: hooks that watch a module's input (FLOP and communication counters) cannot watch the leaf of autograd.grad.
        logits = call(rows[0].view_as(rows[0]))
        if not isinstance(logits, torch.Tensor) or logits.dim() != 2 or logits.shape[0] != n:
            got = list(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
            raise ValueError(f"head must give logits [{n}, V] for [{n}, {rows[0].shape[1]}], it gave {got}")
        vocab_size = logits.shape[1]
        arguments = [rows[value] if is_rows else value for is_rows, value in self.arguments]
        return outputs.read(self.function(logits, *arguments), n, vocab_size)

    def share(self, output: outputs.Output, reduction: str, n: int):
        """(sum, weight) that a chunk of n rows adds to a result that is one number."""
        value, weight = output.tensors[0], output.weight
        if output.kind is outputs.TOKENS:
            weight, value = value.numel(), value.sum()
        elif output.kind is outputs.SCALAR:
            weight = n
            if reduction == "mean":
                # The mean of no rows is NaN: 0, with a path for the zero gradients that other ranks wait for.
                value = value * n if n else torch.nan_to_num(value) * 0
        if isinstance(weight, torch.Tensor):
            weight = weight.detach().to(accumulator_dtype(weight.dtype) if weight.is_floating_point() else torch.int64)
        return value.to(accumulator_dtype(value.dtype)), weight

    def divisor(self, reduction: str, weight):
        """What the sum is divided by: a number or a tensor, and never zero."""
        number = self.num_items if self.num_items is not None else weight if reduction == "mean" else 1
        if isinstance(number, torch.Tensor):
            return torch.where(number == 0, torch.ones_like(number), number)
        return number if number != 0 else 1

    def shaped(self, results):
        """Values of rows get the leading dimensions of hidden back."""
        if len(results) == 1 and results[0].dim() == 0:
            return results[0]
        results = tuple(value.reshape(*self.lead, *value.shape[1:]) for value in results)
        return results if len(results) > 1 else results[0]


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
