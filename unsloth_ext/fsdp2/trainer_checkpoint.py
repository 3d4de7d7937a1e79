"""A checkpoint folder that transformers' Trainer wrote on one device or under DDP, read for a sharded model.

adapter_model.safetensors (or model.safetensors of a model without adapter), optimizer.pt with integers for parameters,
scheduler.pt, rng_state.pth or rng_state_<rank>.pth, trainer_state.json, which is written last.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.distributed.tensor import DTensor

from ..errors import UsageError
from . import optimizer_state
from .adapter_state import adapter_names
from .atomic_folder import Damaged
from .checkpoint_index import CheckpointIndex
from .complete import ADAPTER_WEIGHTS, TRAINER_OPTIMIZER, TRAINER_STATE
from .processes import position
from .row_shard import rows_of
from .stored import Stored, load_plain, parameter_key

__all__ = ["open_one"]

_SCHEDULER = "scheduler.pt"


def open_one(folder: Path, rank: int, world: int, model: nn.Module, optimizer, adapter_name: str) -> Stored:
    """Raises `UsageError` or `Damaged`; reads no weights yet."""
    rows, sizes = _weights(folder, model, adapter_name)
    whole, facts = {}, None
    if optimizer is not None and (folder / TRAINER_OPTIMIZER).is_file():
        saved = load_plain(folder / TRAINER_OPTIMIZER, mmap=True)
        whole, facts = optimizer_state.by_name(saved, model, optimizer)
    sizes |= {key: (tensor.shape, tensor.dtype) for key, tensor in whole.items()}

    def fill(tensors: dict[str, torch.Tensor]) -> None:
        for key, target in tensors.items():
            local, start, stop = target, 0, target.shape[0] if target.ndim else 0
            if isinstance(target, DTensor):
                mesh_rank, mesh_world = position(target.device_mesh)
                local, (start, stop) = target.to_local(), rows_of(mesh_rank, mesh_world, target.shape[0])
            local.copy_(whole[key][start:stop] if key in whole else rows(key, start, stop))

    state = json.loads((folder / TRAINER_STATE).read_text()) if (folder / TRAINER_STATE).is_file() else {}
    scheduler = load_plain(folder / _SCHEDULER) if (folder / _SCHEDULER).is_file() else None
    written_by = len([p for p in folder.glob("rng_state_*.pth") if re.fullmatch(r"rng_state_\d+", p.stem)]) or 1
    own = folder / (f"rng_state_{rank}.pth" if written_by > 1 else "rng_state.pth")
    rng = load_plain(own) if written_by == world and own.is_file() else None
    return Stored(sizes, fill, facts, scheduler, rng, {"trainer_state": state}, written_by)


def _weights(folder: Path, model: nn.Module, adapter_name: str):
    """(function of key, first and last row; sizes) of the trained parameters in the folder's safetensors files."""
    trained = [n for n, p in optimizer_state.named(model) if p.requires_grad]
    own = (
        next((p for p in (folder / adapter_name, folder) if (p / ADAPTER_WEIGHTS).is_file()), folder) / ADAPTER_WEIGHTS
    )
    if own.is_file() and hasattr(model, "peft_config"):
        stored_name = {name: key for key, name in adapter_names(model, adapter_name, False).items()}
        try:
            file = safe_open(str(own), framework="pt")
        except (SafetensorError, OSError) as error:
            raise Damaged(f"{own} is truncated or no safetensors file: {error}") from error
        known = set(file.keys())
        slices = {n: file.get_slice(stored_name[n]) for n in trained if stored_name.get(n) in known}
        sizes = {n: torch.Size(s.get_shape()) for n, s in slices.items()}

        def rows(key, start, stop):
            name = key.partition("/")[2]
            return slices[name][start:stop] if sizes[name] else file.get_tensor(stored_name[name])

        left = sorted(known - {stored_name[n] for n in slices})
        if left and any(k for k in left if "lora" in k):
            raise UsageError(
                f"{own} has {len(left)} tensors that this model does not train, {left[0]!r} among them",
                "Resume with the adapter settings of the saved run.",
            )
    elif hasattr(model, "peft_config"):
        raise UsageError(f"{folder} has no {ADAPTER_WEIGHTS}, and the model has an adapter")
    else:
        index = CheckpointIndex(folder)
        sizes = {n: torch.Size(index.shape(n)) for n in trained if n in index}

        def rows(key, start, stop):
            return index.rows(key.partition("/")[2], start, stop)

    # Their dtype in the file is of no matter: they are copied into the model's.
    dtypes = {n: p.dtype for n, p in optimizer_state.named(model)}
    return rows, {parameter_key(n): (size, dtypes[n]) for n, size in sizes.items()}
