"""Calls of the kernels, each beside its twin in plain torch for what Triton does not serve: CPUs and fp64.

Shapes: logits [n, columns] (a tile of the vocabulary from `column0` on, or all of it), labels [n], state [5, n] fp32 (reference,
sum of the others' exp, label's logit, sum of the others' exp * (z - reference), sum of all z), row values [n] fp32 (fp64 for fp64 input).
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import torch

try:
    import triton

    from . import softmax_kernel as kernels
except ImportError:  # a torch without triton
    triton = None

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SLACK = 20.0  # nats that a tile may exceed the row's reference before everything is rescaled
LOG2E = math.log2(math.e)
LN2 = math.log(2)


@dataclass(frozen=True)
class Options:
    """What happens to logits x W^T + b, and what is taken of them. z = softcap(logits * scale) / temperature."""

    ignore_index: int = -100
    scale: float = 1.0
    softcap: float = 0.0  # 0: none
    temperature: float = 1.0
    smoothing: float = 0.0
    z_loss: float = 0.0
    entropy: bool = False

    @property
    def plain(self) -> bool:
        """Whether the gradient is p times a number of the row, plus a term of the label alone."""
        return not (self.smoothing and self.softcap)


@dataclass
class RowValues:
    """Per row: the loss, -log p of the label, log-sum-exp, entropy."""

    value: torch.Tensor
    negative: torch.Tensor
    lse: torch.Tensor
    entropy: torch.Tensor

    @classmethod
    def empty(cls, n: int, entropy: bool, device, dtype) -> RowValues:
        made = [torch.empty(n, device=device, dtype=dtype) for _ in range(3)]
        return cls(*made, torch.empty(n if entropy else 0, device=device, dtype=dtype))

    def __getitem__(self, rows: slice) -> RowValues:
        entropy = self.entropy[rows] if self.entropy.numel() else self.entropy
        return RowValues(self.value[rows], self.negative[rows], self.lse[rows], entropy)


def by_triton(x: torch.Tensor) -> bool:
    return triton is not None and x.dtype != torch.float64 and (x.is_cuda or INTERPRETED)


def p_scale(dtype: torch.dtype, scale: float = 1.0) -> float:
    """fp16 holds nothing below 6e-8: probabilities are stored times this power of two, and divided by it after the matmul."""
    return 2.0 ** (14 - max(0, math.ceil(math.log2(max(abs(scale), 1e-30))))) if dtype == torch.float16 else 1.0


def _factors(options: Options) -> tuple[float, float]:
    # z / ln 2 = x * b, or tanh(x * a) * b under a softcap
    if options.softcap:
        return options.scale / options.softcap, options.softcap / options.temperature * LOG2E
    return 1.0, options.scale / options.temperature * LOG2E


def _block(columns: int, most: int = 2048) -> int:
    return min(most, max(16, triton.next_power_of_2(columns)))


def _warps(block: int) -> int:
    return 8 if block > 1024 else 4


def stream_tile(x, p, acc, labels, bias, state, column0: int, options: Options, first: bool) -> None:
    """One more tile of every row: x -> e = exp(z - c), written to p (the same memory, same or narrower dtype; None: not written),
    without the label's column; `state` is brought up to date and acc [n, D], the product e @ W so far, rescaled where c moved.
    """
    n, columns = x.shape
    if n == 0:
        return
    if not by_triton(x):
        return _stream_tile(x, p, acc, labels, bias, state, column0, options, first)
    block = _block(columns)
    write = p is not None
    p = x if p is None else p
    acc_ = state if acc is None else acc
    hidden_size = acc_.shape[-1]
    kernels.stream_kernel[(n,)](
        x, x.stride(0), p, p.stride(0), acc_, acc_.stride(0), labels, state if bias is None else bias, state,
        n, columns, column0, hidden_size, *_factors(options),
        0.0 if p.dtype == torch.float16 else SLACK * LOG2E, p_scale(p.dtype),
        FIRST=first, WRITE=write, HAS_BIAS=bias is not None, HAS_CAP=bool(options.softcap), ENTROPY=options.entropy,
        SMOOTH=bool(options.smoothing), BLOCK=block, BLOCK_D=_block(hidden_size, 1024), num_warps=_warps(block),
    )  # fmt: skip


def finish_rows(acc, weight, mean, labels, state, scale, out, values: RowValues, options: Options) -> None:
    """The rows' values from `state`, and their gradients out [n, D] times scale [] (None: 1) from acc [n, D]; out None: not wanted.

    mean [D]: the average row of weight, read under label smoothing.
    """
    n, vocab_size = labels.shape[0], weight.shape[0]
    if n == 0:
        return
    if not by_triton(weight):
        return _finish_rows(acc, weight, mean, labels, state, scale, out, values, options)
    write = out is not None
    hidden_size = weight.shape[1]
    acc, out = (acc, out) if write else (state, state)
    kernels.finish_kernel[(n,)](
        acc, acc.stride(0), weight, weight.stride(0), state if mean is None else mean, labels, state,
        state if scale is None else scale, out, out.stride(0),
        values.value, values.negative, values.lse, values.entropy,
        n, vocab_size, hidden_size, options.ignore_index, options.scale, options.softcap or 1.0, options.temperature,
        options.smoothing, options.z_loss, p_scale(weight.dtype),
        WRITE=write, HAS_CAP=bool(options.softcap), SMOOTH=bool(options.smoothing), ENTROPY=options.entropy,
        HAS_SCALE=scale is not None, BLOCK_D=_block(hidden_size, 1024), num_warps=4,
    )  # fmt: skip


def gradient_tile(
    x, p, labels, bias, values: RowValues, g, ge, column0: int, vocab_size: int, options: Options
) -> None:
    """x -> the gradient of sum(g * value + ge * entropy) for these logits, written to p. g or ge None: 1, or no entropy."""
    n, columns = x.shape
    if n == 0:
        return
    if not by_triton(x):
        return _gradient_tile(x, p, labels, bias, values, g, ge, column0, vocab_size, options)
    block = _block(columns)
    k = options.scale / options.temperature
    k *= p_scale(p.dtype, k)
    some = values.lse
    kernels.gradient_kernel[(n,)](
        x, x.stride(0), p, p.stride(0), labels, some if bias is None else bias, values.lse, values.negative,
        some if ge is None else values.entropy, some if g is None else g, some if ge is None else ge,
        columns, column0, vocab_size, options.ignore_index, *_factors(options), k, options.smoothing, options.z_loss,
        HAS_BIAS=bias is not None, HAS_CAP=bool(options.softcap), ENTROPY=ge is not None, HAS_G=g is not None,
        BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip


def softmax_rows(x, p, labels, bias, values: RowValues, options: Options) -> None:
    """Whole rows of logits x [n, V] -> their values, and in p (the same memory) the gradient of their sum."""
    n, columns = x.shape
    if n == 0:
        return
    if not by_triton(x):
        state = x.new_empty(5, n, dtype=values.lse.dtype)
        _stream_tile(x, None, None, labels, bias, state, 0, options, True)
        row_values(state, labels, columns, values, options)
        return _gradient_tile(x, p, labels, bias, values, None, None, 0, columns, options)
    some = values.lse
    block = _block(columns)
    k = options.scale / options.temperature
    k *= p_scale(p.dtype, k)
    kernels.rows_kernel[(n,)](
        x, x.stride(0), p, p.stride(0), labels, some if bias is None else bias,
        values.value, values.negative, values.lse, values.entropy,
        columns, options.ignore_index, *_factors(options), k, options.smoothing, options.z_loss,
        HAS_BIAS=bias is not None, HAS_CAP=bool(options.softcap), SMOOTH=bool(options.smoothing), ENTROPY=options.entropy,
        BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip


def scale_(x, g) -> None:
    """x *= g in place, g [] or one number a row of x [n, D]. A scalar g of 1 costs no memory traffic."""
    if x.numel() == 0:
        return
    if not by_triton(x) or not x.is_contiguous():
        # g keeps its dtype: 65536 times a mean's coefficient is more than fp16 holds. A row of zeros stays one, whatever g is.
        zero = x == 0
        torch.mul(x, g.reshape(-1, *[1] * (x.dim() - 1)), out=x)
        x.masked_fill_(zero, 0)
        return
    columns = x.shape[-1] if g.dim() else 1
    kernels.scale_kernel[(triton.cdiv(x.numel(), 4096),)](
        x, x.numel(), g, columns, ROWS=g.dim() == 1, BLOCK=4096, num_warps=8
    )


# In plain torch


def _transformed(x, bias, dtype, options):
    z = x.to(dtype)
    if bias is not None:
        z = z + bias.to(dtype)
    z, slope = z * options.scale, None
    if options.softcap:
        t = torch.tanh(z / options.softcap)
        z, slope = options.softcap * t, 1 - t * t
    return z / options.temperature, slope


def _stream_tile(x, p, acc, labels, bias, state, column0, options, first):
    z, slope = _transformed(x, bias, state.dtype, options)
    n, columns = z.shape
    chosen = torch.arange(column0, column0 + columns, device=z.device) == labels[:, None]
    top = z.max(-1).values
    if first:
        state.zero_()
        state[0] = top
    else:
        c = state[0]
        slack = 0.0 if p is not None and p.dtype == torch.float16 else SLACK
        moved = (top > c + slack) | ((c == -math.inf) & (top > c))
        shift = torch.where(moved, c - top, 0)
        factor = shift.exp()
        state[3] = torch.where(state[1] > 0, factor * (state[3] + torch.nan_to_num(shift) * state[1]), 0)
        state[1] *= factor
        if acc is not None:
            acc *= factor[:, None]
        state[0] = torch.where(moved, top, c)
    origin = torch.where(state[0] == -math.inf, 0, state[0])[:, None]
    e = (z - origin).exp().masked_fill(chosen, 0)
    state[1] += e.sum(-1)
    state[2] += z.masked_fill(~chosen, 0).sum(-1)
    if options.entropy:
        state[3] += (e * (z - origin)).masked_fill(e == 0, 0).sum(-1)
    if options.smoothing:
        state[4] += z.sum(-1)
    if p is not None:
        p.copy_((e if slope is None else e * slope) * p_scale(p.dtype))


def row_weights(labels, vocab_size, options, dtype):
    keep = (labels != options.ignore_index).to(dtype)
    return keep.masked_fill((labels != options.ignore_index) & ((labels < 0) | (labels >= vocab_size)), math.nan)


def row_values(state, labels, vocab_size, values, options):
    c, others, target, moment, total = state.unbind()
    c = torch.where(c == -math.inf, 0, c)
    keep = row_weights(labels, vocab_size, options, c.dtype)
    labelled = keep == 1
    negative = torch.where(labelled, torch.nn.functional.softplus(others.log() + c - target, threshold=40.0), 0)
    e = torch.where(labelled, (target - c).exp(), 0)
    s = others + e
    lse = torch.where(labelled & (target > c), target + negative, c + s.log())
    value = negative + options.z_loss * lse * lse
    if options.smoothing:
        value = value + options.smoothing * (lse - total / vocab_size - negative)
    dead = keep == 0
    values.value.copy_((value * keep).masked_fill(dead, 0))
    values.negative.copy_((negative * keep).masked_fill(dead, 0))
    values.lse.copy_(lse)
    if options.entropy:
        away = torch.where(e == 0, 0, target - c)
        high = labelled & (target >= c)
        entropy = torch.where(high, negative + away * (others / s), s.log() - away * (e / s)) - moment / s
        values.entropy.copy_((entropy * keep).masked_fill(dead, 0))
    return keep, lse, e / s, others / s, 1 / s, target


def _finish_rows(acc, weight, mean, labels, state, scale, out, values, options):
    k = options.scale / options.temperature
    dtype = state.dtype
    keep, lse, p, rest, inverse, target = row_values(state, labels, weight.shape[0], values, options)
    if out is None:
        return
    coefficient = keep * k * (1 if scale is None else scale)
    slope = 1
    if options.softcap:
        slope = 1 - (target * options.temperature / options.softcap) ** 2
    c_acc = coefficient * (1 + 2 * options.z_loss * lse) * inverse / p_scale(weight.dtype)
    c_target = coefficient * slope * (options.smoothing + 2 * options.z_loss * lse * p - rest)
    chosen = weight[torch.where((labels >= 0) & (labels < weight.shape[0]), labels, 0)].to(dtype)
    u = c_acc[:, None] * acc + c_target[:, None] * chosen
    if options.smoothing:
        u -= (coefficient * options.smoothing)[:, None] * mean.to(dtype)
    out.copy_(u.masked_fill_((keep == 0)[:, None], 0))


def _gradient_tile(x, p, labels, bias, values, g, ge, column0, vocab_size, options):
    z, slope = _transformed(x, bias, values.lse.dtype, options)
    keep = row_weights(labels, vocab_size, options, z.dtype)
    lse, negative = values.lse[:, None], values.negative[:, None]
    chosen = torch.arange(column0, column0 + z.shape[1], device=z.device) == labels[:, None]
    coefficient = (keep if g is None else keep * g)[:, None]
    each = options.smoothing / vocab_size
    probability = (z - lse).exp()
    dz = coefficient * (probability * (1 + 2 * options.z_loss * lse) - each)
    at_label = torch.expm1(-negative) + options.smoothing - each + 2 * options.z_loss * lse * torch.exp(-negative)
    at_label = coefficient * at_label
    if ge is not None:
        ge, entropy = (keep * ge)[:, None], values.entropy[:, None]
        dz = dz - torch.where(probability > 0, ge * probability * (z - lse + entropy), 0 * probability)
        at_label = at_label - ge * torch.exp(-negative) * (entropy - negative)
    dz = torch.where(chosen, at_label, dz) * (options.scale / options.temperature)
    if slope is not None:
        dz = dz * slope
    p.copy_(dz.masked_fill_((keep == 0)[:, None], 0) * p_scale(p.dtype, options.scale / options.temperature))
