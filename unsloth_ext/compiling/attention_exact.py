"""Packed attention on any device, a document at a time: `unsloth_ext::packed_attention`.

It is what a CPU runs, and what a card without a kernel for the call falls to when it is asked for by name. Scores are held
in fp32 (fp64 for fp64 inputs), one document and at most `_ROWS` queries at a time, so that no [T, T] matrix ever exists.
The boundaries are read on the host, once a call: on a card that is a wait, which the fast backends do not have.

To torch.compile it is one opaque operator with a fake kernel and a backward of its own, the flash formulas (Dao et al.,
arXiv 2205.14135, appendix B) with the softcap's derivative in them: the graph does not depend on how a row was packed.
"""

# no `from __future__ import annotations`: torch.library reads these annotations
from itertools import pairwise

import torch

from .attention_gradients import differentiable

_ROWS = 512


def _runs(cu_seqlens, total):
    """(first query, end of queries, first key) of every piece: at most _ROWS queries of one document, all their keys."""
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] > total or any(b < a for a, b in pairwise(bounds)):
        raise ValueError(f"cu_seqlens must rise from 0 to at most the {total} tokens, got {bounds[:8]}..{bounds[-1]}")
    for start, end in pairwise(bounds):
        for first in range(start, end, _ROWS):
            yield first, min(first + _ROWS, end), start


def _scores(query, key, offset, scale, window, softcap):
    """query [q, H_kv, G, D], key [k, H_kv, D] -> capped scores [H_kv, G, q, k] with -inf where a query may not look, and
    the derivative of the cap. The first query stands `offset` after the first key."""
    scores = torch.einsum("qhgd,khd->hgqk", query, key) * scale
    slope = None
    if softcap is not None:
        slope = torch.tanh(scores / softcap)
        scores = softcap * slope
        slope = 1 - slope * slope
    distance = torch.arange(query.shape[0], device=key.device)[:, None] + offset
    distance = distance - torch.arange(key.shape[0], device=key.device)[None, :]
    hidden = distance < 0
    if window is not None:
        hidden |= distance >= window
    return scores.masked_fill_(hidden, float("-inf")), slope


def _wide(tensor):
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _first_key(first, start, window):
    return start if window is None else max(start, first - window + 1)


@torch.library.custom_op("unsloth_ext::packed_attention", mutates_args=())
def packed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """query [T, H, D], key and value [T, H_kv, D], cu_seqlens [n + 1] int32 -> ([T, H, D], log-sum-exp [H, T] in fp32 or
    fp64). Tokens after the last boundary give zeros."""
    total, heads, width = query.shape
    kv_heads = key.shape[1]
    out = torch.zeros((total, heads, width), dtype=query.dtype, device=query.device)
    wide = torch.promote_types(query.dtype, torch.float32)
    logsumexp = torch.zeros((heads, total), dtype=wide, device=query.device)
    grouped = query.unflatten(1, (kv_heads, heads // kv_heads))
    for first, end, start in _runs(cu_seqlens, total):
        low = _first_key(first, start, window)
        scores, _ = _scores(_wide(grouped[first:end]), _wide(key[low:end]), first - low, scale, window, softcap)
        lse = scores.logsumexp(-1)
        probabilities = (scores - lse[..., None]).exp_()
        piece = torch.einsum("hgqk,khd->qhgd", probabilities, _wide(value[low:end]))
        out[first:end] = piece.flatten(1, 2).to(query.dtype)
        logsumexp[:, first:end] = lse.flatten(0, 1)
    return out, logsumexp


@packed_attention.register_fake
def _(query, key, value, cu_seqlens, scale, window, softcap):
    wide = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(query.shape), query.new_empty((query.shape[1], query.shape[0]), dtype=wide)


@torch.library.custom_op("unsloth_ext::packed_attention_backward", mutates_args=())
def packed_attention_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of query, key and value, in their dtypes; summed over a document in fp32 or fp64."""
    total, heads, _ = query.shape
    kv_heads = key.shape[1]
    split = (kv_heads, heads // kv_heads)
    grad_query, grad_key, grad_value = (
        torch.zeros(t.shape, dtype=logsumexp.dtype, device=t.device) for t in (query, key, value)
    )
    delta = (_wide(grad) * _wide(out)).sum(-1).unflatten(1, split)  # [T, H_kv, G]
    grouped, grouped_grad = query.unflatten(1, split), grad.unflatten(1, split)
    lse = logsumexp.unflatten(0, split)
    for first, end, start in _runs(cu_seqlens, total):
        low = _first_key(first, start, window)
        wide_query, wide_key, wide_grad = _wide(grouped[first:end]), _wide(key[low:end]), _wide(grouped_grad[first:end])
        scores, slope = _scores(wide_query, wide_key, first - low, scale, window, softcap)
        probabilities = (scores - lse[..., first:end, None]).exp_()
        grad_value[low:end] += torch.einsum("hgqk,qhgd->khd", probabilities, wide_grad)
        grad_scores = torch.einsum("qhgd,khd->hgqk", wide_grad, _wide(value[low:end]))
        grad_scores = probabilities * (grad_scores - delta[first:end].permute(1, 2, 0)[..., None])
        if slope is not None:
            grad_scores *= slope
        grad_query[first:end] = torch.einsum("hgqk,khd->qhgd", grad_scores, wide_key).flatten(1, 2) * scale
        grad_key[low:end] += torch.einsum("hgqk,qhgd->khd", grad_scores, wide_query) * scale
    return grad_query.to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype)


differentiable(packed_attention, packed_attention_backward)
