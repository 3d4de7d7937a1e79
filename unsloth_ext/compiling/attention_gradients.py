"""What the operators of packed attention have in common: how a forward and a backward that are operators belong together.

Forward: (query, key, value, cu_seqlens, max_seqlen, scale, window) -> (out, log-sum-exp). Backward: (gradient of out, query, key, value,
out, log-sum-exp, cu_seqlens, max_seqlen, scale, window) -> the gradients of query, key and value, contiguous.
"""

from __future__ import annotations


def differentiable(forward, backward) -> None:
    """Give `forward` its derivative by `backward`, and `backward` its fake kernel. Both: `torch.library.custom_op`."""

    @backward.register_fake
    def _(grad, query, key, value, out, logsumexp, cu_seqlens, max_seqlen, scale, window):
        return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)

    def keep(ctx, inputs, output):
        query, key, value, cu_seqlens, ctx.max_seqlen, ctx.scale, ctx.window = inputs
        ctx.save_for_backward(query, key, value, *output, cu_seqlens)
        ctx.set_materialize_grads(False)

    def gradients(ctx, grad, _):
        if grad is None:
            return (None,) * 7
        found = backward(grad, *ctx.saved_tensors, ctx.max_seqlen, ctx.scale, ctx.window)
        return *found, None, None, None, None

    forward.register_autograd(gradients, setup_context=keep)
