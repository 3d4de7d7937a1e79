"""The fused loss of a head whose logits are not hidden @ weight.T: under a LoRA adapter, or packed in 4 bit.

Unsloth's fused loss reads `lm_head.weight`. On a head that peft has wrapped that is the base layer's, so the loss is that of
the model without the adapter, and the adapter gets no gradient. Here the head is called, a chunk of rows at a time.
"""

from __future__ import annotations

import functools
import sys

import torch

from . import functions
from .chunked import chunked_loss
from .unsloth_losses import _shifted


def must_be_called(head) -> bool:
    """Whether `head` computes something else than hidden @ head.weight.T + head.bias."""
    weight = getattr(head, "weight", None)
    if not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
        return True
    peft = sys.modules.get("peft.tuners.tuners_utils")  # without it nobody has wrapped anything
    return peft is not None and any(
        isinstance(module, peft.BaseTunerLayer)
        and not module.disable_adapters
        and not module.merged
        and bool(module.active_adapters)
        for module in head.modules()
    )


def lm_head_loss(original):
    """For `unsloth_fused_lm_head_loss`."""

    @functools.wraps(original)
    def unsloth_fused_lm_head_loss(hidden_states, lm_head, labels, vocab_size=None, **kwargs):
        if not must_be_called(lm_head):
            return original(hidden_states, lm_head, labels, vocab_size, **kwargs)
        n_items = kwargs.get("num_items_in_batch")
        n_items = kwargs.get("n_items") if n_items is None else n_items
        shift = kwargs.get("shift_labels")
        if shift is not None and not isinstance(shift, bool):
            labels, shift = shift, False
        ignore_index = int(kwargs.get("ignore_index", -100))
        device = next((p.device for p in lm_head.parameters()), hidden_states.device)
        labels, hidden = labels.to(device), hidden_states.to(device)
        targets = _shifted(labels, kwargs.get("mask"), shift is None or shift, ignore_index)
        if isinstance(n_items, torch.Tensor):
            n_items = n_items.reshape(-1)[0]
        return chunked_loss(
            _function(kwargs, ignore_index),
            hidden.reshape(-1, hidden.shape[-1]),
            lm_head,
            targets,
            reduction="mean",
            num_items_in_batch=n_items,
        ).float()

    return unsloth_fused_lm_head_loss


def _function(kwargs, ignore_index):
    scale = float(kwargs.get("logit_scale_multiply") or 1.0) / float(kwargs.get("logit_scale_divide") or 1.0)
    loss = functions.cross_entropy(
        label_smoothing=float(kwargs.get("label_smoothing") or 0.0),
        z_loss=float(kwargs.get("z_loss") or 0.0),
        softcap=float(kwargs.get("logit_softcapping") or 0.0) or None,
        scale=scale,
        ignore_index=ignore_index,
    )
    bias = kwargs.get("logits_bias")
    if bias is None:
        return loss
    return lambda logits, labels: loss(logits + bias.reshape(-1).to(logits.device), labels)
