"""hidden @ weight.T and its softmax, in chunks: the loops between the matmuls and the kernels.

Frozen head, `token_losses`: two matmuls. For a chunk of rows the vocabulary goes by in tiles: logits = X W_v^T, e = exp(logits - c)
written over them (`softmax.stream_tile`), product += e W_v in fp32. At the end each row is divided by its sum and gets its label's
term. A tile of logits is read once and written once, no chunk of whole rows exists, and the logits need not be computed again.

Trained head, fast, `summed_loss`: three matmuls. Chunks of whole rows, as large as the weight's gradient, whose memory they use;
that gradient is summed in fp32 over the chunks and rounded once. With few rows it is one chunk, and written once.

Trained head, lean: four matmuls. First `token_losses`, then `weight_gradient`: from the known log-sum-exp the logits are made
again, for all rows and some columns at a time, so that each block of the weight's gradient is written once, in its own dtype.

Nothing here asks the card for a number: sizes follow from shapes alone.
"""

from __future__ import annotations

import torch

from . import softmax
from .matmul import matmul_into
from .softmax import RowValues
from .workspace import ALIGN, Region, aligned, row_chunks

# Extra bytes for a frozen head's chunks of rows, and the most columns of a tile of logits
FAST = (118 << 20, 26112)
LEAN = (10 << 20, 16384)
BLOCK_COLUMNS = 4096  # of weight's gradient that are summed in fp32 at a time, where it is not written directly


