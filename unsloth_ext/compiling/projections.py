"""The projections of a LoRA layer on NF4 weights with their products side by side, for a compiled training step.

Autograd functions in plain torch, to be traced: Inductor lowers what is inside them. Five things are done otherwise than one
projection after the other:

* The input's gradient is one product, [dY_1 | dY_2 | p_1 | p_2] [W_1; W_2; A_1; A_2] with p = s dY B. The sum over the projections and
  over LoRA happens inside the product, in its accumulator, instead of by reading and writing the gradient again. The weights
  are dequantised one under the other (`nf4_stacked`), and SwiGLU's backward writes straight into its columns (`swiglu_lora_backward`);
  those of q, k and v come from rope and attention, and are copied. For a single projection the copy costs what it spares where that
  is o (measured on an H200), so `Linear` adds LoRA's part to the product; for down, whose product has a wide result, it is worth it.
* The p of one input are one product, [dY_1 | dY_2] with the B in a block diagonal matrix, the gradients of its A another one,
  X^T [p_1 | p_2], and those of its B a third, [x A_1^T | x A_2^T]^T [dY_1 | dY_2], of which the blocks on the diagonal are taken: each
  of these reads the wide operand once. The narrow operands are matrices of their own, not columns of one whose rows are tens of KB
  apart.
* In the MLP's backward the gradients of gate's and up's B and of down's A are sums over the rows of what SwiGLU's backward has in its
  registers, and are made there (`swiglu_lora_backward`): no pass of their own.
* x A^T is kept from the forward, rank columns instead of the input's width that would have to be read once more.
* In the forward gate, up and down are one product each, [x A^T | x] [s B | W]^T, on weights dequantised beside LoRA's
  (`nf4_augmented`); what makes down's input writes its x A^T beside it (`swiglu_lora`). Their bits are therefore not those of a sum
  after the product; `gate_or_up` computes the first two again. The narrower projections would gain nothing from that (measured on an
  H200): q, k, v and o add LoRA's product to the other. The x A^T of one input are one product too.

The mathematics is that of LoRA (arXiv 2106.09685).
"""

from __future__ import annotations

import torch

from ..nf4 import dequantization
from ..nf4.augmented import nf4_augmented, nf4_stacked
from ..nf4.dense_copies import copy_of, group_of, product_below, product_beside
from ..nf4.quant_state import BLOCKSIZES, quant_type, read
from .projections_operators import add_product_, beside, copy_columns_, swiglu_lora, swiglu_lora_backward

__all__ = ["MLP", "QKV", "Linear", "gate_or_up", "mlp_refusal", "refusal"]

_COLUMNS = 64  # what stands beside the dY is a multiple of this wide: rows of 128-byte lines, where those of the dY are


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
        flat = x.flatten(0, -2)
        low = _low(flat, a)
        y = _with_low(flat, low, packed, state, b, scaling)
        ctx.weight = packed, state
        ctx.scaling = scaling
        ctx.save_for_backward(x, a, b, low)
        return y.unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx, dy):
        x, a, b, low = ctx.saved_tensors
        dy = dy.flatten(0, -2)
        p = dy @ _block_diagonal((b,), (ctx.scaling,), dy.dtype)
        dx = dy @ dequantization.traced(*ctx.weight, dtype=dy.dtype)
        add_product_(dx, p[:, : a.shape[0]], a.to(dy.dtype), 1.0)
        (da,) = _gradients_of_a(p, (a,), x.flatten(0, -2))
        (db,) = _gradients_of_b(dy, low, (b,), (ctx.scaling,))
        return dx.view_as(x), None, None, da, db, None


