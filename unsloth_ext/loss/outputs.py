"""What a user's function may return for a chunk, and how the chunks become one result.

| it returns, for n rows      | reduction           | the result                                                       |
| --------------------------- | ------------------- | ---------------------------------------------------------------- |
| a pair of scalars           | "mean" (default)    | sum of the firsts / sum of the seconds: a masked mean, exact     |
|   (sum, weight)             | "sum"               | sum of the firsts                                                |
| values [n, ...] of each row | "none" (default)    | values [tokens, ...], to compute with further; several in a tuple |
|                             | "sum", "mean"       | their sum, their mean                                            |
| a scalar                    | "sum"               | the sum                                                          |
|                             | "mean"              | each is the mean of its rows: weighted by their number           |

A lone scalar has no default: nothing tells a sum from a mean, and a masked mean cannot be put together from means of
chunks. With `num_items_in_batch` a sum is divided by it in place of the local weight.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

SCALAR, PAIR, TOKENS = "a scalar", "a pair (sum, weight)", "values of each row"
_EXPECTED = (
    "a scalar, a pair (sum, weight) of scalars, or a tensor (or a tuple of them) with the chunk's {n} rows first"
)


class Output(NamedTuple):
    kind: str
    tensors: tuple[torch.Tensor, ...]  # (scalar,), (sum,) or the values
    weight: torch.Tensor | float | None  # of a pair

    def like(self) -> tuple:
        """What must be the same for each chunk."""
        return self.kind, tuple((tensor.shape[1:], tensor.dtype) for tensor in self.tensors)


def read(result, n: int, vocab_size: int) -> Output:
    """Sort out what the function returned for a chunk of n rows. Raises TypeError or ValueError that say what was expected."""
    expected = _EXPECTED.format(n=n)
    if isinstance(result, torch.Tensor):
        if result.dim() == 0:
            return Output(SCALAR, (result,), None)
        return Output(TOKENS, (_rows(result, n, vocab_size, expected),), None)
    if not isinstance(result, (tuple, list)) or not result:
        raise TypeError(f"function must return {expected}; it returned {_named(result)}")
    if isinstance(result[0], torch.Tensor) and result[0].dim() == 0:
        if len(result) != 2 or not _is_scalar(result[1]):
            raise ValueError(f"function must return {expected}; it returned {_named(result)}")
        if isinstance(result[1], torch.Tensor) and result[1].requires_grad:
            raise ValueError(
                "function returned a pair (sum, weight) whose weight wants a gradient: detach it, or return the values of "
                "each row and take their mean yourself"
            )
        return Output(PAIR, (result[0],), result[1])
    if not all(isinstance(value, torch.Tensor) for value in result):
        raise TypeError(f"function must return {expected}; it returned {_named(result)}")
    return Output(TOKENS, tuple(_rows(value, n, vocab_size, expected) for value in result), None)


def resolve(reduction: str | None, output: Output, num_items_in_batch) -> str:
    """The reduction for this kind of output. Raises ValueError where it has no meaning."""
    kind, single = output.kind, len(output.tensors) == 1
    if num_items_in_batch is not None:
        if kind is SCALAR and reduction != "sum":
            raise ValueError(
                'function returns a scalar: with num_items_in_batch pass reduction="sum" and let it return the sum over its rows'
            )
        if reduction == "none" or not single:
            raise ValueError("num_items_in_batch divides a sum, but function returns values of each row that are kept")
        return "mean" if reduction is None else reduction
    if reduction is None:
        if kind is SCALAR:
            raise ValueError(
                'function returns a scalar: pass reduction="sum" if it is a sum over its rows, "mean" if it is their mean '
                "(every row counting alike). For a mean over unmasked rows return a pair (sum, number of unmasked rows)"
            )
        return "mean" if kind is PAIR else "none"
    if reduction == "none" and kind is not TOKENS:
        raise ValueError(f'reduction="none" needs values of each row, but function returns {kind}')
    if reduction != "none" and not single:
        raise ValueError(f'reduction="{reduction}" needs one tensor, but function returns {len(output.tensors)}')
    return reduction


def _rows(value, n, vocab_size, expected):
    if value.dim() == 0 or value.shape[0] != n:
        raise ValueError(f"function must return {expected}; it returned a tensor of shape {list(value.shape)}")
    if value.dim() > 1 and value.numel() >= n * vocab_size > 0:
        raise ValueError(
            f"function returned a tensor of shape {list(value.shape)}, as large as the logits [{n}, {vocab_size}]: reduce it "
            "over the vocabulary first"
        )
    return value


def _is_scalar(value) -> bool:
    if isinstance(value, torch.Tensor):
        return value.dim() == 0
    return isinstance(value, (int, float))


def _named(result) -> str:
    if isinstance(result, torch.Tensor):
        return f"a tensor of shape {list(result.shape)}"
    if isinstance(result, (tuple, list)):
        return f"{type(result).__name__} ({', '.join(_named(value) for value in result)})"
    return "None" if result is None else type(result).__name__
