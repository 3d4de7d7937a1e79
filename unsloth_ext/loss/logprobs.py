"""Log-probabilities of tokens, and entropies, without the logits: `linear_logprobs`, what GRPO and DPO need of a model."""

from __future__ import annotations

import torch

from .linear_inputs import checked


def linear_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    entropy: bool = False,
    mask: torch.Tensor | None = None,
    ignore_index: int = -100,
    logits_dtype: torch.dtype | None = torch.float32,
    memory: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """log softmax(softcap(logit_scale * (hidden @ weight.T + bias)) / temperature) at labels; with `entropy` also the entropies.

    hidden [..., D], weight [V, D], bias [V], labels [...] of an integer dtype, mask [...]: rows to take part (others: 0 and no
    gradient, as rows labelled ignore_index). -> fp32 [...] (fp64 for fp64), or two of them. Both can be differentiated, through
    whatever is done with them later.

    The log-probability's gradient for hidden is made in the forward and scaled by rows in the backward: two matmuls in all for a
    frozen head. A trained weight takes two more in the backward, and so does a gradient that reaches the entropies: detach them where
    they are only looked at.

    logits_dtype: fp32 by default. A policy ratio is the difference of two log-probabilities of one token; logits rounded to bf16
        (None: hidden's dtype) put noise of 0.01 on each, where fp32 leaves 0.0001.
    memory, labels out of range, NaN, and what is raised: as for `linear_cross_entropy`.
    """
    from . import cross_entropy_op as op

    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    inputs = checked(
        hidden, weight, labels, bias, softcap=softcap, logit_scale=logit_scale, logits_dtype=logits_dtype, memory=memory
    )
    targets = inputs.labels
    if mask is not None:
        if mask.shape != labels.shape:
            raise ValueError(f"mask has shape {list(mask.shape)}, labels {list(labels.shape)}")
        targets = targets.masked_fill(~mask.reshape(-1).bool(), ignore_index)
    need = torch.is_grad_enabled() and inputs.hidden.requires_grad
    value, entropies, *_ = op.token_losses(
        inputs.hidden, inputs.weight, inputs.bias, targets, int(ignore_index), float(logit_scale), float(softcap or 0.0),
        float(temperature), 0.0, 0.0, bool(entropy), need, inputs.logits_dtype, memory,
    )  # fmt: skip
    logprobs = (-value).view(inputs.lead)
    return (logprobs, entropies.view(inputs.lead)) if entropy else logprobs
