"""Full logits in fp64 by plain autograd: the oracle of the linear_* tests."""

import torch

from unsloth_ext.loss.reference import capped


def values(
    hidden,
    weight,
    labels,
    bias=None,
    *,
    softcap=None,
    scale=1.0,
    temperature=1.0,
    smoothing=0.0,
    z_loss=0.0,
    ignore_index=-100,
):
    """(loss, log-probability, entropy) of each row, 0 where the label is ignored."""
    logits = hidden @ weight.t() if bias is None else hidden @ weight.t() + bias
    z = capped(logits, softcap, scale) / temperature
    keep = labels != ignore_index
    logp = z.log_softmax(-1)
    chosen = logp.gather(-1, labels.clamp(0, weight.shape[0] - 1)[..., None])[..., 0]
    loss = -(1 - smoothing) * chosen + z_loss * z.logsumexp(-1) ** 2
    if smoothing:
        loss = loss - smoothing * logp.mean(-1)
    entropy = -(logp.exp() * logp.masked_fill(logp == -torch.inf, 0)).sum(-1)
    return loss * keep, chosen * keep, entropy * keep


def inputs(
    rows=37, hidden_size=24, vocab_size=301, *, dtype=torch.float64, device="cpu", spread=1.0, ignored=5, bias=True
):
    """Fresh random hidden, weight, labels, bias; every `ignored`-th label is -100."""
    hidden = torch.randn(rows, hidden_size, device=device).to(dtype).requires_grad_()
    weight = (
        (spread * torch.randn(vocab_size, hidden_size, device=device) / hidden_size**0.5).to(dtype).requires_grad_()
    )
    labels = torch.randint(0, vocab_size, (rows,), device=device)
    if ignored:
        labels[::ignored] = -100
    return hidden, weight, labels, torch.randn(vocab_size, device=device).to(dtype).requires_grad_() if bias else None


def in_fp64(*tensors):
    return [None if x is None else x.detach().double().requires_grad_(x.is_floating_point()) for x in tensors]


def error(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)).item()
