"""Operators of projections.py: what Inductor would do with copies, or in more passes, if it were left to it. Not differentiable."""

from __future__ import annotations

import torch

__all__ = ["add_product_", "beside", "copy_columns_", "swiglu_backward_"]

_library = torch.library.Library("unsloth_ext", "FRAGMENT")
for _schema in (
    "add_product_(Tensor(a!) out, Tensor a, Tensor b, float alpha) -> ()",
    "copy_columns_(Tensor(a!) out, Tensor part) -> ()",
    "beside(Tensor[] parts) -> Tensor",
    "swiglu_backward_(Tensor(a!) dh, Tensor e, Tensor g, int more) -> Tensor",
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


def swiglu_backward_(dh: torch.Tensor, e: torch.Tensor, g: torch.Tensor, more: int) -> torch.Tensor:
    """[de | dg | zeros] of h = silu(e) g, and dh becomes h.  dh, e, g: [T, I] of one dtype; more: columns of zeros.

    Returns [T, 2I + more]. Rounded where Unsloth's kernel rounds: silu(e), then each product, in the inputs' dtype.
    """
    return torch.ops.unsloth_ext.swiglu_backward_(dh, e, g, more)


def _add_product(out, a, b, alpha) -> None:
    out.addmm_(a, b, alpha=alpha)


def _copy_columns(out, part) -> None:
    out.copy_(part)


def _beside(parts):
    return torch.cat(parts, 1)


def _wide_for(dh, e, g, more):
    return dh.new_empty(dh.shape[0], 2 * dh.shape[1] + more)


def _swiglu_backward(dh, e, g, more):
    wide, width = _wide_for(dh, e, g, more), dh.shape[1]
    if dh.is_cuda and dh.is_contiguous():
        from .projections_kernel import swiglu_backward

        with torch.cuda.device(dh.device):
            swiglu_backward(dh, e.contiguous(), g.contiguous(), wide)
    else:
        exact = e.float()
        sigmoid = torch.sigmoid(exact)
        f = (sigmoid * exact).to(dh.dtype)
        wide[:, :width] = (dh * g).float() * sigmoid * (1 + exact * (1 - sigmoid))
        torch.mul(dh, f, out=wide[:, width : 2 * width])
        torch.mul(f, g, out=dh)
    wide[:, 2 * width :].zero_()
    return wide


for _key in ("CPU", "CUDA"):
    _library.impl("add_product_", _add_product, _key)
    _library.impl("copy_columns_", _copy_columns, _key)
    _library.impl("beside", _beside, _key)
    _library.impl("swiglu_backward_", _swiglu_backward, _key)
torch.library.register_fake("unsloth_ext::add_product_", lambda out, a, b, alpha: None, lib=_library)
torch.library.register_fake("unsloth_ext::copy_columns_", lambda out, part: None, lib=_library)
torch.library.register_fake("unsloth_ext::beside", _beside, lib=_library)
torch.library.register_fake("unsloth_ext::swiglu_backward_", _wide_for, lib=_library)
