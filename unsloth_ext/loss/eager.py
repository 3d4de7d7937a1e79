"""`chunked_loss` outside torch.compile: one `autograd.Function` around the loop over chunks.

Its inputs are the rows (hidden and targets), the trainable tensors of the head and the declared `parameters`, so that every
gradient leaves through autograd: hooks, DDP, tied weights and several uses of one tensor need nothing special here.
"""

from __future__ import annotations

import torch

from . import outputs
from .closure import Watch, explained
from .heads import autocast_dtype
from .job import Job, accumulator_dtype
from .surroundings import Surroundings


def run(job: Job, rows: list[torch.Tensor]):
    inputs = (*rows, *job.head.trainable, *job.extra)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        results = _ChunkedLoss.apply(job, len(rows), *inputs)
    else:
        results = _values(job, rows)
    return job.shaped(results)


def _values(job: Job, rows):
    """Without gradients."""
    result = _Result(job, rows[0].shape[0])
    with torch.no_grad(), job.head.opened(rows[0].dtype, differentiate=False) as (call, _):
        for start, stop in job.bounds(rows[0].shape[0]):
            result.add(_evaluate(job, call, [row[start:stop] for row in rows]), start, stop)
    return result.finished()


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, job: Job, n_rows: int, *inputs):
        ctx.set_materialize_grads(False)
        rows, wanted = inputs[:n_rows], ctx.needs_input_grad[2:]
        ctx.job, ctx.n_rows = job, n_rows
        ctx.surroundings = Surroundings(rows[0].device)
        result, gradients = _Result(job, rows[0].shape[0]), None
        with job.head.opened(rows[0].dtype, differentiate=True) as (call, leaves):
            watch = Watch((*leaves, *job.extra))
            for start, stop in job.bounds(rows[0].shape[0]):
                chunk = _leaves(rows, wanted, start, stop)
                with torch.enable_grad():
                    output = _evaluate(job, call, chunk)
                    watch(output.tensors, chunk)
                    total = result.add(output, start, stop)
                if start == 0:
                    ctx.source = _source(job, result.reduction, output, inputs, wanted[n_rows:])
                    gradients = None if ctx.source is None else _Gradients(inputs, wanted, n_rows)
                if gradients is not None:
                    value = total if result.reduction != "none" else output.tensors[ctx.source]
                    ones = torch.ones_like(value)
                    asked = [*chunk, *leaves, *job.extra]
                    gradients.add(_differentiate([(value, ones)], asked, wanted), start, stop)
                    del value, ones, asked
                del output, total, chunk  # one chunk's graph at a time
        values = result.finished()
        pathless = [i for i, path in enumerate(result.paths) if not path]
        ctx.mark_non_differentiable(*(values[i] for i in pathless))
        if gradients is not None and len(result.paths) - len(pathless) > 1:
            raise RuntimeError(
                "function's outputs differ between chunks in which of them want a gradient: pass rowwise=False"
            )
        ctx.reduction, divisor = result.reduction, result.divisor
        # Tensors are saved by autograd, which frees them after backward and lets saved-tensor hooks see them.
        ctx.divisor, divisor = (None, divisor) if isinstance(divisor, torch.Tensor) else (divisor, None)
        ctx.save_for_backward(divisor, *(inputs if gradients is None else gradients.sums))
        return values

    @staticmethod
    def backward(ctx, *incoming):
        if all(grad is None for grad in incoming):
            return (None,) * len(ctx.needs_input_grad)
        divisor, *saved = ctx.saved_tensors
        divisor = ctx.divisor if divisor is None else divisor
        with torch.no_grad():
            if ctx.reduction != "none":
                incoming = (incoming[0] / divisor,)
            grads = _recomputed(ctx, saved, incoming) if ctx.source is None else _scaled(ctx, saved, incoming)
            tensors = (*ctx.job.head.trainable, *ctx.job.extra)
            for i, tensor in enumerate(tensors, ctx.n_rows):
                if grads[i] is not None:
                    grads[i] = ctx.job.head.gradient(tensor, grads[i])
        if torch.is_grad_enabled():  # create_graph=True
            grads = _only_once(grads)
        return (None, None, *grads)


def _source(job: Job, reduction: str, output: outputs.Output, inputs, trained) -> int | None:
    """Which output's gradients are taken in forward; None if backward must run the chunks again."""
    if reduction != "none":
        # A user's sum may hold its 1 / number of items, which underflows in fp16 unless multiplied by the incoming loss scale.
        half = torch.float16 in (autocast_dtype(inputs[0].device.type), *(tensor.dtype for tensor in inputs))
        return None if half and output.kind is outputs.SCALAR and reduction == "sum" else 0
    paths = [i for i, value in enumerate(output.tensors) if value.requires_grad]
    if job.rowwise and not any(trained) and len(paths) == 1 and output.tensors[paths[0]].dim() == 1:
        return paths[0]
    return None


def _scaled(ctx, sums, incoming):
    """The gradients of forward times the incoming one: in place, unless the graph is kept for another backward."""
    in_place = not _graph_is_kept()
    incoming = incoming[ctx.source]
    grads = [None] * len(sums)
    for i, grad in enumerate(sums):
        if grad is not None and ctx.needs_input_grad[2 + i] and incoming is not None:
            factor = incoming.reshape(-1, *[1] * (grad.dim() - 1)) if incoming.dim() else incoming
            grads[i] = grad.mul_(factor) if in_place else (grad * factor).to(grad.dtype)
    return grads