def rows_of_chunk(hidden_size: int) -> int:
    """A product of 1024 x 4096 fills a card of 132 multiprocessors in one wave of 128 x 256 tiles."""
    return max(1024, (1 << 22) // max(hidden_size, 1))


def least_bytes(hidden) -> int:
    """What the smallest chunk needs, whatever the sizes say."""
    return 16 * 8 * (256 + hidden.shape[-1]) + 4096


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _settle(out, total, factor, scale) -> None:
    """out = total * factor * scale, rounded once; scale: a number on the card, or None."""
    if scale is not None:
        torch.mul(total, scale if factor == 1 else scale * factor, out=out)
    elif factor != 1:
        torch.mul(total, factor, out=out)
    else:
        out.copy_(total)


def token_losses(
    hidden, weight, bias, labels, options, *, out=None, scale=None, sizes=FAST, scratch=None, logits_dtype=None
):
    """RowValues of hidden [T, D], and into `out` [T, D] (None: not wanted) each row's dvalue/dhidden times `scale` [] (None: 1).

    scratch: a buffer to work in, instead of `sizes[0]` bytes.
    """
    again = not options.plain and out is not None
    rows, hidden_size = hidden.shape
    dtype = acc_dtype(hidden.dtype)
    values = RowValues.empty(rows, options.entropy, hidden.device, dtype)
    target = None if again else out
    mean = weight.mean(0, dtype=dtype) if options.smoothing and target is not None else None
    for chunk, part, x, tile, acc in row_tiles(hidden, weight, target, sizes, scratch, logits_dtype):
        state = torch.empty(5, chunk.rows, dtype=dtype, device=hidden.device)
        for column0 in range(0, weight.shape[0], chunk.columns):
            w = weight[column0 : column0 + chunk.columns]
            b = None if bias is None else bias[column0 : column0 + chunk.columns]
            z = tile[:, : w.shape[0]]
            matmul_into(z, x, w.t())
            p = None if acc is None else z if z.dtype == w.dtype else over(tile, w)
            softmax.stream_tile(z, p, acc, labels[part], b, state, column0, options, column0 == 0)
            if acc is not None:
                matmul_into(acc, p, w, add=column0 > 0)
        own = None if target is None else target[part]
        softmax.finish_rows(acc, weight, mean, labels[part], state, scale, own, values[part], options)
    if again:
        hidden_gradient(
            hidden, weight, bias, labels, values, None, None, options, out,
            scale=scale, sizes=sizes, scratch=scratch, logits_dtype=logits_dtype,
        )  # fmt: skip
    return values


def hidden_gradient(
    hidden,
    weight,
    bias,
    labels,
    values,
    g,
    ge,
    options,
    out,
    *,
    scale=None,
    sizes=FAST,
    scratch=None,
    logits_dtype=None,
):
    """out [T, D] = the gradient of sum(g * value + ge * entropy) times `scale`, the logits made again from known `values`."""
    factor = 1 / softmax.p_scale(weight.dtype, options.scale / options.temperature)
    for chunk, part, x, tile, acc in row_tiles(hidden, weight, out, sizes, scratch, logits_dtype):
        for column0 in range(0, weight.shape[0], chunk.columns):
            w = weight[column0 : column0 + chunk.columns]
            b = None if bias is None else bias[column0 : column0 + chunk.columns]
            z = tile[:, : w.shape[0]]
            matmul_into(z, x, w.t())
            p = z if z.dtype == w.dtype else over(tile, w)
            softmax.gradient_tile(
                z, p, labels[part], b, values[part], None if g is None else g[part], None if ge is None else ge[part],
                column0, weight.shape[0], options,
            )  # fmt: skip
            matmul_into(acc, p, w, add=column0 > 0)
        _settle(out[part], acc, factor, scale)


def over(tile, w):
    # the tile's memory as narrower elements; rows start where they did
    whole = tile.as_strided((tile.shape[0], tile.stride(0)), (tile.stride(0), 1))
    return whole.view(w.dtype)[:, : w.shape[0]]


def row_tiles(hidden, weight, out, sizes, scratch, logits_dtype):
    """(chunk, its rows, hidden states, tile for logits, product), in memory that holds nothing yet."""
    (rows, hidden_size), vocab_size = hidden.shape, weight.shape[0]
    if rows == 0:
        return
    logits_dtype = logits_dtype or hidden.dtype
    product_dtype = acc_dtype(hidden.dtype)
    (extra, most_columns), most_rows = sizes, rows_of_chunk(hidden_size)
    columns = min(most_columns, aligned(vocab_size, 256))
    acc_bytes = 0 if out is None else product_dtype.itemsize
    if scratch is None:
        n = min(most_rows, rows)
        whole = n * columns * logits_dtype.itemsize + aligned(n * hidden_size * acc_bytes) + 1024
        scratch = torch.empty(max(min(extra, whole), least_bytes(hidden)), dtype=torch.uint8, device=hidden.device)
    row_bytes = 0 if out is None else hidden_size * out.dtype.itemsize
    chunks = row_chunks(
        rows, hidden_size, vocab_size, logit_bytes=logits_dtype.itemsize, acc_bytes=acc_bytes, row_bytes=row_bytes,
        extra=scratch.numel() * scratch.itemsize - 1024, most_rows=most_rows, most_columns=columns,
    )  # fmt: skip
    for chunk in chunks:
        part = slice(chunk.start, chunk.start + chunk.rows)
        own = Region(scratch)
        tail = None if out is None else Region(out[part.stop :])
        acc = None
        if out is not None:
            acc = (tail if chunk.product_in_tail else own).take(chunk.rows, hidden_size, product_dtype)
        tile = (tail if chunk.logits_in_tail else own).take(chunk.rows, chunk.columns, logits_dtype)
        yield chunk, part, hidden[part], tile, acc


def _weight_block(out, dz, hidden, factor, scale, room: Region | None = None) -> None:
    """out [n, D] = dz [T, n]^T @ hidden [T, D] * factor * scale; where it must be scaled before it is rounded, in blocks of fp32
    in `room`."""
    if factor == 1 and scale is None and out.dtype == hidden.dtype:
        matmul_into(out, dz.t(), hidden)
        return
    dtype, columns = acc_dtype(hidden.dtype), min(BLOCK_COLUMNS, out.shape[0])
    width = aligned(hidden.shape[1], 8) * dtype.itemsize
    if room is not None:
        columns = min(columns, room.left() // width)
        columns = columns // 128 * 128 or columns
    if room is None or columns < 1:
        columns = min(BLOCK_COLUMNS, out.shape[0])
        room = Region(torch.empty(columns * width + 2 * ALIGN, dtype=torch.uint8, device=out.device))
    block = room.take(columns, hidden.shape[1], dtype)
    for start in range(0, out.shape[0], columns):
        part = out[start : start + columns]
        total = block[: part.shape[0]]
        matmul_into(total, dz[:, start : start + columns].t(), hidden)
        _settle(part, total, factor, scale)


def weight_gradient(
    hidden, weight, bias, labels, values, g, ge, options, out, out_bias, columns, *, scale=None, logits_dtype=None, first=0,
    whole=None,
):  # fmt: skip
    """out [V, D] (None: not wanted) and out_bias [V] (None) = the gradients of sum(g * value + ge * entropy) times `scale`.

    columns: of a tile for which memory is taken; where the tail of `out` has room for more, it is used.
    first, whole: `weight` holds the rows from `first` on of a vocabulary of `whole`.
    """
    (rows, hidden_size), vocab_size = hidden.shape, weight.shape[0]
    logits_dtype = logits_dtype or hidden.dtype
    columns = min(columns, aligned(vocab_size, 8))
    extra = torch.empty(rows * columns * logits_dtype.itemsize + 4096, dtype=torch.uint8, device=hidden.device)
    factor = 1 / softmax.p_scale(weight.dtype, options.scale / options.temperature)
    sum_bytes = acc_dtype(hidden.dtype).itemsize
    column0 = 0
    while column0 < vocab_size:
        left = vocab_size - column0
        in_tail = 0
        if out is not None:
            per_column = rows * logits_dtype.itemsize + hidden_size * out.itemsize
            in_tail = (left * hidden_size * out.itemsize - 2048) // per_column // 256 * 256
            in_tail = min(in_tail, 2 * columns)
        if in_tail > columns:
            n, region, room = in_tail, Region(out[column0 + in_tail :]), Region(extra)
        else:
            n, region = min(columns, left), Region(extra)
            room = None if out is None else Region(out[column0 + n :])
            if out is not None and room.left() < n * hidden_size * sum_bytes:  # the last ones: both in `extra`
                n = max(
                    1, min(left, region.left() // (rows * logits_dtype.itemsize + hidden_size * sum_bytes) // 16 * 16)
                )
                room = region
        w = weight[column0 : column0 + n]
        tile = region.take(rows, n, logits_dtype)
        matmul_into(tile, hidden, w.t())
        p = tile if tile.dtype == w.dtype else over(tile, w)
        b = None if bias is None else bias[column0 : column0 + n]
        softmax.gradient_tile(tile, p, labels, b, values, g, ge, first + column0, whole or vocab_size, options)
        if out is not None:
            _weight_block(out[column0 : column0 + n], p, hidden, factor, scale, room)
        if out_bias is not None:
            _settle(out_bias[column0 : column0 + n], p.sum(0, dtype=acc_dtype(hidden.dtype)), factor, scale)
        column0 += n


def chunked_gradients(
    hidden, weight, bias, labels, options, grad_hidden, grad_weight, grad_bias, *, scales=(None, None), rows_per_chunk=None,
    logits_dtype=None,
):  # fmt: skip
    """RowValues and the gradients of sum(value), for hidden and for weight and bias times their scale, by chunks of whole rows.

    grad_hidden [T, D], grad_weight [V, D], grad_bias [V]: None where not wanted.
    """
    (rows, hidden_size), vocab_size = hidden.shape, weight.shape[0]
    dtype, logits_dtype = acc_dtype(hidden.dtype), logits_dtype or hidden.dtype
    values = RowValues.empty(rows, False, hidden.device, dtype)
    factor = 1 / softmax.p_scale(hidden.dtype, options.scale / options.temperature)
    stride = aligned(vocab_size, 8)
    if rows_per_chunk is None:
        # The gradient's own memory holds the logits of about D rows; without its fp32 sum there is memory for twice as many.
        rows_per_chunk = hidden_size * vocab_size * hidden.itemsize // (stride * logits_dtype.itemsize)
        rows_per_chunk = max(rows_per_chunk // 128 * 128, 128)
        if rows <= 2 * rows_per_chunk:
            rows_per_chunk = rows
    n = max(min(rows, rows_per_chunk), 1)
    total = None
    if grad_weight is not None and n < rows:
        total = torch.empty_like(grad_weight, dtype=dtype)
    total_bias = None if grad_bias is None else torch.zeros(vocab_size, dtype=dtype, device=hidden.device)
    size = n * stride * logits_dtype.itemsize
    if total is None or grad_weight.numel() * grad_weight.itemsize < size:
        buffer = torch.empty(size + 1024, dtype=torch.uint8, device=hidden.device)
    else:
        buffer = grad_weight  # empty until the end
    for start in range(0, rows, n):
        part = slice(start, min(start + n, rows))
        x = hidden[part]
        z = Region(buffer).take(x.shape[0], vocab_size, logits_dtype)
        matmul_into(z, x, weight.t())
        p = z if z.dtype == weight.dtype else over(z, weight)
        softmax.softmax_rows(z, p, labels[part], bias, values[part], options)
        if grad_hidden is not None:
            if factor == 1 and scales[0] is None:
                matmul_into(grad_hidden[part], p, weight)
            else:
                product = torch.empty(x.shape, dtype=dtype, device=x.device)
                matmul_into(product, p, weight)
                _settle(grad_hidden[part], product, factor, scales[0])
        if total is not None:
            matmul_into(total, p.t(), x, add=start > 0)
        elif grad_weight is not None:
            _weight_block(grad_weight, p, x, factor, scales[1])
        if total_bias is not None:
            total_bias += p.sum(0, dtype=dtype)
    if total is not None:
        _settle(grad_weight, total, factor, scales[1])
    if total_bias is not None:
        _settle(grad_bias, total_bias, factor, scales[1])
    return values
