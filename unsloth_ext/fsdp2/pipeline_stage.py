"""A pipeline stage: the model's own decoder, shortened to the layers of the stage.

The decoder is called as transformers wrote it, with token ids on the first stage and with hidden states (`inputs_embeds`) on the
others. Causal and sliding-window masks, padding, packed positions and rotary embeddings are thus the model's own on every stage,
made from the same attention mask and position ids, which every rank has. Only the list of layers, the per-layer facts of the
configuration and the ends differ: no embedding after the first stage, no norm before the last.
"""

from __future__ import annotations

import contextlib
import copy

import torch
from torch import nn

from ..loss.adapted_head import must_be_called

__all__ = ["Stage"]


class Stage(nn.Module):
    """forward(x, attention_mask=None, position_ids=None) -> hidden states [rows, length, hidden].

    x: int64 [rows, length] on the first stage, hidden states on the others. dtype: that of a 16-bit model, computed under autocast
    as adapters are float32; float32 for none. The last stage's output has passed the norm; `loss` takes it.
    """

    def __init__(self, base: nn.Module, layers: range, first: bool, last: bool, dtype: torch.dtype):
        super().__init__()
        inner = base.model
        body = copy.copy(inner)
        body._modules = dict(inner._modules)  # the copy shares what it does not replace
        body.layers = nn.ModuleList(inner.layers[i] for i in layers)
        body.config = _config_of(inner.config, layers)
        body.embed_tokens = None  # called here
        if not last:
            body.norm = nn.Identity()
        self.body = body
        self.embedding = inner.embed_tokens if first else None
        self.head = base.lm_head if last else None
        self.dtype = dtype
        self.trains = any(p.requires_grad for p in self.parameters())

    def forward(self, x, attention_mask=None, position_ids=None):
        with self._autocast(x.device.type):
            if self.embedding is not None:
                x = self.embedding(x)
                if torch.is_grad_enabled() and not self.trains:
                    x.requires_grad_()  # nothing here is trained, yet the stages expect a graph
            out = self.body(
                inputs_embeds=x, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
            ).last_hidden_state
        return out.to(self.dtype).contiguous()

    def loss(self, hidden: torch.Tensor, labels: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        """float32: the sum of the cross entropy of [rows, length] labels, over `items`. Position i predicts label i + 1."""
        if not must_be_called(self.head):
            from ..loss import linear_cross_entropy

            head = self.head
            return linear_cross_entropy(
                hidden,
                head.weight,
                labels,
                getattr(head, "bias", None),
                shift=True,
                num_items_in_batch=items,
                reduction="sum",
            )
        with self._autocast(hidden.device.type):
            logits = self.head(hidden[:, :-1])
        labels = labels[:, 1:].reshape(-1)
        return nn.functional.cross_entropy(logits.float().flatten(0, 1), labels, reduction="sum") / items

    def _autocast(self, device_type: str):
        return (
            contextlib.nullcontext() if self.dtype == torch.float32 else torch.autocast(device_type, dtype=self.dtype)
        )


def _config_of(config, layers: range):
    """A copy whose per-layer lists are those of `layers`: decoders count them from 0."""
    config = copy.copy(config)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in layers]
    config.num_hidden_layers = len(layers)
    return config
