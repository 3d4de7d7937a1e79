"""Cross entropy with the vocabulary spread over a process group: each rank holds [V / p, D] of the head, and all of hidden.

A rank streams its own columns (`linear_softmax`): the sum of exp, the label's logit if it has it, and its part of softmax @ W. One
all-gather of three numbers a row then gives every rank the log-sum-exp, and the gradient of hidden is summed over the ranks in the
backward. No rank ever sees logits of another (as in Megatron-LM, arXiv 1909.08053, section 3, without holding its own either).
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from . import linear_softmax, softmax
from .linear_inputs import checked, shifted
from .linear_softmax import FAST, LEAN, acc_dtype
from .matmul import matmul_into
from .softmax import Options, RowValues


def vocabulary_parallel_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items_in_batch: int | float | torch.Tensor | None = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    shift: bool = False,
    logits_dtype: torch.dtype | None = None,
    memory: str = "fast",
) -> torch.Tensor:
    """`linear_cross_entropy` where weight [V / p, D] and bias [V / p] are this rank's rows of the head, from `vocab_start` on.

    hidden [..., D] and labels [...] (of the whole vocabulary) are the same on every rank of `group`, and so is the result. The
    gradient of hidden is summed over the group; those of weight and bias are this rank's.

    vocab_start, vocab_size: by default equal shards in the order of ranks. Uneven ones name both.
    Raises what `linear_cross_entropy` raises, and RuntimeError where torch.distributed is not initialised.
    """
    if not dist.is_initialized():
        raise RuntimeError("vocabulary_parallel_cross_entropy needs torch.distributed: call init_process_group first")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be one of mean, sum, none, got {reduction!r}")
    if shift:
        labels = shifted(labels, hidden, ignore_index)
    inputs = checked(
        hidden, weight, labels, bias, softcap=softcap, logit_scale=logit_scale, logits_dtype=logits_dtype, memory=memory
    )
    if (vocab_start is None) != (vocab_size is None):
        raise ValueError("vocab_start and vocab_size go together")
    if vocab_start is None:
        vocab_start, vocab_size = dist.get_rank(group) * weight.shape[0], dist.get_world_size(group) * weight.shape[0]
    if not 0 <= vocab_start <= vocab_size - weight.shape[0]:
        raise ValueError(
            f"rows {vocab_start} to {vocab_start + weight.shape[0]} are not within a vocabulary of {vocab_size}"
        )
    options = Options(int(ignore_index), float(logit_scale), float(softcap or 0.0), z_loss=float(z_loss))
    value = _VocabularyParallel.apply(
        inputs.hidden, inputs.weight, inputs.bias, inputs.labels, options, group, vocab_start, vocab_size,
        inputs.logits_dtype, memory == "lean",
    )  # fmt: skip
    if reduction == "none":
        return value.view(inputs.lead)
    if num_items_in_batch is not None:
        return value.sum() / torch.as_tensor(num_items_in_batch, device=value.device, dtype=value.dtype)
    return value.sum() if reduction == "sum" else value.sum() / (inputs.labels != ignore_index).sum().clamp(min=1)


class _VocabularyParallel(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, options, group, start, vocab_size, logits_dtype, lean):
        dtype = acc_dtype(hidden.dtype)
        # the local softmax-weighted sum of weight's rows without the label's, each rank's by its own sum
        mean = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        state = torch.zeros(5, hidden.shape[0], dtype=dtype, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            _stream(hidden, weight, bias, labels, options, mean, state, start, logits_dtype, LEAN if lean else FAST)
        gathered = [torch.empty_like(state[:3]) for _ in range(dist.get_world_size(group))]
        dist.all_gather(gathered, state[:3].contiguous(), group=group)
        gathered = torch.stack(gathered)
        top = gathered[:, 0].amax(0)
        total = torch.zeros_like(state)
        total[0] = top
        share = gathered[:, 1] * torch.exp2(gathered[:, 0] - top)
        total[1] = torch.where(gathered[:, 1] > 0, share, gathered[:, 1]).sum(0)
        total[2] = gathered[:, 2].sum(0)
        values = RowValues.empty(hidden.shape[0], False, hidden.device, dtype)
        total[:3:2] *= softmax.LN2
        softmax.row_values(total, labels, vocab_size, values, options)
        own = torch.where(total[1] > 0, share[dist.get_rank(group)] / total[1], 0)
        ctx.save_for_backward(hidden, weight, bias, labels, mean, values.negative, values.lse, own, total[2])
        ctx.rest = options, group, start, vocab_size, logits_dtype, lean
        return values.value

    @staticmethod
    def backward(ctx, g):
        hidden, weight, bias, labels, mean, negative, lse, own, target = ctx.saved_tensors
        options, group, start, vocab_size, logits_dtype, lean = ctx.rest
        g = g.contiguous()
        grad_hidden = grad_weight = grad_bias = None
        with torch.autocast(hidden.device.type, enabled=False):
            if mean is not None:
                p = torch.exp(-negative)
                rest = -torch.expm1(-negative)
                keep = softmax.row_weights(labels, vocab_size, options, g.dtype)
                k = g * keep * options.scale
                slope = 1 - (target / options.softcap) ** 2 if options.softcap else 1.0
                here = (labels >= start) & (labels < start + weight.shape[0])
                at_label = torch.where(here, k * slope * (2 * options.z_loss * lse * p - rest), 0)
                others = k * (1 + 2 * options.z_loss * lse) * own * rest
                grad_hidden = mean.to(g.dtype).mul_(others[:, None])
                grad_hidden.addcmul_(weight[torch.where(here, labels - start, 0)].to(g.dtype), at_label[:, None])
                grad_hidden.masked_fill_((labels == options.ignore_index)[:, None], 0)
                dist.all_reduce(grad_hidden, group=group)
                grad_hidden = grad_hidden.to(hidden.dtype)
            if ctx.needs_input_grad[1] or (bias is not None and ctx.needs_input_grad[2]):
                grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
                grad_bias = torch.empty_like(bias) if bias is not None and ctx.needs_input_grad[2] else None
                values = RowValues(negative, negative, lse, lse[:0])
                linear_softmax.weight_gradient(
                    hidden, weight, bias, labels, values, g, None, options, grad_weight, grad_bias, 1024 if lean else 4096,
                    logits_dtype=logits_dtype, first=start, whole=vocab_size,
                )  # fmt: skip
        return grad_hidden, grad_weight, grad_bias, *(None,) * 7


def _stream(hidden, weight, bias, labels, options, out, state, start, logits_dtype, sizes):
    for chunk, part, x, tile, acc in linear_softmax.row_tiles(hidden, weight, out, sizes, None, logits_dtype):
        own = torch.empty(5, chunk.rows, dtype=state.dtype, device=state.device)
        for column0 in range(0, weight.shape[0], chunk.columns):
            w = weight[column0 : column0 + chunk.columns]
            b = None if bias is None else bias[column0 : column0 + chunk.columns]
            z = tile[:, : w.shape[0]]
            matmul_into(z, x, w.t())
            p = None if acc is None else z if z.dtype == w.dtype else linear_softmax.over(tile, w)
            softmax.stream_tile(z, p, acc, labels[part], b, own, start + column0, options, column0 == 0)
            if acc is not None:
                matmul_into(acc, p, w, add=column0 > 0)
        if not softmax.by_triton(x):  # the twin counts in nats, the kernel in units of ln 2
            own[0] /= softmax.LN2
            own[2] /= softmax.LN2
        state[:, part] = own
        if out is not None:
            divisor = own[1] * softmax.p_scale(weight.dtype)
            out[part] = torch.where(divisor[:, None] == 0, 0, acc / divisor[:, None]).to(out.dtype)
