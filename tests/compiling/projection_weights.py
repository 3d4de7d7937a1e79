"""Random LoRA projections on NF4 weights, and what they should give, in float64."""

import torch

from unsloth_ext.nf4 import dequantize


def lora(n, k, rank, dtype, *, dtype_of_lora=None, nested=True, scaling=None):
    """[packed, quant_state, A, B, scaling] of a projection from k to n, of a size that keeps fp16 in its range."""
    from bitsandbytes.functional import quantize_4bit

    weight = torch.randn(n, k) * k**-0.5
    packed, state = quantize_4bit(weight.to(dtype), quant_type="nf4", compress_statistics=nested)
    a, b = torch.randn(rank, k) * k**-0.5, torch.randn(n, rank) * rank**-0.5
    a, b = (t.to(dtype_of_lora or dtype).requires_grad_() for t in (a, b))
    return [packed, state, a, b, 2.0 if scaling is None else scaling]


def swiglu_forward(e: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    return (e.float() * torch.sigmoid(e.float())).to(e.dtype) * g


def swiglu_backward(dh, e, g):
    wide = e.float()
    sigmoid = torch.sigmoid(wide)
    f = (sigmoid * wide).to(dh.dtype)
    de = (dh * g).float() * sigmoid * (1 + wide * (1 - sigmoid))
    return f * g, dh * f, de.to(dh.dtype)


def results(run, x, given, outer):
    """Outputs and gradients, of x and of each A and B."""
    leaves = [x, *(leaf for projection in given for leaf in projection[2:4])]
    for leaf in leaves:
        leaf.grad = None
    out = run(x)
    out = out if isinstance(out, tuple) else (out,)
    torch.autograd.backward(out, [one.to(o.dtype) for one, o in zip(outer, out, strict=True)])
    assert all(leaf.grad.dtype == leaf.dtype and leaf.grad.shape == leaf.shape for leaf in leaves)
    return [*(one.detach() for one in out), *(leaf.grad for leaf in leaves)]


def exact(x, given, outer):
    """Results and gradients (of x, then of each A and B) in float64: a projection, three of one input, or an MLP where the third
    projection reads what the first two make."""
    x = x.detach().double().requires_grad_()
    wanted = [x]

    def project(x, packed, state, a, b, scaling):
        a, b = (t.detach().double().requires_grad_() for t in (a, b))
        wanted.extend((a, b))
        return x @ dequantize(packed, state).double().t() + scaling * (x @ a.t()) @ b.t()

    if len(given) == 3 and given[2][2].shape[1] != x.shape[-1]:
        h = torch.nn.functional.silu(project(x, *given[0])) * project(x, *given[1])
        out = (project(h, *given[2]),)
    else:
        out = tuple(project(x, *one) for one in given)
    torch.autograd.backward(out, [one.double() for one in outer])
    return [*(one.detach() for one in out), *(leaf.grad for leaf in wanted)]


def off(found, wanted) -> float:
    """The largest relative error of several tensors, each as a vector."""
    return max(_each(found, wanted))


def mean_off(found, wanted) -> float:
    """The root of their mean square."""
    errors = _each(found, wanted)
    return (sum(error * error for error in errors) / len(errors)) ** 0.5


def _each(found, wanted):
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, wanted, strict=True)]
