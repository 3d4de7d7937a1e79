"""What the loss room changes in Unsloth."""

import functools

from ..patching import Patch, Target


def _ask_about_read_keywords(use_chunked_ce):
    from .keywords import read_keywords

    @functools.wraps(use_chunked_ce)
    def _use_chunked_ce(kwargs, target_gb):
        return use_chunked_ce(read_keywords(kwargs), target_gb)

    return _use_chunked_ce


PATCHES = (
    Patch(
        id="loss.unread_keywords",
        challenge="E",
        summary="an unknown keyword (packed_seq_lengths=, output_attentions=) no longer sends the fused loss to its slower, larger path",
        targets=(
            Target(
                "unsloth_zoo.fused_losses.cross_entropy_loss", "_use_chunked_ce", ">=2026.10.9", ("64311d916e7013da",)
            ),
        ),
        replace=_ask_about_read_keywords,
    ),
)
