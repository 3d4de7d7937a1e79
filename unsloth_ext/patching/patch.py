"""What a patch is: a declaration. Nothing here touches Unsloth; `registry.py` decides and acts.

A `Patch` names the one definition of Unsloth that it changes (a `Target`: module, attribute, the releases it knows and the
fingerprints of the sources it was written against) and a pure function that computes the `Change`s. The registry makes all
of a patch's changes or none, remembers what stood there, and can put it back.

A patch lists several targets where the definition moved between releases; the first whose `versions` admit the installed
release is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from ..switches import OFF, said

_ABSENT = object()


class _AnySource(tuple):
    """Fingerprints of a definition that is called, never rewritten: what counts of it, the patch checks by itself."""

    def __contains__(self, found) -> bool:
        return found is not None


ANY_SOURCE = _AnySource(("any with these arguments",))


@dataclass(frozen=True)
class Target:
    """A definition in Unsloth, e.g. `Target("unsloth_zoo.cpu.loader", "FastCPUModel.from_pretrained", ...)`.

    versions: PEP 440 specifiers of the releases in which the definition is looked for there. The upper end stays open: a newer
        release is judged by the fingerprint, not by its number.
    fingerprints: `fingerprint.of_object` of every source that the patch was checked against.
    patched: the same of a tree in which the git patch has been applied, or which has been given the change by upstream.
    """

    module: str
    attribute: str
    versions: str
    fingerprints: tuple[str, ...]
    patched: tuple[str, ...] = ()

    @property
    def package(self) -> str:
        return self.module.partition(".")[0]

    def __str__(self) -> str:
        return f"{self.module}.{self.attribute}"


@dataclass
class SetAttribute:
    """`owner.name = value`, for a module or a class. Callables are also replaced in every module that imported them by name."""

    owner: Any
    name: str
    value: Any
    old: Any = field(default=_ABSENT, repr=False)

    def make(self) -> None:
        # vars(), not getattr: a class must get its own staticmethod object back, not the function inside it.
        self.old = vars(self.owner).get(self.name, _ABSENT)
        setattr(self.owner, self.name, self.value)

    @property
    def slot(self) -> tuple[int, Any]:
        """What is changed: two changes with the same slot lie on top of each other."""
        return id(self.owner), self.name

    def current(self) -> Any:
        return vars(self.owner).get(self.name, _ABSENT)

    def undo(self) -> None:
        if self.old is _ABSENT:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self.old)


@dataclass
class SetItem:
    """`mapping[key] = value`, for tables such as chat_templates.CHAT_TEMPLATES that others hold by reference."""

    mapping: dict
    key: Any
    value: Any
    old: Any = field(default=_ABSENT, repr=False)

    def make(self) -> None:
        self.old = self.mapping.get(self.key, _ABSENT)
        self.mapping[self.key] = self.value

    @property
    def slot(self) -> tuple[int, Any]:
        return id(self.mapping), self.key

    def current(self) -> Any:
        return self.mapping.get(self.key, _ABSENT)

    def undo(self) -> None:
        if self.old is _ABSENT:
            del self.mapping[self.key]
        else:
            self.mapping[self.key] = self.old


Change = SetAttribute | SetItem


class NotHere(Exception):
    """Raised by `Patch.changes`: the patch is not for this machine, for the reason given. It is then `disabled`."""


@dataclass(frozen=True)
class Patch:
    """One change to Unsloth at run time.

    id: "<room>.<name>", the room being the folder that declares it ("loss.unread_keywords").
    challenge: the letter of the Unsloth challenge that it belongs to, A to E.
    summary: one line, what gets better for the user.
    replace: (original) -> replacement of the target's definition; `original` is the raw attribute, so a staticmethod or
        classmethod object for a method. Must be free of side effects: it may be called more than once.
    changes: instead of `replace`, (module, target) -> the changes to make, equally free of side effects. Raises `NotHere`.
    relies_on: definitions that the replacement calls or whose behaviour it takes for granted, with their fingerprints. The
        patch is skipped where one of them is another.
    superseded: (specifiers, reason) pairs: releases that do it as well or better, with what was measured.
    run_time_only: why the change has no git patch. Empty for all that have one.
    switch: an environment variable. The patch is out until that is set (and not to 0, no, off or false), or somebody enables it
        by its id: for what changes more than Unsloth, and for what has not been measured yet.
    on_unless_switched_off: the patch is in unless that variable says 0, no, off or false.
    """

    id: str
    challenge: str
    summary: str
    targets: tuple[Target, ...]
    replace: Callable[[Any], Any] | None = None
    changes: Callable[[Any, Target], Iterable[Change]] | None = None
    relies_on: tuple[Target, ...] = ()
    superseded: tuple[tuple[str, str], ...] = ()
    run_time_only: str = ""
    switch: str = ""
    on_unless_switched_off: bool = False

    def __post_init__(self):
        if not self.targets:
            raise ValueError(f"patch {self.id} has no target")
        if (self.replace is None) == (self.changes is None):
            raise ValueError(f"patch {self.id} needs either replace= or changes=")
        if len({target.package for target in self.targets}) != 1:
            raise ValueError(f"patch {self.id} has targets in several packages; make a patch for each")

    @property
    def room(self) -> str:
        return self.id.partition(".")[0]

    @property
    def package(self) -> str:
        return self.targets[0].package

    @property
    def is_switched_off(self) -> bool:
        word = said(self.switch) if self.switch else "1"
        return word in OFF or (not word and not self.on_unless_switched_off)
