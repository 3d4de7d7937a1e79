"""For losses that read `lm_head.weight` and never run the head.

Unsloth's fused cross entropy, Liger's and TRL's chunked ones multiply the last hidden states by the head's weight themselves. A
sharded head is gathered by its own forward, which they do not call. So here it is gathered when the decoder has returned its
hidden states, and freed when their gradient has arrived: only around the loss, in forward and backward. Without a gradient it is
freed when the model's forward ends. Every rank does this at the same places of the same step, as a gather must be.

A trained head stays gathered until FSDP2 has reduced its gradient, at the end of the backward.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

__all__ = ["serve_head_readers"]


def serve_head_readers(model: nn.Module) -> bool:
    """Install the two hooks on a sharded causal model, peft or not. False where it has no head that is a unit of its own."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if not isinstance(head, FSDPModule):
        return False
    owner = next((m for m in model.modules() if any(child is head for child in m.children())), None)
    decoder = None if owner is None else getattr(owner, getattr(owner, "base_model_prefix", "") or "model", None)
    if not isinstance(decoder, nn.Module):
        return False
    frozen = not any(p.requires_grad for p in head.parameters())
    waiting = 0  # forwards whose gradient has not arrived

    def gather(module, inputs, output):
        nonlocal waiting
        head.unshard()
        hidden = output[0] if isinstance(output, tuple) else getattr(output, "last_hidden_state", None)
        if torch.is_grad_enabled() and isinstance(hidden, torch.Tensor) and hidden.requires_grad:
            waiting += 1
            hidden.register_hook(arrived)

    def arrived(gradient):
        nonlocal waiting
        waiting = max(0, waiting - 1)
        if frozen and not waiting:
            head.reshard()

    def ended(module, inputs, output):
        # Not where generation.py keeps everything gathered: Unsloth's decoding reads the head and calls no decoder before.
        kept = getattr(model, "_unsloth_ext_all_gathered", False)
        if not torch.is_grad_enabled() and not waiting and not kept:
            head.reshard()

    decoder.register_forward_hook(gather)
    owner.register_forward_hook(ended)
    return True
