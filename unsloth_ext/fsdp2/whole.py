"""One sharded parameter made whole for a moment, as all that saves whole weights does it: one at a time, on every rank.

It is gathered from what the ranks own, not by FSDP2's unshard, which would gather a layer at once and in the dtype of the mixed
precision policy: adapters that are trained in float32 are saved as that.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from .nf4_parameter import NF4Shard, gathered
from .processes import device_of

__all__ = ["local_of", "plain_names", "settle", "shape_of", "unwrap", "whole"]

_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")


def unwrap(model: nn.Module) -> nn.Module:
    """The model within DistributedDataParallel and torch.compile."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif "_orig_mod" in model._modules:  # not hasattr: PEFT's models look into the model within
            model = model._modules["_orig_mod"]
        else:
            return model


def plain_names(name: str) -> str:
    """A parameter's name without what torch.compile and activation checkpointing put into it."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def settle(model: nn.Module) -> None:
    """Give back what is gathered: each parameter is then what this rank owns."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a DTensor, or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shape_of(tensor: torch.Tensor) -> tuple[int, ...]:
    """Of the whole weight, dequantised."""
    local = local_of(tensor)
    if isinstance(local, NF4Shard):
        return tuple(local.cut.shape)
    if (state := getattr(tensor, "quant_state", None)) is not None:
        return tuple(state.shape)
    return tuple(tensor.shape)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a sharded parameter, on every rank; `Params4bit` for an NF4 weight. What is whole already is returned as it is.
    A collective over the parameter's mesh, on whose device the result lies."""
    if not isinstance(tensor, DTensor):
        return tensor
    mesh, local, device = tensor.device_mesh, tensor.to_local(), device_of(tensor.device_mesh)
    if not isinstance(local, NF4Shard):
        if local.device.type != device.type:  # offloaded to the host
            moved = local.detach().to(device)
            tensor = DTensor.from_local(
                moved, mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
            )
        return tensor.detach().full_tensor()
    group, parts = mesh.get_group(mesh.ndim - 1), []
    # Its name from torch 2.13 on, which warns of the old one.
    gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor
    for part in local.fields.tensors():
        part = part.view(torch.uint8).reshape(-1).to(device)
        out = part.new_empty(part.numel() * local.cut.world)
        gather(out, part, group=group)
        parts.append(out)
    return gathered(local.cut, local.fields, *parts)
