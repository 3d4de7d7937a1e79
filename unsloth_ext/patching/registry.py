"""Which patches are in, which are not, and why. The only place that changes Unsloth at run time.

A patch is in one of six states:

    pending     its module has not been imported yet
    applied     its changes are made
    superseded  this release does it as well or better
    skipped     this release is not one that the patch knows, or its source has changed
    disabled    by the user
    failed      applying raised; nothing of it was left behind and Unsloth runs as if we were not there

All changes of a patch are computed first, without the lock (that may import torch or triton, and another thread may be
holding an import lock that this needs), and are then made together under it. So two threads apply a patch once, and an
exception half way takes back what was done.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING

from ..errors import UnslothExtError, UsageError
from . import fingerprint
from .hooks import PostImportFinder, is_executing, rebind_everywhere
from .patch import Change, NotHere, Patch, SetAttribute, Target
from .release import folder_of, installed_release

if TYPE_CHECKING:
    from pathlib import Path


class PatchError(UnslothExtError):
    """With UNSLOTH_EXT_STRICT=1: a patch was skipped or failed."""


@dataclass(frozen=True)
class PatchStatus:
    """The state of one patch. `reason` says why for every state but `applied` and `pending`, where it may be empty."""

    id: str
    challenge: str
    state: str
    reason: str
    summary: str
    target: str
    release: str

    @classmethod
    def of(cls, patch: Patch, state: str, reason: str, target: Target | None, release: str | None) -> PatchStatus:
        where = str(target or patch.targets[0])
        return cls(patch.id, patch.challenge, state, reason, patch.summary, where, release or "")

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


class StatusTable(list):
    """A list of `PatchStatus` that prints as a table."""

    def __str__(self) -> str:
        if not self:
            return "no patches"
        wide = max(len(row.id) for row in self)
        return "\n".join(f"{row.id:<{wide}}  {row.state:<10}  {row.reason or row.summary}" for row in self)

    __repr__ = __str__


@dataclass
class _Record:
    patch: Patch
    state: str = "pending"
    reason: str = ""
    target: Target | None = None
    release: str = ""
    made: list[Change] = field(default_factory=list)


class Registry:
    def __init__(self, *, strict: bool = False):
        self._records: dict[str, _Record] = {}
        self._lock = threading.RLock()
        self._finder = PostImportFinder(self._module_loaded)
        self._listeners: list = []
        self._applied: list[_Record] = []  # in the order in which they went in
        self.strict = strict

    # -- declaring ---------------------------------------------------------------------------------------------------

    def register(self, patches: Iterable[Patch]) -> None:
        with self._lock:
            for patch in patches:
                if patch.id in self._records:
                    raise ValueError(f"two patches with the id {patch.id}")
                self._records[patch.id] = _Record(patch, state="disabled", reason=_until(patch) or "not enabled yet")

    def patches(self) -> list[Patch]:
        return [record.patch for record in self._records.values()]

    def names(self) -> set[str]:
        """What `enable` and `disable` accept: "all", a room ("loss") or a patch id ("loss.unread_keywords")."""
        return {"all", *self._records, *(patch.room for patch in self.patches())}

    def _select(self, names: Iterable[str]) -> list[_Record]:
        names = set(names) or {"all"}
        if unknown := sorted(names - self.names()):
            raise UsageError(
                f"no patch or room named {', '.join(unknown)}", f"There are: {', '.join(sorted(self.names()))}."
            )
        return [r for r in self._records.values() if names & {"all", r.patch.id, r.patch.room}]

    # -- the user's switches -------------------------------------------------------------------------------------------

    def enable(self, *names: str) -> None:
        """Put patches in: now where their modules are imported, else when they are. One with a switch: by its id, or where the
        switch is on."""
        with self._lock:
            chosen = [record for record in self._select(names) if record.state in ("disabled", "failed", "skipped")]
            for record in [r for r in chosen if r.patch.is_switched_off and r.patch.id not in names]:
                chosen.remove(record)
                if record.state == "disabled":  # why it failed or was skipped is worth more
                    record.reason = _until(record.patch)
            for record in chosen:
                record.state, record.reason = "pending", ""
            modules = {target.module for record in chosen for target in record.patch.targets}
            if modules:
                # The packages themselves too: once their release is known, so is which patches are not for it.
                self._finder.watch(modules | {module.partition(".")[0] for module in modules})
        self._wait_for_other_threads(modules)
        self._apply_pending()

    def disable(self, *names: str, reason: str = "by disable()") -> None:
        """Take patches out again and leave nothing behind.

        A patch whose change somebody else has replaced or wrapped since stays `applied`, with that reason: it cannot be known
        whether theirs still calls ours.
        """
        with self._lock:
            chosen = self._select(names)
            # A patch that lies over one of them has to make room, and comes back afterwards.
            slots = {change.slot for record in chosen for change in record.made}
            over = [r for r in self._applied if r not in chosen and any(change.slot in slots for change in r.made)]
            for record in [r for r in reversed(self._applied) if r in chosen or r in over]:
                self._take_out(record)
            for record in chosen:
                if not record.made:
                    record.state, record.reason = "disabled", reason
            for record in over:
                if not record.made:
                    record.state, record.reason = "pending", ""
            if all(record.state == "disabled" for record in self._records.values()):
                self._finder.remove()
        self._apply_pending()

    def status(self) -> StatusTable:
        with self._lock:
            return StatusTable(
                PatchStatus.of(r.patch, r.state, r.reason, r.target, r.release) for r in self._records.values()
            )

    # -- when modules arrive ---------------------------------------------------------------------------------------------

    def on_import(self, module: str, listener) -> None:
        """Call `listener()` once `module` has been imported and patched; at once if that has happened."""
        if (present := sys.modules.get(module)) is not None and not is_executing(present):
            listener()
            return
        self._listeners.append((module, listener))
        self._finder.watch({module})

    def _module_loaded(self, module: ModuleType) -> None:
        with self._lock:
            # Executed a second time (importlib.reload, or taken out of sys.modules): what we had put there is gone.
            for record in [r for r in self._applied if r.target.module == module.__name__]:
                self._applied.remove(record)
                record.made.clear()
                record.state = "pending"
        self._apply_pending(just_loaded=module.__name__)
        for name, listener in [entry for entry in self._listeners if entry[0] == module.__name__]:
            self._listeners.remove((name, listener))
            listener()

    def _wait_for_other_threads(self, modules: set[str]) -> None:
        # A module that another thread is executing right now was found before our finder stood there, so no hook will
        # fire for it. Importing it waits for that thread; in the thread that is executing it, it returns at once.
        import importlib

        for name in modules:
            present = sys.modules.get(name)
            if present is not None and is_executing(present):
                importlib.import_module(name)

    def _apply_pending(self, just_loaded: str = "") -> None:
        for record in list(self._records.values()):
            if record.state != "pending":
                continue
            try:
                self._try_apply(record, just_loaded)
            except Exception as error:  # the import of Unsloth must survive whatever a patch does
                with self._lock:
                    if record.state == "pending":
                        record.state, record.reason = "failed", f"{type(error).__name__}: {error}"
        if self.strict:
            # Every time, not only for what has just changed: Unsloth catches errors around some of its own imports.
            for record in self._records.values():
                if record.state in ("skipped", "failed"):
                    raise PatchError(
                        f"patch {record.patch.id} {record.state}: {record.reason}",
                        "UNSLOTH_EXT_STRICT=1 makes this an error; without it Unsloth runs unpatched here.",
                    )

    def _try_apply(self, record: _Record, just_loaded: str) -> None:
        patch = record.patch
        if patch.package not in sys.modules:
            return
        release = installed_release(patch.package)
        verdict, target = choose_target(patch, release)
        if verdict is not None:
            self._set(record, *verdict, target, release)
            return
        module = sys.modules.get(target.module)
        if module is None or (is_executing(module) and target.module != just_loaded):
            return
        original, owner, name = _resolve(module, target.attribute)
        verdict = judge_source(patch, target, release, fingerprint.of_object(original), folder_of(patch.package))
        if verdict is not None:
            self._set(record, *verdict, target, release)
            return
        if patch.replace is not None:
            changes: list[Change] = [SetAttribute(owner, name, patch.replace(original))]
        else:
            try:
                changes = list(patch.changes(module, target))
            except NotHere as reason:
                self._set(record, "disabled", str(reason), target, release)
                return
        with self._lock:
            if record.state != "pending":  # another thread was quicker
                return
            if _resolve(module, target.attribute)[0] is original:
                self._put_in(record, changes)
                self._set(record, "applied", "", target, release)
                return
        self._try_apply(record, just_loaded)  # another patch has come under this one meanwhile

    def _set(self, record: _Record, state: str, reason: str, target: Target | None, release: str | None) -> None:
        with self._lock:
            if record.state == "pending":
                record.state, record.reason, record.target, record.release = state, reason, target, release or ""

    # -- making and undoing ------------------------------------------------------------------------------------------------

    def _put_in(self, record: _Record, changes: list[Change]) -> None:
        try:
            for change in changes:
                change.make()
                record.made.append(change)
            rebind_everywhere({id(c.old): c.value for c in record.made if _is_shared(c)})
        except BaseException:
            self._undo(record)
            raise
        self._applied.append(record)

    def _take_out(self, record: _Record) -> None:
        theirs = next((change for change in record.made if change.current() is not change.value), None)
        if theirs is not None:
            value = theirs.current()
            who = getattr(getattr(value, "__func__", value), "__module__", None) or type(value).__name__
            record.reason = f"cannot be taken out: {who} has replaced or wrapped {record.target} since"
            return
        self._undo(record)
        self._applied.remove(record)

    def _undo(self, record: _Record) -> None:
        for change in reversed(record.made):
            change.undo()
        rebind_everywhere({id(c.value): c.old for c in record.made if _is_shared(c)})
        record.made.clear()


def _until(patch: Patch) -> str:
    return f"until {patch.switch}=1 or unsloth_ext.enable({patch.id!r}) switches it on" if patch.is_switched_off else ""


def choose_target(patch: Patch, release: str | None) -> tuple[tuple[str, str] | None, Target | None]:
    """((state, reason), None) if the release alone rules the patch out, else (None, the target to look at)."""
    from packaging.specifiers import SpecifierSet

    if release is None:
        return ("skipped", f"{patch.package} is not installed"), None
    for specifiers, reason in patch.superseded:
        if SpecifierSet(specifiers).contains(release, prereleases=True):
            return ("superseded", f"{patch.package} {release}: {reason}"), None
    for target in patch.targets:
        if SpecifierSet(target.versions).contains(release, prereleases=True):
            return None, target
    known = " or ".join(target.versions for target in patch.targets)
    return ("skipped", f"for {patch.package} {known}, this is {release}"), None


def judge_source(
    patch: Patch, target: Target, release: str | None, found: str | None, folder: Path | None
) -> tuple[str, str] | None:
    """(state, reason) if the sources rule the patch out, else None.

    `found` is the fingerprint of the target's definition; what the patch relies on is read from `folder`, the package's.
    """
    if found is not None and found in target.patched:
        return "superseded", f"this {patch.package} {release} already has the change"
    if found not in target.fingerprints:
        return "skipped", _describe_change(target, release, found)
    for needed in patch.relies_on:
        if (other := of_target(folder, needed)) not in needed.fingerprints:
            return "skipped", _describe_change(needed, release, other)
    return None


def of_target(folder: Path | None, target: Target) -> str | None:
    """The fingerprint of a target's definition in a package folder, without importing it."""
    if folder is None:
        return None
    file = folder.joinpath(*target.module.split(".")[1:]).with_suffix(".py")
    return fingerprint.of_definition(file, target.attribute) if file.is_file() else None


def _describe_change(target: Target, release: str | None, found: str | None) -> str:
    known = ", ".join(target.fingerprints)
    return f"upstream changed: {target} in {release} is {found or 'gone or not readable'}, known: {known}"


def _resolve(module: ModuleType, attribute: str):
    """(the raw attribute or None, the module or class that owns it, its name there)."""
    *owners, name = attribute.split(".")
    owner = module
    for part in owners:
        owner = vars(owner).get(part)
        if owner is None:
            return None, None, name
    return vars(owner).get(name), owner, name


def _is_shared(change: Change) -> bool:
    # Only a module's functions and classes are imported by name elsewhere; sweeping for, say, a small string by identity
    # would hit every interned copy of it.
    return isinstance(change, SetAttribute) and isinstance(change.owner, ModuleType) and callable(change.old)
