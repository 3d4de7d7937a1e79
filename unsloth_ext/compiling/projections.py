"""The projections of a LoRA layer on NF4 weights with fewer passes over what is wide, for a compiled training step.

Autograd functions in plain torch, to be traced: Inductor lowers what is inside them. Four things are done otherwise than one
projection after the other:

* LoRA's part of a projection, and the sum over projections in an input's gradient, are added inside the product, in its accumulator
  (`sum_of_products`): x W^T + (x A^T)(s B)^T in the forward, dY_1 W_1 + dY_2 W_2 + [p_1 | p_2] [A_1; A_2] with p = s dY B in the
  backward. The result is written once and not read again, and nothing is copied to where a wider product would read it. The bits are
  therefore not those of a sum after the product; `gate_or_up` computes two of them again.
* The x A^T of one input, and p, are made by the first product that reads that input (`product_with_low`), not by one of their own, where
  they have at most 64 columns; the gradients of its A are one product, X^T [p_1 | p_2], which reads the wide operand once.
* In the MLP the x A^T of down's input is made by what makes that input (`swiglu_lora`), and the gradients of gate's and up's B and of
  down's A are sums over the rows of what SwiGLU's backward has in its registers (`swiglu_lora_backward`): no passes of their own.
* x A^T is kept from the forward, rank columns instead of the input's width that would have to be read once more.

The mathematics is that of LoRA (arXiv 2106.09685).
"""

from __future__ import annotations

import torch

from ..nf4 import dequantization
from ..nf4.products import low_of, product_with_low, sum_of_products
from ..nf4.quant_state import BLOCKSIZES, quant_type, read
from .projections_operators import swiglu_lora, swiglu_lora_backward

__all__ = ["MLP", "QKV", "Linear", "gate_or_up", "mlp_refusal", "refusal"]


def refusal(x: torch.Tensor, *projections) -> str:
    """Why these projections of `x` cannot be done here, in a few words; "" where they can.

    x: [..., K].  projections: (packed weight, quant_state, A, B, scaling) of each.
    """
    if x.dtype not in (torch.float16, torch.bfloat16):
        return f"the input is {x.dtype}"
    kind = x.device.type
    if kind not in ("cuda", "cpu") or torch.version.hip is not None:
        return "it is no NVIDIA card"  # nobody has measured it there
    if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) != x.dtype:
        return "autocast is to another dtype"
    for packed, state, a, b, scaling in projections:
        if quant_type(state) != "nf4":
            return "a weight is not NF4"
        if a is None or b is None:
            return "a projection has no LoRA"
        shape, blocksize = state[1:4:2] if type(state) is list else (state.shape, state.blocksize)
        if len(shape) != 2 or blocksize not in BLOCKSIZES or shape[1] % blocksize != 0:
            return "a weight's rows are no whole blocks"
        if read(state).dtype != x.dtype:
            return "a weight is of another dtype than the input"
        if packed.shape[0] == 1:
            return "a weight is transposed"
        n, k = shape
        if x.shape[-1] != k or a.dim() != 2 or a.shape[1] != k or tuple(b.shape) != (n, a.shape[0]):
            return "the shapes do not fit"
        if a.shape[0] > k // 8:
            return "a rank is more than an eighth of the input's width"  # x A^T would be no small thing to keep
        if not isinstance(scaling, (int, float)):
            return "a scaling is no number"
    return ""


def mlp_refusal(x: torch.Tensor, gate, up) -> str:
    """`refusal` of gate and up of `x`, whose x A^T are kept as one."""
    if why := refusal(x, gate, up):
        return why
    if gate[2].shape[0] + up[2].shape[0] > x.shape[-1] // 8:
        return "the ranks of gate and up are more than an eighth of the input's width"
    return ""


# The forwards read no size of what they make (flatten, unflatten): with dynamic shapes, torch 2.11 fails on one that turns out to
# be a constant (constant_outputs.py).


class Linear(torch.autograd.Function):
    """x W^T + s (x A^T) B^T.  x: [..., K]; the weight packed, its state [N, K]; A [r, K], B [N, r].  Returns [..., N]."""

    @staticmethod
    def forward(ctx, x, packed, state, a, b, scaling):
        y, low = _project_first(x.flatten(0, -2), (a,), packed, state, b, scaling)
        ctx.weight = packed, state
        ctx.scaling = scaling
        ctx.save_for_backward(x, a, b, low)
        return y.unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx, dy):
        x, a, b, low = ctx.saved_tensors
        dy = dy.flatten(0, -2)
        dx, p = _input_gradient((dy,), (b,), (ctx.scaling,), (ctx.weight,), (a,))
        (da,) = _gradients_of_a(p, (a,), x.flatten(0, -2))
        db = _gradient_of_b(dy, low, b, ctx.scaling)
        return dx.view_as(x), None, None, da, db, None


