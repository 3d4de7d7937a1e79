"""Clipping the gradients of a sharded model by their norm: on each rank's parts, with one number for the ranks to exchange.

`torch.nn.utils.clip_grad_norm_` takes DTensors too, but goes through their dispatch for every one of hundreds of adapters, at a moment
when the card has nothing else to do. Here it is three kernels over all parts and an all-reduce of a scalar.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard

__all__ = ["clip_grad_norm_"]


@torch.no_grad()
def clip_grad_norm_(
    parameters: torch.Tensor | Iterable[torch.Tensor], max_norm: float, norm_type: float = 2.0
) -> torch.Tensor:
    """Scale the gradients in place so that the norm of all together, over all ranks, is at most `max_norm`. A collective.

    Returns that norm as it was, a scalar tensor (float32 for 16-bit gradients), the same on every rank. norm_type: 2 or infinity are
    computed here; other norms, and gradients that are not sharded by FSDP2 over one mesh, by torch.
    """
    parameters = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    gradients = [p.grad for p in parameters if p.grad is not None]
    meshes = {g.device_mesh for g in gradients if _sharded(g)}
    if norm_type not in (2, math.inf) or len(meshes) != 1 or not all(map(_sharded, gradients)):
        norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm
    parts, mesh = [g.to_local() for g in gradients], meshes.pop()
    wide = parts[0].new_empty((), dtype=torch.promote_types(parts[0].dtype, torch.float32))
    # A part without rows has a norm of 0, if at all: infinity's is an error.
    norms = [norm.to(torch.float64) for norm in _norms([p for p in parts if p.numel()], norm_type, wide.dtype)]
    norms = torch.stack(norms) if norms else parts[0].new_zeros(1, dtype=torch.float64)
    group = mesh.get_group(mesh.ndim - 1)
    if norm_type == 2:
        total = norms.square().sum()
        dist.all_reduce(total, group=group)
        total = total.sqrt()
    else:  # a maximum over ranks may lose a NaN
        both = torch.stack([norms.nan_to_num(nan=0.0, posinf=torch.inf).max(), norms.isnan().any().double()])
        dist.all_reduce(both, dist.ReduceOp.MAX, group=group)
        total = torch.where(both[1] > 0, torch.nan, both[0])
    total = total.to(wide.dtype)
    torch._foreach_mul_(parts, (max_norm / (total + 1e-6)).clamp(max=1.0))
    return total


def _norms(parts: list[torch.Tensor], norm_type: float, dtype: torch.dtype) -> list[torch.Tensor]:
    return list(torch._foreach_norm(parts, norm_type, dtype=dtype)) if parts else []


def _sharded(gradient) -> bool:
    if not isinstance(gradient, DTensor):
        return False
    *copies, last = gradient.placements
    return isinstance(last, Shard) and all(isinstance(placement, Replicate) for placement in copies)
