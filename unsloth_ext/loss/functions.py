"""Ready-made functions for `chunked_loss`, and examples of how to write one.

Each factory takes the settings and gives a function of one chunk: (logits [n, V], targets of these n rows). They upcast
to fp32 themselves and hold no derivative. `labels[..., i]` is the token that `hidden[..., i]` should predict: shift
before, not inside.

What one row decides is here. What spans rows, a sequence or a group, works on the per-token log-probabilities that
`chunked_loss(token_logprobs(), hidden, head, ids)` returns: see `objectives.py`.

A label outside [0, V) that is not ignored raises IndexError on a CPU. A card cannot raise without stopping for it: there the loss is
NaN, and the process goes on.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["cross_entropy", "focal", "jsd", "kl_divergence", "mse", "token_logprobs"]


def cross_entropy(
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    weight: torch.Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    ignore_index: int = -100,
):
    """(logits, labels [n]) -> (sum, weight), so that the mean is `torch.nn.functional.cross_entropy`'s.

    weight: of the classes, [V]. z_loss: times logsumexp(logits)², weighted as the row is (PaLM, arXiv 2204.02311,
    section 5). scale, then softcap * tanh(logits / softcap), are applied to the logits first (Cohere, Gemma 2).
    """

    def function(logits, labels):
        logits = _prepared(logits, scale, softcap)
        labels, keep, bad = _checked(labels, logits.shape[-1], ignore_index)
        classes = None if weight is None else weight.to(logits)
        values = F.cross_entropy(logits, labels, classes, reduction="none", label_smoothing=label_smoothing)
        rows = keep.to(logits.dtype) if classes is None else classes[labels] * keep
        values = values * keep
        if z_loss:
            values = values + z_loss * rows * logits.logsumexp(-1).square()
        return values.masked_fill(bad, math.nan).sum(), rows.detach().sum()

    function.compiles = True
    return function


def focal(*, gamma: float = 2.0, ignore_index: int = -100):
    """(logits, labels [n]) -> (sum, number of rows): -(1 - p)^gamma log p of the label (arXiv 1708.02002)."""

    def function(logits, labels):
        logits = _prepared(logits)
        labels, keep, bad = _checked(labels, logits.shape[-1], ignore_index)
        logp = _at(logits.log_softmax(-1), labels)
        # 1 - p from log p; where p rounds to 1 the derivative of a power below 1 would be infinite times zero
        rest = (-torch.expm1(logp)).clamp(min=torch.finfo(logp.dtype).tiny)
        values = -(rest**gamma) * logp * keep
        return values.masked_fill(bad, math.nan).sum(), keep.sum()

    function.compiles = True
    return function


def token_logprobs(
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    entropy: bool = False,
    entropy_gradient: bool = False,
    ignore_index: int = -100,
):
    """(logits, labels [n]) -> log-probability [n] of each label, 0 where it is ignored; with `entropy` also the entropies [n].

    entropy_gradient: the entropy is part of the loss and not only looked at. It costs a second pass where the head is
    frozen.
    """

    def function(logits, labels):
        logits = _prepared(logits, scale, softcap)
        if temperature != 1.0:
            logits = logits / temperature
        labels, keep, bad = _checked(labels, logits.shape[-1], ignore_index)
        logps = logits.log_softmax(-1)
        chosen = (_at(logps, labels) * keep).masked_fill(bad, math.nan)
        if not entropy:
            return chosen
        with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
            return chosen, -(logps.exp() * logps).sum(-1) * keep

    function.rowwise = True
    function.compiles = True
    return function


def kl_divergence(teacher_head, *, temperature: float = 1.0, reverse: bool = False, ignore_index: int = -100):
    """(logits, teacher's hidden [n, D2], labels [n] or None) -> (sum, number of rows): KL(teacher || student) times temperature²
    (arXiv 1503.02531), or KL(student || teacher). teacher_head: its module or weight [V, D2]; it gets no gradient.
    """

    def function(logits, teacher_hidden, labels=None):
        student = (_prepared(logits) / temperature).log_softmax(-1)
        teacher = _teacher(teacher_head, teacher_hidden, temperature)
        a, b = (student, teacher) if reverse else (teacher, student)
        values = F.kl_div(b, a, log_target=True, reduction="none").sum(-1) * temperature**2
        return _masked(values, labels, ignore_index)

    function.compiles = True
    return function


def jsd(teacher_head, *, beta: float = 0.5, temperature: float = 1.0, ignore_index: int = -100):
    """(logits, teacher's hidden [n, D2], labels [n] or None) -> (sum, number of rows): the generalised Jensen-Shannon divergence
    of arXiv 2306.13649, between KL(teacher || student) at beta = 0 and KL(student || teacher) at beta = 1, as in trl.
    """
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta must be from 0 to 1, got {beta}")

    def function(logits, teacher_hidden, labels=None):
        student = (_prepared(logits) / temperature).log_softmax(-1)
        teacher = _teacher(teacher_head, teacher_hidden, temperature)
        if beta == 0.0:
            values = F.kl_div(student, teacher, log_target=True, reduction="none")
        elif beta == 1.0:
            values = F.kl_div(teacher, student, log_target=True, reduction="none")
        else:
            mixed = torch.logaddexp(student + math.log1p(-beta), teacher + math.log(beta))
            values = beta * F.kl_div(mixed, teacher, log_target=True, reduction="none")
            values = values + (1 - beta) * F.kl_div(mixed, student, log_target=True, reduction="none")
        return _masked(values.sum(-1), labels, ignore_index)

    function.compiles = True
    return function


def mse(teacher_head=None):
    """(logits, target [n, V]) -> (sum of squares, number of elements); with `teacher_head` the target is the teacher's hidden
    [n, D2], whose logits are then computed chunk by chunk as well. A head with V = 1 takes targets [n].
    """

    def function(logits, target):
        logits = _prepared(logits)
        if teacher_head is not None:
            with torch.no_grad():
                target = _prepared(_project(teacher_head, target))
        elif target.dim() == 1 and logits.shape[-1] == 1:
            target = target[:, None]
        if target.shape != logits.shape:
            raise ValueError(f"target has shape {list(target.shape)}, the logits {list(logits.shape)}")
        return (logits - target).square().sum(), logits.numel()

    function.compiles = True
    return function


def _prepared(logits, scale: float = 1.0, softcap: float | None = None):
    """In fp32 (fp64 stays), scaled and capped."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if scale != 1.0:
        logits = logits * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _checked(labels, vocab_size: int, ignore_index: int):
    """(labels that can be looked up, rows that count, rows whose label does not exist)."""
    if labels.is_floating_point() or labels.is_complex() or labels.dim() != 1:
        raise ValueError(
            f"labels must be whole numbers, one a row, got shape [n, ...] = {list(labels.shape)} of {labels.dtype}"
        )
    keep = labels != ignore_index
    bad = keep & ((labels < 0) | (labels >= vocab_size))
    if labels.device.type == "cpu" and not torch.compiler.is_compiling() and bad.any():
        raise IndexError(f"label {labels[bad][0].item()} is out of range: the head has {vocab_size} classes")
    return torch.where(keep & ~bad, labels, 0).long(), keep, bad


def _at(values, labels):
    return values.gather(-1, labels[:, None]).squeeze(-1)


def _masked(values, labels, ignore_index: int):
    if labels is None:
        return values.sum(), values.numel()
    keep = labels != ignore_index
    return torch.where(keep, values, 0).sum(), keep.sum()


@torch.no_grad()
def _teacher(head, hidden, temperature: float):
    return (_prepared(_project(head, hidden)) / temperature).log_softmax(-1)


def _project(head, hidden):
    return head(hidden) if isinstance(head, nn.Module) else F.linear(hidden, head)