class QKV(torch.autograd.Function):
    """Three projections of one input, each as `Linear`. Returns q, k, v."""

    @staticmethod
    def forward(
        ctx, x, q_packed, q_state, q_a, q_b, q_scaling, k_packed, k_state, k_a, k_b, k_scaling, v_packed, v_state, v_a, v_b, v_scaling
    ):  # fmt: skip
        flat, head = x.flatten(0, -2), x.shape[:-1]
        low = _low(flat, q_a, k_a, v_a)
        q_low, k_low, v_low = low.split([q_a.shape[0], k_a.shape[0], v_a.shape[0]], 1)
        q = _with_low(flat, q_low, q_packed, q_state, q_b, q_scaling)
        k = _with_low(flat, k_low, k_packed, k_state, k_b, k_scaling)
        v = _with_low(flat, v_low, v_packed, v_state, v_b, v_scaling)
        ctx.weights = (q_packed, q_state), (k_packed, k_state), (v_packed, v_state)
        ctx.scalings = q_scaling, k_scaling, v_scaling
        ctx.save_for_backward(x, q_a, q_b, k_a, k_b, v_a, v_b, low)
        return q.unflatten(0, head), k.unflatten(0, head), v.unflatten(0, head)

    @staticmethod
    def backward(ctx, dq, dk, dv):
        x, q_a, q_b, k_a, k_b, v_a, v_b, low = ctx.saved_tensors
        a_s, b_s = (q_a, k_a, v_a), (q_b, k_b, v_b)
        wide, dy, p = _side_by_side((dq.flatten(0, -2), dk.flatten(0, -2), dv.flatten(0, -2)), b_s, ctx.scalings)
        dx = _times_stacked(wide, ctx.weights, a_s)
        dq_a, dk_a, dv_a = _gradients_of_a(p, a_s, x.flatten(0, -2))
        dq_b, dk_b, dv_b = _gradients_of_b(dy, low, b_s, ctx.scalings)
        return (dx.view_as(x), None, None, dq_a, dq_b, None, None, None, dk_a, dk_b, None, None, None, dv_a, dv_b, None)  # fmt: skip


class MLP(torch.autograd.Function):
    """down(silu(gate(x)) up(x)), each projection as `Linear` but for the order of its sums."""

    @staticmethod
    def forward(
        ctx, x, gate_packed, gate_state, gate_a, gate_b, gate_scaling, up_packed, up_state, up_a, up_b, up_scaling,
        down_packed, down_state, down_a, down_b, down_scaling,
    ):  # fmt: skip
        flat, head = x.flatten(0, -2), x.shape[:-1]
        low = _low(flat, gate_a, up_a)
        wide = _columns(flat, low, gate_a, up_a)
        e = _gate(wide, gate_packed, gate_state, gate_b, gate_scaling)
        g = _up(wide, up_packed, up_state, up_b, up_scaling)
        h, down_low = swiglu_lora(e, g, down_a.to(e.dtype))
        y = _beside_right(h, down_packed, down_state, down_b, down_scaling)
        ctx.weights = (gate_packed, gate_state), (up_packed, up_state), (down_packed, down_state)
        ctx.scalings = gate_scaling, up_scaling, down_scaling
        ctx.save_for_backward(
            x, gate_a, gate_b, up_a, up_b, down_a, down_b, e.unflatten(0, head), g.unflatten(0, head), low, down_low
        )
        return y.unflatten(0, head)

    @staticmethod
    def backward(ctx, dy):
        x, gate_a, gate_b, up_a, up_b, down_a, down_b, e, g, low, down_low = ctx.saved_tensors
        gate_weight, up_weight, down_weight = ctx.weights
        gate_scaling, up_scaling, down_scaling = ctx.scalings
        dy = dy.flatten(0, -2)
        p = dy @ _block_diagonal((down_b,), (down_scaling,), dy.dtype)
        # dY is copied beside p: a tenth of reading and writing dh again.
        dh = beside([dy, p, p.new_zeros(p.shape[0], -p.shape[1] % _COLUMNS)])
        dh = _times_stacked(dh, (down_weight,), (down_a,))
        (ddown_b,) = _gradients_of_b(dy, down_low, (down_b,), (down_scaling,))
        a_s, b_s, scalings = (gate_a, up_a), (gate_b, up_b), (gate_scaling, up_scaling)
        wide, sums = swiglu_lora_backward(
            dh, e.flatten(0, -2), g.flatten(0, -2), low, p, gate_a.shape[0], _columns_of(b_s)
        )
        at, end = gate_a.shape[0], low.shape[1]
        dgate_b = (sums[:at].t() * gate_scaling).to(gate_b.dtype).contiguous()
        dup_b = (sums[at:end].t() * up_scaling).to(up_b.dtype).contiguous()
        ddown_a = sums[end : end + down_a.shape[0]].to(down_a.dtype)
        _, p = _add_columns(wide, b_s, scalings)
        dgate_a, dup_a = _gradients_of_a(p, a_s, x.flatten(0, -2))
        dx = _times_stacked(wide, (gate_weight, up_weight), a_s)
        return (
            dx.view_as(x), None, None, dgate_a, dgate_b, None, None, None, dup_a, dup_b, None,
            None, None, ddown_a, ddown_b, None,
        )  # fmt: skip


