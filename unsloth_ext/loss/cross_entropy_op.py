"""The loops of `linear_softmax` as operators of torch.library: opaque to torch.compile, with shapes and gradients known to it.

`summed_loss`: the sum of the rows' values times a number, all gradients made in the forward and rounded once.

`token_losses`: a value a row. The gradient of hidden is made in the forward, for a row weight of one; the backward multiplies its
rows by the gradient that comes in, whatever was done with the values. The weight's is made in the backward, as is everything once
the entropy has a gradient.

The backward scales what the forward made in place, so that it exists once; a gradient of exactly 1 costs nothing. Asked a second
time (retain_graph), it computes anew. Nothing waits for the card, except `SummedLossOfRows`, once, to learn how many there are.
"""

# ruff: noqa: UP007
# no `from __future__ import annotations`: torch.library reads these annotations

import math
from typing import Optional

import torch

from .. import card_memory
from . import linear_softmax, softmax
from .linear_softmax import FAST, LEAN, acc_dtype, least_bytes
from .softmax import Options, RowValues

Tensor = torch.Tensor
LEAN_COLUMNS = 1024  # of a tile for which a lean weight gradient takes memory


def _is_lean(memory: str, hidden: Tensor, weight: Tensor, trained: bool) -> bool:
    if memory != "auto":
        return memory == "lean"
    if hidden.device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return False
    enough = _enough(hidden, weight, trained)
    return card_memory.free_bytes(hidden.device, enough) < enough


def _enough(hidden: Tensor, weight: Tensor, trained: bool) -> int:
    needed = weight.numel() * (4 + hidden.itemsize) if trained else FAST[0]
    return 2 * (needed + hidden.numel() * hidden.itemsize)


def memory_ahead(hidden: Tensor, weight: Tensor, trained: bool) -> str:
    """What `memory` is for some rows of `hidden` that are not known yet: "fast" where "auto" will be that for certain."""
    if hidden.device.type != "cuda":
        return "auto"
    # What is allocated until "auto" is decided: the rows, their gradient, the weight's.
    before = 2 * hidden.numel() * hidden.itemsize + (weight.numel() * weight.itemsize if trained else 0)
    enough = _enough(hidden, weight, trained) + before
    return "fast" if card_memory.free_bytes(hidden.device, enough) >= enough else "auto"


