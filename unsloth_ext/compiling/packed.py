"""Packed batches: where the documents of a row begin, found once a batch and outside the graph.

A padding-free or packed batch is one row of documents laid end to end. Every layer needs the same two facts of it, the
boundaries and a bound of the longest document. Found in each layer they cost a wait for the card, or, traced, a branch that
depends on data. Here they are found before the first layer, on the host where the lengths are already there, and travel as
the four keyword arguments that transformers has for them (`FlashAttentionKwargs`): cu_seq_lens_q, cu_seq_lens_k,
max_length_q, max_length_k.

Three ways of saying where documents begin are understood: those four arguments (`DataCollatorWithFlattening`), Unsloth's
`packed_seq_lengths`, and `position_ids` that start again (TRL's `padding_free=True` and `packing=True`).

The bound of the longest document is rounded up to a power of two, so that it takes few values: a compile that takes it for a constant at
first (Unsloth's own of the layers) meets few others. A bound that is too high gives a kernel blocks that end at once. Where only a graph
under trace knows the lengths, the bound is the whole row: correct, and a little slower.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch

LEAST = 128  # of bounds: a tile of the kernels

# Whether the forward pass under way has its boundaries: then no [T, T] mask is built beside them (packed_transformers.py).
_in_packed_forward = [False]


class Packing(NamedTuple):
    """cu_seqlens: [n + 1] int32 from 0 to the number of tokens. max_seqlen: no document is longer."""

    cu_seqlens: torch.Tensor
    max_seqlen: int


def packing_of_lengths(
    lengths: torch.Tensor | Sequence[int], total: int, device: torch.device | str | None = None
) -> Packing:
    """The packing of a row of `total` tokens whose documents have these lengths, in order.

    Tokens left over (a row padded to a multiple of something) become one more document: no kernel may leave rows unwritten.
    Lengths on the host need no wait for the card; lengths on a card are read from it, once.
    Raises ValueError where a length is negative or their sum is above `total`.
    """
    if isinstance(lengths, torch.Tensor):
        device = lengths.device if device is None else device
        lengths = lengths.reshape(-1).tolist()
    lengths = [int(length) for length in lengths]
    if any(length < 0 for length in lengths) or sum(lengths) > total:
        raise ValueError(
            f"document lengths must not be negative and must sum to at most the row's {total} tokens, got "
            f"{len(lengths)} that sum to {sum(lengths)}, the least {min(lengths)}"
        )
    lengths = [length for length in lengths if length]
    if (rest := total - sum(lengths)) or not lengths:
        lengths.append(rest)
    cu_seqlens = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    torch.cumsum(torch.tensor(lengths, dtype=torch.int32), 0, dtype=torch.int32, out=cu_seqlens[1:])
    return Packing(_moved(cu_seqlens, device), _bound(max(lengths)))


def packing_of_positions(position_ids: torch.Tensor) -> Packing | None:
    """The packing of a row by its position ids [1, T], a document beginning wherever they do not rise by one; None where
    there is only one document. Waits for the card once."""
    row = position_ids.reshape(-1)
    starts = (torch.diff(row) != 1).nonzero().reshape(-1).tolist()
    if not starts:
        return None
    bounds = [0, *(start + 1 for start in starts), row.numel()]
    lengths = [b - a for a, b in pairwise(bounds)]
    return packing_of_lengths(lengths, row.numel(), position_ids.device)


def traced_packing(lengths: torch.Tensor, total: int, device: torch.device) -> Packing:
    """The packing inside a graph, where no value can be read: what is left over always becomes a document, perhaps an empty
    one, and the bound is the row. lengths [n], any integer dtype; a row that was cut after packing has documents that end
    with it, since no error can be raised here."""
    lengths = lengths.reshape(-1).to(device=device, dtype=torch.int32)
    inner = torch.cumsum(lengths, 0, dtype=torch.int32).clamp(max=total)
    ends = inner.new_zeros(1), inner, inner.new_full((1,), total)
    return Packing(torch.cat(ends), total)


def position_ids_of(cu_seqlens: torch.Tensor, total: int) -> torch.Tensor:
    """[1, total] int64: each token's place in its document. Traceable."""
    positions = torch.arange(total, device=cu_seqlens.device)
    documents = torch.searchsorted(cu_seqlens[1:], positions.to(cu_seqlens.dtype), right=True)
    return (positions - cu_seqlens.to(torch.int64)[documents])[None]


def packed_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A model's keyword arguments with the packing of its batch in them; a plain copy where the batch is not packed.

    arguments: what the forward is called with: input_ids or inputs_embeds [1, T, ...] and one of the three descriptions.
    Added: cu_seq_lens_q, cu_seq_lens_k [n + 1] int32 on the inputs' device, max_length_q, max_length_k int, and
    position_ids [1, T] where the caller gives none. Nothing else is changed; calling it twice changes nothing more.
    A batch with an attention mask, a cache or several rows is left alone: its mask says what belongs together.
    Raises ValueError where the description does not fit the row.
    """
    arguments = dict(arguments)
    tokens = arguments.get("input_ids")
    if tokens is None:
        tokens = arguments.get("inputs_embeds")
    if not isinstance(tokens, torch.Tensor) or tokens.dim() < 2 or tokens.shape[0] != 1:
        return arguments
    if arguments.get("attention_mask") is not None or arguments.get("past_key_values") is not None:
        return arguments
    packing = _found(arguments, tokens.shape[1], tokens.device)
    if packing is None:
        return arguments
    if not torch.compiler.is_compiling():
        torch._dynamo.maybe_mark_dynamic(packing.cu_seqlens, 0)  # one graph for any number of documents
        packing.cu_seqlens._unsloth_ext_covers = (tokens.shape[1], tokens.device)
    for side in "qk":
        arguments[f"cu_seq_lens_{side}"] = packing.cu_seqlens
        arguments[f"max_length_{side}"] = packing.max_seqlen
    if arguments.get("position_ids") is None:
        arguments["position_ids"] = position_ids_of(packing.cu_seqlens, tokens.shape[1])
    return arguments


def _found(arguments, total, device):
    tracing = torch.compiler.is_compiling()
    ready = arguments.get("cu_seq_lens_q")
    if ready is not None:
        longest = arguments.get("max_length_q")
        if tracing:
            return Packing(
                ready.reshape(-1).to(device=device, dtype=torch.int32), total if longest is None else longest
            )
        if getattr(ready, "_unsloth_ext_covers", None) == (total, device):
            return Packing(ready, longest)  # made here: not read back
        ready = ready.reshape(-1).to("cpu", torch.int64)  # some collators give [1, n + 1]
        if ready.numel() < 2 or int(ready[0]) != 0:
            raise ValueError(
                f"cu_seq_lens_q must begin with 0 and have an end for each document, got {ready.tolist()[:8]}"
            )
        return packing_of_lengths(torch.diff(ready), total, device)
    lengths = arguments.get("packed_seq_lengths")
    if lengths is not None:
        return traced_packing(lengths, total, device) if tracing else packing_of_lengths(lengths, total, device)
    position_ids = arguments.get("position_ids")
    if tracing or not isinstance(position_ids, torch.Tensor) or position_ids.dim() != 2 or position_ids.shape[0] != 1:
        return None  # under trace the model's own mask, made of the position ids, keeps the documents apart
    return packing_of_positions(position_ids)


def _bound(longest):
    return max(LEAST, 1 << (longest - 1).bit_length())


def _moved(tensor, device):
    if device is None or torch.device(device).type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True) if torch.cuda.is_available() else tensor.to(device)