def _with_low(x, low, packed, state, b, scaling):
    """y of x [T, K] and low = x A^T, in the order of Unsloth's `matmul_lora`: x W^T, then += s low B^T in the output's dtype."""
    y = x @ dequantization.traced(packed, state, dtype=x.dtype).t()
    add_product_(y, low, b.to(x.dtype).t(), scaling)
    return y


def gate_or_up(name: str, x: torch.Tensor, gate, up) -> torch.Tensor:
    """What `MLP` computes of x [..., K] on its way, "gate" or "up", bit for bit: [..., I].

    gate, up: (packed weight, quant_state, A, B, scaling). Raises ValueError where `MLP` would not be taken.
    """
    if why := mlp_refusal(x, gate, up):
        raise ValueError(f"gate and up must be NF4 projections with LoRA that go side by side: {why}")
    flat = x.flatten(0, -2)
    wide = _columns(flat, _low(flat, gate[2], up[2]), gate[2], up[2])
    one = {"gate": _gate, "up": _up}[name]
    packed, state, _, b, scaling = gate if name == "gate" else up
    return one(wide, packed, state, b, scaling).unflatten(0, x.shape[:-1])


def _low(x, *a_s):
    """[x A_1^T | x A_2^T | ...], reading x once."""
    a_s = [a.to(x.dtype) for a in a_s]
    return x @ (torch.cat(a_s) if len(a_s) > 1 else a_s[0]).t()


def _columns(x, low, gate_a, up_a):
    """[x A_gate^T | zeros | x | x A_up^T | zeros]: gate's columns and up's are each in one piece, which begins at 16 bytes."""
    gate_rank, up_rank = gate_a.shape[0], up_a.shape[0]
    left = torch.nn.functional.pad(low[:, :gate_rank], (0, _padding([gate_rank])))
    right = torch.nn.functional.pad(low[:, gate_rank:], (0, _padding([up_rank])))
    return beside([left.contiguous(), x, right.contiguous()])  # contiguous: cat's faster kernels


def _gate(wide, packed, state, b, scaling):
    """wide: what `_columns` gives; gate's are the first."""
    scaled, kept = _scaled(b, scaling), copy_of(state, wide.dtype, wide.device)
    if kept is not None:
        return product_beside(wide[:, : scaled.shape[1] + kept.shape[1]], kept, scaled, True)
    weight = nf4_augmented(packed, state, scaled, None, wide.dtype)
    return wide[:, : weight.shape[1]] @ weight.t()


def _up(wide, packed, state, b, scaling):
    """wide: what `_columns` gives; up's are the last."""
    columns = b.shape[1] + _padding([b.shape[1]]) + _width(state)
    return _beside_right(wide[:, wide.shape[1] - columns :], packed, state, b, scaling)


