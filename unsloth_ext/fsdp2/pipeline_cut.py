"""Which layers a pipeline stage has, and which rank has which stage.

A rank with more work than the others makes all of them wait in every microbatch, so ranks are evened out first, and then the
stages of a rank. The head is weighed in layers: with LoRA a frozen linear costs one product forward and one backward, whatever
it is, so its weight is its number of parameters over those of a layer. A head of 128256 x 4096 weighs as much as 2.4 layers of
Llama 3 8B. The embedding is a lookup and weighs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import UsageError

__all__ = ["cut_layers", "head_in_layers", "rank_of_stage", "spans"]


def rank_of_stage(stages: int, ranks: int, v_shaped: bool = False) -> list[int]:
    """The rank of each stage: 0 1 2 0 1 2 in a loop, 0 1 2 2 1 0 in a V."""
    forth = list(range(ranks))
    return [(forth[::-1] if v_shaped and (s // ranks) % 2 else forth)[s % ranks] for s in range(stages)]


def head_in_layers(config) -> float:
    """The head's parameters over a decoder layer's, from a transformers config of the Llama kind."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    key_value = getattr(config, "num_key_value_heads", None) or heads
    layer = 2 * hidden * head_dim * (heads + key_value) + 3 * hidden * config.intermediate_size
    return config.vocab_size * hidden / layer


def cut_layers(layers: int, ranks: int, stages_per_rank: int, head: float = 0.0, v_shaped: bool = False) -> list[int]:
    """How many of `layers` each of ranks * stages_per_rank stages has, in order; the head weighs `head` layers.

    No assignment of whole layers has a less loaded busiest rank, unless stages would have to be empty. Only the last stage, which
    has the head, may be empty. Raises `UsageError` for fewer layers than stages.
    """
    stages = ranks * stages_per_rank
    if layers < stages:
        raise UsageError(
            f"the model has {layers} layers, fewer than the {stages} stages of {ranks} ranks with {stages_per_rank} each",
            "Use fewer ranks or a smaller stages_per_rank.",
        )
    rank_of = rank_of_stage(stages, ranks, v_shaped)
    counts = [1] * (stages - 1) + [0]
    cost = [1.0] * (stages - 1) + [float(head)]
    load = [sum(c for c, r in zip(cost, rank_of, strict=True) if r == rank) for rank in range(ranks)]
    for _ in range(layers - sum(counts)):  # always to the least loaded: no other order ends with a smaller maximum
        rank = min(range(ranks), key=lambda r: (load[r], r))
        stage = min((s for s in range(stages) if rank_of[s] == rank), key=lambda s: (cost[s], s))
        counts[stage] += 1
        cost[stage] += 1
        load[rank] += 1
    return counts


def spans(counts: Sequence[int], layers: int, ranks: int, stages_per_rank: int) -> list[range]:
    """The layers of each stage. Raises `UsageError` for counts that are not a cut of `layers` layers into these stages."""
    stages, counts = ranks * stages_per_rank, list(counts)
    if len(counts) != stages:
        raise UsageError(
            f"layers must say how many layers each of the {stages} stages has ({ranks} ranks with {stages_per_rank} each), "
            f"got {len(counts)} numbers"
        )
    if any(not isinstance(n, int) or n < (0 if s == stages - 1 else 1) for s, n in enumerate(counts)):
        raise UsageError(
            f"layers must be positive (only the last stage, which has the head, may be empty), got {counts}"
        )
    if sum(counts) != layers:
        raise UsageError(f"layers must add up to the {layers} layers of the model, got {counts} with {sum(counts)}")
    found, start = [], 0
    for n in counts:
        found.append(range(start, start + n))
        start += n
    return found
