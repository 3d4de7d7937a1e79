"""Embeddings whose output asks for gradients, in a graph.

Checkpointing frozen layers needs inputs that require grad, so transformers and peft hook `output.requires_grad_(True)` to the
embedding. Inside a graph a tensor that is not an input cannot be made to require grad. An autograd function with a second
input that does gives such an output; its forward returns the first as it is. The hooks also stack, one a call, of which
disabling removes the last: here one remains.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch

_NAME = "make_inputs_require_grads"


class _RequireGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, anchor):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def trace_input_gradients(model: torch.nn.Module) -> Callable[[], None]:
    """Put a hook that traces in the place of transformers' and peft's, one a module. Returns the function that undoes it."""
    replaced: list[tuple[torch.nn.Module, OrderedDict]] = []
    for module in model.modules():
        old = [key for key, hook in module._forward_hooks.items() if _is_theirs(hook)]
        if old:
            replaced.append((module, OrderedDict(module._forward_hooks)))
            module._forward_hooks[old[0]] = _hook()
            for key in old[1:]:
                del module._forward_hooks[key]

    def undo():
        for module, hooks in replaced:
            for key, hook in hooks.items():
                if _is_theirs(hook):
                    module._forward_hooks[key] = hook

    return undo


def _is_theirs(hook) -> bool:
    module = getattr(hook, "__module__", None) or ""  # Unsloth's of that name traces
    return getattr(hook, "__name__", "") == _NAME and module.partition(".")[0] in ("transformers", "peft")


def _hook():
    anchor = torch.zeros((), requires_grad=True)  # made here: a graph cannot make a leaf

    def make_inputs_require_grads(module, args, output):
        if not torch.is_grad_enabled() or output.requires_grad:
            return output
        return _RequireGrad.apply(output, anchor)

    return make_inputs_require_grads
