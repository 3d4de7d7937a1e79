"""Which keywords of a loss call mean anything to Unsloth's fused cross entropy.

transformers hands every keyword of `model(...)` on to the loss: `output_attentions=False`, `packed_seq_lengths=...`,
`cache_position=...`. Unsloth's fused loss leaves its fast path at the first keyword that it does not know, for a path that
ignores that keyword too, is slower and holds more (benchmarks/bench_unread_keywords.py). Only keywords that the slow path reads
should lead there.
"""


def read_keywords(kwargs):
    """The keywords that change the loss; the caller's other ones (`output_attentions`, `packed_seq_lengths`) change nothing."""
    read = (
        "ignore_index",
        "label_smoothing",
        "logit_scale_divide",
        "logit_scale_multiply",
        "logit_softcapping",
        "logits_bias",
        "n_chunks",
    )
    return {name: kwargs[name] for name in read if name in kwargs}
