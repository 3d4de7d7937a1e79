"""Rotary position embedding as one operator a tensor, for a compiled layer.

Unsloth's own operator for graphs asks at each call whether its addresses fit 32 bits, which a trace with symbolic sizes answers by guards
(a tenth of the time to trace a step), and it rounds where the tables are wider. This one has nothing to ask.

As arithmetic in the graph Inductor could join it with what reads it, but joins it badly: 99 us for the queries and keys of 8192 tokens of 8B
where Unsloth's kernels take 49, and 230 for the rotation back and the columns of the projections' gradients for 97 (an H200).

The rotation is that of RoFormer (arXiv 2104.09864) in the form of halves: x1 cos - x2 sin, x2 cos + x1 sin, in fp32 and rounded once.
"""

from __future__ import annotations

import functools

import torch

__all__ = ["refusal", "rotate"]

_library = torch.library.Library("unsloth_ext", "FRAGMENT")
_library.define(
    "rotate(Tensor x, Tensor cos, Tensor sin, Tensor? positions, bool back) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor | None = None
) -> torch.Tensor:
    """x [B, S, H, D] rotated by its position. Differentiable in x.

    cos, sin: tables [at least the positions asked for, D or D / 2], of which the first half of the columns is read.
    positions: [B * S] or [B, S] integers, a table's row for each token; None: token i of each row has row i.
    Returns a new contiguous [B, S, H, D] of x's dtype. D must be even. Raises ValueError for too few rows or another number of positions.
    """
    return torch.ops.unsloth_ext.rotate(x, cos, sin, positions, False)


def refusal(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> str:
    """Why these, q and k [B, H, S, D], cannot be rotated by `rotate`, in a few words; "" where they can."""
    if not (q.dtype == k.dtype == cos.dtype == sin.dtype and q.dtype in (torch.float16, torch.bfloat16)):
        return "not all of one 16-bit dtype"  # Unsloth rounds where the tables are wider
    if q.device.type not in ("cuda", "cpu") or not (q.device == k.device == cos.device == sin.device):
        return "on another kind of device, or on several"
    if torch.version.hip is not None:
        return "on no NVIDIA card"  # nobody has measured it there
    if cos.dim() != 2 or sin.dim() != 2 or q.dim() != 4 or q.shape[-1] % 2:
        return "of other shapes"
    return ""


def _rotate(x, cos, sin, positions, back):
    half = x.shape[-1] // 2
    if positions is None:
        cos, sin = (table[: x.shape[1], :half][None, :, None] for table in (cos, sin))
    else:
        cos, sin = (table[positions, :half].view(x.shape[0], x.shape[1], 1, half) for table in (cos, sin))
    cos, sin = cos.float(), -sin.float() if back else sin.float()
    left, right = x[..., :half].float(), x[..., half:].float()
    out = x.new_empty(x.shape)  # contiguous: a concatenation would be laid out like its parts
    out[..., :half] = left * cos - right * sin
    out[..., half:] = right * cos + left * sin
    return out


def _setup_context(ctx, inputs, output):
    _, cos, sin, positions, ctx.back = inputs
    ctx.save_for_backward(cos, sin, positions)


def _backward(ctx, gradient):
    cos, sin, positions = ctx.saved_tensors
    return torch.ops.unsloth_ext.rotate(gradient, cos, sin, positions, not ctx.back), None, None, None, None


@functools.cache
def _kernels():
    from . import rope_kernel

    return rope_kernel


def _rotate_on_card(x, cos, sin, positions, back):
    tokens = x.shape[0] * x.shape[1]
    if positions is None and min(cos.shape[0], sin.shape[0]) < x.shape[1]:
        raise ValueError(
            f"the tables have {min(cos.shape[0], sin.shape[0])} rows, and {x.shape[1]} positions are asked for"
        )
    if positions is not None and positions.numel() != tokens:
        raise ValueError(f"positions must be one for each of {tokens} tokens, got {positions.numel()}")
    x, cos, sin = (one if one.stride(-1) == 1 else one.contiguous() for one in (x, cos, sin))
    return _kernels().rotate(x, cos, sin, None if positions is None else positions.contiguous(), back)


_library.impl("rotate", _rotate, "CPU")
_library.impl("rotate", _rotate_on_card, "CUDA")
torch.library.register_fake(
    "unsloth_ext::rotate", lambda x, cos, sin, positions, back: x.new_empty(x.shape), lib=_library
)
torch.library.register_autograd("unsloth_ext::rotate", _backward, setup_context=_setup_context, lib=_library)
