"""Attention inside each document of a packed row, in a few plain lines: the oracle of the tests.

One [T, T] mask for the whole row, one softmax. Every other implementation must agree with it; none should be as slow.
"""

import torch


def documents_of(cu_seqlens: torch.Tensor, total: int) -> torch.Tensor:
    """The number of the document that each of `total` tokens belongs to, [total], int64. Tokens after the last
    boundary count as one more document."""
    positions = torch.arange(total, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:], positions, right=True)


def allowed(documents: torch.Tensor, window: int | None = None) -> torch.Tensor:
    """[T, T] bool: query i may read key j, in the same document, not after it, and less than `window` before it."""
    position = torch.arange(documents.numel(), device=documents.device)
    mask = (documents[:, None] == documents[None, :]) & (position[:, None] >= position[None, :])
    if window is not None:
        mask &= position[:, None] - position[None, :] < window
    return mask


def reference_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """query [T, H, D], key and value [T, H_kv, D], cu_seqlens [n + 1] -> [T, H, D], in the inputs' dtype throughout."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = torch.einsum("qhd,khd->hqk", query, key) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    mask = allowed(documents_of(cu_seqlens, query.shape[0]), window)
    probabilities = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", probabilities, value)
