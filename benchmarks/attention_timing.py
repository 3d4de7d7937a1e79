"""Forward and backward of an attention on a card, apart: what bench_packed_attention.py and bench_row_attention.py have in common.

A time is the card's, between events around one call, with a buffer larger than the card's cache written before it; the host has put the call
into the queue by then.
"""

from collections.abc import Callable, Sequence

import record
import torch


def measured(
    attend: Callable, inputs: Sequence[torch.Tensor], upstream: torch.Tensor, cache: torch.Tensor
) -> tuple[float, float, tuple[torch.Tensor, ...]]:
    """(ms of attend(*inputs), ms of its gradients, (the result, the gradients)). cache: what is written before each."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(4)]
    torch.cuda._sleep(2_000_000)  # a millisecond, in which the host queues what follows
    cache.zero_()
    marks[0].record()
    out = attend(*inputs)
    marks[1].record()
    cache.zero_()
    marks[2].record()
    found = torch.autograd.grad(out, inputs, upstream)
    marks[3].record()
    torch.cuda.synchronize()
    return marks[0].elapsed_time(marks[1]), marks[2].elapsed_time(marks[3]), (out.detach(), *found)


def row(case: str, backend: str, baseline: str, forward: list[float], backward: list[float], first: dict) -> dict:
    """first: of each backend, its first result and gradients."""
    both = [sum(pair) for pair in zip(forward, backward, strict=True)]
    times = {"forward": forward, "backward": backward, "both": both}
    off = max(
        ((a.float() - b.float()).norm() / b.float().norm()).item()
        for a, b in zip(first[backend], first[baseline], strict=True)
    )
    found = {"case": case, "backend": backend, "unit": "ms", "baseline": baseline}
    return found | {part: record.percentiles(ms) for part, ms in times.items()} | {f"off {baseline}": off}
