"""Optimizers on what a rank owns: bitsandbytes' at all, torch's without the price of DTensors.

bitsandbytes' kernels read raw memory, and a sharded parameter is a DTensor, which has none of its own. `on_local_shards` gives the
optimizer plain parameters that are this rank's memory, and hands it the gradients just before each step. An 8-bit state is
quantised in blocks that begin with the shard, so its blocks differ from those on one device, as in any sharded run.

torch's optimizers take DTensors, but the dispatch of hundreds of them costs the host several times what the step costs otherwise,
while the card has nothing to do. Those that compute each element by itself step on the same plain parameters, with the same result.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ..errors import UsageError
from . import kept_layers

__all__ = ["on_local_shards", "step_quickly"]

_ELEMENTWISE = {getattr(torch.optim, name) for name in ("Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "NAdam", "RAdam",
                                                         "RMSprop", "Rprop", "SGD")}  # fmt: skip


def on_local_shards(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Make a new optimizer over DTensor parameters step on this rank's parts of them, in place. Before its first step.

    For bitsandbytes' optimizers, and any that computes each element by itself, or in blocks.

    Clip gradients on the model's own parameters, as ever; `zero_grad` clears those. A rank whose part of a parameter is empty
    leaves it out. Raises ValueError if the optimizer has state already, `UsageError` if it has
    parameters that are gathered at the moment: it would train those, and not the parts.
    """
    if optimizer.state:
        raise ValueError("on_local_shards must be called before the optimizer's first step: it has state already")
    whole = kept_layers.gathered_now()
    if any(id(parameter) in whole for group in optimizer.param_groups for parameter in group["params"]):
        raise UsageError(
            "the optimizer has parameters that are gathered at the moment",
            "Make it before a forward or after its backward.",
        )
    pairs: list[tuple[torch.Tensor, nn.Parameter]] = []
    sharded: list[torch.Tensor] = []
    parts: list[
        list[tuple[torch.Tensor, torch.Tensor | None]]
    ] = []  # of each group, for the state's names (optimizer_state.py)
    for group in optimizer.param_groups:
        local = []
        parts.append([])
        for parameter in group["params"]:
            if not isinstance(parameter, DTensor):
                local.append(parameter)
                parts[-1].append((parameter, parameter))
                continue
            sharded.append(parameter)
            part = parameter.to_local().detach()
            parts[-1].append((parameter, nn.Parameter(part, requires_grad=True) if part.numel() else None))
            if part.numel():
                local.append(parts[-1][-1][1])
                pairs.append((parameter, local[-1]))
        group["params"] = local
    optimizer._unsloth_ext_parts = parts

    @torch.no_grad()
    def hand_over(_=None, args=(), kwargs=None):  # args: the optimizer again, and what `step` was called with
        if any(callable(one) for one in (*args[1:], *(kwargs or {}).values())):
            raise UsageError(
                "an optimizer on local shards takes no closure: the gradients are handed to it before its step"
            )
        for parameter, part in pairs:
            part.grad = None if parameter.grad is None else parameter.grad.to_local()

    def take_back(*_):
        for _, part in pairs:
            part.grad = None

    clear = optimizer.zero_grad

    def zero_grad(set_to_none: bool = True):
        clear(set_to_none=set_to_none)
        for parameter in sharded:
            if set_to_none:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad.zero_()

    optimizer.zero_grad = zero_grad
    optimizer._unsloth_ext_hand_over = hand_over  # for a gradient scaler, which looks before the step
    optimizer.register_step_pre_hook(hand_over)
    optimizer.register_step_post_hook(take_back)
    return optimizer


def step_quickly(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Spare one of torch's new optimizers the dispatch of its DTensors: on this rank's parts where it computes each element by itself,
    else all together (`foreach`, which torch chooses for plain tensors on a card, and for DTensors one by one, 0.1 s a step for the
    adapters of an 8B model), where it was left to torch how.
    """
    alone = not optimizer.state and not any(group.get("differentiable") for group in optimizer.param_groups)
    if type(optimizer) in _ELEMENTWISE and alone:  # Adagrad has state from the beginning
        return on_local_shards(optimizer)
    for group in optimizer.param_groups:
        meshes = {getattr(parameter, "device_mesh", None) for parameter in group["params"]}
        chosen = group.get("foreach", True) is not None or group.get("fused") or group.get("differentiable")
        if len(meshes) == 1 and None not in meshes and not chosen:
            group["foreach"] = True
    return optimizer
