"""Is a checkpoint folder as it was written? Of this package's (atomic_folder.py) and of transformers' Trainer.

Imports nothing heavy: a run that goes on asks before it imports Unsloth.
"""

from __future__ import annotations

import json
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path

from .atomic_folder import MANIFEST, Damaged, read_manifest, verify

__all__ = ["check_trainers", "first_whole", "is_trainers", "say", "within"]

SHARDED = "sharded_optimizer"  # where a sharded run's Trainer has its checkpoint of this package (trainer_saving.py)
TENSORS = "tensors"  # the folder of a checkpoint of this package that torch.distributed.checkpoint writes
ADAPTER_WEIGHTS = "adapter_model.safetensors"
TRAINER_STATE, TRAINER_OPTIMIZER = "trainer_state.json", "optimizer.pt"


def within(folder: Path) -> Path:
    """The checkpoint in a folder of a sharded run's Trainer; any other folder as it is."""
    return folder / SHARDED if (folder / SHARDED).is_dir() and not (folder / MANIFEST).exists() else folder


def is_trainers(folder: Path) -> bool:
    return _is_one(folder) and not any((folder / name).exists() for name in (MANIFEST, TENSORS))


def _is_one(folder: Path) -> bool:
    weights = ("model.safetensors", "model.safetensors.index.json")
    return any((folder / name).is_file() for name in weights) or bool(_adapters(folder))


def _adapters(folder: Path) -> list[Path]:
    """The weights of its adapters: one of another name than "default" lies in a folder of its name, as PEFT has it."""
    return [*folder.glob(ADAPTER_WEIGHTS), *folder.glob(f"*/{ADAPTER_WEIGHTS}")]


def check_trainers(folder: Path) -> None:
    """Raises `Damaged` for what a killed Trainer leaves, and for files that cannot be read."""
    from safetensors import SafetensorError, safe_open

    if not (folder / TRAINER_STATE).is_file():
        raise Damaged(f"{folder} has no {TRAINER_STATE}, which the Trainer writes last: it was not finished")
    try:
        json.loads((folder / TRAINER_STATE).read_text())
        for path in (*_adapters(folder), *folder.glob("model*.safetensors")):
            with safe_open(str(path), framework="pt"):
                pass
    except (OSError, ValueError, SafetensorError) as error:
        raise Damaged(f"{folder} is damaged: {error}") from error
    if not _is_one(folder):
        raise Damaged(f"{folder} has no {ADAPTER_WEIGHTS} and no model.safetensors")
    if not (folder / TRAINER_OPTIMIZER).is_file():
        raise Damaged(f"{folder} has no {TRAINER_OPTIMIZER}: training cannot go on from it")
    for path in (*folder.glob("*.pt"), *folder.glob("*.pth")):
        try:
            with zipfile.ZipFile(path) as archive:
                bad = archive.testzip()
        except (OSError, zipfile.BadZipFile) as error:
            raise Damaged(f"{path} is truncated or no torch file: {error}") from error
        if bad is not None:
            raise Damaged(f"{path} is damaged at {bad}")


def first_whole(folders: Iterable[Path]) -> Path | None:
    """The first checkpoint that is as it was written: each file of a sharded one is read, the others' archives are tested."""
    for path in folders:
        try:
            if is_trainers(within(path)):
                check_trainers(path)
            else:
                verify(within(path), read_manifest(within(path)))
            return path
        except (Damaged, OSError) as problem:
            say(f"passed by: {str(problem).splitlines()[0]}")
    return None


def say(text: str) -> None:
    print(f"unsloth_ext: {text}", file=sys.stderr)
