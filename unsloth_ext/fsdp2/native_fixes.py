"""Two repairs of Unsloth's own FSDP2 (`UNSLOTH_FSDP2=1`, since 2026.10.9), for those who use it.

`generate` before the first forward gathers and runs inner modules while FSDP2 does not know its root yet; the first forward then
raises "already been lazily initialized". `settle_root` lets it know.

The optimizer of one GPU or of DDP is saved under integers; a sharded one is loaded by parameter names, and resuming raises
`KeyError: 'state.0.step'`. `optimizer_state_by_name` gives each integer its name.
"""

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
        for key, param in zip(ids, params, strict=True):
            for value in saved.get(key, {}).values():
                if getattr(value, "ndim", 0) and value.ndim == param.ndim and value.shape != param.shape:
                    raise RuntimeError(
                        f"Unsloth: the optimizer checkpoint has a state of shape {tuple(value.shape)} for "
                        f"{names[param]}, which is {tuple(param.shape)} here."
                    )
            if key in saved:
                found[names[param]] = saved[key]
    return {**state, "state": found, "param_groups": out}
