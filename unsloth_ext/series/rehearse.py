"""Trying a series in a throw-away repository, so that nobody's tree changes before everything is known to work.

The rehearsal stands on a commit that it borrows, objects and all, from another repository, and has no files checked out: `git am`
brings in those that a patch touches. It also borrows the base release and the series applied to it, because a three-way merge
needs the blobs that a patch was made from and a fresh clone of upstream may lack them.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from ..errors import UnslothExtError
from .base import pristine_repository
from .git import data, git, git_bytes, names, run, text
from .layout import Series
from .mail import Hunk, MailPatch

CLEAN = "clean"
MERGED = "merged"  # by a three-way merge
THERE = "already there"  # upstream has the change
ALREADY = "already applied"  # by us
NOT_FOR = "not for this release"
CONFLICT = "conflict"
TAKEN_OUT, REVERTED = "taken out", "reverted"
_SHOWN_LINES = 40  # of a conflict


@dataclass(frozen=True)
class Conflict:
    """One place where a patch does not fit: `hunk` is the `@@` line of the patch, `lines` show both sides (or say why not)."""

    file: str
    line: int
    hunk: str
    lines: tuple[str, ...]

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line else self.file
        return "\n".join([f"{place}  {self.hunk}".rstrip(), *(f"    {line}" for line in self.lines)])


@dataclass(frozen=True)
class Outcome:
    """What became of one patch. `result` is one of the words above, `commit` its commit when it made one."""

    patch: str
    id: str
    result: str
    commit: str = ""
    conflicts: tuple[Conflict, ...] = ()

    def as_json(self) -> dict:
        return {key: value for key, value in asdict(self).items() if value}

    def __str__(self) -> str:
        return "\n".join(
            [f"{self.patch}: {self.result}", *("  " + str(c).replace("\n", "\n  ") for c in self.conflicts)]
        )


class Rehearsal:
    """A repository that will be thrown away. `work` is its folder; paths are relative to that."""

    def __init__(self, work: Path, start: str, borrowed: list[Path], shallow: Path | None = None):
        self.work = work
        self.start = start
        work.mkdir()
        git(work, "init", "--quiet", "--template=", "--initial-branch=rehearsal")
        info = work / ".git" / "info"
        info.mkdir(exist_ok=True)
        # Bytes go in and out as they are, whatever .gitattributes the tree carries.
        (info / "attributes").write_text("* -text -ident !filter !diff !merge !working-tree-encoding\n")
        self.objects = work / ".git" / "objects"
        (self.objects / "info").mkdir(exist_ok=True)
        (self.objects / "info" / "alternates").write_text("".join(f"{path}\n" for path in borrowed))
        if shallow and shallow.is_file():
            shutil.copy(shallow, work / ".git" / "shallow")
        git(work, "config", "core.sparseCheckout", "true")
        git(work, "update-ref", "HEAD", start)
        self.check_out([])

    @property
    def head(self) -> str:
        return git(self.work, "rev-parse", "HEAD")

    def check_out(self, paths: list[str]) -> None:
        """Have these files of HEAD on disk and no others. Git counts the others as unchanged and fetches what a merge needs."""
        patterns = "".join("/" + re.sub(r"([\\\[*?])", r"\\\1", path) + "\n" for path in paths)
        (self.work / ".git" / "info" / "sparse-checkout").write_bytes(data(patterns or "/.nothing\n"))
        git(self.work, "read-tree", "-m", "-u", "HEAD")

    def am(self, patch: MailPatch) -> Outcome:
        """Apply one patch as a commit; after a conflict the rehearsal is back where it was."""
        before = self.head
        self.check_out(patch.files)
        options = ("--3way", "--keep-cr", "--no-scissors", "--whitespace=nowarn", "--committer-date-is-author-date")
        done = run(self.work, "am", *options, stdin=patch.content)
        said = text(done.stdout + b"\n" + done.stderr)
        if done.returncode:
            conflicts = tuple(self.conflicts(patch, said))
            self.back_to(before)
            return Outcome(patch.name, patch.id, CONFLICT, conflicts=conflicts)
        head = self.head
        if head == before or self._only_tests(patch, before, head):
            self.back_to(before)
            return Outcome(patch.name, patch.id, THERE)
        return Outcome(patch.name, patch.id, MERGED if "3-way merge" in said else CLEAN, head)

    def _only_tests(self, patch: MailPatch, before: str, after: str) -> bool:
        """Whether nothing of the change itself was left to apply: upstream has it, under a test of its own."""
        tests = {target for _, target in patch.pairs("Upstream-Test")}
        changed = set(names(git_bytes(self.work, "diff", "--name-only", "-z", "--no-renames", before, after)))
        return changed <= tests and not set(patch.files) <= tests

    def back_to(self, commit: str) -> None:
        """Stand on `commit` again, with nothing in progress and no files checked out."""
        run(self.work, "am", "--quit")
        run(self.work, "revert", "--quit")
        git(self.work, "update-ref", "HEAD", commit)
        (self.work / ".git" / "index").unlink()
        for path in self.work.iterdir():
            if path.name == ".git":
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        self.check_out([])

    def read(self, path: str) -> bytes | None:
        """A file at HEAD, or None."""
        done = run(self.work, "cat-file", "blob", f"HEAD:{path}")
        return None if done.returncode else done.stdout

    def amend(self, files: dict[str, bytes]) -> None:
        """Put other contents into the last commit."""
        for path, content in files.items():
            target = self.work / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
            git(self.work, "add", "--force", "--sparse", "--", path)
        git(self.work, "commit", "--amend", "--no-edit", "--quiet", "--allow-empty")

    def conflicts(self, patch: MailPatch, said: str) -> Iterator[Conflict]:
        unmerged = names(git_bytes(self.work, "diff", "--name-only", "-z", "--diff-filter=U"))
        for file in unmerged:
            path = self.work / file
            content = text(path.read_bytes()) if path.is_file() else ""
            found = list(_regions(content))
            for line, lines in found:
                hunk = _nearest(patch, file, lines)
                yield Conflict(file, line, hunk.header if hunk else "", lines)
            if not found:
                reasons = [line for line in said.splitlines() if line.startswith("CONFLICT") and file in line]
                hunk = _nearest(patch, file, ())
                yield Conflict(
                    file, 0, hunk.header if hunk else "", (*reasons, *(hunk.lines if hunk else ()))[:_SHOWN_LINES]
                )
        if not unmerged:  # git did not get as far as merging
            for file, line in re.findall(r"^error: patch failed: (.+):(\d+)$", said, re.MULTILINE):
                hunk = next((h for h in patch.hunks if h.file == file and h.start == int(line)), None)
                yield Conflict(
                    file, int(line), hunk.header if hunk else "", (hunk.lines if hunk else ())[:_SHOWN_LINES]
                )
            reasons = [
                line
                for line in said.splitlines()
                if line.startswith(("error: ", "fatal: ")) and "patch failed" not in line
            ]
            if reasons:
                yield Conflict(patch.name, 0, "", tuple(reasons))


def _regions(content: str) -> Iterator[tuple[int, tuple[str, ...]]]:
    """The parts of a merged file between conflict markers, each with its line number."""
    start, lines = 0, []
    for number, line in enumerate(content.split("\n"), 1):
        if line.startswith("<<<<<<< "):
            start, lines = number, []
        if start:
            lines.append(line)
        if start and line.startswith(">>>>>>> "):
            shown = (
                lines
                if len(lines) <= _SHOWN_LINES
                else [*lines[:_SHOWN_LINES], f"... {len(lines) - _SHOWN_LINES} more lines"]
            )
            yield start, tuple(shown)
            start = 0


def _nearest(patch: MailPatch, file: str, lines: tuple[str, ...]) -> Hunk | None:
    """The hunk of `file` that shares most changed lines with a conflict."""
    hunks = [hunk for hunk in patch.hunks if hunk.file == file]
    shown = set(lines)
    return max(hunks, key=lambda hunk: sum(line[1:] in shown for line in hunk.lines if line[:1] in "+-"), default=None)


@contextmanager
def rehearsal(start: str, borrowed: list[Path], shallow: Path | None = None) -> Iterator[Rehearsal]:
    """A rehearsal on the commit `start`, which one of the `borrowed` object folders holds."""
    with tempfile.TemporaryDirectory(prefix="unsloth-ext-rehearsal-") as folder:
        yield Rehearsal(Path(folder, "work"), start, borrowed, shallow)


def base_of(series: Series) -> tuple[str, Path]:
    """The commit of the release that a series is made for, and the object folder that holds it."""
    repository = pristine_repository(series.package, series.base.version, series.base)
    return git(repository, "rev-parse", "base"), repository / "objects"


@contextmanager
def on_base(series: Series) -> Iterator[tuple[Rehearsal, list[Outcome]]]:
    """The series applied to its own base. Raises UnslothExtError when a patch does not apply as it stands."""
    start, objects = base_of(series)
    with rehearsal(start, [objects]) as stage:
        outcomes = []
        for patch in series.patches:
            outcome = stage.am(patch)
            if outcome.result != CLEAN:
                raise UnslothExtError(
                    f"{series.name}: {outcome} on its own base {series.base.version}",
                    "Repair the patch, or export it again from a checkout where it is right: unsloth-ext patches export",
                )
            outcomes.append(outcome)
        yield stage, outcomes


def try_series(stage: Rehearsal, series: Series, version: str, done: frozenset[str] = frozenset()) -> list[Outcome]:
    """Apply each patch that is not in `done` (by id) and that admits `version`; go on after a conflict, so that all are told."""
    outcomes = []
    for patch in series.patches:
        if patch.id in done:
            outcomes.append(Outcome(patch.name, patch.id, ALREADY))
        elif not patch.applies_to(series.package, version):
            outcomes.append(Outcome(patch.name, patch.id, NOT_FOR))
        else:
            outcomes.append(stage.am(patch))
    return outcomes