def _sizes(memory, hidden, weight):
    if not _is_lean(memory, hidden, weight, False):
        return FAST
    return min(LEAN[0], max(4 << 20, hidden.numel() * hidden.itemsize * 3 // 4)), LEAN[
        1
    ]  # a small input's gradient is small


def _no_autocast(x):
    return torch.autocast(x.device.type, enabled=False)


def _empty(like: Tensor) -> Tensor:
    return like.new_empty(0)


@torch.library.custom_op("unsloth_ext::linear_token_losses", mutates_args=())
def token_losses(
    hidden: Tensor, weight: Tensor, bias: Optional[Tensor], labels: Tensor, ignore_index: int, scale: float, softcap: float,
    temperature: float, smoothing: float, z_loss: float, entropy: bool, need_hidden: bool, logits_dtype: torch.dtype, memory: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """-> value [T], entropy [T] or [0], -log p [T], log-sum-exp [T], and dvalue/dhidden [T, D] or [0]."""
    options = Options(ignore_index, scale, softcap, temperature, smoothing, z_loss, entropy)
    out = torch.empty_like(hidden, memory_format=torch.contiguous_format) if need_hidden else None
    with _no_autocast(hidden):
        values = linear_softmax.token_losses(
            hidden,
            weight,
            bias,
            labels,
            options,
            out=out,
            sizes=_sizes(memory, hidden, weight),
            logits_dtype=logits_dtype,
        )
    return values.value, values.entropy, values.negative, values.lse, _empty(hidden) if out is None else out


@token_losses.register_fake
def _(
    hidden, weight, bias, labels, ignore_index, scale, softcap, temperature, smoothing, z_loss, entropy, need_hidden,
    logits_dtype, memory,
):  # fmt: skip
    row = hidden.new_empty(hidden.shape[0], dtype=acc_dtype(hidden.dtype))
    out = torch.empty_like(hidden, memory_format=torch.contiguous_format) if need_hidden else _empty(hidden)
    return row, row.new_empty(hidden.shape[0] if entropy else 0), torch.empty_like(row), torch.empty_like(row), out


@torch.library.custom_op("unsloth_ext::linear_token_losses_backward", mutates_args=())
def token_losses_backward(
    hidden: Tensor, weight: Tensor, bias: Optional[Tensor], labels: Tensor, negative: Tensor, lse: Tensor, entropy: Tensor,
    g: Tensor, ge: Optional[Tensor], ignore_index: int, scale: float, softcap: float, temperature: float, smoothing: float,
    z_loss: float, need_hidden: bool, need_weight: bool, need_bias: bool, logits_dtype: torch.dtype, memory: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """-> the gradients of sum(g * value + ge * entropy) for hidden, weight and bias, [0] where not needed."""
    options = Options(ignore_index, scale, softcap, temperature, smoothing, z_loss, ge is not None)
    values = RowValues(negative, negative, lse, entropy)
    rescaled = None
    if hidden.dtype == torch.float16:  # keep dz in its range: the largest row weight becomes 1
        rescaled = torch.maximum(g.abs().amax(), ge.abs().amax()) if ge is not None else g.abs().amax()
        rescaled = rescaled.clamp(min=torch.finfo(torch.float32).tiny)
        g, ge = g / rescaled, None if ge is None else ge / rescaled
    grads = [_empty(hidden)] * 3
    lean = _is_lean(memory, hidden, weight, need_weight)
    with _no_autocast(hidden):
        if need_hidden:
            grads[0] = torch.zeros_like(hidden, memory_format=torch.contiguous_format)
            linear_softmax.hidden_gradient(
                hidden, weight, bias, labels, values, g, ge, options, grads[0], sizes=LEAN if lean else FAST,
                logits_dtype=logits_dtype,
            )  # fmt: skip
        if (need_weight or need_bias) and hidden.shape[0] == 0:
            grads[1:] = [torch.zeros_like(weight), grads[2] if bias is None else torch.zeros_like(bias)]
        elif need_weight or need_bias:
            grads[1] = torch.empty_like(weight) if need_weight else grads[1]
            grads[2] = torch.empty_like(bias) if need_bias else grads[2]
            _weight_gradient(hidden, weight, bias, labels, values, g, ge, options, grads, lean, logits_dtype)
    if rescaled is not None:
        for grad in grads:
            softmax.scale_(grad, rescaled)
    return tuple(
        x if needed else _empty(hidden) for x, needed in zip(grads, (need_hidden, need_weight, need_bias), strict=True)
    )


def _weight_gradient(hidden, weight, bias, labels, values, g, ge, options, grads, lean, logits_dtype, scale=None):
    linear_softmax.weight_gradient(
        hidden, weight, bias, labels, values, g, ge, options, grads[1] if grads[1].numel() else None,
        grads[2] if grads[2].numel() else None, LEAN_COLUMNS if lean else 4 * LEAN_COLUMNS, scale=scale, logits_dtype=logits_dtype,
    )  # fmt: skip


@token_losses_backward.register_fake
def _(
    hidden, weight, bias, labels, negative, lse, entropy, g, ge, ignore_index, scale, softcap, temperature, smoothing, z_loss,
    need_hidden, need_weight, need_bias, logits_dtype, memory,
):  # fmt: skip
    return (
        torch.empty_like(hidden, memory_format=torch.contiguous_format) if need_hidden else _empty(hidden),
        torch.empty_like(weight) if need_weight else _empty(hidden),
        torch.empty_like(bias) if need_bias else _empty(hidden),
    )


def _is_traced(x: Tensor) -> bool:
    return torch.compiler.is_compiling() or type(x) is not Tensor  # a fake or functional tensor of AOTAutograd


def _scaled(x: Tensor, g: Tensor) -> Tensor:
    if _is_traced(x):
        return (x * (g if g.dim() == 0 else g[:, None])).to(x.dtype)
    # .data: no new version, since `used` already says that this buffer has been given away
    softmax.scale_(x.data, g)
    return x.detach()


def _token_losses_context(ctx, inputs, output):
    hidden, weight, bias, labels, *options = inputs
    _, entropy, negative, lse, unit = output
    ctx.mark_non_differentiable(negative, lse, unit)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, bias, labels, entropy, negative, lse, unit)
    ctx.options, ctx.memory = options[:6], options[-2:]
    ctx.made, ctx.used = options[-3], False


def _token_losses_backward(ctx, g, ge, *_):
    hidden, weight, bias, labels, entropy, negative, lse, unit = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    none = (None,) * (len(ctx.needs_input_grad) - 3)
    if g is None and ge is None:
        return (None, None, None, *none)
    g = torch.zeros_like(lse) if g is None else g.contiguous()
    ge = None if ge is None else ge.contiguous()
    scale_rows = needs[0] and ge is None and ctx.made and not ctx.used
    grads = [None, None, None]
    if scale_rows:
        grads[0] = _scaled(unit, g)
        ctx.used = not _is_traced(unit)
    rest = [needs[0] and not scale_rows, needs[1], needs[2]]
    if any(rest):
        made = token_losses_backward(
            hidden, weight, bias, labels, negative, lse, entropy, g, ge, *ctx.options, *rest, *ctx.memory
        )
        grads = [new if wanted else old for new, old, wanted in zip(made, grads, rest, strict=True)]
    return (*grads, *none)


token_losses.register_autograd(_token_losses_backward, setup_context=_token_losses_context)


def _kept_back(dtype: torch.dtype, rows: int) -> tuple[float, float] | None:
    """What the gradients of hidden and of weight are stored times, instead of the coefficient, which then waits for the backward.

    In fp16 a mean over many rows rounds to zero where the loss scale comes in only later, and a sum over as many overflows.
    """
    if dtype != torch.float16:
        return None
    return 1.0, 0.5 ** math.ceil(math.log2(max(rows, 1)))


def _summed_loss(
    hidden: Tensor, weight: Tensor, bias: Optional[Tensor], labels: Tensor, coefficient: Tensor, ignore_index: int, scale: float,
    softcap: float, temperature: float, smoothing: float, z_loss: float, need_hidden: bool, need_weight: bool, need_bias: bool,
    logits_dtype: torch.dtype, memory: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """-> coefficient [] * sum(value), and its gradients for hidden, weight and bias (or `_kept_back`), [0] where not needed."""
    options = Options(ignore_index, scale, softcap, temperature, smoothing, z_loss, False)
    kept = _kept_back(hidden.dtype, hidden.shape[0])
    scales = [coefficient] * 2 if kept is None else [torch.full_like(coefficient, factor) for factor in kept]
    grads = [
        torch.empty_like(x, memory_format=torch.contiguous_format) if needed else _empty(hidden)
        for x, needed in ((hidden, need_hidden), (weight, need_weight), (bias, need_bias))
    ]
    given = [
        grad if needed else None for grad, needed in zip(grads, (need_hidden, need_weight, need_bias), strict=True)
    ]
    with _no_autocast(hidden):
        if hidden.shape[0] == 0:
            for grad in grads:
                grad.zero_()
            return coefficient.new_zeros(()), *grads
        if not need_weight and not need_bias:
            values = linear_softmax.token_losses(
                hidden, weight, bias, labels, options, out=given[0], scale=scales[0], sizes=_sizes(memory, hidden, weight),
                logits_dtype=logits_dtype,
            )  # fmt: skip
        elif _is_lean(memory, hidden, weight, True):
            scratch = given[1]
            if scratch is not None and scratch.numel() * scratch.itemsize < max(LEAN[0], least_bytes(hidden)):
                scratch = None
            values = linear_softmax.token_losses(
                hidden, weight, bias, labels, options, out=given[0], scale=scales[0], sizes=LEAN if scratch is None else FAST,
                scratch=scratch, logits_dtype=logits_dtype,
            )  # fmt: skip
            _weight_gradient(
                hidden, weight, bias, labels, values, None, None, options, grads, True, logits_dtype, scales[1]
            )
        else:
            values = linear_softmax.chunked_gradients(
                hidden, weight, bias, labels, options, *given, scales=scales, logits_dtype=logits_dtype
            )
    return values.value.sum() * coefficient, *grads


summed_loss = torch.library.custom_op("unsloth_ext::linear_summed_loss", _summed_loss, mutates_args=())


@summed_loss.register_fake
def _(
    hidden, weight, bias, labels, coefficient, ignore_index, scale, softcap, temperature, smoothing, z_loss, need_hidden,
    need_weight, need_bias, logits_dtype, memory,
):  # fmt: skip
    grads = [
        torch.empty_like(x, memory_format=torch.contiguous_format) if needed else _empty(hidden)
        for x, needed in ((hidden, need_hidden), (weight, need_weight), (bias, need_bias))
    ]
    return hidden.new_empty((), dtype=acc_dtype(hidden.dtype)), *grads


def _summed_loss_context(ctx, inputs, output):
    ctx.mark_non_differentiable(*output[1:])
    _keep_for_backward(ctx, inputs, output)


def _keep_for_backward(ctx, inputs, output):
    hidden, weight, bias, labels, coefficient, *options = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, bias, labels, coefficient, *output[1:])
    ctx.options, ctx.used = options, False


def _summed_loss_backward(ctx, g, *_):
    saved = ctx.saved_tensors  # once: activation checkpointing counts
    inputs, grads = saved[:5], saved[5:]
    none = (None,) * (len(ctx.needs_input_grad) - 3)
    if g is None:
        return (None, None, None, *none)
    if ctx.used:
        grads = summed_loss(*(x if x is None else x.detach() for x in inputs), *ctx.options)[1:]
    ctx.used = not _is_traced(grads[0])
    kept = _kept_back(inputs[0].dtype, inputs[0].shape[0])
    factors = [g] * 2 if kept is None else [g * inputs[4] / factor for factor in kept]
    found = [
        _scaled(grad, factor) if needed else None
        for grad, factor, needed in zip(grads, (*factors, factors[1]), ctx.needs_input_grad[:3], strict=True)
    ]
    return (*found, *none)


summed_loss.register_autograd(_summed_loss_backward, setup_context=_summed_loss_context)


class SummedLossOfRows(torch.autograd.Function):
    """`summed_loss` of the labelled rows, the value alone. The way into an operator takes the host a tenth of a millisecond, and
    an operator's inputs must be there before; here it lies behind the host when the rows arrive. For eager mode.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, labelled, coefficient, *options):
        rows, shape = labelled.indices(), hidden.shape
        if rows is not None:
            hidden, labels = hidden.index_select(0, rows), labels.index_select(0, rows)
        inputs = hidden, weight, bias, labels, coefficient, *options
        made = _summed_loss(*inputs)
        _keep_for_backward(ctx, inputs, made)
        ctx.rows, ctx.shape = rows, shape
        return made[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        grad, *others = _summed_loss_backward(ctx, g)
        if grad is not None and ctx.rows is not None:
            grad = grad.new_zeros(ctx.shape).index_add_(0, ctx.rows, grad)
        return grad, *others
