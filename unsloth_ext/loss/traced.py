"""`chunked_loss` while torch.compile traces: plain differentiable operations, each chunk under `torch.utils.checkpoint`.

The loop is unrolled, so a graph belongs to one number of chunks; within it the number of rows may be dynamic. Gradients
are not taken in forward: the compiled backward runs the chunks' head again, one matmul more than the eager way.
"""

from __future__ import annotations

import torch
from torch.utils.checkpoint import checkpoint

from . import outputs
from .job import Job


def run(job: Job, rows):
    call, weights = job.head.traced(rows[0].dtype)

    def evaluated(tensors):
        return job.evaluate(lambda x: call(x, tensors[len(rows) :]), tensors[: len(rows)])

    def only_tensors(*tensors):
        output = evaluated(tensors)
        if output.kind is not outputs.PAIR:
            return output.tensors
        weight = output.weight
        if not isinstance(weight, torch.Tensor):
            weight = torch.full((), weight, device=rows[0].device)
        return output.tensors[0], weight

    # A checkpoint gives tensors only. What kind they are is read off a chunk outside, whose numbers nobody uses: it is
    # removed from the graph.
    with torch.no_grad():
        kind = evaluated([*(row[: job.size] for row in rows), *weights]).kind
    parts, total, weight = [], 0, 0
    for start, stop in job.bounds(rows[0].shape[0]):
        tensors = checkpoint(only_tensors, *(row[start:stop] for row in rows), *weights, use_reentrant=False)
        output = (
            outputs.Output(kind, tensors[:1], tensors[1])
            if kind is outputs.PAIR
            else outputs.Output(kind, tensors, None)
        )
        reduction = outputs.resolve(job.reduction, output, job.num_items)
        if reduction == "none":
            parts.append(tensors)
        else:
            value, n = job.share(output, reduction, stop - start)
            total, weight = total + value, weight + n
    if reduction == "none":
        return job.shaped([torch.cat(values) for values in zip(*parts, strict=True)])
    return job.shaped([total / job.divisor(reduction, weight)])
