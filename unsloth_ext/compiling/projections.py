"""The projections of a LoRA layer on NF4 weights with their products side by side, for a compiled training step.

Autograd functions in plain torch, to be traced: Inductor lowers what is inside them. Four things are done otherwise than one
projection after the other:

* The input's gradient is one product, [dY_1 | dY_2 | p_1 | p_2] [W_1; W_2; A_1; A_2] with p = s dY B. The sum over the projections and
  over LoRA happens inside the product, in its accumulator, instead of by reading and writing the gradient again. The weights
  are dequantised one under the other (`nf4_stacked`), the p are written into their columns by the product that makes them
  (`add_product_`), and what makes the dY (the SwiGLU's backward) writes straight into its columns.
* The gradients of the A of one input are one product, [p_1 | p_2]^T X.
* x A^T is kept from the forward, rank columns instead of the input's width that would have to be read once more.
* In the forward gate and up are one product each, [x A^T | x] [s B | W]^T, on weights dequantised beside LoRA's (`nf4_augmented`). Their
  bits are therefore not those of a sum after the product; `gate_or_up` computes them again. The narrower projections would gain
  nothing from that (measured on an H200): q, k, v, o and down sum in the order of the projections one by one, with the same bits.

The mathematics is that of LoRA (arXiv 2106.09685).
"""

from __future__ import annotations

import torch

from ..nf4 import dequantization
from ..nf4.augmented import nf4_augmented, nf4_stacked
from ..nf4.quant_state import BLOCKSIZES, quant_type, read

__all__ = ["MLP", "QKV", "Linear", "add_product_", "gate_or_up", "mlp_refusal", "refusal"]

_library = torch.library.Library("unsloth_ext", "FRAGMENT")
_library.define(
    "add_product_(Tensor(a!) out, Tensor a, Tensor b, float alpha, float beta) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define("beside(Tensor[] parts) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


def _add_product(out, a, b, alpha, beta) -> None:
    out.addmm_(a, b, alpha=alpha, beta=beta)


def _beside(parts):
    # An operator, because Inductor would let torch.cat's parts be views of its result, and what is kept of them for the backward
    # would keep all of it.
    return torch.cat(parts, 1)


for _key in ("CPU", "CUDA", "XPU"):
    _library.impl("add_product_", _add_product, _key)
    _library.impl("beside", _beside, _key)
torch.library.register_fake("unsloth_ext::beside", _beside, lib=_library)
torch.library.register_fake("unsloth_ext::add_product_", lambda out, a, b, alpha, beta: None, lib=_library)


def add_product_(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, alpha: float, beta: float = 1.0) -> None:
    """out = beta out + alpha a b, in place in a graph too, where `out` may be columns of a larger matrix. Not differentiable.

    Inductor makes a copy of what `Tensor.addmm_` writes to; an operator that declares it is run in place.
    """
    torch.ops.unsloth_ext.add_product_(out, a, b, alpha, beta)


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


class Linear(torch.autograd.Function):
    """x W^T + s (x A^T) B^T.  x: [..., K]; the weight packed, its state [N, K]; A [r, K], B [N, r].  Returns [..., N]."""

    @staticmethod
    def forward(ctx, x, packed, state, a, b, scaling):
        y, low = _project(x.reshape(-1, x.shape[-1]), packed, state, a, b, scaling)
        ctx.weight = packed, state
        ctx.scaling = scaling
        ctx.save_for_backward(x, a, b, low)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx, dy):
        x, a, b, low = ctx.saved_tensors
        wide, spans = _side_by_side((dy.reshape(-1, dy.shape[-1]),), (b,), (ctx.scaling,))
        dx = wide @ _stacked((ctx.weight,), (a,), x.dtype)
        (da,) = _gradients_of_a(wide, spans, x.reshape(-1, x.shape[-1]))
        db = _gradient_of_b(wide, spans[0], low, ctx.scaling)
        return dx.view(x.shape), None, None, da, db, None