def _beside_right(wide, packed, state, b, scaling):
    """[x | x A^T | zeros] [W | s B | zeros]^T."""
    scaled, kept = _scaled(b, scaling), copy_of(state, wide.dtype, wide.device)
    if kept is not None:
        return product_beside(wide, kept, scaled, False)
    return wide @ nf4_augmented(packed, state, None, scaled, wide.dtype).t()


def _width(state) -> int:
    return (state[1] if type(state) is list else state.shape)[1]


def _scaled(b, scaling):
    """s B in fp32, which is rounded once, and zeros to a multiple of 8 columns."""
    return torch.nn.functional.pad(b.float() * scaling, (0, _padding([b.shape[1]])))


def _side_by_side(gradients, b_s, scalings):
    """[dY_1 | dY_2 | ... | p_1 | p_2 | ... | zeros] with p = s dY B, and what `_add_columns` gives."""
    zeros = gradients[0].new_zeros(gradients[0].shape[0], _columns_of(b_s))
    # Of torch.cat Inductor makes one kernel, which takes nine times as long as the copies (measured on an H200).
    wide = beside([*gradients, zeros])
    return wide, *_add_columns(wide, b_s, scalings)


def _add_columns(wide, b_s, scalings):
    """Write the p of [dY_1 | dY_2 | ... | zeros] to where the zeros begin. Returns the columns that hold the dY, and the p as a matrix of
    their own."""
    dy = wide[:, : wide.shape[1] - _columns_of(b_s)]
    p = dy @ _block_diagonal(b_s, scalings, wide.dtype)
    copy_columns_(wide[:, dy.shape[1] : dy.shape[1] + p.shape[1]], p)
    return dy, p


def _columns_of(b_s) -> int:
    rank = sum(b.shape[1] for b in b_s)
    return rank + -rank % _COLUMNS


def _block_diagonal(b_s, scalings, dtype):
    """The s B on the diagonal, each rounded once: [sum of N, sum of ranks and zero columns to a multiple of 8]."""
    width, at, rows = sum(b.shape[1] for b in b_s), 0, []
    width += _padding([width])
    for b, scaling in zip(b_s, scalings, strict=True):
        rows.append(torch.nn.functional.pad((b.float() * scaling).to(dtype), (at, width - at - b.shape[1])))
        at += b.shape[1]
    return torch.cat(rows) if len(rows) > 1 else rows[0]


def _times_stacked(wide, weights, a_s):
    """[dY_1 | dY_2 | ... | p_1 | p_2 | ... | zeros] [W_1; W_2; ...; A_1; A_2; ...; zeros]."""
    rank = sum(a.shape[0] for a in a_s)
    rows = [*a_s, a_s[0].new_zeros(-rank % _COLUMNS, a_s[0].shape[1])]
    kept = group_of([state for _, state in weights], wide.dtype, wide.device)
    if kept is not None:
        return product_below(wide, kept, rows)
    return wide @ nf4_stacked(weights, rows, wide.dtype)


def _padding(ranks) -> int:
    return -sum(ranks) % 8


def _gradients_of_a(p, a_s, x):
    """(s dY B)^T x, [r, K] of each, laid out as A is: autograd would copy it once more."""
    product, found, row = x.t() @ p, [], 0
    for a in a_s:
        found.append(product[:, row : row + a.shape[0]].t().to(a.dtype).contiguous())
        row += a.shape[0]
    return found


def _gradients_of_b(dy, low, b_s, scalings):
    """s dY^T (x A^T), [N, r] of each; dy and low hold the columns of all."""
    product, found, column, row = low.t() @ dy, [], 0, 0
    for b, scaling in zip(b_s, scalings, strict=True):
        (n, rank) = b.shape
        found.append((product[row : row + rank, column : column + n].t().float() * scaling).to(b.dtype).contiguous())
        row, column = row + rank, column + n
    return found
