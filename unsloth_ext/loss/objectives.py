"""Objectives over sequences and groups, on per-token log-probabilities [B, S]: small tensors, plain autograd.

    logps = chunked_loss(functions.token_logprobs(), hidden, head, ids)
    loss = objectives.dpo(logps, reference_logps, mask)

`mask` [B, S] is 1 on the tokens that count. For pairs the first half of the batch is chosen, the second rejected.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

__all__ = ["dpo", "grpo", "orpo", "simpo"]


def dpo(logps, reference_logps, mask, *, beta: float = 0.1, label_smoothing: float = 0.0):
    """Direct preference optimisation (arXiv 2305.18290), with cDPO's smoothing. A scalar."""
    chosen, rejected = _pairs(((logps - reference_logps) * mask).sum(-1))
    margin = beta * (chosen - rejected)
    return -((1 - label_smoothing) * F.logsigmoid(margin) + label_smoothing * F.logsigmoid(-margin)).mean()


def orpo(logps, mask, *, beta: float = 0.1):
    """Odds-ratio preference optimisation (arXiv 2403.07691): the chosen tokens' mean NLL plus beta times the odds term. A scalar."""
    chosen, rejected = _pairs(_mean(logps, mask))
    odds = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
    (chosen_logps, _), (chosen_mask, _) = _pairs(logps), _pairs(mask)
    nll = -(chosen_logps * chosen_mask).sum() / chosen_mask.sum().clamp(min=1)
    return nll - beta * F.logsigmoid(odds).mean()


def simpo(logps, mask, *, beta: float = 2.0, gamma: float = 1.0):
    """Reference-free preference optimisation (arXiv 2405.14734), gamma the target margin. A scalar."""
    chosen, rejected = _pairs(_mean(logps, mask))
    return -F.logsigmoid(beta * (chosen - rejected) - gamma).mean()


def grpo(
    logps,
    advantages,
    mask,
    *,
    old_logps=None,
    reference_logps=None,
    entropies=None,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    beta: float = 0.0,
    entropy_coef: float = 0.0,
    level: str = "token",
    aggregate: str = "token",
    num_items_in_batch=None,
):
    """Group-relative policy optimisation (arXiv 2402.03300). A scalar.

    advantages: [B] or [B, S]. old_logps: of the sampling policy, the current ones if None. reference_logps: for beta
    times the KL estimate exp(r) - r - 1. entropies: entropy_coef times their mean over the mask is a bonus.
    level: the importance ratio of a "token", or of a "sequence" (GSPO, arXiv 2507.18071).
    aggregate: "token", the mean over all tokens (DAPO, arXiv 2503.14476; num_items_in_batch in place of their number),
    or "sequence", the mean over sequences of their means.
    """
    if level not in ("token", "sequence") or aggregate not in ("token", "sequence"):
        raise ValueError(f'level and aggregate must be "token" or "sequence", got {level!r} and {aggregate!r}')
    mask = mask.to(logps.dtype)
    advantages = advantages[:, None] if advantages.dim() == 1 else advantages
    # Where the mask is 0 the values may be anything: a ratio that overflows times 0 would be NaN.
    ratio = torch.where(mask > 0, logps - (logps.detach() if old_logps is None else old_logps), 0)
    if level == "sequence":
        ratio = _mean(ratio, mask)[:, None]
    ratio = ratio.exp()
    clipped = ratio.clamp(1 - epsilon_low, 1 + epsilon_high)
    values = -torch.minimum(ratio * advantages, clipped * advantages).expand_as(logps)
    if beta:
        if reference_logps is None:
            raise ValueError(f"beta is {beta}: reference_logps is missing")
        difference = torch.where(mask > 0, reference_logps - logps, 0)
        values = values + beta * (difference.exp() - difference - 1)
    if aggregate == "sequence":
        loss = _mean(values, mask).mean()
    else:
        number = mask.sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch, device=mask.device)
        loss = (values * mask).sum() / number.clamp(min=1)
    if entropy_coef:
        if entropies is None:
            raise ValueError(f"entropy_coef is {entropy_coef}: entropies are missing")
        loss = loss - entropy_coef * (entropies * mask).sum() / mask.sum().clamp(min=1)
    return loss


def _pairs(values):
    if values.shape[0] % 2:
        raise ValueError(f"pairs need an even batch, chosen then rejected, got {values.shape[0]} sequences")
    return values.chunk(2)


def _mean(values, mask):
    return (values * mask).sum(-1) / mask.sum(-1).clamp(min=1)


def _log1mexp(x):
    """log(1 - exp(x)) for x < 0, by the branch that keeps its digits (Mächler 2012)."""
    x = x.clamp(max=-torch.finfo(x.dtype).tiny)
    near = x > -math.log(2)
    return torch.where(
        near, torch.log(-torch.expm1(torch.where(near, x, -1))), torch.log1p(-torch.exp(torch.where(near, -1, x)))
    )
