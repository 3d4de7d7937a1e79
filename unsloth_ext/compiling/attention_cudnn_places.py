"""Where the documents of a packed row begin in each of attention's tensors, for `attention_cudnn.py`."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from ..direct_launch import Quick


@triton.jit
def places_kernel(
    cu_seqlens_ptr,  # [documents + 1] int32
    places_ptr,  # [4, row] int32: lengths; then, in elements, where documents begin in queries, in keys, in the log-sum-exp
    documents,
    room,  # documents that are written, the last of them empty
    row,
    query_token,
    key_token,
    stats_token,
    BLOCK: tl.constexpr,
):
    at = tl.arange(0, BLOCK)
    inside = at <= room
    here = tl.load(cu_seqlens_ptr + tl.minimum(at, documents))
    end = tl.load(cu_seqlens_ptr + tl.minimum(at + 1, documents))
    tl.store(places_ptr + at, end - here, mask=inside)
    tl.store(places_ptr + row + at, here * query_token, mask=inside)
    tl.store(places_ptr + 2 * row + at, here * key_token, mask=inside)
    tl.store(places_ptr + 3 * row + at, here * stats_token, mask=inside)


_places = Quick(places_kernel)
_power = functools.cache(triton.next_power_of_2)


def write_places(cu_seqlens: torch.Tensor, places: torch.Tensor, room: int, tokens: tuple[int, int, int]) -> None:
    """cu_seqlens [n + 1] int32 -> places, int32 [4, at least room + 1]: of `room` >= n documents the lengths, and in elements where each
    begins in queries, in keys and in the log-sum-exp, whose tokens take so many each. Documents past the n-th are empty."""
    numbers = (cu_seqlens.shape[0] - 1, room, places.stride(0), *tokens)
    _places((1, 1, 1), (cu_seqlens, places), numbers, BLOCK=_power(room + 1))
