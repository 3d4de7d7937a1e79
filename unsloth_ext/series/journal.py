"""A folder of notes that lets the next command clean up after one that was killed.

Before files of a user's tree are changed, `begin` writes down which, with the contents that they had; `end` takes the notes away
again. Whatever finds notes at its start knows that somebody was killed in between. A lock in the same folder keeps two commands
from working on one tree.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import Refused
from .wheels import write_atomically


def digest(path: Path) -> str | None:
    """The sha256 of a file, or None where there is no file."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except (FileNotFoundError, NotADirectoryError):
        return None


class Journal:
    """Notes kept in `folder`, which is created when something is to be noted and removed when nothing is left."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._notes = folder / "journal.json"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock. Raises Refused when another process does."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "lock"
        with open(path, "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                ours = os.path.samestat(os.fstat(lock.fileno()), os.stat(path))  # not one that its owner just took away
            except (BlockingIOError, FileNotFoundError):
                ours = False
            if not ours:
                raise Refused(
                    f"another unsloth-ext works on {self.folder.parent}", "Wait until it is done, then try again."
                )
            try:
                yield
            finally:
                if {entry.name for entry in self.folder.iterdir()} <= {"lock"}:
                    shutil.rmtree(self.folder)

    def begin(self, notes: dict, contents: dict[str, bytes]) -> None:
        """Write down what is about to happen, and the `contents` by name that undoing it would need."""
        shutil.rmtree(self.folder / "undo", ignore_errors=True)
        (self.folder / "undo").mkdir(parents=True)
        for name, content in contents.items():
            write_atomically(self.folder / "undo" / name, content)
        write_atomically(self._notes, json.dumps(notes, indent=2).encode())

    def pending(self) -> dict | None:
        """The notes of a command that did not end."""
        return json.loads(self._notes.read_text()) if self._notes.is_file() else None

    def undo_content(self, name: str) -> bytes:
        return (self.folder / "undo" / name).read_bytes()

    def end(self) -> None:
        self._notes.unlink(missing_ok=True)
        shutil.rmtree(self.folder / "undo", ignore_errors=True)
