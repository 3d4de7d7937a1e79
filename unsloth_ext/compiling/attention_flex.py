"""Packed attention by torch's flex attention: any window, the softcap, fp32, and one kernel for every length.

flex skips blocks of 128 x 128 scores that a mask leaves empty and does not evaluate the mask in those that it leaves whole,
but it must be told which they are. torch's `create_block_mask` finds out by evaluating the mask everywhere; traced, it makes
a graph per length, and compiled apart it breaks the graph. A packed row needs none of that: documents lie one after another,
so a block of queries meets a block of keys exactly where their ranges of documents overlap. `block_masks` writes that down as
a handful of operations on [blocks, blocks] matrices, once a batch, for each window that the model has. The tensors are
graph inputs; the `BlockMask` around them is made inside the graph, where its function is traced with it.

flex has no backward on a CPU (torch 2.11 to 2.14): asked for one, this module says so.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

BLOCK = 128

_compiled = None


class FlexMask(NamedTuple):
    """One window's block mask as plain tensors: documents [T] int32, counts [1, 1, blocks] and indices [1, 1, blocks,
    blocks] int32 of the partly and the wholly visible blocks, by row (`kv_`) and by column (`q_`)."""

    documents: torch.Tensor
    kv_num_blocks: torch.Tensor
    kv_indices: torch.Tensor
    full_kv_num_blocks: torch.Tensor
    full_kv_indices: torch.Tensor
    q_num_blocks: torch.Tensor
    q_indices: torch.Tensor
    full_q_num_blocks: torch.Tensor
    full_q_indices: torch.Tensor


def block_masks(
    cu_seqlens: torch.Tensor, total: int, windows: Iterable[int | None] = (None,)
) -> dict[int | None, FlexMask]:
    """The block masks of a packed row of `total` tokens, one a window.

    cu_seqlens: [n + 1], rising from 0; tokens after its end count as one more document. Traceable, lengths and all.
    """
    positions = torch.arange(total, device=cu_seqlens.device, dtype=torch.int32)
    documents = torch.searchsorted(cu_seqlens[1:].to(torch.int32), positions, right=True, out_int32=True)
    count = (total + BLOCK - 1) // BLOCK
    block = torch.arange(count, device=cu_seqlens.device, dtype=torch.int32)
    first = documents[(block * BLOCK).to(torch.int64)]
    last = documents[(block * BLOCK + (BLOCK - 1)).clamp(max=total - 1).to(torch.int64)]
    apart = (block[:, None] - block[None, :]) * BLOCK  # of the first tokens of a query block and a key block
    touching = (apart >= 0) & (last[None, :] >= first[:, None])
    # A last block that the row does not fill is never whole to torch either.
    whole = (apart > 0) & (first[None, :] == last[:, None]) & ((block[:, None] + 1) * BLOCK <= total)
    masks = {}
    for window in windows:
        some, all_ = touching, whole
        if window is not None:
            some = some & (apart - (BLOCK - 1) < window)
            all_ = all_ & (apart + (BLOCK - 1) < window)
        partial = some & ~all_
        masks[window] = FlexMask(
            documents, *_ordered(partial), *_ordered(all_), *_ordered(partial.t()), *_ordered(all_.t())
        )
    return masks


def _ordered(dense):
    """The set columns of each row first, in their order: what flex reads."""
    dense = dense.to(torch.int32)
    indices = torch.argsort(dense, dim=-1, descending=True, stable=True).to(torch.int32)
    return dense.sum(-1, dtype=torch.int32)[None, None], indices[None, None].contiguous()


def flex_packed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: FlexMask,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """query [T, H, D], key and value [T, H_kv, D] -> [T, H, D]. mask: `block_masks(...)[window]` of this very row.

    Raises NotImplementedError for tensors on a CPU that require a gradient.
    """
    rows = (t.transpose(0, 1).unsqueeze(0) for t in (query, key, value))
    out = flex_attention_rows(*rows, mask, scale=scale, window=window, softcap=softcap)
    return out.squeeze(0).transpose(0, 1)


def flex_attention_rows(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: FlexMask,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """The same for rows that are all divided alike: query [B, H, T, D], key and value [B, H_kv, T, D] -> [B, H, T, D]."""
    needs_grad = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    if query.device.type == "cpu" and needs_grad:
        raise NotImplementedError(
            "backend='flex': torch's flex attention has no backward on a CPU. Train on a card, or use backend='exact'"
        )
    total = query.shape[2]
    if mask.documents.shape[0] != total:
        raise ValueError(f"mask is that of {mask.documents.shape[0]} tokens, the row has {total}: make it once a batch")
    from torch.nn.attention.flex_attention import BlockMask

    documents = mask.documents
    # A tensor, not the number: a float of a module is symbolic under dynamic=True, and flex takes no symbolic float.
    cap = None if softcap is None else torch.full((), softcap, dtype=torch.float32, device=query.device)

    def visible(batch, head, q, k):
        near = (documents[q] == documents[k]) & (q >= k)
        return near if window is None else near & (q - k < window)

    def capped(score, batch, head, q, k):
        return cap * torch.tanh(score / cap)

    block_mask = BlockMask((total, total), *mask[1:], BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=visible)
    return _flex()(
        query,
        key,
        value,
        score_mod=None if softcap is None else capped,
        block_mask=block_mask,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _flex():
    """flex itself while tracing; outside a graph, flex compiled once for all lengths: uncompiled it holds every score."""
    global _compiled
    from torch.nn.attention.flex_attention import flex_attention

    if torch.compiler.is_compiling():
        return flex_attention
    if _compiled is None:
        _compiled = torch.compile(flex_attention, dynamic=True, fullgraph=True)
    return _compiled
