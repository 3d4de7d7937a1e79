"""What the room changes in Unsloth's plain causal attention: lengths are not padded to a bucket where they fill it already.

Where SDPA picks cuDNN (Hopper, torch 2.11 and newer), `_cudnn_length_bucketed_sdpa` bounds the number of cuDNN's plans by rounding
lengths up to a multiple of 128, and always by one row at least, since a padding of zero rows would specialise a graph with
symbolic lengths. A full row of 4096 tokens so becomes 4224: three copies, a copy of the sliced output that is kept beside
the first, and a copy of its gradient. Outside of such a graph the length is known, and can be asked.
"""

from __future__ import annotations

import functools

from ..patching import Patch, Target

_DISPATCH = "unsloth.utils.attention_dispatch"
_SINCE = ">=2026.10.9"


def _bucketed(original):
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    around = original.__globals__  # read at each call: the bucket, and SDPA as context parallelism may have replaced it

    @functools.wraps(original)
    def _cudnn_length_bucketed_sdpa(Q, K, V, *args, **kwargs):
        if statically_known_true(
            Q.shape[-2] % around["_CUDNN_LENGTH_BUCKET"] == 0
        ):  # a number, or a graph for it alone
            return around["scaled_dot_product_attention"](Q, K, V, *args, **kwargs)
        return original(Q, K, V, *args, **kwargs)

    return _cudnn_length_bucketed_sdpa


PATCHES = (
    Patch(
        id="compiling.unpadded_attention",
        challenge="C",
        summary="rows whose length is a multiple of 128 already are not padded for cuDNN, but in graphs with symbolic lengths",
        targets=(
            Target(
                _DISPATCH, "_cudnn_length_bucketed_sdpa", _SINCE, ("cc2726ab3996ddfe",), patched=("668498a0e96aeef7",)
            ),
        ),
        relies_on=(
            Target(_DISPATCH, "_cudnn_length_bucket_applies", _SINCE, ("64291a1e00630380",)),
            Target(_DISPATCH, "scaled_dot_product_attention", _SINCE, ("253ad255a487f7a2",)),
        ),
        replace=_bucketed,
    ),
)
