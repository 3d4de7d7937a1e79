"""`save_adapter(model, folder)`: the adapter of a sharded model in PEFT's own format, which any single device reads.

PEFT decides which parameters belong to an adapter and what they are called in the file; here they are only made whole, one at a
time, and streamed by rank 0.
"""

from __future__ import annotations

import datetime
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ..errors import UsageError
from .atomic_folder import begin, discard, flush, move_in, partial
from .complete import ADAPTER_WEIGHTS
from .nf4_parameter import NF4Shard
from .team import Team
from .weight_stream import Planned, WeightStream
from .whole import plain_names, settle, shape_of, unwrap, whole

__all__ = ["ADAPTER_CONFIG", "adapter_names", "save_adapter", "write_adapter"]

ADAPTER_CONFIG = "adapter_config.json"


def adapter_names(
    model: nn.Module, adapter_name: str = "default", save_embedding_layers: bool | str = "auto"
) -> dict[str, str]:
    """{name in adapter_model.safetensors: name of the parameter or buffer in the model}, as this release of PEFT has it."""
    from peft.utils.save_and_load import get_peft_model_state_dict

    if adapter_name not in model.peft_config:
        raise UsageError(f"adapter_name must be one of {sorted(model.peft_config)}, got {adapter_name!r}")
    tensors = {**_tensors(model)}
    name_of = {id(tensor): name for name, tensor in reversed(tensors.items())}
    # Names are all that is wanted: PEFT sorts and renames what it is given, and computes nothing with it.
    state = get_peft_model_state_dict(
        model, state_dict=tensors, adapter_name=adapter_name, save_embedding_layers=save_embedding_layers
    )
    found = {}
    for key, tensor in state.items():
        if id(tensor) not in name_of:
            raise UsageError(
                f"PEFT computes {key!r} when it saves this kind of adapter, which a sharded model does not allow"
            )
        found[key] = name_of[id(tensor)]
    return found


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {plain_names(name): parameter for name, parameter in model.named_parameters(remove_duplicate=False)}
    saved = {plain_names(name) for name in model.state_dict(keep_vars=True)}
    return found | {name: buffer for name, buffer in model.named_buffers() if name in saved}


def write_adapter(
    team: Team, model: nn.Module, folder: Path, adapter_name: str, save_embedding_layers: bool | str
) -> None:
    """Into a folder that rank 0 has. A collective."""
    tensors = _tensors(model)
    names = team.on_first(adapter_names, model, adapter_name, save_embedding_layers)

    def plan():
        planned = []
        for key, name in names.items():
            if name not in tensors:
                raise UsageError(f"the adapter's {name} is not in the model of rank {team.rank}")
            local = tensors[name].to_local() if isinstance(tensors[name], DTensor) else tensors[name]
            if isinstance(local, NF4Shard) or getattr(local, "quant_state", None) is not None:
                raise UsageError(f"{name} would be saved with the adapter, but it is a 4-bit weight")
            planned.append(Planned(key, tensors[name].dtype, shape_of(tensors[name])))
        return planned

    planned = team.together(plan)
    size = max(1, sum(p.nbytes for p in planned))
    stream = team.on_first_only(WeightStream, folder, "adapter_model", planned, size, {"format": "pt"})
    write_stream(
        team, stream, ((key, (lambda name=name: whole(tensors[name]).detach())) for key, name in names.items())
    )

    def configure():
        config = model.peft_config[adapter_name]
        before = config.inference_mode, config.base_model_name_or_path
        config.inference_mode = True
        if not config.base_model_name_or_path:
            config.base_model_name_or_path = getattr(model.get_base_model(), "name_or_path", None)
        try:
            config.save_pretrained(str(folder))
        finally:
            config.inference_mode, config.base_model_name_or_path = before
        flush(folder / ADAPTER_CONFIG)

    team.on_first_only(configure)


_BETWEEN = 32  # tensors between two looks at whether rank 0 could write


def write_stream(team: Team, stream: WeightStream | None, tensors) -> None:
    """tensors: (name, function that makes the tensor) pairs; made on every rank in the same order, written by rank 0.

    An error of rank 0 must not leave the others in a collective: it takes part until the next agreement."""
    error = None
    try:
        for number, (name, make) in enumerate(tensors, 1):
            with team.noticing():
                tensor = make()
            if team.first and error is None:
                try:
                    stream.write(name, tensor)
                except Exception as problem:
                    error = problem
            del tensor
            if number % _BETWEEN == 0:
                team.agree(error)
        if team.first and error is None:
            try:
                stream.finish()
            except Exception as problem:
                error = problem
        team.agree(error)
    finally:
        if stream is not None:
            stream.abandon()


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    *,
    adapter_name: str = "default",
    save_embedding_layers: bool | str = "auto",
    timeout: datetime.timedelta | None = None,
) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json`, as `PeftModel.save_pretrained` does on one device.

    Called by every rank (or by one process). Dtypes stay as they are trained. One parameter at a time is whole, on every rank; rank
    0 writes. A new folder appears when it is complete; in an existing one both files are replaced once both are complete, and
    nothing else is touched. save_embedding_layers: as in PEFT. Raises `UsageError` for a model without that adapter,
    `UnslothExtError` where writing failed: nothing has been changed then.
    """
    model, folder = unwrap(model), Path(folder)
    team = Team(f"saving the adapter to {folder}", timeout)
    if not hasattr(model, "peft_config"):
        team.agree(UsageError(f"{type(model).__name__} has no adapter: it is no PEFT model"))
    settle(model)
    team.on_first_only(begin, folder)
    try:
        write_adapter(team, model, partial(folder), adapter_name, save_embedding_layers)
        team.on_first_only(move_in, folder, ADAPTER_WEIGHTS)
    except BaseException:
        if team.first:
            discard(folder)
        raise
