"""`linear(x, packed, quant_state)`: x W^T with an NF4 weight that is never written out, for few rows of x.

The ways, and what decides between them:

* On a card whose table (`matmul_table.py`) has a measured row for this weight and this many rows of x: a kernel straight from
  bitsandbytes' bytes, launched by `matmul_plan.py`. On Hopper and for bitsandbytes' usual states that is one in CUDA C++ (`cuda/`,
  chosen by `matmul_hopper.py`, compiled by the NVRTC that torch brings along), else, or where it fails, one in Triton (`matmul_kernel.py`).
* Everywhere else (more rows, other cards, fp32, odd shapes, the CPU): `dequantize`, then torch's matmul.
* With a gradient to x, while torch.compile traces, and under modes such as fake tensors: `torch.ops.unsloth_ext.nf4_linear`,
  an operator around the same. Its backward is `dY @ dequantize(W)`.

A LoRA adapter adds two small matmuls, `x A^T` and then `B` onto the result in place. They are cuBLAS': A and B together have a
hundredth of the weight's bytes, so that launches are all they cost, and those a CUDA graph takes.
"""

from __future__ import annotations

import contextlib
from numbers import Real

import torch

from . import matmul_plan
from .matmul_plan import dense, forget, plans, run
from .quant_state import NF4State, check, read

__all__ = ["forget", "linear", "plans", "run"]

_is_compiling, _is_dynamo_compiling = torch.compiler.is_compiling, torch.compiler.is_dynamo_compiling
_plan_of = matmul_plan.plans.get


def linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    quant_state,
    bias: torch.Tensor | None = None,
    lora: tuple[torch.Tensor, torch.Tensor, float] | None = None,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`x @ W.T + bias + scaling * (x @ A.T) @ B.T` for an NF4 weight W, which is not written out where a kernel is faster.

    x: [..., K], float16, bfloat16 or float32.
    packed: the weight's 4-bit values as bitsandbytes holds them, two a byte, contiguous; its own shape ([bytes, 1], or the
        transposed [1, bytes]) does not matter.
    quant_state: its `bitsandbytes.functional.QuantState`, or the nested list of old versions, of shape [N, K].
    bias: [N], of x's dtype.
    lora: (A [r, K], B [N, r], scaling), an adapter as peft holds it; A and B of any floating dtype, used in x's.
    out: where to write, [..., N] of x's dtype, not overlapping x; allocated if None. Not with gradients, and not under torch.compile.

    Returns [..., N] of x's dtype. The weight is that of `dequantize(packed, quant_state, dtype=x.dtype)`, or closer to
    `code * scale` than that: up to 16 rows of x the scale is applied in fp32. Sums are fp32; repeated calls give equal bits.
    The adapter's part is added to the rounded result, as peft adds it, with x A^T rounded to x's dtype. Autocast changes nothing.
    Differentiable with respect to x, bias, A and B. Runs on x's device and current stream and waits for nothing. Raises TypeError
    or ValueError naming the argument.

    The format is that of QLoRA (arXiv 2305.14314), the adapter that of LoRA (arXiv 2106.09685); the method is described in
    `matmul_kernel.py`.
    """
    if _is_dynamo_compiling():
        if out is not None:
            raise ValueError("out cannot be given under torch.compile: leave it out, the compiler places the result")
        y = _traced(x, packed, quant_state, bias)
        return y if lora is None else _plus_lora(y, x, lora)
    plan = _plan_of(id(quant_state))
    if plan is None or (y := plan(x, packed, quant_state, bias, out)) is None:
        if _is_compiling() or torch._C._len_torch_dispatch_stack() or _wants_gradient(x, bias):
            if out is not None:
                raise ValueError(
                    "out cannot be given where a gradient is wanted or under a dispatch mode: leave it out"
                )
            y = _traced(x, packed, quant_state, bias)
        else:
            state = read(quant_state)
            _check(x, packed, state, bias, out)
            y = _linear(x, packed, state, bias, out, quant_state)
    return y if lora is None else _plus_lora(y, x, lora, out)


def _wants_gradient(*tensors) -> bool:
    return torch.is_grad_enabled() and any(getattr(tensor, "requires_grad", False) for tensor in tensors)


def _check(x, packed, state: NF4State, bias, out=None) -> None:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    check(packed, state, None, x.dtype)
    if len(state.shape) != 2:
        raise ValueError(f"quant_state.shape must be [N, K], got {tuple(state.shape)}")
    n, k = state.shape
    if x.ndim == 0 or x.shape[-1] != k:
        raise ValueError(f"x must have {k} columns for a weight of {(n, k)}, got {tuple(x.shape)}")
    if x.device != packed.device:
        raise ValueError(f"x must be on {packed.device} like the packed weight, got {x.device}")
    if bias is not None:
        _check_like("bias", bias, (n,), x)
    if out is not None:
        _check_like("out", out, (*x.shape[:-1], n), x)


def _check_like(name, tensor, shape, x) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")
    if tensor.dtype != x.dtype or tensor.device != x.device:
        raise ValueError(f"{name} must be {x.dtype} on {x.device} like x, got {tensor.dtype} on {tensor.device}")


def _linear(x, packed, state: NF4State, bias, out=None, quant_state=None) -> torch.Tensor:
    n, k = state.shape
    rows = x.reshape(-1, k)
    result = torch.empty((*x.shape[:-1], n), dtype=x.dtype, device=x.device) if out is None else out
    # cuBLAS picks another kernel, with other last bits, where memory is not aligned: the result must not depend on that.
    direct = result.is_contiguous() and (out is None or result.data_ptr() % 16 == 0)
    flat = result.view(-1, n) if direct else result.new_empty((rows.shape[0], n))
    if not run(rows, packed, state, bias, flat, quant_state):
        weight = dense(packed, state, x.dtype)
        if bias is None:
            torch.mm(rows, weight.t(), out=flat)
        else:
            torch.addmm(bias, rows, weight.t(), out=flat)
    return result if direct else result.copy_(flat.view(result.shape))


def _plus_lora(y, x, lora, out=None):
    a, b, scaling = _checked_lora(lora, y, x)
    rows, flat = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    with _without_autocast(x.device.type):
        if _is_compiling() or _wants_gradient(y, x, a, b):
            if out is not None:
                raise ValueError("out cannot be given where a gradient is wanted: leave it out")
            low = rows @ a.to(x.dtype).t()
            return torch.addmm(flat, low, b.to(x.dtype).t(), alpha=scaling).view(y.shape)
        low = torch.mm(rows, a.to(x.dtype).t())
        if y.is_contiguous():  # then `flat` is a view
            flat.addmm_(low, b.to(x.dtype).t(), alpha=scaling)
            return y
        return y.copy_(torch.addmm(flat, low, b.to(x.dtype).t(), alpha=scaling).view(y.shape))


def _checked_lora(lora, y, x):
    if not isinstance(lora, (tuple, list)) or len(lora) != 3:
        raise TypeError(f"lora must be (A, B, scaling), got {type(lora).__name__}")
    a, b, scaling = lora
    for name, tensor in (("A", a), ("B", b)):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"lora's {name} must be a tensor, got {type(tensor).__name__}")
        if tensor.ndim != 2 or not tensor.is_floating_point() or tensor.device != x.device:
            raise ValueError(
                f"lora's {name} must be a matrix of floats on {x.device} like x,"
                f" got {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}"
            )
    if a.shape[1] != x.shape[-1] or b.shape[0] != y.shape[-1] or a.shape[0] != b.shape[1]:
        raise ValueError(
            f"lora must be A [r, {x.shape[-1]}] and B [{y.shape[-1]}, r], got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    if not isinstance(scaling, Real):
        raise TypeError(f"lora's scaling must be a number, got {type(scaling).__name__}")
    return a, b, scaling


def _without_autocast(device_type):
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


# -- torch.compile and autograd ---------------------------------------------------------------------------------------------

_library = torch.library.Library("unsloth_ext", "FRAGMENT")
_library.define(
    "nf4_linear(Tensor x, Tensor packed, Tensor absmax, Tensor? code2, Tensor? absmax2, Tensor? offset, int blocksize,"
    " int blocksize2, SymInt[] shape, Tensor? bias) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _operator(x, packed, absmax, code2, absmax2, offset, blocksize, blocksize2, shape, bias):
    state = NF4State(absmax, torch.Size(shape), x.dtype, blocksize, code2, absmax2, offset, blocksize2)
    _check(x, packed, state, bias)
    return _linear(x, packed, state, bias)


def _operator_fake(x, packed, absmax, code2, absmax2, offset, blocksize, blocksize2, shape, bias):
    return x.new_empty((*x.shape[:-1], shape[0]))


def _keep(ctx, inputs, output):
    x, packed, absmax, code2, absmax2, offset, blocksize, blocksize2, shape, bias = inputs
    ctx.save_for_backward(packed, absmax, code2, absmax2, offset)
    ctx.blocksize, ctx.blocksize2, ctx.shape, ctx.dtype = blocksize, blocksize2, shape, x.dtype


def _backward(ctx, gradient):
    packed, absmax, code2, absmax2, offset = ctx.saved_tensors
    of_x = of_bias = None
    if ctx.needs_input_grad[0]:
        fields = (packed, absmax, code2, absmax2, offset, ctx.blocksize, ctx.blocksize2)
        weight = torch.ops.unsloth_ext.dequantize_nf4(*fields, list(ctx.shape), ctx.dtype)
        of_x = gradient.to(ctx.dtype) @ weight
    if ctx.needs_input_grad[9]:
        of_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0)
    return of_x, None, None, None, None, None, None, None, None, of_bias


for _key in ("CPU", "CUDA", "XPU"):
    _library.impl("nf4_linear", _operator, _key)
torch.library.register_fake("unsloth_ext::nf4_linear", _operator_fake, lib=_library)
torch.library.register_autograd("unsloth_ext::nf4_linear", _backward, setup_context=_keep, lib=_library)


def _traced(x, packed, quant_state, bias):
    """`linear` as one node of a graph."""
    state = read(quant_state)
    offset = state.offset
    if offset is not None and not isinstance(offset, torch.Tensor):
        offset = torch.tensor(offset, dtype=torch.float32, device=packed.device)
    fields = (packed, state.absmax, state.code2, state.absmax2, offset, state.blocksize, state.blocksize2)
    return torch.ops.unsloth_ext.nf4_linear(x, *fields, list(state.shape), bias)
