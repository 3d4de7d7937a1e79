"""Operators of projections.py: what Inductor would do with copies, or in more passes, if it were left to it. Not differentiable."""

from __future__ import annotations

import functools

import torch

__all__ = ["add_product_", "beside", "copy_columns_", "swiglu_lora", "swiglu_lora_backward"]

_library = torch.library.Library("unsloth_ext", "FRAGMENT")
for _schema in (
    "add_product_(Tensor(a!) out, Tensor a, Tensor b, float alpha) -> ()",
    "copy_columns_(Tensor(a!) out, Tensor part) -> ()",
    "beside(Tensor[] parts) -> Tensor",
    "swiglu_lora(Tensor e, Tensor g, Tensor a) -> (Tensor wide, Tensor low)",
    "swiglu_lora_backward(Tensor dh, Tensor e, Tensor g, Tensor low, Tensor p, SymInt gate_rank, SymInt more) "
    "-> (Tensor wide, Tensor sums)",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


def add_product_(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, alpha: float) -> None:
    """out += alpha a b, in place in a graph too. (Inductor makes a copy of what `Tensor.addmm_` writes to.)"""
    torch.ops.unsloth_ext.add_product_(out, a, b, alpha)


def copy_columns_(out: torch.Tensor, part: torch.Tensor) -> None:
    """out = part, in place in a graph too, where `out` is columns of a larger matrix."""
    torch.ops.unsloth_ext.copy_columns_(out, part)


def beside(parts) -> torch.Tensor:
    """Matrices of equal rows side by side, copied. Inductor would let torch.cat's parts be views of its result: what is kept of them
    for the backward would keep all of it, and products that read them would read columns of it."""
    return torch.ops.unsloth_ext.beside(parts)


def swiglu_lora(e: torch.Tensor, g: torch.Tensor, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """h = silu(e) g and, of the same pass, h A^T.  e, g: [T, I]; a: [rank, I], all of one 16-bit dtype.

    Returns wide = [h | h A^T | zeros to a multiple of 8 columns], whose rows begin at cache lines where those of e do, and h A^T,
    [T, rank], contiguous. Rounded where Unsloth's kernel rounds: silu(e), the product, the sum.
    """
    return torch.ops.unsloth_ext.swiglu_lora(e, g, a)


def swiglu_lora_backward(
    dh: torch.Tensor, e: torch.Tensor, g: torch.Tensor, low: torch.Tensor, p: torch.Tensor, gate_rank: int, more: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """SwiGLU's backward and what of LoRA's gradients are sums over its rows; h = silu(e) g is among those, and kept nowhere.

    dh, e, g: [T, I] of one dtype. low: [T, gate_rank + up_rank], x A^T of gate and of up. p: [T, down_rank], s dY B of down.
    more: columns of zeros.

    Returns wide = [de | dg | zeros], [T, 2I + more], and sums = [low_gate^T de; low_up^T dg; p^T h], fp32 [sum of ranks, I]. Rounded
    where Unsloth's kernel rounds: silu(e), then each product, in the inputs' dtype.
    """
    return torch.ops.unsloth_ext.swiglu_lora_backward(dh, e, g, low, p, gate_rank, more)


@functools.cache
def _kernels():
    from . import projections_kernel

    return projections_kernel


def _add_product(out, a, b, alpha) -> None:
    out.addmm_(a, b, alpha=alpha)


def _copy_columns(out, part) -> None:
    out.copy_(part)


def _beside(parts):
    return torch.cat(parts, 1)


def _results_of(e, g, a):
    (rows, width), rank = e.shape, a.shape[0]
    beside = rank + -rank % 8
    wide = e.new_empty(rows, width + beside + -beside % 64)
    return wide[:, : width + beside], e.new_empty(rows, rank)


def _swiglu_lora(e, g, a):
    wide, low = _results_of(e, g, a)
    rank, width = a.shape
    if e.is_cuda and rank <= _kernels().MOST_RANK:
        _kernels().swiglu_lora(e.contiguous(), g.contiguous(), a.contiguous(), wide, low)
        return wide, low
    if e.device.type == "cpu":  # oneDNN multiplies what stands behind a row's end by zeros: it may not be NaN
        torch.as_strided(wide, (wide.shape[0], wide.stride(0)), (wide.stride(0), 1)).zero_()
    h = wide[:, :width]
    torch.mul(torch.nn.functional.silu(e.float()).to(e.dtype), g, out=h)
    torch.mm(h, a.t(), out=low)
    wide[:, width:] = torch.nn.functional.pad(low, (0, -rank % 8))
    return wide, low


def _results_for(dh, e, g, low, p, gate_rank, more):
    (rows, width), ranks = dh.shape, low.shape[1] + p.shape[1]
    return dh.new_empty(rows, 2 * width + more), dh.new_empty(ranks, width, dtype=torch.float32)


def _swiglu_lora_backward(dh, e, g, low, p, gate_rank, more):
    width, ranks = dh.shape[1], (gate_rank, low.shape[1] - gate_rank, p.shape[1])
    wide = dh.new_empty(dh.shape[0], 2 * width + more)
    wide[:, 2 * width :].zero_()
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
        torch.mul(dh, f, out=wide[:, width : 2 * width])
        h = f * g
    parts = (low[:, :gate_rank], wide[:, :width]), (low[:, gate_rank:], wide[:, width : 2 * width]), (p, h)
    return wide, torch.cat([(left.t() @ right).float() for left, right in parts])


for _key in ("CPU", "CUDA"):
    _library.impl("add_product_", _add_product, _key)
    _library.impl("copy_columns_", _copy_columns, _key)
    _library.impl("beside", _beside, _key)
    _library.impl("swiglu_lora", _swiglu_lora, _key)
    _library.impl("swiglu_lora_backward", _swiglu_lora_backward, _key)
torch.library.register_fake("unsloth_ext::add_product_", lambda out, a, b, alpha: None, lib=_library)
torch.library.register_fake("unsloth_ext::copy_columns_", lambda out, part: None, lib=_library)
torch.library.register_fake("unsloth_ext::beside", _beside, lib=_library)
torch.library.register_fake("unsloth_ext::swiglu_lora", _results_of, lib=_library)
torch.library.register_fake("unsloth_ext::swiglu_lora_backward", _results_for, lib=_library)
