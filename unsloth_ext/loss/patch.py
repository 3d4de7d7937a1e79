"""What the loss room changes in Unsloth."""

import functools

from ..patching import Patch, Target

_LOSS = "unsloth_zoo.fused_losses.cross_entropy_loss"


def _ask_about_read_keywords(use_chunked_ce):
    # transformers hands every keyword of model(...) on to the loss. What the fast path can do, upstream has in a set; n_chunks is
    # the one keyword that only the old path reads. Any other changes nothing on either path.
    read = use_chunked_ce.__globals__["_FUSED_LINEAR_CE_KWARGS"] | {"n_chunks"}

    @functools.wraps(use_chunked_ce)
    def _use_chunked_ce(kwargs, target_gb):
        return use_chunked_ce({name: value for name, value in kwargs.items() if name in read}, target_gb)

    return _use_chunked_ce


PATCHES = (
    Patch(
        id="loss.unread_keywords",
        challenge="E",
        summary="an unknown keyword (packed_seq_lengths=, output_attentions=) no longer sends the fused loss to its slower, larger path",
        targets=(
            Target(_LOSS, "_use_chunked_ce", ">=2026.10.9", ("21f30ab299cc16d6",), patched=("6a6107df580ab61c",)),
        ),
        relies_on=(  # the old path reads these and n_chunks, and nothing else
            Target(_LOSS, "compute_fused_ce_loss", ">=2026.10.9", ("a2defc84bbf55b50",)),
            Target(_LOSS, "UnslothFusedLoss.forward", ">=2026.10.9", ("f0a7890410ca51c8",)),
            Target(_LOSS, "_FUSED_LINEAR_CE_KWARGS", ">=2026.10.9", ("9bae5dbf5639c52b",)),
            Target(_LOSS, "_CHUNKED_CE_KWARGS", ">=2026.10.9", ("31de56e5b50e47ad",)),
        ),
        replace=_ask_about_read_keywords,
    ),
)
