"""How an NF4 weight is cut over ranks, in plain torch: what the sharded parameter, the loader and the gather must agree with.

A *group* is what shares one entry of absmax2: `blocksize2` blocks of `blocksize` weights, 256 x 64 = 16384 weights as a rule, in
8192 packed bytes, 256 bytes of absmax and 4 of absmax2. Rank r of W holds groups [r * c, (r + 1) * c), c = ceil(groups / W), with
zeros after the last real one. So no border lies inside a block or inside a group, every rank's piece has one size, and the pieces
one after another are the whole weight followed by padding. At most one group a rank (8.3 KiB) is lost to padding.

The scale of a block needs nothing from another rank except the offset, the mean of all block maxima, which is one number a weight.
"""

from __future__ import annotations

import torch


def groups(n_weights: int, group_weights: int) -> int:
    return -(-n_weights // group_weights)


def chunk(n_groups: int, world: int) -> int:
    """Groups that each rank holds, padding included. At least one, so that no tensor is empty."""
    return max(1, -(-n_groups // world))


def cut(field: torch.Tensor, per_group: int, n_groups: int, world: int) -> list[torch.Tensor]:
    """[chunk * per_group] for each rank from a field of one weight (packed bytes, absmax or absmax2) in order."""
    each = chunk(n_groups, world) * per_group
    padded = field.new_zeros(each * world)
    padded[: field.numel()] = field.reshape(-1)
    return list(padded.split(each))


def join(pieces: list[torch.Tensor], numel: int) -> torch.Tensor:
    return torch.cat(pieces)[:numel]


def offset_of(absmax_of_all_ranks: torch.Tensor) -> torch.Tensor:
    """bitsandbytes' offset: torch's mean of the block maxima of the whole weight, fp32 and 0-d.

    A mean of partial means rounds differently, so each rank takes the mean of all maxima: a 64th of the weight's elements.
    """
    return absmax_of_all_ranks.mean()