class QKV(torch.autograd.Function):
    """Three projections of one input, each as `Linear`. Returns q, k, v."""

    @staticmethod
    def forward(
        ctx, x, q_packed, q_state, q_a, q_b, q_scaling, k_packed, k_state, k_a, k_b, k_scaling, v_packed, v_state, v_a, v_b, v_scaling
    ):  # fmt: skip
        flat, head = x.reshape(-1, x.shape[-1]), x.shape[:-1]
        q, q_low = _project(flat, q_packed, q_state, q_a, q_b, q_scaling)
        k, k_low = _project(flat, k_packed, k_state, k_a, k_b, k_scaling)
        v, v_low = _project(flat, v_packed, v_state, v_a, v_b, v_scaling)
        ctx.weights = (q_packed, q_state), (k_packed, k_state), (v_packed, v_state)
        ctx.scalings = q_scaling, k_scaling, v_scaling
        ctx.save_for_backward(x, q_a, q_b, k_a, k_b, v_a, v_b, q_low, k_low, v_low)
        return q.view(*head, q.shape[-1]), k.view(*head, k.shape[-1]), v.view(*head, v.shape[-1])

    @staticmethod
    def backward(ctx, dq, dk, dv):
        x, q_a, q_b, k_a, k_b, v_a, v_b, q_low, k_low, v_low = ctx.saved_tensors
        gradients = tuple(d.reshape(-1, d.shape[-1]) for d in (dq, dk, dv))
        wide, spans = _side_by_side(gradients, (q_b, k_b, v_b), ctx.scalings)
        dx = wide @ _stacked(ctx.weights, (q_a, k_a, v_a), x.dtype)
        dq_a, dk_a, dv_a = _gradients_of_a(wide, spans, x.reshape(-1, x.shape[-1]))
        dq_b, dk_b, dv_b = (
            _gradient_of_b(wide, span, low, scaling)
            for span, low, scaling in zip(spans, (q_low, k_low, v_low), ctx.scalings, strict=True)
        )
        return (dx.view(x.shape), None, None, dq_a, dq_b, None, None, None, dk_a, dk_b, None, None, None, dv_a, dv_b, None)  # fmt: skip


class MLP(torch.autograd.Function):
    """down(f(gate(x), up(x))), each projection as `Linear`, with the activation's two functions given:

    forward(e, g) -> h for e = gate(x) and g = up(x), all [..., I].
    backward(dh, e, g) -> (h, dg, de), all [T, I]; what it was given may be overwritten.
    """

    @staticmethod
    def forward(
        ctx, x, gate_packed, gate_state, gate_a, gate_b, gate_scaling, up_packed, up_state, up_a, up_b, up_scaling,
        down_packed, down_state, down_a, down_b, down_scaling, forward_function, backward_function,
    ):  # fmt: skip
        flat, head = x.reshape(-1, x.shape[-1]), x.shape[:-1]
        low = _low(flat, gate_a, up_a)
        wide = _columns(flat, low, gate_a, up_a)
        e = _gate(wide, gate_packed, gate_state, gate_b, gate_scaling)
        g = _up(wide, up_packed, up_state, up_b, up_scaling)
        e, g = e.view(*head, e.shape[-1]), g.view(*head, g.shape[-1])
        h = forward_function(e, g)
        y, down_low = _project(h.reshape(-1, h.shape[-1]), down_packed, down_state, down_a, down_b, down_scaling)
        ctx.weights = (gate_packed, gate_state), (up_packed, up_state), (down_packed, down_state)
        ctx.scalings = gate_scaling, up_scaling, down_scaling
        ctx.backward_function = backward_function
        ctx.save_for_backward(x, gate_a, gate_b, up_a, up_b, down_a, down_b, e, g, low, down_low)
        return y.view(*head, y.shape[-1])

    @staticmethod
    def backward(ctx, dy):
        x, gate_a, gate_b, up_a, up_b, down_a, down_b, e, g, low, down_low = ctx.saved_tensors
        gate_weight, up_weight, down_weight = ctx.weights
        gate_scaling, up_scaling, down_scaling = ctx.scalings
        wide, spans = _side_by_side((dy.reshape(-1, dy.shape[-1]),), (down_b,), (down_scaling,))
        dh = wide @ _stacked((down_weight,), (down_a,), x.dtype)
        h, dg, de = ctx.backward_function(dh, e.reshape(-1, e.shape[-1]), g.reshape(-1, g.shape[-1]))
        (ddown_a,) = _gradients_of_a(wide, spans, h)
        ddown_b = _gradient_of_b(wide, spans[0], down_low, down_scaling)
        wide, spans = _side_by_side((de, dg), (gate_b, up_b), (gate_scaling, up_scaling))
        dgate_a, dup_a = _gradients_of_a(wide, spans, x.reshape(-1, x.shape[-1]))
        dgate_b = _gradient_of_b(wide, spans[0], low[:, : gate_a.shape[0]], gate_scaling)
        dup_b = _gradient_of_b(wide, spans[1], low[:, gate_a.shape[0] :], up_scaling)
        dx = wide @ _stacked((gate_weight, up_weight), (gate_a, up_a), x.dtype)
        return (
            dx.view(x.shape), None, None, dgate_a, dgate_b, None, None, None, dup_a, dup_b, None,
            None, None, ddown_a, ddown_b, None, None, None,
        )  # fmt: skip


