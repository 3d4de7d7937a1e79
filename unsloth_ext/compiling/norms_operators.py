"""RMS norm, alone and with the addition beside it, as operators of a graph: what norms_fusion.py looks for and what it puts there.

    y, rstd = rms_norm(x, weight, eps)                              x, y [..., H]; rstd fp32 [T], one a row
    dx = rms_norm_backward(dy, x, weight, rstd)
    total, y, rstd = add_rms_norm(a, b, weight, eps)                total = a + b
    sum = rms_norm_backward_add(dy, x, weight, rstd, other)         dx + other, in the shape of other

A fused operator gives the bits of the two that it stands for: the total is rounded to its dtype before it is normed, dx before other
is added. On a CPU the same in plain torch. `rms_norm` is differentiable in x; its weight is a frozen one.
"""

from __future__ import annotations

import functools
import math

import torch

__all__ = ["add_rms_norm", "refusal", "rms_norm", "rms_norm_backward", "rms_norm_backward_add"]

_NARROW = 128  # up to here Unsloth norms several rows in one program
WIDEST = 65536  # one program holds a row

_library = torch.library.Library("unsloth_ext", "FRAGMENT")
for _schema in (
    "rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor y, Tensor rstd)",
    "rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor rstd) -> Tensor",
    "add_rms_norm(Tensor a, Tensor b, Tensor weight, float eps) -> (Tensor total, Tensor y, Tensor rstd)",
    "rms_norm_backward_add(Tensor dy, Tensor x, Tensor weight, Tensor rstd, Tensor other) -> Tensor",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))

rms_norm = torch.ops.unsloth_ext.rms_norm.default
rms_norm_backward = torch.ops.unsloth_ext.rms_norm_backward.default
add_rms_norm = torch.ops.unsloth_ext.add_rms_norm.default
rms_norm_backward_add = torch.ops.unsloth_ext.rms_norm_backward_add.default


def refusal(x: torch.Tensor, weight: torch.Tensor) -> str:
    """Why the norm of `x` [..., H] cannot be taken here, in a few words; "" where it can."""
    if x.device.type not in ("cuda", "cpu") or torch.version.hip is not None:
        return "it is no NVIDIA card"  # nobody has measured it there
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"the input is {x.dtype}"
    if weight.dtype not in (x.dtype, torch.float32):
        return "the weight is of another dtype"
    if weight.requires_grad:
        return "the weight is trained"
    if weight.dim() != 1 or x.dim() == 0 or x.shape[-1] != weight.shape[0] or weight.device != x.device:
        return "the weight is not the input's"
    if not _NARROW < weight.shape[0] <= WIDEST:
        return "rows are too short or too long"
    return ""


@functools.cache
def _kernels():
    from . import norms_kernel

    return norms_kernel


def _like(x):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_norm(x, weight, eps):
    return _like(x), x.new_empty(math.prod(x.shape[:-1]), dtype=torch.float32)


def _fake_add_norm(a, b, weight, eps):
    return _like(a), *_fake_norm(a, weight, eps)


def _norm(x, weight, eps):
    y, rstd = _fake_norm(x, weight, eps)
    if x.is_cuda:
        _kernels().rms_norm(x.contiguous(), None, weight.contiguous(), eps, None, y, rstd)
        return y, rstd
    exact = x.float()
    torch.rsqrt(exact.square().sum(-1).div_(x.shape[-1]).add_(eps), out=rstd.view(x.shape[:-1]))
    y.copy_((exact * rstd.view(x.shape[:-1]).unsqueeze(-1)).to(weight.dtype) * weight)
    return y, rstd


def _backward(dy, x, weight, rstd):
    dx = _like(dy)
    if x.is_cuda:
        _kernels().rms_norm_backward(dy.contiguous(), x.contiguous(), weight.contiguous(), rstd, None, dx)
        return dx
    each = rstd.view(x.shape[:-1]).unsqueeze(-1)
    normed, scaled, width = x.float() * each, dy.reshape(x.shape).float() * weight.float(), x.shape[-1]
    along = (scaled * normed).sum(-1, keepdim=True)
    dx.view(x.shape).copy_(each / width * (width * scaled - normed * along))
    return dx


def _add_norm(a, b, weight, eps):
    if a.shape != b.shape or a.dtype != b.dtype:
        raise ValueError(f"a and b must be alike, got {tuple(a.shape)} {a.dtype} and {tuple(b.shape)} {b.dtype}")
    if not a.is_cuda or a.dtype not in (torch.float16, torch.bfloat16):
        total = _like(a)
        torch.add(a, b, out=total)
        return total, *_norm(total, weight, eps)
    total, y, rstd = _fake_add_norm(a, b, weight, eps)
    _kernels().rms_norm(a.contiguous(), b.contiguous(), weight.contiguous(), eps, total, y, rstd)
    return total, y, rstd


def _backward_add(dy, x, weight, rstd, other):
    if other.numel() != x.numel() or other.dtype != dy.dtype:
        raise ValueError(
            f"other must be like dy, got {tuple(other.shape)} {other.dtype} and {tuple(dy.shape)} {dy.dtype}"
        )
    if not x.is_cuda or dy.dtype not in (torch.float16, torch.bfloat16):
        return torch.add(_backward(dy, x, weight, rstd).view(other.shape), other, out=_like(other))
    dx = _like(other)
    tensors = dy.contiguous(), x.contiguous(), weight.contiguous(), rstd, other.contiguous()
    _kernels().rms_norm_backward(*tensors, dx)
    return dx


def _setup_context(ctx, inputs, output):
    x, weight, _ = inputs
    if ctx.needs_input_grad[1]:
        raise ValueError("weight must be frozen: its gradient is not computed here")
    ctx.save_for_backward(x, weight, output[1])


def _differentiate(ctx, dy, _):
    return rms_norm_backward(dy.contiguous(), *ctx.saved_tensors), None, None


for _key in ("CPU", "CUDA"):
    _library.impl("rms_norm", _norm, _key)
    _library.impl("rms_norm_backward", _backward, _key)
    _library.impl("add_rms_norm", _add_norm, _key)
    _library.impl("rms_norm_backward_add", _backward_add, _key)
for _name, _fake in (
    ("rms_norm", _fake_norm),
    ("rms_norm_backward", lambda dy, x, weight, rstd: _like(dy)),
    ("add_rms_norm", _fake_add_norm),
    ("rms_norm_backward_add", lambda dy, x, weight, rstd, other: _like(other)),
):
    torch.library.register_fake(f"unsloth_ext::{_name}", _fake, lib=_library)
torch.library.register_autograd("unsloth_ext::rms_norm", _differentiate, setup_context=_setup_context, lib=_library)
