"""Packed attention by aten's memory-efficient kernel: `unsloth_ext::efficient_attention`.

The kernel is called from an operator of our own, forward and backward, because autograd's own way to it has three faults (torch
2.11 to 2.13): the derivative leaves the window out, so gradients are those of full attention; the fake kernel of the backward
mistakes one argument for another and cannot be traced; and a bound of the longest document above the row's length is refused,
in the backward only. The kernel knows no groups: key and value heads are repeated, here and not among what is saved.
"""

# no `from __future__ import annotations`: torch.library reads these annotations
import torch

from .attention_gradients import differentiable

_CAUSAL = 1  # from each document's top left corner


def _repeated(tensor, heads):
    groups = heads // tensor.shape[1]
    return (tensor if groups == 1 else tensor.repeat_interleave(groups, 1)).unsqueeze(0)


def _rows(bound):
    """The kernel keeps log-sum-exps in multiples of 32 rows a document."""
    return (bound + 31) // 32 * 32


@torch.library.custom_op("unsloth_ext::efficient_attention", mutates_args=(), device_types="cuda")
def efficient_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    scale: float,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """query [T, H, D], key and value [T, H_kv, D], cu_seqlens [n + 1] int32 -> ([T, H, D], log-sum-exp [n, H, max_seqlen
    rounded up to 32] in fp32)."""
    total, heads, _ = query.shape
    bound = min(max_seqlen, total)
    out, found, *_ = torch.ops.aten._efficient_attention_forward(
        query.unsqueeze(0),
        _repeated(key, heads),
        _repeated(value, heads),
        None,
        cu_seqlens,
        cu_seqlens,
        bound,
        bound,
        0.0,
        _CAUSAL,
        True,
        scale=scale,
        window_size=window,
    )
    logsumexp = found
    if _rows(bound) != _rows(max_seqlen):  # a graph knows the bound, not which of the two is less
        logsumexp = found.new_zeros((*found.shape[:2], _rows(max_seqlen)))
        logsumexp[..., : _rows(bound)] = found
    return out.squeeze(0), logsumexp


@efficient_attention.register_fake
def _(query, key, value, cu_seqlens, max_seqlen, scale, window):
    shape = (cu_seqlens.shape[0] - 1, query.shape[1], _rows(max_seqlen))
    return query.new_empty(query.shape), query.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("unsloth_ext::efficient_attention_backward", mutates_args=(), device_types="cuda")
def efficient_attention_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    scale: float,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of query, key and value, in their dtypes and contiguous."""
    total, heads, width = query.shape
    bound = min(max_seqlen, total)
    nothing = torch.zeros((), dtype=torch.int64, device=query.device)  # no dropout: neither a seed nor an offset
    grads = torch.ops.aten._efficient_attention_backward(
        grad.contiguous().unsqueeze(0),
        query.unsqueeze(0),
        _repeated(key, heads),
        _repeated(value, heads),
        None,
        out.unsqueeze(0),
        cu_seqlens,
        cu_seqlens,
        bound,
        bound,
        logsumexp[..., : _rows(bound)].contiguous(),
        0.0,
        nothing,
        nothing,
        _CAUSAL,
        False,
        scale=scale,
        window_size=window,
    )[:3]
    shapes = (query.shape, key.shape, value.shape)
    return tuple(
        (g.view(shape) if shape[1] == heads else g.view(total, shape[1], -1, width).sum(2)).contiguous()
        for g, shape in zip(grads, shapes, strict=True)
    )


differentiable(efficient_attention, efficient_attention_backward)
