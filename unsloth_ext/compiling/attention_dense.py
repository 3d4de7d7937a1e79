"""Causal attention by cuDNN with few plans and no padding where none is needed: `unsloth_ext::causal_attention`.

cuDNN builds a plan for each new sequence length, about 170 ms on an H100. Lengths rounded up to a multiple of a bucket bound
the number of plans. But a graph with symbolic lengths cannot ask whether a length is a multiple already: the answer would become a
guard and the graph two. So padding written in the graph is always done, and costs three copies, a copy of the sliced output, a
copy of its gradient and attention over a bucket of nothing, for full rows too. In an operator the question is asked when it runs:

- a multiple of the bucket goes to cuDNN as it is; nothing is copied, and the only output is what both the backward and the
  output projection read;
- another length is padded inside. Causal masking hides the padded keys, padded queries are cut off. Nothing padded is kept for
  the backward but the log-sum-exp: the backward pads again, four copies against a smaller memory than padding in the graph needs.

What a graph is told about the layout holds for both: `out` and the gradients are laid out as their inputs are. The log-sum-exp is
always written (1 MiB for 8192 tokens of 32 heads): a plan without it would be one more plan.

The calls of cuDNN are those of aten's own `scaled_dot_product_attention` (aten/src/ATen/native/transformers/attention.cpp), which
hands grouped heads over as they are. On a CPU the same formulas run in plain torch, the scores held in full: for tests and traces.
The backward there: Dao et al., arXiv 2205.14135, appendix B.
"""

# no `from __future__ import annotations`: torch.library reads these annotations
import torch
from torch.utils.flop_counter import register_flop_formula

_TAGS = (torch.Tag.needs_exact_strides,)  # a graph's compiler hands over the layouts that were traced


@torch.library.custom_op("unsloth_ext::causal_attention", mutates_args=(), tags=_TAGS)
def causal_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None, bucket: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token i reads tokens 0 to i. Traceable: one graph for all lengths; gradients for query, key and value.

    query: [B, H, L, D]; key, value: [B, H_kv, L, D], H a multiple of H_kv; fp16 or bf16 on a card, any floating dtype on a CPU.
    scale: of the scores; 1 / sqrt(D) where None. bucket: lengths are padded to a multiple of it.
    -> out [B, H, L, D], dtype and layout of query; log-sum-exp [B, H, L rounded up to bucket, 1], fp32 (fp64 for fp64), for the
    backward only. Raises ValueError for shapes that do not belong together.
    """
    _check(query, key, value, bucket)
    query, key, value = (_readable(t) for t in (query, key, value))
    length, rows = query.shape[2], _rows(query.shape[2], bucket)
    if length == rows:
        return _forward(query, key, value, scale)
    out, logsumexp = _forward(*_padded(rows, query, key, value), scale)
    return torch.empty_like(query).copy_(out[:, :, :length]), logsumexp


@causal_attention.register_fake
def _(query, key, value, scale, bucket):
    _check(query, key, value, bucket)
    batch, heads, length, _ = query.shape
    return _as(query), query.new_empty((batch, heads, _rows(length, bucket), 1), dtype=_wide(query.dtype))


@torch.library.custom_op("unsloth_ext::causal_attention_backward", mutates_args=(), tags=_TAGS)
def causal_attention_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    scale: float | None,
    bucket: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of query, key and value, in their dtypes and layouts."""
    query, key, value, out = (_readable(t) for t in (query, key, value, out))
    if 0 in grad.stride() or grad.stride(3) != 1:  # expanded, as the gradient of a sum is
        grad = torch.empty_like(out).copy_(grad)
    length, rows = query.shape[2], logsumexp.shape[2]
    if length == rows:
        return _backward(grad, query, key, value, out, logsumexp, scale)
    query_, key_, value_, out_, grad_ = _padded(rows, query, key, value, out, grad)
    grads = _backward(grad_, query_, key_, value_, out_, logsumexp, scale)
    return tuple(torch.empty_like(t).copy_(g[:, :, :length]) for t, g in zip((query, key, value), grads, strict=True))


@causal_attention_backward.register_fake
def _(grad, query, key, value, out, logsumexp, scale, bucket):
    return _as(query), _as(key), _as(value)


def _keep(ctx, inputs, output):
    query, key, value, ctx.scale, ctx.bucket = inputs
    ctx.save_for_backward(query, key, value, *output)
    ctx.set_materialize_grads(False)


def _gradients(ctx, grad, _):
    if grad is None:
        return (None,) * 5
    return *causal_attention_backward(grad, *ctx.saved_tensors, ctx.scale, ctx.bucket), None, None


causal_attention.register_autograd(_gradients, setup_context=_keep)


# Without these a memory budget of torch.compile takes the operator for free and computes it again.
@register_flop_formula(torch.ops.unsloth_ext.causal_attention)
def _flops(query_shape, *args, out_shape=None, **kwargs):
    batch, heads, length, width = query_shape
    return 2 * 2 * batch * heads * length * length * width


