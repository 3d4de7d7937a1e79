"""Operators of projections.py: what Inductor would do in more passes if it were left to it. Not differentiable."""

from __future__ import annotations

import functools

import torch

__all__ = ["swiglu_lora", "swiglu_lora_backward"]

_library = torch.library.Library("unsloth_ext", "FRAGMENT")
for _schema in (
    "swiglu_lora(Tensor e, Tensor g, Tensor a) -> (Tensor h, Tensor low)",
    "swiglu_lora_backward(Tensor dh, Tensor e, Tensor g, Tensor low, Tensor p, SymInt gate_rank) -> (Tensor wide, Tensor sums)",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


def swiglu_lora(e: torch.Tensor, g: torch.Tensor, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """h = silu(e) g and, of the same pass, h A^T.  e, g: [T, I]; a: [rank, I], all of one 16-bit dtype.

    Returns both, [T, I] and [T, rank], contiguous. Rounded where Unsloth's kernel rounds: silu(e), the product, the sum.
    """
    return torch.ops.unsloth_ext.swiglu_lora(e, g, a)


def swiglu_lora_backward(
    dh: torch.Tensor, e: torch.Tensor, g: torch.Tensor, low: torch.Tensor, p: torch.Tensor, gate_rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """SwiGLU's backward and what of LoRA's gradients are sums over its rows; h = silu(e) g is among those, and kept nowhere.

    dh, e, g: [T, I] of one dtype. low: [T, gate_rank + up_rank], x A^T of gate and of up. p: [T, down_rank], s dY B of down.

    Returns wide = [de | dg], [T, 2I], and sums = [low_gate^T de; low_up^T dg; p^T h], fp32 [sum of ranks, I]. Rounded
    where Unsloth's kernel rounds: silu(e), then each product, in the inputs' dtype.
    """
    return torch.ops.unsloth_ext.swiglu_lora_backward(dh, e, g, low, p, gate_rank)


@functools.cache
def _kernels():
    from . import projections_kernel

    return projections_kernel


def _results_of(e, g, a):
    return e.new_empty(e.shape), e.new_empty(e.shape[0], a.shape[0])


def _swiglu_lora(e, g, a):
    h, low = _results_of(e, g, a)
    if e.is_cuda and a.shape[0] <= _kernels().MOST_RANK:
        _kernels().swiglu_lora(e.contiguous(), g.contiguous(), a.contiguous(), h, low)
    else:
        torch.mul(torch.nn.functional.silu(e.float()).to(e.dtype), g, out=h)
        torch.mm(h, a.t(), out=low)
    return h, low


def _results_for(dh, e, g, low, p, gate_rank):
    (rows, width), ranks = dh.shape, low.shape[1] + p.shape[1]
    return dh.new_empty(rows, 2 * width), dh.new_empty(ranks, width, dtype=torch.float32)


def _swiglu_lora_backward(dh, e, g, low, p, gate_rank):
    width, ranks = dh.shape[1], (gate_rank, low.shape[1] - gate_rank, p.shape[1])
    wide = dh.new_empty(dh.shape[0], 2 * width)
    if dh.is_cuda and dh.is_contiguous():
        e, g = e.contiguous(), g.contiguous()
        if max(ranks) <= _kernels().MOST_RANK and low.stride(1) == p.stride(1) == 1:
            return wide, _kernels().swiglu_lora_backward(dh, e, g, low, p, ranks[:2], wide)
        h = _kernels().swiglu_backward(dh, e, g, wide)
    else:
        exact = e.float()
        sigmoid = torch.sigmoid(exact)
        f = (sigmoid * exact).to(dh.dtype)
        wide[:, :width] = (dh * g).float() * sigmoid * (1 + exact * (1 - sigmoid))
        torch.mul(dh, f, out=wide[:, width:])
        h = f * g
    parts = (low[:, :gate_rank], wide[:, :width]), (low[:, gate_rank:], wide[:, width:]), (p, h)
    return wide, torch.cat([(left.t() @ right).float() for left, right in parts])


for _key in ("CPU", "CUDA"):
    _library.impl("swiglu_lora", _swiglu_lora, _key)
    _library.impl("swiglu_lora_backward", _swiglu_lora_backward, _key)
torch.library.register_fake("unsloth_ext::swiglu_lora", _results_of, lib=_library)
torch.library.register_fake("unsloth_ext::swiglu_lora_backward", _results_for, lib=_library)
