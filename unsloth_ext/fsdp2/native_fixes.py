"""Three repairs of Unsloth's own FSDP2 (`UNSLOTH_FSDP2=1`, since 2026.10.9), for those who use it.

`generate` before the first forward gathers and runs inner modules while FSDP2 does not know its root yet; the first forward then
raises "already been lazily initialized". `settle_root` lets it know.

The optimizer of one GPU or of DDP is saved under integers; a sharded one is loaded by parameter names, and resuming raises
`KeyError: 'state.0.step'`. `optimizer_state_by_name` gives each integer its name.

An optimizer that each rank saved its part of (`UNSLOTH_FSDP2_DCP_OPTIM=1`) is a folder, which only a sharded run reads: one process
raises FileNotFoundError for the optimizer.pt that is not there. `whole_optimizer_state` reads the folder without the ranks that wrote
it, and `optimizer_state_by_number` turns it into what an optimizer loads.
"""

# Unsloth runs on Python 3.9 too, whose zip has no strict=.
# ruff: noqa: B905

from __future__ import annotations


def settle_root(root) -> None:
    """Make a sharded module FSDP2's root now, before one of its inner modules is gathered or run by itself."""
    state = root._get_fsdp_state() if hasattr(root, "_get_fsdp_state") else None
    if state is not None and state._is_root is None:
        state._lazy_init()


def optimizer_state_by_name(root, optimizer, state: dict) -> dict:
    """An optimizer state whose parameters are integers (`optimizer.state_dict()` on one device or under DDP), by name.

    Integers count the parameters group by group, in the order of the model. A saved group may have become several neighbours
    here, one for sharded and one for replicated parameters. Any other state is given back as it is. Raises RuntimeError where the
    numbers of parameters or their shapes differ.
    """
    saved, groups = state.get("state") or {}, state.get("param_groups") or []
    if not saved or not all(isinstance(key, int) for key in saved):
        return state
    names, places = {}, {}
    for place, (name, param) in enumerate(root.named_parameters()):
        names[param] = name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")
        places[param] = place
    count = sum(len(group["params"]) for group in groups)
    mine = [list(group["params"]) for group in optimizer.param_groups]
    if count != sum(map(len, mine)):
        raise RuntimeError(
            f"Unsloth: the optimizer checkpoint has {count} parameters and this optimizer {sum(map(len, mine))}, "
            "so it was not saved from this model's optimizer."
        )
    found, out = {}, []
    waiting = iter(mine)
    for group in groups:
        ids, params = group["params"], []
        if not ids:  # a Trainer's second group, where nothing goes without weight decay
            out.append({**group, "params": []})
        while len(params) < len(ids):
            part = next(waiting)
            params += part
            if part:
                out.append({**group, "params": [names[param] for param in part]})
        if len(params) != len(ids):
            raise RuntimeError(
                f"Unsloth: the optimizer checkpoint has a group of {len(ids)} parameters where this optimizer has "
                f"{len(params)}, so it was not saved from this model's optimizer."
            )
        params.sort(key=places.__getitem__)
        for key, param in zip(ids, params):
            for value in saved.get(key, {}).values():
                if getattr(value, "ndim", 0) and value.ndim == param.ndim and value.shape != param.shape:
                    raise RuntimeError(
                        f"Unsloth: the optimizer checkpoint has a state of shape {tuple(value.shape)} for "
                        f"{names[param]}, which is {tuple(param.shape)} here."
                    )
            if key in saved:
                found[names[param]] = saved[key]
    return {**state, "state": found, "param_groups": out}


def whole_optimizer_state(directory) -> dict:
    """The optimizer that native_save_optimizer_sharded wrote, whole and on the CPU: {"state": {name: {...}}, "param_groups": [...]}.

    The folder's own description says which entries there are, of what size, and where each belongs, so it does not matter how many
    ranks wrote it. Needs no process group; where there is one, all its ranks call.
    """
    import os

    import torch
    import torch.distributed.checkpoint as dcp

    folder = os.fspath(directory)
    described = dcp.FileSystemReader(folder).read_metadata()
    flat = {}
    for key, entry in described.state_dict_metadata.items():
        size = getattr(entry, "size", None)  # of a tensor; numbers and lists of names have none
        flat[key] = None if size is None else torch.empty(size, dtype=entry.properties.dtype)
    dcp.load(flat, checkpoint_id=folder)
    whole = {"state": {}, "param_groups": {}}
    for key, value in flat.items():
        *path, last = described.planner_data[key]
        place = whole
        for step in path:
            place = place.setdefault(step, {})
        place[last] = value
    groups = whole["param_groups"]
    if isinstance(groups, dict):  # saved entry by entry, under the groups' numbers
        whole["param_groups"] = [groups[number] for number in sorted(groups)]
    return whole


def optimizer_state_by_number(root, optimizer, state: dict) -> dict:
    """The reverse of `optimizer_state_by_name`: what `optimizer.load_state_dict` takes, of a state whose parameters are names.

    Groups are this optimizer's, with the options of the saved group that their parameters were in, as far as this optimizer has such
    options. A parameter that was never stepped stays without a state. Raises RuntimeError for one that was not in the saved optimizer,
    or had another shape.
    """
    names = {}
    for name, param in root.named_parameters():
        names[param] = name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")
    listed = {name: group for group in state["param_groups"] for name in group["params"]}
    numbered, found = optimizer.state_dict()["param_groups"], {}
    for group, mine in zip(numbered, optimizer.param_groups):
        for number, param in zip(group["params"], mine["params"]):
            name = names.get(param, "a parameter that is not the model's")
            if name not in listed:
                raise RuntimeError(
                    f"Unsloth: the optimizer checkpoint has no entry for {name}, so it was not saved from this model's optimizer."
                )
            group.update((key, value) for key, value in listed[name].items() if key in group and key != "params")
            if not (saved := state["state"].get(name)):
                continue
            for value in saved.values():
                if getattr(value, "ndim", 0) and value.ndim == param.ndim and value.shape != param.shape:
                    raise RuntimeError(
                        f"Unsloth: the optimizer checkpoint has a state of shape {tuple(value.shape)} for {name}, which is "
                        f"{tuple(param.shape)} here."
                    )
            found[number] = saved
    return {"state": found, "param_groups": numbered}
