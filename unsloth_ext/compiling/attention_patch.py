"""What the room changes in Unsloth's plain causal attention: lengths are not padded to a bucket where they fill it already.

Where SDPA picks cuDNN (Hopper, torch 2.11 and newer), `_cudnn_length_bucketed_sdpa` bounds the number of cuDNN's plans by rounding
lengths up to a multiple of 128, and always by one row at least, since a padding of zero rows would specialise a graph with
symbolic lengths. A full row of 4096 tokens so becomes 4224: three copies, a copy of the sliced output that is kept beside
the first, and a copy of its gradient.

Outside of such a graph the length is known, and can be asked. In one it cannot be asked without a guard, so a graph asks only where the
length that it is traced with is full: then it is for full lengths, and the first length that is not brings a second graph, for the
others. As long as no graph was traced with a full length, one serves all of them, full ones padded, as upstream's does: whoever
trains on batches of any length gets no recompilation for a full one among a hundred. One operator for both, which asks when it runs, was
quicker on full rows and slower on short ones, where the host is the limit (benchmarks/NOTES.md).

Where the package flash-attn-4 is installed none of that happens to larger batches in a graph (attention_rows.py): no plan for each length,
no padding, and no [T, T] mask for a sliding window.
"""

from __future__ import annotations

import functools

from ..patching import NotHere, Patch, SetAttribute, Target
from .measured_cards import are_measured

_SWITCH = "UNSLOTH_EXT_ROW_ATTENTION"
_DISPATCH = "unsloth.utils.attention_dispatch"
_SINCE = ">=2026.10.9"


_asks = False  # whether a graph of symbolic lengths was ever traced with a full one. From then on each says which lengths it is for, or the one for
# all lengths, once it has run, would be the first that Dynamo takes.
_asks_here = False  # whether the graph does that is being traced: one at a time is


def _look(frame) -> None:
    """While a graph is traced, at the caller's `length` and `bucket`, without a guard."""
    global _asks, _asks_here
    length, bucket = (frame.get_local(name) for name in ("length", "bucket"))
    if length.is_python_constant():  # the graph is for that length alone
        _asks_here = True
        return
    hint = length.as_fake().node.hint
    _asks = _asks or (hint is not None and int(hint) % bucket.as_python_constant() == 0)
    _asks_here = _asks


def _bucketed(original):
    import torch
    from torch._dynamo.comptime import comptime
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    around = original.__globals__  # read at each call: the bucket, and SDPA as context parallelism may have replaced it
    asks = torch.compiler.assume_constant_result(_is_asking)

    @functools.wraps(original)
    def _cudnn_length_bucketed_sdpa(Q, K, V, *args, **kwargs):
        length, bucket = Q.shape[-2], around["_CUDNN_LENGTH_BUCKET"]
        if torch.compiler.is_dynamo_compiling():
            comptime(_look)
            fills = asks() and length % bucket == 0
        else:
            fills = statically_known_true(length % bucket == 0)
        if fills:
            return around["scaled_dot_product_attention"](Q, K, V, *args, **kwargs)
        return original(Q, K, V, *args, **kwargs)

    return _cudnn_length_bucketed_sdpa


def _is_asking() -> bool:
    return _asks_here


def is_plain(module, config, context) -> bool:
    """Whether Unsloth asks for causal attention and no more than a scale and a window. module: its dispatch."""
    return (
        context.attention_mask is None
        and context.prefix_seg_info is None
        and context.is_causal
        and context.q_len == context.kv_seq_len
        and module._configured_softcap(config) is None
        and not any(value for name, value in (config.sdpa_kwargs or {}).items() if name != "scale")  # a dropout of 0
    )


def scale_and_window(config, context) -> tuple[float | None, int | None]:
    """(of the scores, None where it is 1 / sqrt(D); of the layer, None where it has none)"""
    scale = (config.sdpa_kwargs or {}).get("scale")
    if scale is None:
        scale = (config.flash_varlen_kwargs or {}).get("softmax_scale")
    window = context.sliding_window
    return scale, window if window is not None and window > 0 else None


def _rows(module, target):
    from .as_traced import as_traced
    from .attention_rows import refusal, row_attention

    if not are_measured():
        raise NotHere("flash-attn-4 is taken on Hopper alone")
    original, sdpa, xformers = module._run_attention, module.SDPA, module.XFORMERS

    def takes(config, context):
        if context.seq_info is not None or not is_plain(module, config, context):
            return False
        if config.backend == xformers:  # which is SDPA in a graph, unless more is asked of it
            plain = context.causal_mask is None or type(context.causal_mask).__name__ == "LowerTriangularMask"
            return plain and not config.xformers_kwargs
        return config.backend == sdpa

    @functools.wraps(original)
    def _run_attention(*, config, context, Q, K, V):
        if as_traced() and takes(config, context):
            query, key, value = (t.transpose(1, 2) for t in (Q, K, V))
            # Context parallelism puts its own attention under SDPA, on parts of the rows.
            scale, window = scale_and_window(config, context)
            if not refusal(query, key, value, window) and module.get_cp_manager() is None:
                return row_attention(query, key, value, scale, window)
        return original(config=config, context=context, Q=Q, K=K, V=V)

    return [SetAttribute(module, "_run_attention", _run_attention)]


PATCHES = (
    Patch(
        id="compiling.unpadded_attention",
        challenge="C",
        summary="rows whose length is a multiple of 128 already are not padded for cuDNN, in graphs first traced with such a length too",
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
    Patch(
        id="compiling.row_attention",
        challenge="C",
        summary="attention of a compiled layer by FlashAttention 4 where flash-attn-4 is installed: less time, no plan for each new length, no mask for a window (by itself on Hopper)",
        targets=(Target(_DISPATCH, "_run_attention", _SINCE, ("f200d79cdd77b591", "e952cc7d7aaf1f7b")),),
        relies_on=(Target("unsloth.context_parallel", "get_cp_manager", _SINCE, ("93818e36ae785d23",)),),
        changes=_rows,
        run_time_only="the operator around flash-attn-4 that a graph needs would have to come with it",
        switch=_SWITCH,
        on_unless_switched_off=True,
    ),
)