class QKV(torch.autograd.Function):
    """Three projections of one input, each as `Linear`. Returns q, k, v."""

    @staticmethod
    def forward(
        ctx, x, q_packed, q_state, q_a, q_b, q_scaling, k_packed, k_state, k_a, k_b, k_scaling, v_packed, v_state, v_a, v_b, v_scaling
    ):  # fmt: skip
        flat, head = x.flatten(0, -2), x.shape[:-1]
        q, low = _project_first(flat, (q_a, k_a, v_a), q_packed, q_state, q_b, q_scaling)
        _, k_low, v_low = low.split([q_a.shape[0], k_a.shape[0], v_a.shape[0]], 1)
        k = _project(flat, k_low, k_packed, k_state, k_b, k_scaling)
        v = _project(flat, v_low, v_packed, v_state, v_b, v_scaling)
        ctx.weights = (q_packed, q_state), (k_packed, k_state), (v_packed, v_state)
        ctx.scalings = q_scaling, k_scaling, v_scaling
        ctx.save_for_backward(x, q_a, q_b, k_a, k_b, v_a, v_b, low)
        return q.unflatten(0, head), k.unflatten(0, head), v.unflatten(0, head)

    @staticmethod
    def backward(ctx, dq, dk, dv):
        x, q_a, q_b, k_a, k_b, v_a, v_b, low = ctx.saved_tensors
        a_s, b_s = (q_a, k_a, v_a), (q_b, k_b, v_b)
        dys = dq.flatten(0, -2), dk.flatten(0, -2), dv.flatten(0, -2)
        dx, p = _input_gradient(dys, b_s, ctx.scalings, ctx.weights, a_s)
        dq_a, dk_a, dv_a = _gradients_of_a(p, a_s, x.flatten(0, -2))
        lows = low.split([a.shape[0] for a in a_s], 1)
        dq_b, dk_b, dv_b = (
            _gradient_of_b(dy, one, b, scaling)
            for dy, one, b, scaling in zip(dys, lows, b_s, ctx.scalings, strict=True)
        )
        return (dx.view_as(x), None, None, dq_a, dq_b, None, None, None, dk_a, dk_b, None, None, None, dv_a, dv_b, None)  # fmt: skip


class MLP(torch.autograd.Function):
    """down(silu(gate(x)) up(x)), each projection as `Linear` but for the order of its sums."""

    @staticmethod
    def forward(
        ctx, x, gate_packed, gate_state, gate_a, gate_b, gate_scaling, up_packed, up_state, up_a, up_b, up_scaling,
        down_packed, down_state, down_a, down_b, down_scaling,
    ):  # fmt: skip
        flat, head = x.flatten(0, -2), x.shape[:-1]
        e, low = _project_first(flat, (gate_a, up_a), gate_packed, gate_state, gate_b, gate_scaling)
        _, up_low = low.split([gate_a.shape[0], up_a.shape[0]], 1)
        g = _project(flat, up_low, up_packed, up_state, up_b, up_scaling)
        h, down_low = swiglu_lora(e, g, down_a.to(e.dtype))
        y = _project(h, down_low, down_packed, down_state, down_b, down_scaling)
        ctx.weights = (gate_packed, gate_state), (up_packed, up_state), (down_packed, down_state)
        ctx.scalings = gate_scaling, up_scaling, down_scaling
        ctx.save_for_backward(
            x, gate_a, gate_b, up_a, up_b, down_a, down_b, e.unflatten(0, head), g.unflatten(0, head), low, down_low
        )
        return y.unflatten(0, head)

    @staticmethod
    def backward(ctx, dy):
        x, gate_a, gate_b, up_a, up_b, down_a, down_b, e, g, low, down_low = ctx.saved_tensors
        gate_scaling, up_scaling, down_scaling = ctx.scalings
        dy = dy.flatten(0, -2)
        dh, p = _input_gradient((dy,), (down_b,), (down_scaling,), ctx.weights[2:], (down_a,))
        ddown_b = _gradient_of_b(dy, down_low, down_b, down_scaling)
        a_s, b_s = (gate_a, up_a), (gate_b, up_b)
        wide, sums = swiglu_lora_backward(dh, e.flatten(0, -2), g.flatten(0, -2), low, p, gate_a.shape[0])
        at, end = gate_a.shape[0], low.shape[1]
        dgate_b = (sums[:at].t() * gate_scaling).to(gate_b.dtype).contiguous()
        dup_b = (sums[at:end].t() * up_scaling).to(up_b.dtype).contiguous()
        ddown_a = sums[end : end + down_a.shape[0]].to(down_a.dtype)
        dys = wide.split([gate_b.shape[0], up_b.shape[0]], 1)
        dx, p = _input_gradient(dys, b_s, (gate_scaling, up_scaling), ctx.weights[:2], a_s)
        dgate_a, dup_a = _gradients_of_a(p, a_s, x.flatten(0, -2))
        return (
            dx.view_as(x), None, None, dgate_a, dgate_b, None, None, None, dup_a, dup_b, None,
            None, None, ddown_a, ddown_b, None,
        )  # fmt: skip


