"""The losses on full logits, in the words of their papers: what the chunked and fused ways must equal.

`full_loss` is `chunked_loss` in one chunk, by plain autograd. The others write each loss from probabilities, as one would on a
blackboard: use them in fp64.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def full_loss(function, hidden, head, *targets, reduction="mean", num_items_in_batch=None):
    """function(head(hidden), *targets) with all rows at once, and `chunked_loss`'s reductions."""
    rows = hidden.shape[:-1].numel()
    hidden_rows = hidden.reshape(rows, -1)
    logits = head(hidden_rows) if isinstance(head, torch.nn.Module) else F.linear(hidden_rows, head)
    lead = hidden.dim() - 1
    flat = [t.reshape(rows, *t.shape[lead:]) if isinstance(t, torch.Tensor) and t.dim() else t for t in targets]
    result = function(logits, *flat)
    if reduction == "none":
        values = [value.reshape(*hidden.shape[:-1], *value.shape[1:]) for value in _tuple(result)]
        return values[0] if len(values) == 1 else tuple(values)
    total, weight = result if isinstance(result, tuple) else (result.sum(), result.numel() if result.dim() else 1)
    if reduction == "sum":
        weight = 1
    return total / (weight if num_items_in_batch is None else num_items_in_batch)


def _tuple(result):
    return result if isinstance(result, tuple) else (result,)


def capped(logits, softcap=None, scale=1.0):
    logits = logits * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def cross_entropy(logits, labels, *, label_smoothing=0.0, z_loss=0.0, weight=None, ignore_index=-100):
    """The mean over labelled rows of -sum_v q_v w_v log p_v, q the smoothed label; divided by the labels' class weights."""
    total, divisor, vocab_size = 0.0, 0.0, logits.shape[-1]
    weight = torch.ones(vocab_size, dtype=logits.dtype) if weight is None else weight
    for row, label in zip(logits, labels.tolist(), strict=True):
        if label == ignore_index:
            continue
        z = torch.log(torch.exp(row).sum())
        q = torch.full_like(row, label_smoothing / vocab_size)
        q[label] += 1 - label_smoothing
        total = total - (q * weight * (row - z)).sum() + z_loss * weight[label] * z**2
        divisor = divisor + weight[label]
    return total / divisor if divisor else logits.sum() * 0


def focal(logits, labels, *, gamma=2.0):
    p = torch.softmax(logits, -1)[torch.arange(len(labels)), labels]
    return (-((1 - p) ** gamma) * torch.log(p)).mean()


def token_logprobs(logits, labels, *, temperature=1.0):
    """(log-probabilities, entropies)."""
    p = torch.softmax(logits / temperature, -1)
    return torch.log(p[torch.arange(len(labels)), labels]), -(p * torch.log(p)).sum(-1)


def kl(p, q):
    return (p * (torch.log(p) - torch.log(q))).sum(-1)


def jsd(student_logits, teacher_logits, beta):
    student, teacher = torch.softmax(student_logits, -1), torch.softmax(teacher_logits, -1)
    if beta in (0, 1):
        return (kl(student, teacher) if beta else kl(teacher, student)).mean()
    mixed = beta * teacher + (1 - beta) * student
    return (beta * kl(teacher, mixed) + (1 - beta) * kl(student, mixed)).mean()


def dpo(logps, reference_logps, mask, beta):
    """The mean over pairs of -log sigmoid of beta times the difference of the log-ratios."""
    ratio = torch.stack(
        [(row - ref)[keep.bool()].sum() for row, ref, keep in zip(logps, reference_logps, mask, strict=True)]
    )
    half = len(ratio) // 2
    return -torch.log(torch.sigmoid(beta * (ratio[:half] - ratio[half:]))).mean()


def orpo(logps, mask, beta):
    p = torch.stack([torch.exp(row[keep.bool()].mean()) for row, keep in zip(logps, mask, strict=True)])
    half = len(p) // 2
    odds = p / (1 - p)
    nll = -logps[:half][mask[:half].bool()].mean()
    return nll - beta * torch.log(torch.sigmoid(torch.log(odds[:half] / odds[half:]))).mean()


def grpo(logps, advantages, mask, old_logps, reference_logps, entropies, *, epsilon, beta, entropy_coef):
    """Token level, mean over all tokens."""
    total, entropy, number = 0.0, 0.0, 0
    for b, s in mask.nonzero().tolist():
        ratio = torch.exp(logps[b, s] - old_logps[b, s])
        gain = torch.minimum(ratio * advantages[b], ratio.clamp(1 - epsilon, 1 + epsilon) * advantages[b])
        r = torch.exp(reference_logps[b, s]) / torch.exp(logps[b, s])
        total = total - gain + beta * (r - torch.log(r) - 1)
        entropy, number = entropy + entropies[b, s], number + 1
    return total / number - entropy_coef * entropy / number
