"""`Stored`: what a checkpoint folder holds, whoever wrote it, in the terms of `load_checkpoint`; and torch files read as data.

Nothing in a checkpoint is executed. Files of torch.save are read with `weights_only=True`. The index of
torch.distributed.checkpoint is a pickle: it is read with an unpickler that knows its dozen classes and no others.
"""

from __future__ import annotations

import dataclasses
import enum
import io
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed import checkpoint as dcp

from ..errors import UsageError
from .atomic_folder import Damaged

__all__ = ["Reader", "Stored", "as_bytes", "load_plain", "parameter_key"]


@dataclasses.dataclass
class Stored:
    sizes: dict[str, tuple[torch.Size, torch.dtype]]  # of all saved tensors, by key
    fill: Callable[[dict[str, torch.Tensor]], None]  # read tensors into those given, each whole or this rank's part
    optimizer: dict | None  # optimizer_state's facts
    scheduler: dict | None
    rng: dict | None
    extra: dict
    world: int


def parameter_key(name: str) -> str:
    return f"parameter/{name}"


_core = np._core if hasattr(np, "_core") else np.core  # numpy 1
_NUMPY = [_core.multiarray._reconstruct, np.ndarray, np.dtype, type(np.dtype(np.uint32))]


def load_plain(path: Path, **options) -> Any:
    """A file of torch.save with tensors, numpy arrays and plain values. Raises `Damaged` for anything else."""
    try:
        with torch.serialization.safe_globals(_NUMPY):
            return torch.load(path, map_location="cpu", weights_only=True, **options)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise Damaged(f"{path} cannot be read: {reason}") from error


def as_bytes(what: str, value: Any) -> bytes:
    """For `load_plain`. Raises `UsageError`, naming `what`, for a value that could not be read back without running code."""
    buffer = io.BytesIO()
    try:
        torch.save(value, buffer)
        buffer.seek(0)
        with torch.serialization.safe_globals(_NUMPY):
            torch.load(buffer, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UsageError(
            f"{what} must be made of numbers, texts, lists, dicts and tensors to be saved: "
            f"{str(error).strip().splitlines()[0]}"
        ) from error
    return buffer.getvalue()


def _member(kind, name: str):
    if not (isinstance(kind, enum.EnumMeta) and isinstance(name, str) and name in kind.__members__):
        raise pickle.UnpicklingError(f"{name!r} of {kind!r} is no part of a checkpoint's index")
    return kind[name]


class _Unpickler(pickle.Unpickler):
    _MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
    _OTHERS = frozenset({
        ("torch", "Size"), ("torch.serialization", "_get_layout"), ("collections", "OrderedDict"), ("builtins", "set"),
        ("datetime", "datetime"), ("pathlib", "PosixPath"),
    })  # fmt: skip

    def find_class(self, module, name):
        if (module, name) in self._OTHERS:
            return super().find_class(module, name)
        if (module, name) == ("builtins", "getattr"):
            return _member  # as Python 3.11.0 to 3.11.3 write the member of an enumeration
        if module == "torch" and isinstance(
            getattr(torch, name, None), (torch.dtype, torch.memory_format, torch.layout)
        ):
            return getattr(torch, name)
        if module in self._MODULES and "." not in name:
            found = super().find_class(module, name)
            if (
                isinstance(found, type)
                and found.__module__ == module
                and not issubclass(found, dcp.StorageReader | dcp.StorageWriter)
            ):
                return found
        raise pickle.UnpicklingError(f"{module}.{name} is no part of a checkpoint's index")


class Reader(dcp.FileSystemReader):
    """torch's reader of a folder, whose index cannot run code."""

    def read_metadata(self, *args, **kwargs):
        path = Path(self.path) / ".metadata"
        try:
            with open(path, "rb") as file:
                metadata = _Unpickler(file).load()
        except Exception as error:
            raise Damaged(f"{path} cannot be read: {type(error).__name__}: {error}") from error
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = dcp.metadata.StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def sizes(self) -> dict[str, tuple[torch.Size, torch.dtype]]:
        entries = self.read_metadata().state_dict_metadata
        return {k: (e.size, e.properties.dtype) for k, e in entries.items() if hasattr(e, "properties")}

    def fill(self, tensors: dict[str, torch.Tensor]) -> None:
        """Each rank for itself: no rank waits for another."""
        if not tensors:
            return
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that it takes this for a single process
                dcp.load(tensors, storage_reader=self, no_dist=True)
        except dcp.api.CheckpointException as error:
            reason = next(iter(error.failures.values()))[0]
            raise Damaged(f"{self.path} cannot be read: {type(reason).__name__}: {reason}") from error
