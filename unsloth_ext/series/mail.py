"""One patch file: a mail as `git format-patch` writes it, whose last paragraph says what the patch is for.

The trailers follow Debian's DEP-3 in spirit: a patch that cannot say why it exists, where it was sent and what it applies to is
one that nobody dares to delete. Keys read here (any other is kept as it is):

    Description: why (or the message's own text)      Forwarded: not-yet | no | URL of the pull request
    Applies-To: unsloth_zoo >=2026.10.9               License: SPDX id(s) of the files that it changes
    Unsloth-Ext-Patch: loss.unread_keywords           the run-time patch of the same change; the first one names this patch
    Room-Code: unsloth_ext.loss.keywords:read -> unsloth_zoo/x.py      a definition kept identical to ours
    Room-File: unsloth_ext/nf4/x.py -> unsloth/kernels/x.py            a whole file kept identical to ours
    Room-Import: unsloth_ext.nf4.y -> unsloth.kernels.y                where a module that we import lives upstream
    Upstream-Test: upstream_tests/unsloth/tests/test_x.py -> tests/test_x.py
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from email.header import decode_header, make_header
from email.parser import BytesHeaderParser
from functools import cached_property
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement

from ..errors import UsageError
from .git import text

ID = "Unsloth-Ext-Patch"
REVERTS = "Unsloth-Ext-Reverts"  # in the commit with which `unapply` takes a buried patch back
_TRAILER = re.compile(r"([A-Z][A-Za-z0-9]*(?:-[A-Za-z0-9]+)*):\s*(.*)")
_HUNK = re.compile(r"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@")


def split_message(message: str) -> tuple[str, list[tuple[str, str]]]:
    """A commit message without its trailers, and the trailers in order; a line that starts with a blank continues the one above."""
    head, _, last = message.strip().rpartition("\n\n")
    trailers: list[tuple[str, str]] = []
    for line in last.split("\n"):
        found = _TRAILER.fullmatch(line.rstrip())
        if found:
            trailers.append((found.group(1), found.group(2)))
        elif trailers and line[:1] in (" ", "\t"):
            key, value = trailers[-1]
            trailers[-1] = (key, f"{value} {line.strip()}".strip())
        else:
            return message.strip(), []
    return head, trailers


def values(trailers: list[tuple[str, str]], key: str) -> list[str]:
    return [value for name, value in trailers if name == key]


@dataclass(frozen=True)
class Hunk:
    """One hunk of a patch: the file's new name, the `@@` line and the lines below it."""

    file: str
    header: str
    lines: tuple[str, ...]

    @property
    def start(self) -> int:
        found = _HUNK.match(self.header)
        return int(found.group(1)) if found else 0


@dataclass(frozen=True)
class MailPatch:
    """A .patch file. `name` is its file name, `content` its bytes."""

    name: str
    content: bytes

    @classmethod
    def read(cls, path: Path) -> MailPatch:
        return cls(path.name, path.read_bytes())

    @cached_property
    def _parts(self) -> tuple[str, str, str]:
        header, _, rest = self.content.partition(b"\n\n")
        subject = BytesHeaderParser().parsebytes(header + b"\n\n").get("Subject", "")
        subject = re.sub(r"\s*\n\s+", " ", str(make_header(decode_header(subject))))
        message, found, diff = text(b"\n" + rest).partition("\ndiff --git ")
        message = re.split(r"^---$", message, maxsplit=1, flags=re.MULTILINE)[0]  # `git am` ends the message there
        return re.sub(r"^\[PATCH[^\]]*\]\s*", "", subject), message.strip(), found.lstrip("\n") + diff

    @property
    def subject(self) -> str:
        return self._parts[0]

    @property
    def diff(self) -> str:
        return self._parts[2]

    @cached_property
    def _message(self) -> tuple[str, list[tuple[str, str]]]:
        return split_message(f"{self.subject}\n\n{self._parts[1]}")

    @property
    def trailers(self) -> list[tuple[str, str]]:
        return self._message[1]

    @property
    def body(self) -> str:
        """The text between the subject and the trailers."""
        return self._message[0].partition("\n\n")[2].strip()

    @property
    def description(self) -> str:
        """The `Description:` trailer, else the body."""
        given = self.all("Description")
        return given[0] if given else self.body

    def all(self, key: str) -> list[str]:
        return values(self.trailers, key)

    @property
    def id(self) -> str:
        return next(iter(self.all(ID)), "")

    @property
    def stem(self) -> str:
        """The file name without its number and suffix: 0001-Read-keywords.patch gives Read-keywords."""
        return re.sub(r"^\d+-", "", self.name.removesuffix(".patch"))

    def applies_to(self, package: str, version: str) -> bool:
        """Whether the Applies-To trailers admit a release. Raises UsageError for one that cannot be read."""
        admitted = True
        for line in self.all("Applies-To"):
            requirement = self.requirement(line)
            if requirement.name.replace("-", "_") == package:
                admitted = admitted and requirement.specifier.contains(version, prereleases=True)
        return admitted

    def requirement(self, line: str) -> Requirement:
        try:
            return Requirement(line)
        except InvalidRequirement as error:
            raise UsageError(
                f"{self.name}: Applies-To: {line}: {error}", "Write it as: unsloth_zoo >=2026.10.9"
            ) from error

    def pairs(self, key: str) -> list[tuple[str, str]]:
        """The `source -> target` values of a trailer. Raises UsageError for one without an arrow."""
        found = []
        for value in self.all(key):
            source, arrow, target = (part.strip() for part in value.partition("->"))
            if not (source and arrow and target):
                raise UsageError(
                    f"{self.name}: {key}: {value!r} has no target", f"Write it as: {key}: SOURCE -> TARGET"
                )
            found.append((source, target))
        return found

    @cached_property
    def hunks(self) -> list[Hunk]:
        """The hunks in order. A file that is only renamed or has a new mode has none."""
        found: list[tuple[str, str, list[str]]] = []
        file = old = ""
        left_old = left_new = 0  # lines that the current hunk still owes: a removed line may itself begin with "-- "
        for line in self.diff.split("\n"):
            header = None if left_old or left_new else _HUNK.match(line)
            if left_old or left_new:
                left_old -= line[:1] in ("-", " ")
                left_new -= line[:1] in ("+", " ")
                found[-1][2].append(line)
            elif header:
                left_old, left_new = int(header.group(2) or 1), int(header.group(4) or 1)
                found.append((file, line, []))
            elif line.startswith("--- "):
                old = line[4:].rstrip("\t").removeprefix("a/")
            elif line.startswith("+++ "):
                new = line[4:].rstrip("\t")
                file = old if new == "/dev/null" else new.removeprefix("b/")
        return [Hunk(file, header, tuple(lines)) for file, header, lines in found]

    @property
    def changed_lines(self) -> dict[str, list[str]]:
        """The removed and added lines of each file, without their surroundings: equal for the same change at another place."""
        changed: dict[str, list[str]] = {}
        for hunk in self.hunks:
            changed.setdefault(hunk.file, []).extend(line for line in hunk.lines if line[:1] in ("-", "+"))
        return changed

    @cached_property
    def files(self) -> list[str]:
        """The paths that the patch touches, in order."""
        return list(dict.fromkeys(re.findall(r"^diff --git a/.+ b/(.+)$", self.diff, re.MULTILINE)))
