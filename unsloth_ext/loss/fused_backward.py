"""Unsloth's fused ops take their gradients in forward. Their backward here scales them where they are, so they exist once.

Overwriting is safe where nobody reads the stored gradients again: autograd says whether it will keep the graph.
"""

from __future__ import annotations

import torch

from . import softmax

_ROWS = 1024
_keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)


def _may_overwrite(*tensors) -> bool:
    if _keeps_graph is None or _keeps_graph() or torch.compiler.is_compiling() or torch.version.hip is not None:
        return False
    return all(type(tensor) is torch.Tensor for tensor in tensors)  # no fake tensor of a trace


def scale_rows_(x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """x *= g, one number or one a row of x [n, ...]: in fp32 (fp64), rounded once to x's dtype."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    g = g.to(device=x.device, dtype=dtype)
    if softmax.by_triton(x) and x.is_contiguous():
        with torch.cuda.device_of(x):
            softmax.scale_(x, g.contiguous())
        return x
    g = g.reshape(-1, *[1] * (x.dim() - 1))
    for start in range(0, x.shape[0], _ROWS):
        part = x[start : start + _ROWS]
        part.copy_(part.to(dtype) * (g if g.shape[0] == 1 else g[start : start + _ROWS]))
    return x


def cross_entropy_backward(original):
    """For `_ce_backward`: saved are the gradients of hidden, weight and bias, and what they are scaled by."""

    def _ce_backward(ctx, grad_loss, *others):
        if grad_loss is None:
            return original(ctx, grad_loss, *others)
        *grads, scaling = ctx.saved_tensors
        if not _may_overwrite(*grads):
            return original(ctx, grad_loss, *others)
        dtype = torch.float64 if grad_loss.device.type in ("cuda", "cpu") else torch.float32
        factor = grad_loss.to(dtype) / scaling.to(dtype)
        found = tuple(
            scale_rows_(grad, factor) if needed else None for grad, needed in zip(grads, ctx.need, strict=True)
        )
        return found + (None,) * 15

    return _ce_backward


def logprobs_backward(original):
    """For `_lp_backward`: where the gradient of hidden was taken in forward, in hidden's dtype, its rows are scaled in place."""

    def _lp_backward(ctx, g_logps, g_ent, *others):
        if not ctx.want_u or not ctx.need[0] or g_logps is None or (ctx.ent_lazy and g_ent is not None):
            return original(ctx, g_logps, g_ent, *others)
        u = ctx.saved_tensors[0]
        if u.dtype != ctx.hidden_dtype or not _may_overwrite(u):
            return original(ctx, g_logps, g_ent, *others)
        return (scale_rows_(u, g_logps),) + (None,) * 19

    return _lp_backward
