"""A safetensors checkpoint, read in slices: which tensor lies in which file, of what shape, and whether all that is needed is there.

Only headers are read until a slice is asked for. Every error names the file and the tensor.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..errors import UsageError

__all__ = ["CheckpointIndex"]

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


class CheckpointIndex:
    """folder: with model.safetensors, or with model.safetensors.index.json and the files that it names.

    Raises `UsageError` if they are missing, truncated, or do not hold what the index says.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._open: dict[str, object] = {}
        self._slices: dict[str, object] = {}
        index = self.folder / _INDEX
        if index.is_file():
            try:
                self.file_of: dict[str, str] = json.loads(index.read_text())["weight_map"]
            except (ValueError, KeyError, TypeError) as error:
                raise UsageError(f"{index} is no safetensors index: {type(error).__name__}: {error}") from error
            for file in dict.fromkeys(self.file_of.values()):
                listed = {name for name, where in self.file_of.items() if where == file}
                if absent := sorted(listed - set(self._file(file, min(listed)).keys())):
                    raise UsageError(
                        f"{self.folder / file} has no tensor {absent[0]!r}, which {_INDEX} says it holds"
                        f" ({len(absent)} missing)",
                        "The checkpoint is incomplete: download it again.",
                    )
        elif (self.folder / _SINGLE).is_file():
            self.file_of = dict.fromkeys(self._file(_SINGLE).keys(), _SINGLE)
        else:
            others = sorted(p.name for p in self.folder.glob("*.bin")) if self.folder.is_dir() else []
            raise UsageError(
                f"{self.folder} has neither {_SINGLE} nor {_INDEX}",
                f"Slices can only be read from safetensors: convert {others[0]} first." if others else None,
            )

    def _file(self, file: str, tensor: str | None = None):
        if file not in self._open:
            path = self.folder / file
            wanted = f" (it holds {tensor!r})" if tensor else ""
            if not path.is_file():
                raise UsageError(f"{path} is missing{wanted}", "The checkpoint is incomplete: download it again.")
            try:
                self._open[file] = safe_open(str(path), framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise UsageError(
                    f"{path} is truncated or no safetensors file: {path.stat().st_size} bytes{wanted}: {error}",
                    "The checkpoint is incomplete: download it again.",
                ) from error
        return self._open[file]

    def __contains__(self, name: str) -> bool:
        return name in self.file_of

    def names(self) -> list[str]:
        return list(self.file_of)

    def where(self, name: str) -> str:
        """For messages: the tensor and its file."""
        return f"{name!r} in {self.folder / self.file_of[name]}"

    def _slice(self, name: str):
        if name not in self.file_of:
            raise UsageError(f"the checkpoint {self.folder} has no tensor {name!r}")
        if name not in self._slices:
            self._slices[name] = self._file(self.file_of[name], name).get_slice(name)
        return self._slices[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        text = self._slice(name).get_dtype()
        if text not in _DTYPES:
            raise UsageError(f"{self.where(name)} has the dtype {text}, which cannot be read in slices")
        return _DTYPES[text]

    def numel(self, name: str) -> int:
        return math.prod(self.shape(name))

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of a tensor, on the CPU; nothing else of it is read. A 0-d tensor is read whole."""
        part = self._slice(name)
        if not self.shape(name):
            return self.whole(name)
        if start >= stop:
            return torch.empty((0, *self.shape(name)[1:]), dtype=self.dtype(name))
        return part[start:stop]

    def whole(self, name: str) -> torch.Tensor:
        return self._file(self.file_of[name], name).get_tensor(name)

    def close(self) -> None:
        self._open.clear()
        self._slices.clear()
