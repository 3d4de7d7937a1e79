"""Triton kernels on tiles of logits: the softmax and its gradient, between one matmul and the next.

Three ways through a row of logits, all exact, statistics in fp32:

`stream_tile` sees one tile of columns at a time and never again. It turns the logits z into e = exp(z - c), in place, for a
reference c of the row, and adds up what the row needs. A tile whose maximum exceeds c by more than `slack` moves c, and rescales
what was summed so far, the accumulated product e @ W included (online softmax, arXiv 1805.02867; the slack makes that rare, and
costs nothing: bf16 has the exponents of fp32). The label's column is left out of e. `finish_rows` adds it: there the gradient is
p - 1, and taken from the sum of the others it is exact where p rounds to 1.

`softmax_rows` has whole rows and writes their gradient over them. `gradient_tile` knows the log-sum-exp already.

Logits are in units of ln 2 here, so that exp(z - c) is one fused multiply-add and one exp2. Blocks inside a row are read without a
mask, and the label is looked for only in the block that holds it: these kernels are bound by instructions as much as by memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _logits(x_row, at, columns, bias_ptr, a, b, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, MASK: tl.constexpr):
    # (z / ln 2, dz/dx over its constants). No cap: x * b. With one: tanh(x * a) * b
    if MASK:
        x = tl.load(x_row + at, mask=at < columns, other=0.0).to(tl.float32)
    else:
        x = tl.load(x_row + at).to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias_ptr + at, mask=at < columns, other=0.0).to(tl.float32)
    slope = x  # not read without a cap
    if HAS_CAP:
        x = x * a
        y = tl.abs(x)
        e = tl.exp2(y * -2.8853900817779268)  # exp(-2 y)
        small = y * (1.0 - y * y * (1.0 / 3.0 - y * y * (2.0 / 15.0)))  # 1 - e cancels there
        t = tl.where(y < 0.05, small, (1.0 - e) / (1.0 + e))
        x = tl.where(x < 0, -t, t)
        slope = 1.0 - t * t
    z = x * b
    if MASK:
        z = tl.where(at < columns, z, -float("inf"))
    return z, slope


@triton.jit
def _log1p(x):  # Kahan: exact to an ulp with log alone
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def _expm1(x):
    u = tl.exp(x)
    v = u - 1.0
    safe = (u != 1.0) & (v != -1.0)
    return tl.where(safe, v * (x / tl.where(safe, tl.log(u), 1.0)), tl.where(v == -1.0, -1.0, x))


@triton.jit
def _negative_log(others, reference, target):
    # logsumexp - z_t, as softplus of log(sum of the others) - z_t: exact where p_t rounds to 1, and never negative
    r = tl.log(others) + reference - target
    return tl.maximum(r, 0.0) + _log1p(tl.exp(-tl.abs(r))) + (r - r)  # r - r keeps a NaN, which maximum() may drop


@triton.jit
def _top(x_row, columns, bias_ptr, a, b, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, BLOCK: tl.constexpr):
    tops = tl.full([BLOCK], -float("inf"), tl.float32)
    whole = columns // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        z, slope = _logits(x_row, start + tl.arange(0, BLOCK), columns, bias_ptr, a, b, HAS_BIAS, HAS_CAP, False)
        tops = tl.maximum(tops, z)
    if whole < columns:
        z, slope = _logits(x_row, whole + tl.arange(0, BLOCK), columns, bias_ptr, a, b, HAS_BIAS, HAS_CAP, True)
        tops = tl.maximum(tops, z)
    return tl.max(tops, 0)


@triton.jit
def _block_sums(
    x_row, p_row, start, columns, label, origin, sums, tops, moments, totals, target, bias_ptr, a, b, p_scale,
    WRITE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, ENTROPY: tl.constexpr, SMOOTH: tl.constexpr,
    BLOCK: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    at = start + tl.arange(0, BLOCK)
    z, slope = _logits(x_row, at, columns, bias_ptr, a, b, HAS_BIAS, HAS_CAP, MASK)
    e = tl.exp2(z - origin)
    if (label >= start) & (label < start + BLOCK):
        target += tl.sum(tl.where(at == label, z, 0.0), 0)
        e = tl.where(at == label, 0.0, e)
    sums += e
    if ENTROPY:
        moments += tl.where(e == 0, 0.0, e * (z - origin))
    if SMOOTH:
        if MASK:
            totals += tl.where(at < columns, z, 0.0)
        else:
            totals += z
    if WRITE:
        if HAS_CAP:
            e = e * slope
        e = (e * p_scale).to(p_row.dtype.element_ty)
        if p_row.dtype.element_ty != x_row.dtype.element_ty:
            tl.debug_barrier()  # p lies over x and is narrower: no warp may write what another has yet to read
        if MASK:
            tl.store(p_row + at, e, mask=at < columns)
        else:
            tl.store(p_row + at, e)
    else:
        tops = tl.maximum(tops, z)
    return sums, tops, moments, totals, target


@triton.jit
def _row_sums(
    x_row, p_row, columns, label, c, bias_ptr, a, b, p_scale,
    WRITE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, ENTROPY: tl.constexpr, SMOOTH: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    # One reading of a row for a reference c that is known: no reduction inside the loop.
    # -> maximum, sum of the others' e, label's z, sum of the others' e * (z - c), sum of z
    origin = tl.where(c == -float("inf"), 0.0, c)
    sums = tl.zeros([BLOCK], tl.float32)
    tops = tl.full([BLOCK], -float("inf"), tl.float32)
    moments = tl.zeros([BLOCK], tl.float32)
    totals = tl.zeros([BLOCK], tl.float32)
    target = tl.sum(sums, 0)
    whole = columns // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        sums, tops, moments, totals, target = _block_sums(
            x_row, p_row, start, columns, label, origin, sums, tops, moments, totals, target, bias_ptr, a, b, p_scale,
            WRITE, HAS_BIAS, HAS_CAP, ENTROPY, SMOOTH, BLOCK, False,
        )  # fmt: skip
    if whole < columns:
        sums, tops, moments, totals, target = _block_sums(
            x_row, p_row, whole, columns, label, origin, sums, tops, moments, totals, target, bias_ptr, a, b, p_scale,
            WRITE, HAS_BIAS, HAS_CAP, ENTROPY, SMOOTH, BLOCK, True,
        )  # fmt: skip
    return tl.max(tops, 0), tl.sum(sums, 0), target, tl.sum(moments, 0), tl.sum(totals, 0)


@triton.jit
def _row_statistics(
    x_row, columns, label, bias_ptr, a, b,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, ENTROPY: tl.constexpr, SMOOTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # The first block's maximum serves as reference; a row that exceeds it by 2^80 is read again.
    z, slope = _logits(x_row, tl.arange(0, BLOCK), columns, bias_ptr, a, b, HAS_BIAS, HAS_CAP, True)
    c = tl.max(z, axis=0)
    top, others, target, moment, total = _row_sums(
        x_row, x_row, columns, label, c, bias_ptr, a, b, 1.0, False, HAS_BIAS, HAS_CAP, ENTROPY, SMOOTH, BLOCK
    )
    if (top > c + 80.0) | ((c == -float("inf")) & (top > c)):
        c = top
        top, others, target, moment, total = _row_sums(
            x_row, x_row, columns, label, c, bias_ptr, a, b, 1.0, False, HAS_BIAS, HAS_CAP, ENTROPY, SMOOTH, BLOCK
        )
    return c, others, target, moment, total


@triton.jit
def stream_kernel(
    x_ptr, x_stride, p_ptr, p_stride, acc_ptr, acc_stride, labels_ptr, bias_ptr, state_ptr,
    n_rows, columns, column0, hidden_size, a, b, slack, p_scale,
    FIRST: tl.constexpr, WRITE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, ENTROPY: tl.constexpr,
    SMOOTH: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_row, p_row = x_ptr + row * x_stride, p_ptr + row * p_stride
    label = tl.load(labels_ptr + row).to(tl.int64) - column0
    label = tl.where(label < columns, label, -1).to(tl.int32)
    state = state_ptr + row
    if WRITE:
        top = _top(x_row, columns, bias_ptr, a, b, HAS_BIAS, HAS_CAP, BLOCK)
    else:
        top, others, target, moment, total = _row_statistics(
            x_row, columns, label, bias_ptr, a, b, HAS_BIAS, HAS_CAP, ENTROPY, SMOOTH, BLOCK
        )
    c = top
    if not FIRST:
        c = tl.load(state)
    if WRITE:
        factor = 1.0
        shift = 0.0
        if (top > c + slack) | ((c == -float("inf")) & (top > c)):
            factor = tl.exp2(c - top)
            shift = c - top
            c = top
            for start in range(0, hidden_size, BLOCK_D):
                d = start + tl.arange(0, BLOCK_D)
                where = acc_ptr + row * acc_stride + d
                tl.store(where, tl.load(where, mask=d < hidden_size) * factor, mask=d < hidden_size)
        dropped, others, target, moment, total = _row_sums(
            x_row, p_row, columns, label, c, bias_ptr, a, b, p_scale, WRITE, HAS_BIAS, HAS_CAP, ENTROPY, SMOOTH, BLOCK
        )
        own = 1.0
        own_shift = 0.0
    else:
        # both sums to the larger reference
        new = tl.maximum(c, top)
        origin = tl.where(new == -float("inf"), 0.0, new)
        shift = c - origin
        factor = tl.exp2(shift)
        own_shift = top - origin
        own = tl.exp2(own_shift)
        c = new
        moment = tl.where(others > 0, own * (moment + own_shift * others), others)
        others = others * own
    if not FIRST:
        before = tl.load(state + n_rows)
        target += tl.load(state + 2 * n_rows)
        if ENTROPY:
            moment += tl.where(before > 0, factor * (tl.load(state + 3 * n_rows) + shift * before), before)
        total += tl.load(state + 4 * n_rows)
        others += before * factor
    tl.store(state, c)
    tl.store(state + n_rows, others)
    tl.store(state + 2 * n_rows, target)
    tl.store(state + 3 * n_rows, moment)
    tl.store(state + 4 * n_rows, total)


@triton.jit
def _row_values(c, others, target, moment, label, vocab_size, ignore_index, ENTROPY: tl.constexpr):
    # -> -log p_t, logsumexp, entropy, p_t, 1 - p_t, 1 / sum, coefficient (0 ignored, NaN out of range)
    c = tl.where(c == -float("inf"), 0.0, c) * LN2
    target = target * LN2
    moment = moment * LN2
    keep = tl.where(label == ignore_index, 0.0, 1.0)
    keep = tl.where((label != ignore_index) & ((label < 0) | (label >= vocab_size)), float("nan"), keep)
    labelled = keep == 1.0
    negative = tl.where(labelled, _negative_log(others, c, target), 0.0)
    e = tl.where(labelled, tl.exp(target - c), 0.0)
    s = others + e
    lse = tl.where(labelled & (target > c), target + negative, c + tl.log(s))
    entropy = 0.0
    if ENTROPY:  # lse - sum p z, both measured from c
        away = tl.where(e == 0, 0.0, target - c)
        high = labelled & (target >= c)
        entropy = tl.where(high, negative + away * (others / s), tl.log(s) - away * (e / s)) - moment / s
    return negative, lse, entropy, e / s, others / s, 1.0 / s, keep


@triton.jit
def finish_kernel(
    acc_ptr, acc_stride, w_ptr, w_stride, mean_ptr, labels_ptr, state_ptr, scale_ptr,
    out_ptr, out_stride, value_ptr, negative_ptr, lse_ptr, entropy_ptr,
    n_rows, vocab_size, hidden_size, ignore_index, scale, cap, temperature, smoothing, z_loss, p_scale,
    WRITE: tl.constexpr, HAS_CAP: tl.constexpr, SMOOTH: tl.constexpr, ENTROPY: tl.constexpr, HAS_SCALE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row).to(tl.int64)
    state = state_ptr + row
    c, others, target = tl.load(state), tl.load(state + n_rows), tl.load(state + 2 * n_rows)
    moment = tl.load(state + 3 * n_rows)
    negative, lse, entropy, p, rest, inverse, keep = _row_values(
        c, others, target, moment, label, vocab_size, ignore_index, ENTROPY
    )
    k = scale / temperature
    value = negative
    if SMOOTH:
        value = (1.0 - smoothing) * negative + smoothing * (lse - tl.load(state + 4 * n_rows) * LN2 / vocab_size)
    value += z_loss * lse * lse
    dead = keep == 0.0
    tl.store(value_ptr + row, tl.where(dead, 0.0, value * keep))
    tl.store(negative_ptr + row, tl.where(dead, 0.0, negative * keep))
    tl.store(lse_ptr + row, lse)
    if ENTROPY:
        tl.store(entropy_ptr + row, tl.where(dead, 0.0, entropy * keep))
    if WRITE:
        if HAS_SCALE:
            keep *= tl.load(scale_ptr).to(tl.float32)
        k *= keep
        slope = 1.0
        if HAS_CAP:
            t = target * LN2 * temperature / cap
            slope = 1.0 - t * t
        c_acc = k * (1.0 + 2.0 * z_loss * lse) * inverse / p_scale
        c_target = k * slope * (smoothing + 2.0 * z_loss * lse * p - rest)
        at = tl.where((label >= 0) & (label < vocab_size), label, 0)
        for start in range(0, hidden_size, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            u = c_acc * tl.load(acc_ptr + row * acc_stride + d, mask=d < hidden_size, other=0.0)
            u += c_target * tl.load(w_ptr + at * w_stride + d, mask=d < hidden_size, other=0.0).to(tl.float32)
            if SMOOTH:
                u -= k * smoothing * tl.load(mean_ptr + d, mask=d < hidden_size, other=0.0)
            u = tl.where(dead, 0.0, u)
            tl.store(out_ptr + row * out_stride + d, u.to(out_ptr.dtype.element_ty), mask=d < hidden_size)


@triton.jit
def _gradient(
    x_row, p_row, start, columns, label, bias_ptr, a, b, lse2, lse, negative, entropy, g, ge, k, smoothing, each, z_loss, dead,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, ENTROPY: tl.constexpr, BLOCK: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    at = start + tl.arange(0, BLOCK)
    z, slope = _logits(x_row, at, columns, bias_ptr, a, b, HAS_BIAS, HAS_CAP, MASK)
    z = z - lse2
    p = tl.exp2(z)
    factor = g * k * (1.0 + 2.0 * z_loss * lse)
    dz = factor * p - g * k * each
    if ENTROPY:
        dz -= tl.where(p > 0, ge * k * p * (z * LN2 + entropy), 0.0 * p)
    if (label >= start) & (label < start + BLOCK):
        # p - 1 from the label's log-probability: exact where p rounds to 1
        at_label = g * (_expm1(-negative) + smoothing - each + 2.0 * z_loss * lse * tl.exp(-negative))
        at_label -= ge * tl.exp(-negative) * (entropy - negative)
        dz = tl.where(at == label, at_label * k, dz)
    if HAS_CAP:
        dz = dz * slope
    dz = tl.where(dead, 0.0, dz).to(p_row.dtype.element_ty)
    if p_row.dtype.element_ty != x_row.dtype.element_ty:
        tl.debug_barrier()  # as in _block_sums
    if MASK:
        tl.store(p_row + at, dz, mask=at < columns)
    else:
        tl.store(p_row + at, dz)


@triton.jit
def gradient_kernel(
    x_ptr, x_stride, p_ptr, p_stride, labels_ptr, bias_ptr, lse_ptr, negative_ptr, entropy_ptr, g_ptr, ge_ptr,
    columns, column0, vocab_size, ignore_index, a, b, k, smoothing, z_loss,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, ENTROPY: tl.constexpr, HAS_G: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row).to(tl.int64)
    keep = tl.where(label == ignore_index, 0.0, 1.0)
    keep = tl.where((label != ignore_index) & ((label < 0) | (label >= vocab_size)), float("nan"), keep)
    lse, negative = tl.load(lse_ptr + row), tl.load(negative_ptr + row)
    g = keep
    if HAS_G:
        g *= tl.load(g_ptr + row)
    entropy = 0.0
    ge = 0.0
    if ENTROPY:
        entropy = tl.load(entropy_ptr + row)
        ge = keep * tl.load(ge_ptr + row)
    label = tl.where(label - column0 < columns, label - column0, -1).to(tl.int32)
    x_row, p_row = x_ptr + row * x_stride, p_ptr + row * p_stride
    lse2, each = lse * LOG2E, smoothing / vocab_size
    whole = columns // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        _gradient(
            x_row, p_row, start, columns, label, bias_ptr, a, b, lse2, lse, negative, entropy, g, ge, k, smoothing, each, z_loss,
            keep == 0.0, HAS_BIAS, HAS_CAP, ENTROPY, BLOCK, False,
        )  # fmt: skip
    if whole < columns:
        _gradient(
            x_row, p_row, whole, columns, label, bias_ptr, a, b, lse2, lse, negative, entropy, g, ge, k, smoothing, each, z_loss,
            keep == 0.0, HAS_BIAS, HAS_CAP, ENTROPY, BLOCK, True,
        )  # fmt: skip


@triton.jit
def rows_kernel(
    x_ptr, x_stride, p_ptr, p_stride, labels_ptr, bias_ptr, value_ptr, negative_ptr, lse_ptr, entropy_ptr,
    columns, ignore_index, a, b, k, smoothing, z_loss,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, SMOOTH: tl.constexpr, ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_row, p_row = x_ptr + row * x_stride, p_ptr + row * p_stride
    label = tl.load(labels_ptr + row).to(tl.int64)
    place = tl.where(label < columns, label, -1).to(tl.int32)
    c, others, target, moment, total = _row_statistics(
        x_row, columns, place, bias_ptr, a, b, HAS_BIAS, HAS_CAP, ENTROPY, SMOOTH, BLOCK
    )
    negative, lse, entropy, p, rest, inverse, keep = _row_values(
        c, others, target, moment, label, columns, ignore_index, ENTROPY
    )
    value = (1.0 - smoothing) * negative + z_loss * lse * lse
    if SMOOTH:
        value += smoothing * (lse - total * LN2 / columns)
    dead = keep == 0.0
    tl.store(value_ptr + row, tl.where(dead, 0.0, value * keep))
    tl.store(negative_ptr + row, tl.where(dead, 0.0, negative * keep))
    tl.store(lse_ptr + row, lse)
    if ENTROPY:
        tl.store(entropy_ptr + row, tl.where(dead, 0.0, entropy * keep))
    g = keep
    lse2, each = lse * LOG2E, smoothing / columns
    whole = columns // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        _gradient(
            x_row, p_row, start, columns, place, bias_ptr, a, b, lse2, lse, negative, 0.0, g, 0.0, k, smoothing, each, z_loss,
            dead, HAS_BIAS, HAS_CAP, False, BLOCK, False,
        )  # fmt: skip
    if whole < columns:
        _gradient(
            x_row, p_row, whole, columns, place, bias_ptr, a, b, lse2, lse, negative, 0.0, g, 0.0, k, smoothing, each, z_loss,
            dead, HAS_BIAS, HAS_CAP, False, BLOCK, True,
        )  # fmt: skip


@triton.jit
def scale_kernel(x_ptr, n, g_ptr, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if ROWS:
        g = tl.load(g_ptr + at // columns, mask=at < n, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + at, mask=at < n, other=0.0).to(tl.float32)
        tl.store(x_ptr + at, tl.where(x == 0, 0.0, x * g).to(x_ptr.dtype.element_ty), mask=at < n)
    else:
        g = tl.load(g_ptr).to(tl.float32)
        if g != 1.0:
            x = tl.load(x_ptr + at, mask=at < n, other=0.0).to(tl.float32)
            tl.store(x_ptr + at, (x * g).to(x_ptr.dtype.element_ty), mask=at < n)
