"""What the room changes in Unsloth's plain causal attention: padding to a bucket of lengths only where a length is no multiple.

Where SDPA picks cuDNN (Hopper, torch 2.11 and newer), `_cudnn_length_bucketed_sdpa` pads Q, K and V by 1 to 128 rows, a full row of
4096 tokens too: a padding of zero rows would specialise a graph. `attention_dense.py` asks for the length when it runs.
"""

from __future__ import annotations

import functools

from ..patching import Patch, Target

_DISPATCH = "unsloth.utils.attention_dispatch"
_SINCE = ">=2026.10.9"


def _bucketed(original):
    import torch
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    from .attention_dense import causal_attention

    around = original.__globals__  # read at each call: the bucket, and SDPA as context parallelism may have replaced it
    is_autocast_enabled, autocast_dtype = torch.is_autocast_enabled, torch.get_autocast_dtype
    is_deterministic = torch.are_deterministic_algorithms_enabled

    def takes(Q, K, V, options):
        if Q.shape[0] != K.shape[0] or Q.shape[3] != K.shape[3] or not Q.dtype == K.dtype == V.dtype:
            return False
        if set(options) - {"scale", "enable_gqa"} or K.shape != V.shape:
            return False
        if Q.shape[1] != K.shape[1] and not options.get("enable_gqa"):
            return False
        if is_deterministic():  # SDPA would leave cuDNN out
            return False
        # SDPA is one of the calls whose inputs autocast casts.
        device = Q.device.type
        return not is_autocast_enabled(device) or autocast_dtype(device) == Q.dtype

    @functools.wraps(original)
    def _cudnn_length_bucketed_sdpa(Q, K, V, attn_mask=None, dropout_p=0.0, is_causal=False, **kwargs):
        bucket = around["_CUDNN_LENGTH_BUCKET"]
        if statically_known_true(Q.shape[-2] % bucket == 0):  # outside a graph, or in a graph for this length alone
            sdpa = around["scaled_dot_product_attention"]
            return sdpa(Q, K, V, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, **kwargs)
        if attn_mask is None and is_causal and not dropout_p and takes(Q, K, V, kwargs):
            return causal_attention(Q, K, V, kwargs.get("scale"), bucket)[0]
        return original(Q, K, V, attn_mask, dropout_p, is_causal, **kwargs)

    return _cudnn_length_bucketed_sdpa


PATCHES = (
    Patch(
        id="compiling.unpadded_attention",
        challenge="C",
        summary="rows whose length is a multiple of 128 already are not padded for cuDNN, in one graph for all lengths",
        targets=(Target(_DISPATCH, "_cudnn_length_bucketed_sdpa", _SINCE, ("cc2726ab3996ddfe",)),),
        relies_on=(
            Target(_DISPATCH, "_cudnn_length_bucket_applies", _SINCE, ("64291a1e00630380",)),
            Target(_DISPATCH, "scaled_dot_product_attention", _SINCE, ("253ad255a487f7a2",)),
        ),
        replace=_bucketed,
        run_time_only="it goes upstream when it has been measured on a card",
        switch="UNSLOTH_EXT_UNPADDED_ATTENTION",  # until then
    ),
)