def _project_first(x, a_s, packed, state, b, scaling):
    """(x W^T + low (s B)^T, [low | ...]) of x [T, K] and low = x A^T, for the first A of all that x meets."""
    weight = dequantization.traced(packed, state, dtype=x.dtype)
    return product_with_low((x,), (_stacked(a_s, x.dtype),), (weight,), _scaled(b, scaling, x.dtype))


def _project(x, low, packed, state, b, scaling):
    """x W^T + low (s B)^T of x [T, K] and low = x A^T."""
    weight = dequantization.traced(packed, state, dtype=x.dtype)
    return sum_of_products((x, low), (weight, _scaled(b, scaling, x.dtype)))


def _input_gradient(dys, b_s, scalings, weights, a_s):
    """(dY_1 W_1 + dY_2 W_2 + ... + p [A_1; A_2; ...], p), where p = [s dY_1 B_1 | s dY_2 B_2 | ...] and zero columns to a multiple of 8: a block
    diagonal product, so an infinity in one dY makes NaNs in the columns of the others."""
    dtype = dys[0].dtype
    up = _stacked(a_s, dtype)  # before the weights: Dynamo fails on a size that a quant_state alone gives it
    dense = [dequantization.traced(packed, state, dtype=dtype, again=True) for packed, state in weights]
    downs = _block_diagonal(b_s, scalings, dtype).split([b.shape[0] for b in b_s])
    return product_with_low(dys, downs, dense, up, transposed=False)


def _scaled(b, scaling, dtype):
    """s B, rounded once."""
    return (b.float() * scaling).to(dtype)


def gate_or_up(name: str, x: torch.Tensor, gate, up) -> torch.Tensor:
    """What `MLP` computes of x [..., K] on its way, "gate" or "up", bit for bit: [..., I].

    gate, up: (packed weight, quant_state, A, B, scaling). Raises ValueError where `MLP` would not be taken.
    """
    if why := mlp_refusal(x, gate, up):
        raise ValueError(f"gate and up must be NF4 projections with LoRA as MLP takes them: {why}")
    flat, a_s = x.flatten(0, -2), (gate[2], up[2])
    if name == "gate":
        packed, state, _, b, scaling = gate
        return _project_first(flat, a_s, packed, state, b, scaling)[0].unflatten(0, x.shape[:-1])
    packed, state, _, b, scaling = up
    low = low_of((flat,), (_stacked(a_s, x.dtype),), gate[3].shape[0])
    return _project(flat, low[:, gate[2].shape[0] :], packed, state, b, scaling).unflatten(0, x.shape[:-1])


def _stacked(a_s, dtype):
    a_s = [a.to(dtype) for a in a_s]
    return torch.cat(a_s) if len(a_s) > 1 else a_s[0]


def _block_diagonal(b_s, scalings, dtype):
    """The s B on the diagonal, each rounded once: [sum of N, sum of ranks and zero columns to a multiple of 8]."""
    width, at, rows = sum(b.shape[1] for b in b_s), 0, []
    width += -width % 8
    for b, scaling in zip(b_s, scalings, strict=True):
        rows.append(torch.nn.functional.pad((b.float() * scaling).to(dtype), (at, width - at - b.shape[1])))
        at += b.shape[1]
    return torch.cat(rows) if len(rows) > 1 else rows[0]


def _gradients_of_a(p, a_s, x):
    """(s dY B)^T x, [r, K] of each, laid out as A is: autograd would copy it once more."""
    product, found, row = x.t() @ p, [], 0
    for a in a_s:
        found.append(product[:, row : row + a.shape[0]].t().to(a.dtype).contiguous())
        row += a.shape[0]
    return found


def _gradient_of_b(dy, low, b, scaling):
    """s dY^T (x A^T), [N, r]."""
    return ((low.t() @ dy).t().float() * scaling).to(b.dtype).contiguous()
