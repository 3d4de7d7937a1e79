"""What a rank holds of a sharded model: bytes by kind, and its frozen parameters as tensors that can be saved."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from .nf4_parameter import NF4Shard
from .row_shard import RowShard

__all__ = ["base_state", "bytes_held", "gathered_bytes", "packed_state", "parts_held"]


def bytes_held(model: nn.Module) -> dict[str, int]:
    """{"packed", "quant_state", "frozen", "trainable"}: bytes of this rank's parameters, from `load` or `shard`.

    quant_state: absmax, absmax2 and offset; the codebooks, which all weights share, are not counted. Weights that happen to be
    gathered count as what they are then: whole, under "packed" and "quant_state".
    """
    held, seen = dict.fromkeys(("packed", "quant_state", "frozen", "trainable"), 0), set()

    def add(kind, *tensors):
        for tensor in tensors:
            if tensor is not None and tensor.numel() and (at := tensor.data_ptr()) not in seen:
                seen.add(at)
                held[kind] += tensor.numel() * tensor.itemsize

    for parameter in model.parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if isinstance(local, NF4Shard):
            fields = local.fields
            add("packed", fields.packed)
            add("quant_state", fields.absmax, fields.absmax2, fields.offset)
        elif (state := getattr(local, "quant_state", None)) is not None:
            add("packed", local)
            add("quant_state", state.absmax, state.state2.absmax if state.nested else None, state.offset)
        else:
            local = local.rows if isinstance(local, RowShard) else local
            add("trainable" if parameter.requires_grad else "frozen", local)
    return held


def parts_held(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """{"parameters", "optimizer", "staging", "rotary", "gradients"}: bytes on the model's device that a rank holds between two steps.

    staging: what adapters and their gradients are exchanged through (staged_collectives.py). rotary: Unsloth's tables. cuBLAS' workspaces are in no tensor: they are what
    `torch.cuda.memory_allocated` loses by `torch._C._cuda_clearCublasWorkspaces()`.
    """
    tables = [
        table
        for module in model.modules()
        for name, tables in vars(module).items()
        if name.startswith("multi_gpu_") and isinstance(tables, list)
        for table in tables
    ]
    states = [value for state in optimizer.state.values() for value in state.values()]
    return {
        "parameters": sum(bytes_held(model).values()),
        "optimizer": _bytes_of(states),
        "staging": sum(one.size_here for one in getattr(model, "_unsloth_ext_staged", ())),
        "rotary": _bytes_of(tables),
        "gradients": _bytes_of(parameter.grad for parameter in model.parameters()),
    }


def _bytes_of(values: Iterable) -> int:
    """Of all tensors among them, each counted once."""
    found = {}
    for value in values:
        value = value.to_local() if isinstance(value, DTensor) else value
        if isinstance(value, torch.Tensor):
            found[value.data_ptr()] = value.numel() * value.itemsize
    return sum(found.values())


def gathered_bytes(unit: nn.Module, taken: Iterable[nn.Parameter] = ()) -> int:
    """Bytes of a sharded unit's parameters when they are gathered, without those in `taken`."""
    total, others = 0, {id(p) for p in taken}
    for parameter in unit.parameters():
        if id(parameter) in others:
            continue
        local = getattr(parameter, "_local_tensor", parameter)
        if isinstance(local, NF4Shard):
            total += local.bytes_held() * local.cut.world
        else:
            total += parameter.numel() * parameter.itemsize
    return total


def packed_state(model: nn.Module) -> dict[str, DTensor]:
    """{weight, weight.absmax, weight.nested_absmax: DTensor} of all sharded 4-bit weights, for torch.distributed.checkpoint.

    Sharded by groups (see reference.py): uint8 [groups, packed bytes a group], uint8 or float32 [groups, blocks a group] and
    float32 [groups]. The sizes do not depend on the number of ranks, so what N ranks saved M can load. The tensors are this
    rank's own memory: torch.distributed.checkpoint.load into them loads the model.
    """
    state = {}
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, DTensor) or not isinstance(shard := parameter.to_local(), NF4Shard):
            continue
        cut, fields = shard.cut, shard.fields
        start, stop = cut.real(shard.rank)
        sizes = {"": (fields.packed, cut.group_bytes), ".absmax": (fields.absmax, cut.group_blocks)}
        if cut.blocksize2:
            sizes[".nested_absmax"] = (fields.absmax2, None)
        for ending, (tensor, width) in sizes.items():
            rows = tensor.view(-1) if width is None else tensor.view(-1, width)
            shape = torch.Size((cut.groups, *rows.shape[1:]))
            state[name + ending] = DTensor.from_local(
                rows[: stop - start], parameter.device_mesh, [*[_replicated()] * (parameter.device_mesh.ndim - 1), Shard(0)],
                run_check=False, shape=shape, stride=torch.empty(shape, device="meta").stride(),
            )  # fmt: skip
    return state


def base_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """All that is frozen, for torch.distributed.checkpoint: `packed_state`, the NF4 weights' offsets ({weight}.nested_offset,
    float32 []), and the parameters that are not quantised. This rank's own memory."""
    state = dict(packed_state(model))
    for name, parameter in model.named_parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if isinstance(local, NF4Shard):
            if local.fields.offset is not None:
                state[f"{name}.nested_offset"] = local.fields.offset
        elif not parameter.requires_grad:
            state[name] = parameter.detach()
    return state


def _replicated():
    from torch.distributed.tensor import Replicate

    return Replicate()
