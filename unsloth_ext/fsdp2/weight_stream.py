"""safetensors files written tensor by tensor, none of which is ever in memory whole.

Shapes and dtypes of all tensors are known before the first is computed, so each file's header is written first and every tensor
then goes to its own place. Space for the whole file is asked of the file system at once: a disk that is too small says so before
the work begins. Tensors of wider types come first in a file, as the safetensors library orders them: readers view bytes in place.
Format: https://huggingface.co/docs/safetensors (8 bytes of header length, a JSON header, the tensors without gaps).
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import torch

from ..errors import UnslothExtError, UsageError

__all__ = ["Planned", "WeightStream", "parse_size"]

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class Planned(NamedTuple):
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def parse_size(size: int | str, argument: str = "max_shard_size") -> int:
    """Bytes of 5000000, "5GB" or "5GiB". Raises `UsageError`."""
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    text = str(size).strip().upper()
    for unit in sorted(_UNITS, key=len, reverse=True):
        if text.endswith(unit) and text.removesuffix(unit).strip().replace(".", "", 1).isdigit():
            if (found := int(float(text.removesuffix(unit)) * _UNITS[unit])) > 0:
                return found
    raise UsageError(f"{argument} must be a positive number of bytes or a size like '5GB', got {size!r}")


class WeightStream:
    """Files of a folder for planned tensors, which `write` then takes in any order.

    stem: "model" gives model.safetensors, or model-00001-of-00003.safetensors and so on with model.safetensors.index.json where
    the tensors need more than `max_shard_size` bytes. A tensor that is larger has a file of its own. Raises `UsageError` if two
    tensors have one name or a dtype has no safetensors form, `UnslothExtError` where the disk is full.
    """

    def __init__(self, folder: Path, stem: str, planned: list[Planned], max_shard_size: int, metadata: dict[str, str]):
        self.folder, self._open, self._place, self._left = Path(folder), {}, {}, {}
        names = [p.name for p in planned]
        if len(set(names)) < len(names):
            raise UsageError(f"two tensors are called {next(n for n in names if names.count(n) > 1)!r}")
        for tensor in planned:
            if tensor.dtype not in _NAMES:
                raise UsageError(f"{tensor.name} is {tensor.dtype}, which safetensors cannot hold")
        files: list[list[Planned]] = [[]]
        for tensor in planned:
            if files[-1] and sum(p.nbytes for p in files[-1]) + tensor.nbytes > max_shard_size:
                files.append([])
            files[-1].append(tensor)
        self.total = sum(p.nbytes for p in planned)
        free = shutil.disk_usage(self.folder).free
        if self.total > free:
            raise UnslothExtError(
                f"{self.folder.parent} has {free / 1e9:.2f} GB free, and {self.total / 1e9:.2f} GB are to be written",
                "Free some space or choose another folder.",
            )
        width = f"-of-{len(files):05}"
        for number, tensors in enumerate(files, 1):
            file = f"{stem}.safetensors" if len(files) == 1 else f"{stem}-{number:05}{width}.safetensors"
            self._begin(file, sorted(tensors, key=lambda p: -p.dtype.itemsize), metadata)
        if len(files) > 1:
            index = {"metadata": {"total_size": self.total}, "weight_map": {n: self._place[n][0] for n in names}}
            self._text(f"{stem}.safetensors.index.json", json.dumps(index, indent=2) + "\n")

    def _begin(self, file: str, tensors: list[Planned], metadata: dict[str, str]) -> None:
        header, at = {"__metadata__": metadata}, 0
        for tensor in tensors:
            header[tensor.name] = {
                "dtype": _NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [at, at + tensor.nbytes],
            }
            self._place[tensor.name] = (file, at, tensor)
            at += tensor.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        begin = 8 + len(text)
        for tensor in tensors:
            name, offset, _ = self._place[tensor.name]
            self._place[tensor.name] = (name, begin + offset, tensor)
        self._left[file] = {tensor.name for tensor in tensors}
        descriptor = os.open(self.folder / file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            self._reserve(descriptor, file, begin + at)
            self._put(descriptor, file, len(text).to_bytes(8, "little") + text, 0)
        finally:
            os.close(descriptor)

    def _reserve(self, descriptor: int, file: str, size: int) -> None:
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise self._failed(file, error) from error  # others: this file system cannot reserve

    def _failed(self, file: str, error: OSError) -> UnslothExtError:
        return UnslothExtError(
            f"writing {self.folder / file} failed: {error.strerror}", "Free some space or choose another folder."
        )

    def _put(self, descriptor: int, file: str, data, at: int) -> None:
        view = memoryview(data)
        try:
            while view:
                done = os.pwrite(descriptor, view[: 1 << 30], at)
                view, at = view[done:], at + done
        except OSError as error:
            raise self._failed(file, error) from error

    def _text(self, file: str, text: str) -> None:
        try:
            with open(self.folder / file, "w", encoding="utf-8") as out:
                out.write(text)
                out.flush()
                os.fsync(out.fileno())
        except OSError as error:
            raise self._failed(file, error) from error

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """tensor: of the planned shape and dtype, on any device."""
        file, at, planned = self._place[name]
        if tuple(tensor.shape) != planned.shape or tensor.dtype != planned.dtype:
            raise UnslothExtError(
                f"{name} was planned as {planned.shape} of {planned.dtype}, got {tuple(tensor.shape)} of {tensor.dtype}"
            )
        if file not in self._open:
            self._open[file] = os.open(self.folder / file, os.O_WRONLY)
        if planned.nbytes:
            flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
            self._put(self._open[file], file, flat.numpy(), at)
        self._left[file].discard(name)
        if not self._left[file]:
            self._close(file)

    def _close(self, file: str) -> None:
        descriptor = self._open.pop(file)
        try:
            os.fsync(descriptor)
        except OSError as error:
            raise self._failed(file, error) from error
        finally:
            os.close(descriptor)

    def finish(self) -> None:
        """Raises `UnslothExtError` if a planned tensor was not written."""
        missing = sorted(name for left in self._left.values() for name in left)
        self.abandon()
        if missing:
            raise UnslothExtError(f"{len(missing)} planned tensors were not written, {missing[0]} among them")

    def abandon(self) -> None:
        for file in list(self._open):
            os.close(self._open.pop(file))
