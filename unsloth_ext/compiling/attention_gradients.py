"""What the operators of packed attention have in common: how a forward and a backward that are operators belong together.

Forward: (query, key, value, cu_seqlens, three settings) -> (out, log-sum-exp). Backward: (gradient of out, query, key, value, out,
log-sum-exp, cu_seqlens, the settings) -> the gradients of query, key and value, contiguous. A setting is a number or None.
"""

from __future__ import annotations


def differentiable(forward, backward) -> None:
    """Give `forward` its derivative by `backward`, and `backward` its fake kernel. Both: `torch.library.custom_op`."""

    @backward.register_fake
    def _(grad, query, key, value, *rest):
        return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)

    def keep(ctx, inputs, output):
        query, key, value, cu_seqlens, *ctx.settings = inputs
        ctx.save_for_backward(query, key, value, *output, cu_seqlens)
        ctx.set_materialize_grads(False)

    def gradients(ctx, grad, _):
        if grad is None:
            return (None,) * 7
        found = backward(grad, *ctx.saved_tensors, *ctx.settings)
        return *found, None, None, None, None

    forward.register_autograd(gradients, setup_context=keep)