@register_flop_formula(torch.ops.unsloth_ext.causal_attention_backward)
def _backward_flops(grad_shape, *args, out_shape=None, **kwargs):
    return _flops(grad_shape) * 5 // 2


def _check(query, key, value, bucket):
    if query.dim() != 4 or key.dim() != 4 or value.shape != key.shape:
        raise ValueError(
            "query must be [B, H, L, D] and key and value [B, H_kv, L, D], got "
            f"{tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
        )
    (batch, heads, length, width), kv_heads = query.shape, key.shape[1]
    if key.shape != (batch, kv_heads, length, width) or heads % kv_heads:
        raise ValueError(
            f"query {tuple(query.shape)} and key {tuple(key.shape)} must have the same B, L and D, and H a multiple of H_kv"
        )
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(
            f"query, key and value must have one dtype, got {query.dtype}, {key.dtype}, {value.dtype}: cast them before"
        )
    if bucket < 1:
        raise ValueError(f"bucket must be at least 1 (which pads nothing), got {bucket}")


def _rows(length, bucket):
    return (length + bucket - 1) // bucket * bucket


def _wide(dtype):
    return torch.promote_types(dtype, torch.float32)


def _readable(tensor):
    """cuDNN wants the last dimension's elements side by side."""
    return tensor if tensor.stride(3) == 1 else tensor.contiguous()


def _as(tensor):
    """What `torch.empty_like` of the readable tensor is, in a graph too: `tensor`'s order of dimensions, without gaps."""
    if tensor.stride(3) != 1:
        return tensor.new_empty(tensor.shape)
    return torch.empty_like(tensor)


def _padded(rows, *tensors):
    """Copies with zeros up to `rows` tokens, side by side in one buffer, in the order of dimensions of the first: many small
    kernels cost more than what they write where rows are short."""
    batch, _, length, width = tensors[0].shape
    heads = [t.shape[1] for t in tensors]
    if tensors[0].stride(2) >= tensors[0].stride(1):  # [B, L, H, D] in memory
        buffer = tensors[0].new_empty((batch, rows, sum(heads), width)).transpose(1, 2)
    else:
        buffer = tensors[0].new_empty((batch, sum(heads), rows, width))
    buffer[:, :, length:].zero_()
    parts = buffer.split(heads, 1)
    for part, tensor in zip(parts, tensors, strict=True):
        part[:, :, :length].copy_(tensor)
    return parts


def _forward(query, key, value, scale):
    if not query.is_cuda:
        return _math(query, key, value, scale)
    if not query.numel():  # aten leaves both undefined
        return torch.empty_like(query), query.new_empty((*query.shape[:3], 1), dtype=torch.float32)
    # bias, log-sum-exp, dropout, causal, debug mask
    options = (None, True, 0.0, True, False)
    return torch.ops.aten._scaled_dot_product_cudnn_attention(query, key, value, *options, scale=scale)[:2]


def _backward(grad, query, key, value, out, logsumexp, scale):
    if not query.is_cuda:
        return _math_backward(grad, query, key, value, out, logsumexp, scale)
    state = torch.empty((), dtype=torch.int64, device=query.device)  # of dropout's random numbers: there are none
    rows = query.shape[2]
    return torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        grad, query, key, value, out, logsumexp, state, state, None, None, None, rows, rows, 0.0, True, scale=scale
    )


def _scores(query, key, scale):
    """query in groups [B, H_kv, G, L, D], key [B, H_kv, 1, L, D] -> scores [B, H_kv, G, L, L], -inf for later tokens."""
    length = query.shape[-2]
    later = torch.ones((length, length), dtype=torch.bool, device=query.device).triu(1)
    return (query @ key.mT).mul_(scale).masked_fill_(later, float("-inf"))


def _grouped(query, key, value, *others):
    kv_heads, wide = key.shape[1], _wide(query.dtype)
    split = [t.to(wide).unflatten(1, (kv_heads, -1)) for t in (query, *others)]
    return split[0], key.to(wide).unsqueeze(2), value.to(wide).unsqueeze(2), *split[1:]


def _math(query, key, value, scale):
    scale = query.shape[3] ** -0.5 if scale is None else scale
    q, k, v = _grouped(query, key, value)
    scores = _scores(q, k, scale)
    logsumexp = scores.logsumexp(-1, keepdim=True)
    out = (scores - logsumexp).exp_() @ v
    return torch.empty_like(query).copy_(out.flatten(1, 2)), logsumexp.flatten(1, 2)


def _math_backward(grad, query, key, value, out, logsumexp, scale):
    scale = query.shape[3] ** -0.5 if scale is None else scale
    q, k, v, grad, out, logsumexp = _grouped(query, key, value, grad, out, logsumexp)
    probabilities = (_scores(q, k, scale) - logsumexp).exp_()
    delta = (grad * out).sum(-1, keepdim=True)
    scores = probabilities * (grad @ v.mT - delta) * scale
    grads = (scores @ k).flatten(1, 2), (scores.mT @ q).sum(2), (probabilities.mT @ grad).sum(2)
    return tuple(torch.empty_like(t).copy_(g) for t, g in zip((query, key, value), grads, strict=True))
