"""A folder that is there whole or not at all, and a manifest that says whether it still is.

It is written under another name beside its place, flushed to the disk, and renamed. Its `manifest.json` is written last and lists
every file with its size and SHA-256: a folder without one is unfinished, one that differs from it is damaged. A crash leaves
`partial-<name>`, which the next save of that name removes. When a folder is replaced, the old one waits as `replaced-<name>`
until the new one is in place, so at every moment one of them is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from pathlib import Path

from ..errors import UnslothExtError, UsageError

__all__ = ["MANIFEST", "Damaged", "begin", "commit", "discard", "flush", "hashes", "move_in", "read_manifest", "verify"]

MANIFEST = "manifest.json"
FORMAT = "unsloth_ext checkpoint"


class Damaged(UnslothExtError):
    """A checkpoint that is not what its manifest says, or has none."""


def partial(folder: Path) -> Path:
    return folder.with_name(f"partial-{folder.name}")


def begin(folder: Path) -> Path:
    """An empty folder to write into, on the same file system as `folder`. Raises `UsageError` where none can be made."""
    work = partial(folder)
    try:
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"{folder} is a file; a folder is to be written there")
        folder.parent.mkdir(parents=True, exist_ok=True)
        if work.exists():
            shutil.rmtree(work)
        work.mkdir()
    except OSError as error:
        raise UsageError(f"nothing can be written to {folder.parent}: {error}") from error
    return work


def discard(folder: Path) -> None:
    shutil.rmtree(partial(folder), ignore_errors=True)


def move_in(folder: Path, last: str) -> None:
    """What was written after `begin`, into its place: as the whole folder, or file by file, `last` last, into one that is there."""
    if not folder.is_dir():
        commit(folder)
        return
    for path in sorted(partial(folder).iterdir(), key=lambda path: path.name == last):
        os.replace(path, folder / path.name)
    flush(folder)
    discard(folder)


def flush(path: Path) -> None:
    """fsync a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest(path: Path) -> str:
    sha, buffer = hashlib.sha256(), bytearray(1 << 20)
    view = memoryview(buffer)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            sha.update(view[:count])
    return sha.hexdigest()


def files_of(folder: Path) -> list[str]:
    """Relative names, the manifest left out, in order."""
    found = (
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST
    )
    return sorted(found)


def hashes(folder: Path, names: list[str]) -> dict[str, dict]:
    """{name: {"size", "sha256"}} of files that have been written; they are flushed to the disk first."""
    found = {}
    for name in names:
        flush(folder / name)
        found[name] = {"size": (folder / name).stat().st_size, "sha256": digest(folder / name)}
    return found


def commit(folder: Path, manifest: dict | None = None) -> None:
    """Give the finished `partial(folder)` its name. With `manifest`, that is written first. What is at `folder` is replaced if it
    has a manifest; else, unless it is empty, it is kept as `replaced-<name>-<n>`."""
    work = partial(folder)
    for path in work.rglob("*"):
        if path.is_dir():
            flush(path)
    if manifest is not None:
        unfinished = work / f"{MANIFEST}.unfinished"
        unfinished.write_text(json.dumps({"format": FORMAT, "version": 1, "saved": time.time(), **manifest}, indent=1))
        flush(unfinished)
        os.replace(unfinished, work / MANIFEST)
    flush(work)
    old = None
    if folder.is_dir():
        if any(folder.iterdir()):
            old = folder.with_name(f"replaced-{folder.name}")
            if not (folder / MANIFEST).exists():
                old, n = None, 1
                while old is None or old.exists():
                    old, n = folder.with_name(f"replaced-{folder.name}-{n}"), n + 1
                print(f"unsloth_ext: {folder} was there and is no complete checkpoint; it is kept as {old.name}")
            elif old.exists():
                shutil.rmtree(old)
            os.rename(folder, old)
        else:
            folder.rmdir()
    os.rename(work, folder)
    flush(folder.parent)
    if old is not None and (old / MANIFEST).exists():
        shutil.rmtree(old)


def read_manifest(folder: Path) -> dict:
    """Raises `Damaged` where there is none or it cannot be read."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise Damaged(f"{path} is no manifest of an unsloth_ext checkpoint")
        if manifest.get("version") != 1:
            raise Damaged(f"{path} has version {manifest.get('version')!r}; this release reads version 1")
        for name, entry in manifest["files"].items():
            if not isinstance(entry["size"], int) or not isinstance(entry["sha256"], str):
                raise Damaged(f"{path} is damaged: the entry of {name!r} is {entry!r}")
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise Damaged(f"{path} names a file outside its folder: {name!r}")
    except FileNotFoundError as error:
        raise Damaged(f"{folder} has no {MANIFEST}: it was not finished, or is no unsloth_ext checkpoint") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{path} cannot be read: {type(error).__name__}: {error}") from error
    return manifest


def verify(folder: Path, manifest: dict, part: int = 0, parts: int = 1) -> None:
    """Raises `Damaged` naming the first file that is missing, of another size, or of another content. Of the contents, that of
    every `parts`-th file from `part` on is read."""
    for name, entry in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise Damaged(f"{path} is missing")
        if (size := path.stat().st_size) != entry["size"]:
            raise Damaged(f"{path} has {size} bytes, the manifest says {entry['size']}")
    for name, entry in list(manifest["files"].items())[part::parts]:
        if digest(folder / name) != entry["sha256"]:
            raise Damaged(f"{folder / name} has changed since it was written: its SHA-256 is another")