def _project(x, packed, state, a, b, scaling):
    """(y, x A^T) of x [T, K], in the order of Unsloth's `matmul_lora`: x W^T, then += s (x A^T) B^T in the output's dtype."""
    y = x @ dequantization.traced(packed, state, dtype=x.dtype).t()
    low = x @ a.to(x.dtype).t()
    add_product_(y, low, b.to(x.dtype).t(), scaling)
    return y, low


def gate_or_up(name: str, x: torch.Tensor, gate, up) -> torch.Tensor:
    """What `MLP` computes of x [..., K] on its way, "gate" or "up", bit for bit: [..., I].

    gate, up: (packed weight, quant_state, A, B, scaling). Raises ValueError where `MLP` would not be taken.
    """
    if why := mlp_refusal(x, gate, up):
        raise ValueError(f"gate and up must be NF4 projections with LoRA that go side by side: {why}")
    flat = x.reshape(-1, x.shape[-1])
    wide = _columns(flat, _low(flat, gate[2], up[2]), gate[2], up[2])
    one = {"gate": _gate, "up": _up}[name]
    packed, state, _, b, scaling = gate if name == "gate" else up
    return one(wide, packed, state, b, scaling).view(*x.shape[:-1], b.shape[0])


def _low(x, gate_a, up_a):
    """[x A_gate^T | x A_up^T], reading x once."""
    return x @ torch.cat([gate_a.to(x.dtype), up_a.to(x.dtype)]).t()


def _columns(x, low, gate_a, up_a):
    """[x A_gate^T | zeros | x | x A_up^T | zeros]: gate's columns and up's are each in one piece, which begins at 16 bytes."""
    gate_rank, up_rank = gate_a.shape[0], up_a.shape[0]
    left = torch.nn.functional.pad(low[:, :gate_rank], (0, _padding([gate_rank])))
    right = torch.nn.functional.pad(low[:, gate_rank:], (0, _padding([up_rank])))
    return torch.ops.unsloth_ext.beside([left.contiguous(), x, right.contiguous()])  # contiguous: cat's faster kernels


def _gate(wide, packed, state, b, scaling):
    weight = nf4_augmented(packed, state, _scaled(b, scaling), None, wide.dtype)
    return wide[:, : weight.shape[1]] @ weight.t()


def _up(wide, packed, state, b, scaling):
    weight = nf4_augmented(packed, state, None, _scaled(b, scaling), wide.dtype)
    return wide[:, wide.shape[1] - weight.shape[1] :] @ weight.t()


def _scaled(b, scaling):
    """s B in fp32, which is rounded once, and zeros to a multiple of 8 columns."""
    return torch.nn.functional.pad(b.float() * scaling, (0, _padding([b.shape[1]])))


def _side_by_side(gradients, bs, scalings):
    """[dY_1 | dY_2 | ... | p_1 | p_2 | ... | zeros], p = s dY B, and where each is: ((first, end) of dY, (first, end) of p) of each."""
    rows, dtype = gradients[0].shape[0], gradients[0].dtype
    ranks = [b.shape[1] for b in bs]
    # The zeros, which the products fill, keep the columns a multiple of 8: rows that begin at 16 bytes.
    wide = torch.cat([*gradients, gradients[0].new_zeros(rows, sum(ranks) + _padding(ranks))], 1)
    spans, at, low = [], 0, sum(d.shape[1] for d in gradients)
    for d, rank in zip(gradients, ranks, strict=True):
        spans.append(((at, at + d.shape[1]), (low, low + rank)))
        at, low = at + d.shape[1], low + rank
    for (columns, own), b, scaling in zip(spans, bs, scalings, strict=True):
        add_product_(wide[:, own[0] : own[1]], wide[:, columns[0] : columns[1]], b.to(dtype), scaling, 0.0)
    return wide, spans


def _stacked(weights, a_s, dtype):
    """[W_1; W_2; ...; A_1; A_2; ...; zeros], as many rows as `_side_by_side` has columns."""
    padding = _padding([a.shape[0] for a in a_s])
    extra = [*a_s, a_s[0].new_zeros(padding, a_s[0].shape[1])] if padding else a_s
    return nf4_stacked(weights, extra, dtype)


def _padding(ranks) -> int:
    return -sum(ranks) % 8


def _gradients_of_a(wide, spans, x):
    """[r, K] of each: rows of one product."""
    first, end = spans[0][1][0], spans[-1][1][1]
    return (wide[:, first:end].t() @ x).split([own[1] - own[0] for _, own in spans])


def _gradient_of_b(wide, span, low, scaling):
    """s dY^T (x A^T): [N, r]."""
    (first, end), _ = span
    d = low.new_empty(end - first, low.shape[1])
    return d.addmm_(wide[:, first:end].t(), low, alpha=scaling, beta=0)