def _recomputed(ctx, inputs, incoming):
    """Each chunk once more, differentiated with its incoming gradient."""
    job, rows, wanted = ctx.job, inputs[: ctx.n_rows], ctx.needs_input_grad[2:]
    gradients = _Gradients(inputs, wanted, ctx.n_rows)
    with ctx.surroundings.restored(), job.head.opened(rows[0].dtype, differentiate=True) as (call, leaves):
        for start, stop in job.bounds(rows[0].shape[0]):
            chunk = _leaves(rows, wanted, start, stop)
            with torch.enable_grad():
                output = _evaluate(job, call, chunk)
                if ctx.reduction == "none":
                    pairs = [(v, g[start:stop]) for v, g in zip(output.tensors, incoming, strict=True) if g is not None]
                else:
                    total, _ = job.share(output, ctx.reduction, stop - start)
                    pairs = [(total, incoming[0].to(total.dtype))]
            gradients.add(_differentiate(pairs, [*chunk, *leaves, *job.extra], wanted), start, stop)
            del output, pairs, chunk
    return gradients.sums


class _Result:
    """What the chunks add up to."""

    def __init__(self, job: Job, rows: int):
        self.job, self.rows = job, rows
        self.like = self.reduction = self.divisor = None
        self.paths: list[bool] = []  # for each result: does it lead to a gradient

    def add(self, output: outputs.Output, start: int, stop: int):
        """The chunk's part of a sum, with its graph; None where values are kept."""
        if self.like is None:
            self.like, self.reduction = output.like(), outputs.resolve(self.job.reduction, output, self.job.num_items)
            self.paths = [False] * len(output.tensors)
            if self.reduction == "none":
                self.values = tuple(value.new_empty(self.rows, *value.shape[1:]) for value in output.tensors)
        elif output.like() != self.like:
            raise ValueError(
                f"function returned {output.like()} for rows {start} to {stop}, but {self.like} before: it must return the same "
                "kind, shapes and dtypes for each chunk"
            )
        self.paths = [path or value.requires_grad for path, value in zip(self.paths, output.tensors, strict=True)]
        if self.reduction == "none":
            for kept, value in zip(self.values, output.tensors, strict=True):
                kept[start:stop] = value.detach()
            return None
        total, weight = self.job.share(output, self.reduction, stop - start)
        now = total.detach()
        self.total, self.weight = (now, weight) if start == 0 else (self.total + now, self.weight + weight)
        return total

    def finished(self) -> tuple[torch.Tensor, ...]:
        if self.reduction == "none":
            return self.values
        self.divisor = self.job.divisor(self.reduction, self.weight)
        return (self.total / self.divisor,)


class _Gradients:
    """Sums of gradients for the inputs: rows are written to their place, trainable tensors are added up in fp32."""

    def __init__(self, inputs, wanted, n_rows: int):
        self.n_rows = n_rows
        self.sums = [torch.empty_like(t) if w and i < n_rows else None for i, (t, w) in enumerate(zip(inputs, wanted))]  # noqa: B905

    def add(self, grads, start: int, stop: int) -> None:
        for i, grad in enumerate(grads):
            total = self.sums[i]
            if i < self.n_rows:
                if total is not None:
                    total[start:stop].zero_() if grad is None else total[start:stop].copy_(grad)
            elif grad is not None:
                if total is None:
                    self.sums[i] = grad.to(accumulator_dtype(grad.dtype), copy=True)
                else:
                    total.add_(grad)
                grads[i] = None  # the next weight's gradient may take its memory


def _leaves(rows, wanted, start: int, stop: int):
    return [row[start:stop].detach().requires_grad_(wanted[i]) for i, row in enumerate(rows)]


def _evaluate(job: Job, call, chunk) -> outputs.Output:
    before = [None if row.is_inference() else row._version for row in chunk[1:]]
    output = job.evaluate(call, chunk)
    after = [None if row.is_inference() else row._version for row in chunk[1:]]
    if before != after:
        which = next(i for i, pair in enumerate(zip(before, after, strict=True)) if pair[0] != pair[1])
        raise RuntimeError(
            f"function changed its target tensor number {which} in place, and with it the caller's: let it work on a copy"
        )
    return output


def _differentiate(pairs, inputs, wanted):
    """pairs: (value, incoming gradient). A list as long as inputs; None for what is not wanted or has no path."""
    pairs = [(value, grad) for value, grad in pairs if value.requires_grad]
    asked = [tensor for tensor, want in zip(inputs, wanted, strict=True) if want]
    if not pairs or not asked:
        return [None] * len(inputs)
    values, cotangents = zip(*pairs, strict=True)
    with explained():
        grads = iter(torch.autograd.grad(values, asked, cotangents, allow_unused=True))
    return [next(grads) if want else None for want in wanted]


def _graph_is_kept() -> bool:
    read = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if read is None else read()


def _only_once(grads):
    """Gradients that raise when they are differentiated again, instead of being constants without a word."""
    anchor = torch.empty((), requires_grad=True)
    refusing = iter(_Refusal.apply(anchor, *(grad for grad in grads if grad is not None)))
    return [None if grad is None else next(refusing) for grad in grads]


class _Refusal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, anchor, *grads):
        return tuple(grad.view_as(grad) for grad in grads)

    @staticmethod
    def backward(ctx, *incoming):
        raise RuntimeError(
            "chunked_loss has no second derivative: its gradients were taken without keeping the logits. For the gradient of a "
            "gradient compute this loss from full logits, function(head(hidden), *targets)"
        )
