"""What the room changes in Unsloth's rotary embedding: while a graph is traced, it is an operator of ours (rope.py).

Outside of a trace, and for what `rope.refusal` names, it is Unsloth's own. On by itself on Hopper, where it was measured, with
UNSLOTH_EXT_ROPE=1 elsewhere.
"""

from __future__ import annotations

import functools

from ..patching import Patch, SetAttribute, Target
from .measured_cards import refuse_where_not_measured

_ROPE = "unsloth.kernels.rope_embedding"
_SINCE = ">=2026.10.9"
_SWITCH = "UNSLOTH_EXT_ROPE"


def _traced(module, target):
    refuse_where_not_measured(_SWITCH)
    return [SetAttribute(module, "fast_rope_embedding", _routed(module.fast_rope_embedding))]


def _routed(original):
    from .as_traced import as_traced
    from .rope import refusal, rotate

    @functools.wraps(original)
    def fast_rope_embedding(Q, K, cos, sin, rope_embedding_indices=None):
        if as_traced():
            tables = cos.squeeze(), sin.squeeze()
            if not refusal(Q, K, *tables):
                at = rope_embedding_indices
                at = None if at is None else at.reshape(-1).to(Q.device)
                return tuple(rotate(x.transpose(1, 2), *tables, at).transpose(1, 2) for x in (Q, K))
        return original(Q, K, cos, sin, rope_embedding_indices)

    return fast_rope_embedding


PATCHES = (
    Patch(
        id="compiling.rope",
        challenge="C",
        summary="in a compiled layer rotary embedding is an operator that is traced without a guard: a tenth less to trace (by itself on Hopper)",
        targets=(Target(_ROPE, "fast_rope_embedding", _SINCE, ("47ad74dc7976413c",)),),
        relies_on=(Target(_ROPE, "_rope_launch", _SINCE, ("729a3b36c790b633",)),),
        changes=_traced,
        run_time_only="a git patch would bring an operator and its measurements with it",
        switch=_SWITCH,
        on_unless_switched_off=True,
    ),
)
