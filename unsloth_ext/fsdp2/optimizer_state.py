"""An optimizer's state by parameter names, in a form that another number of ranks can read.

torch's optimizers keep tensors of the parameter's shape, which are saved as DTensors. bitsandbytes' keep theirs in blocks of 256
that begin with what a rank owns: a *piece*, saved as it is. A rank that owns the same piece later reads it back bit for bit. For
another cut the pieces are dequantised, cut anew and quantised again, which moves each value by at most half a step of the
codebook, once. Steps and other numbers, and the options of the groups, are the same on all ranks and are saved beside.

The integers that `Optimizer.state_dict` uses for parameters mean nothing to a sharded optimizer (Unsloth 2026.10.9 raises
KeyError 'state.0.step'). `by_name` turns them into names.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from ..errors import UsageError
from .processes import position
from .row_shard import rows_of
from .whole import plain_names

__all__ = ["Slot", "by_name", "check", "describe", "install", "merge", "named", "slots", "targets", "unwrapped"]

_HIDDEN = "__bnb_optimizer_quant_state__"  # where bitsandbytes' state_dict puts its tensors


@dataclasses.dataclass
class Slot:
    """One parameter of one group of an optimizer."""

    name: str
    parameter: torch.Tensor  # of the model
    member: torch.Tensor | None  # what the optimizer steps on; None where this rank owns nothing of it
    group: int

    @property
    def start(self) -> int:
        """Of this rank's part, in elements of the flat parameter."""
        if not isinstance(self.parameter, DTensor):
            return 0
        rank, world = position(self.parameter.device_mesh)
        rows = self.parameter.shape[0]
        return rows_of(rank, world, rows)[0] * (self.parameter.numel() // rows if rows else 0)

    def like(self, part: torch.Tensor) -> torch.Tensor:
        """`part`, of the shape of this rank's part, as a tensor of the whole."""
        if not isinstance(self.parameter, DTensor):
            return part
        of = self.parameter
        if part.device.type != of.device_mesh.device_type:  # offloaded: from_local would move it to the card
            found = torch.empty_like(of.detach(), dtype=part.dtype)
            found.to_local().copy_(part)
            return found
        return DTensor.from_local(
            part, of.device_mesh, of.placements, run_check=False, shape=of.shape, stride=of.stride()
        )


def unwrapped(optimizer):
    """The optimizer within accelerate's."""
    while not isinstance(optimizer, torch.optim.Optimizer) or hasattr(optimizer, "accelerator_state"):
        if not hasattr(optimizer, "optimizer"):
            raise UsageError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        optimizer = optimizer.optimizer
    return optimizer


def in_pieces(optimizer) -> bool:
    return hasattr(optimizer, "get_state_buffer") and hasattr(optimizer, "init_state")  # bitsandbytes


def named(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [(plain_names(name), parameter) for name, parameter in model.named_parameters()]


def slots(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[Slot]]:
    """A list for each group, with what this rank owns nothing of. Raises `UsageError` for a parameter that is not the model's, or
    is cut in another way than by rows."""
    names = {id(p): n for n, p in named(model)}
    groups = getattr(optimizer, "_unsloth_ext_parts", None)  # of `on_local_shards`
    groups = groups or [[(p, p) for p in group["params"]] for group in optimizer.param_groups]
    found = []
    for number, group in enumerate(groups):
        found.append([])
        for parameter, member in group:
            if id(parameter) not in names:
                raise UsageError(
                    f"group {number} of the optimizer has a parameter {tuple(parameter.shape)} that is not in the model",
                    "Make the optimizer after the model is sharded.",
                )
            name = names[id(parameter)]
            if isinstance(parameter, DTensor) and (
                parameter.placements[-1] != Shard(0) or any(isinstance(p, Shard) for p in parameter.placements[:-1])
            ):
                raise UsageError(f"{name} is placed as {parameter.placements}; only shards of rows can be saved")
            found[-1].append(Slot(name, parameter, member, number))
    return found


def _options(group: dict) -> dict:
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}


def _number(value: Any) -> bool:
    return not isinstance(value, torch.Tensor) or value.ndim == 0


def describe(model: nn.Module, optimizer) -> tuple[dict[str, torch.Tensor], dict]:
    """(tensors for torch.distributed.checkpoint, what else there is to know). The second is this rank's: `merge` those of all."""
    optimizer = unwrapped(optimizer)
    tensors, numbers, pieces = {}, {}, {}
    found = slots(model, optimizer)
    for slot in (slot for group in found for slot in group):
        if slot.member is None or not (state := optimizer.state.get(slot.member)):
            continue
        numbers[slot.name] = {
            k: (v.detach().cpu() if isinstance(v, torch.Tensor) else v) for k, v in state.items() if _number(v)
        }
        for key, value in state.items():
            if _number(value):
                continue
            if in_pieces(optimizer):
                tensors[f"optimizer/{slot.name}/{key}@{slot.start}"] = value
                continue
            if not isinstance(value, DTensor) and isinstance(slot.parameter, DTensor):
                if value.shape != slot.parameter.to_local().shape:
                    raise UsageError(
                        f"{type(optimizer).__name__} keeps {key!r} {tuple(value.shape)} for {slot.name}, of which this rank "
                        f"owns {tuple(slot.parameter.to_local().shape)}: it cannot be saved for other numbers of ranks"
                    )
                value = slot.like(value)
            tensors[f"optimizer/{slot.name}/{key}"] = value
        if in_pieces(optimizer):
            pieces[slot.name] = {slot.start: slot.member.numel()}
    groups = [
        {"names": [slot.name for slot in group], "options": _options(options)}
        for group, options in zip(found, optimizer.param_groups, strict=True)
    ]
    return tensors, {"class": type(optimizer).__name__, "groups": groups, "numbers": numbers, "pieces": pieces}


def merge(facts: list[dict]) -> dict:
    """`describe`'s facts of all ranks in one."""
    numbers, pieces = {}, {}
    for one in facts:
        for name, values in one["numbers"].items():
            numbers.setdefault(name, values)
        for name, places in one["pieces"].items():
            pieces.setdefault(name, {}).update(places)
    return {**facts[0], "numbers": numbers, "pieces": pieces}


# What optimizers keep of each parameter in its own shape, by torch's and by bitsandbytes' names.
_MOMENTS = {
    "exp_avg", "exp_avg_sq", "exp_inf", "exp_avg_diff", "momentum_buffer", "square_avg", "grad_avg", "acc_delta", "sum", "prev",
    "state1", "state2",
}  # fmt: skip


def _moments(optimizer: torch.optim.Optimizer) -> set[str] | None:
    """Which of `_MOMENTS` this optimizer keeps, seen on one number of its own; None where that cannot be seen."""
    if in_pieces(optimizer):
        from bitsandbytes.optim.optimizer import Optimizer2State

        return {"state1", "state2"} if isinstance(optimizer, Optimizer2State) else {"state1"}
    if any(optimizer.state.values()):
        return _MOMENTS.intersection(k for state in optimizer.state.values() for k, v in state.items() if v is not None)
    number = torch.nn.Parameter(torch.zeros(1))
    number.grad = torch.zeros(1)
    try:
        probe = type(optimizer)([{**_options(optimizer.param_groups[0]), "params": [number]}])
        probe.step()
    except Exception:  # it wants other arguments, a card, or a closure
        return None
    return _MOMENTS.intersection(key for key, value in probe.state[number].items() if value is not None)


def by_name(state_dict: dict, model: nn.Module, optimizer) -> tuple[dict[str, torch.Tensor], dict]:
    """A whole optimizer's `state_dict`, whose parameters are integers, in the form of `describe`.

    The integers count the parameters through the groups. Groups are matched in order, empty ones left out. Raises `UsageError`
    where their sizes differ, a state's shape does not fit the parameter, or the states are those of another kind of optimizer, whose
    class such a file does not name.
    """
    optimizer = unwrapped(optimizer)
    try:
        saved = [group for group in state_dict["param_groups"] if group["params"]]
        states = state_dict["state"]
    except (KeyError, TypeError) as error:
        raise UsageError(
            f"the optimizer's file is no state_dict of an optimizer: {type(error).__name__}: {error}"
        ) from error
    mine = [group for group in slots(model, optimizer) if group]
    if [len(g["params"]) for g in saved] != [len(g) for g in mine]:
        raise UsageError(
            f"the saved optimizer has groups of {[len(g['params']) for g in saved]} parameters, this one of "
            f"{[len(g) for g in mine]}",
            "Resume with the adapter and the optimizer settings of the saved run.",
        )
    facts = {"class": None, "groups": [], "numbers": {}, "pieces": {}}
    tensors, known_kind = {}, _moments(optimizer)
    for group, here in zip(saved, mine, strict=True):
        names = group.get("param_names") or [slot.name for slot in here]
        known = {slot.name: slot for slot in here}
        facts["groups"].append({"names": [slot.name for slot in here], "options": _options(group)})
        for integer, name in zip(group["params"], names, strict=True):
            if not (state := states.get(integer)):
                continue
            if name not in known:
                raise UsageError(f"the saved optimizer has {name!r}, which is not in this one's group")
            state = {**state, **state.get(_HIDDEN, {})}
            state.pop(_HIDDEN, None)
            kind = _MOMENTS.intersection(key for key, value in state.items() if value is not None)
            if known_kind is not None and kind != known_kind:
                raise UsageError(
                    f"the saved optimizer keeps {', '.join(sorted(kind)) or 'no moments'} of a parameter, "
                    f"{type(optimizer).__name__} keeps {', '.join(sorted(known_kind)) or 'none'}",
                    "Make the optimizer of the saved run (TrainingArguments(optim=...)), or pass optimizer=None to load the weights only.",
                )
            shape = known[name].parameter.shape
            facts["numbers"][name] = {k: v for k, v in state.items() if _number(v)}
            ending = "@0" if in_pieces(optimizer) else ""
            for key, value in state.items():
                if _number(value):
                    continue
                if key in ("exp_avg", "exp_avg_sq", "momentum_buffer", "state1", "state2") and value.shape != shape:
                    raise UsageError(
                        f"the saved {key} of parameter {integer} has shape {tuple(value.shape)}, {name} has {tuple(shape)}",
                        "The order of the parameters differs: resume with the adapter settings of the saved run.",
                    )
                tensors[f"optimizer/{name}/{key}{ending}"] = value
            if in_pieces(optimizer):
                facts["pieces"][name] = {0: shape.numel()}
    return tensors, facts


def check(facts: dict, model: nn.Module, optimizer) -> None:
    """Can what was saved be loaded into this optimizer? Raises `UsageError`; nothing has been changed."""
    optimizer = unwrapped(optimizer)
    mine, saved = type(optimizer).__name__, facts["class"]
    if saved is not None and saved.removeprefix("Paged") != mine.removeprefix("Paged"):
        raise UsageError(
            f"the checkpoint's optimizer is {saved}, this one is {mine}",
            "Make the same optimizer, or pass optimizer=None to load the weights only.",
        )
    here = [{slot.name for slot in group} for group in slots(model, optimizer) if group]
    there = [set(group["names"]) for group in facts["groups"] if group["names"]]
    if len(here) != len(there):
        raise UsageError(f"the checkpoint's optimizer has {len(there)} groups of parameters, this one {len(here)}")
    for number, (a, b) in enumerate(zip(here, there, strict=True)):
        if a != b:
            extra = sorted(a ^ b)
            raise UsageError(
                f"group {number} of the optimizer differs from the checkpoint's in {len(extra)} parameters, {extra[0]!r} among them"
            )


def _keys(sizes: dict) -> dict[str, list[str]]:
    """{parameter: [what follows its name]} of the keys that `describe` makes."""
    found: dict[str, list[str]] = {}
    for key in sizes:
        kind, _, rest = key.partition("/")
        if kind == "optimizer":
            name, _, ending = rest.rpartition("/")
            found.setdefault(name, []).append(ending)
    return found


def targets(
    facts: dict, sizes: dict[str, tuple[torch.Size, torch.dtype]], model: nn.Module, optimizer
) -> dict[str, torch.Tensor]:
    """Empty tensors for what this rank needs of the saved ones, to be filled. sizes: of all saved tensors. Raises `UsageError`."""
    optimizer, wanted, keys = unwrapped(optimizer), {}, _keys(sizes)
    for slot in (slot for group in slots(model, optimizer) for slot in group):
        if slot.member is None:
            continue
        part = slot.parameter.to_local() if isinstance(slot.parameter, DTensor) else slot.parameter
        pieces = facts["pieces"].get(slot.name, {})
        first, last = slot.start, slot.start + part.numel()
        for ending in keys.get(slot.name, []):
            key = f"optimizer/{slot.name}/{ending}"
            shape, dtype = sizes[key]
            if in_pieces(optimizer):
                start = int(ending.rpartition("@")[2])
                if start < last and first < start + pieces[start]:
                    wanted[key] = torch.zeros(shape, dtype=dtype)
            elif shape == slot.parameter.shape:
                wanted[key] = slot.like(torch.zeros_like(part, dtype=dtype, requires_grad=False))
            elif not isinstance(slot.parameter, DTensor):
                wanted[key] = torch.zeros(shape, dtype=dtype, device=part.device)
            else:
                raise UsageError(f"the saved {ending} of {slot.name} has shape {tuple(shape)} and cannot be sharded")
    return wanted


def install(facts: dict, filled: dict[str, torch.Tensor], model: nn.Module, optimizer) -> int:
    """Put filled `targets` into the optimizer, with numbers and options. Returns how many parameters were quantised anew."""
    optimizer, again, keys = unwrapped(optimizer), 0, _keys(filled)
    found = slots(model, optimizer)
    saved = iter([group for group in facts["groups"] if group["names"]])
    for group, members in zip(optimizer.param_groups, found, strict=True):
        if members:
            options = next(saved)["options"]  # but for how the steps are computed, which is this optimizer's own matter
            group.update({name: value for name, value in options.items() if name not in ("foreach", "fused")})
    optimizer.state.clear()
    if in_pieces(optimizer) and not optimizer.initialized:
        optimizer.check_overrides()
    for number, group in enumerate(found):
        at = 0
        for slot in group:
            if slot.member is None:
                continue
            at += 1
            if slot.name not in facts["numbers"]:
                continue
            options = optimizer.param_groups[number]
            if in_pieces(optimizer):
                optimizer.init_state(options, slot.member, number, at - 1)
                again += _from_pieces(facts, filled, keys.get(slot.name, []), slot, optimizer.state[slot.member])
            for key, value in facts["numbers"][slot.name].items():
                if isinstance(value, torch.Tensor):
                    on_device = key != "step" or options.get("capturable") or options.get("fused")
                    value = value.clone().to(slot.member.device if on_device else "cpu")
                optimizer.state[slot.member][key] = value
            if not in_pieces(optimizer):
                for ending in keys.get(slot.name, []):
                    value = filled[f"optimizer/{slot.name}/{ending}"]
                    local = isinstance(value, DTensor) and not isinstance(slot.member, DTensor)
                    optimizer.state[slot.member][ending] = value.to_local() if local else value
    return again


def _from_pieces(facts: dict, filled: dict, endings: list[str], slot: Slot, state: dict) -> bool:
    """Fill a state that bitsandbytes has just made. True if values had to be dequantised or quantised."""
    quantised = False
    pieces: dict[int, dict[str, torch.Tensor]] = {}
    for ending in endings:
        key, _, start = ending.rpartition("@")
        pieces.setdefault(int(start), {})[key] = filled[f"optimizer/{slot.name}/{ending}"]
    sizes, mine = facts["pieces"][slot.name], {k: v for k, v in state.items() if not _number(v)}
    same = pieces.get(slot.start)
    if same is not None and sizes[slot.start] == slot.member.numel() and _same_form(same, mine):
        for key, tensor in mine.items():
            if not key.startswith("qmap"):  # all parameters share them
                tensor.copy_(same[key])
        return False
    from bitsandbytes import functional

    for key, tensor in mine.items():
        if not key.startswith("state"):
            continue
        number = key.removeprefix("state")
        values = torch.zeros(slot.member.numel(), device=slot.member.device)
        for start, piece in sorted(pieces.items()):
            part = _dequantised(piece, number, values.device)
            if part is None or part.numel() != sizes[start] or tensor.numel() != values.numel():
                raise UsageError(
                    f"the saved {key} of {slot.name} cannot be cut for another number of ranks; resume with the old one"
                )
            first, last = max(start, slot.start), min(start + sizes[start], slot.start + values.numel())
            values[first - slot.start : last - slot.start] = part[first - start : last - start]
            quantised |= piece[key].dtype == torch.uint8
        if tensor.dtype == torch.uint8:
            codes, blocks = functional.quantize_blockwise(values, code=mine[f"qmap{number}"], blocksize=256)
            tensor.copy_(codes.view(tensor.shape))
            mine[f"absmax{number}"].copy_(blocks.absmax)
            quantised = True
        else:
            tensor.copy_(values.view(tensor.shape))
    return quantised


def _same_form(saved: dict, mine: dict) -> bool:
    if saved.keys() != mine.keys():
        return False
    return all(
        saved[k].shape == t.shape
        and saved[k].dtype == t.dtype
        and (not k.startswith("qmap") or torch.equal(saved[k], t.cpu()))
        for k, t in mine.items()
    )


def _dequantised(piece: dict, number: str, device) -> torch.Tensor | None:
    from bitsandbytes import functional

    state = piece.get(f"state{number}")
    if state is None:
        return None
    state = state.to(device).reshape(-1)
    if state.dtype != torch.uint8:
        return state.float()
    absmax, code = piece[f"absmax{number}"].to(device), piece[f"qmap{number}"].to(device)
    return functional.dequantize_blockwise(state, absmax=absmax, code=code, blocksize=256)
