"""Measured improvements for Unsloth that install themselves.

    import unsloth_ext   # before unsloth
    import unsloth

prints one line that says which patches are in. `status()` says more, `disable("loss")` takes a room's patches out and leaves
nothing behind, `enable("loss")` puts them in again.

Environment: UNSLOTH_EXT_DISABLE=all (or 1) or a list of rooms and patch ids (loss,tools.empty_tool_calls); UNSLOTH_EXT_STRICT=1
turns a skipped or failed patch, and a name in UNSLOTH_EXT_DISABLE that does not exist, into an error; UNSLOTH_EXT_QUIET=1 mutes
the line. Some patches wait for a switch of their own (`Patch.switch`, shown by `status()`): UNSLOTH_EXT_FSDP2=1 lets a Trainer
under torchrun shard its 4-bit model.

Importing this module costs a few milliseconds and imports nothing heavy: Unsloth wants to come before transformers, trl and
peft, and this has to come before Unsloth.
"""

from __future__ import annotations

import os as _os

from .patching import PatchError, PatchStatus, Registry, StatusTable
from .version import __version__

__all__ = ["PatchError", "PatchStatus", "StatusTable", "__version__", "disable", "enable", "patches", "status"]

# Folders with a `patch.py` that declares PATCHES, in the order in which they are applied.
ROOMS = ("loss", "tools", "nf4", "fsdp2", "compiling")

_YES = ("1", "true", "yes", "on")


def _switch(name: str) -> bool:
    return _os.environ.get(name, "").strip().lower() in _YES


if "_registry" in globals():  # importlib.reload(unsloth_ext): the old one must not stay in
    _registry.disable()  # noqa: F821
_registry = Registry(strict=_switch("UNSLOTH_EXT_STRICT"))


def status() -> StatusTable:
    """The state of every patch, as a list of `PatchStatus` that prints as a table."""
    return _registry.status()


def patches():
    """The declarations (`unsloth_ext.patching.Patch`) of every patch."""
    return _registry.patches()


def enable(*names: str) -> None:
    """Put patches in: all, or those of the named rooms ("loss") or ids ("loss.unread_keywords").

    Raises UsageError for a name that does not exist, PatchError under UNSLOTH_EXT_STRICT=1 where a patch cannot be applied.
    """
    _registry.enable(*names)


def disable(*names: str) -> None:
    """Take patches out again: all, or those of the named rooms or ids. Unsloth is then as it was."""
    _registry.disable(*names)


def _rank() -> int:
    for name in ("RANK", "LOCAL_RANK"):  # torchrun sets both
        if _os.environ.get(name, "").isdigit():
            return int(_os.environ[name])
    return 0


def _say(line: str, *, always: bool = False) -> None:
    import contextlib
    import sys

    if _rank() == 0 and (always or not _switch("UNSLOTH_EXT_QUIET")):
        with contextlib.suppress(
            OSError, ValueError, AttributeError
        ):  # stderr closed, broken or None: never a reason to fail
            print(f"unsloth_ext {__version__}: {line}", file=sys.stderr)


def _by_room(ids: list[str]) -> list[str]:
    """One entry for each patch of a room with up to two, else one for the room: "tools.* (11)"."""
    found = []
    for room in dict.fromkeys(id.partition(".")[0] for id in ids):
        here = [id for id in ids if id.partition(".")[0] == room]
        found += here if len(here) <= 2 else [f"{room}.* ({len(here)})"]
    return found


def _summary() -> None:
    rows = status()
    parts = []
    for state in ("applied", "pending", "failed"):
        if named := [row.id for row in rows if row.state == state]:
            listed = ", ".join(named if state == "failed" else _by_room(named))
            parts.append(f"{len(named)} {state} ({listed})")
    for state in ("superseded", "skipped", "disabled"):
        if count := sum(row.state == state for row in rows):
            parts.append(f"{count} {state}")
    from .patching.release import installed_release

    _say(f"on Unsloth {installed_release('unsloth')}, patches: {', '.join(parts)}; unsloth_ext.status() says why")


def _install() -> None:
    from importlib import import_module

    for room in ROOMS:
        _registry.register(import_module(f"{__name__}.{room}.patch").PATCHES)
    off = set(_os.environ.get("UNSLOTH_EXT_DISABLE", "").lower().replace(",", " ").replace(";", " ").split()) - {"0"}
    if off & set(_YES):
        off = {"all"}
    if unknown := sorted(off - _registry.names()):
        known = ", ".join(sorted(_registry.names()))
        line = f"UNSLOTH_EXT_DISABLE names {', '.join(unknown)}, which does not exist (there are: {known})"
        if _registry.strict:
            raise PatchError(line, "UNSLOTH_EXT_STRICT=1 makes this an error.")
        _say(line, always=True)  # what the user wants out would stay in
        off -= set(unknown)
    if off:
        _registry.disable(*off, reason="by UNSLOTH_EXT_DISABLE")
    import_module(
        f"{__name__}.fsdp2.switch"
    ).requested()  # a wrong setting is an error now, not when the model has been loaded
    on = [patch.id for patch in patches() if not (off & {"all", patch.id, patch.room} or patch.is_switched_off)]
    if on:
        _registry.enable(*on)
        _registry.on_import("unsloth", _summary)


_install()
