"""Matrix products into a given buffer, summed in fp32 whatever the inputs are, and rounded once."""

from __future__ import annotations

import functools

import torch

HALF = (torch.float16, torch.bfloat16)


@functools.cache
def _fp32_out(device: torch.device, dtype: torch.dtype) -> bool:
    # torch >= 2.8 on CUDA; bf16 from sm_80 on
    try:
        a = torch.ones(8, 8, dtype=dtype, device=device)
        out = torch.empty(8, 8, dtype=torch.float32, device=device)
        torch.mm(a, a, out_dtype=torch.float32, out=out)
        torch.addmm(out, a, a, out_dtype=torch.float32, out=out)
    except (RuntimeError, TypeError, NotImplementedError):
        return False
    return True


def matmul_into(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, add: bool = False) -> None:
    """out [m, n] = a [m, k] @ b [k, n], or += with `add`. out has the dtype of a and b, or fp32 (then add is exact to fp32)."""
    if out.dtype == a.dtype:
        if add:
            torch.addmm(out, a, b, out=out)
        elif a.is_cuda:
            torch.mm(a, b, out=out)
        else:
            out.copy_(torch.mm(a, b))
    elif a.is_cuda and _fp32_out(a.device, a.dtype):
        if add:
            torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
        else:
            torch.mm(a, b, out_dtype=torch.float32, out=out)
    elif add:
        out.addmm_(a.to(out.dtype), b.to(out.dtype))
    else:
        out.copy_(torch.mm(a.to(out.dtype), b.to(out.dtype)))
