"""An installed package without git (site-packages, an unpacked wheel) as the place to apply a series to.

The rehearsal runs on the pristine release that the tree must be equal to, and then the files that came out different replace
those in the tree, each by a rename. Notes in `.unsloth-ext-<package>/` beside the package hold the originals for `unapply` and,
while files are being replaced, what is needed to undo a killed command. A tree that was patched and lost its notes (a copy) is
recognised by its content: it equals the release with the first N patches on it.

Line endings are the tree's own: the wheels of unsloth_zoo carry CRLF, patches carry LF, and a replaced file keeps what it had.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import Refused, UnslothExtError
from .base import Base, is_crlf, pristine_repository, pristine_tree, with_lf
from .git import git, git_bytes, names, run
from .journal import Journal, digest
from .layout import Series
from .rehearse import ALREADY, TAKEN_OUT, Outcome, Rehearsal, on_base, rehearsal, try_series
from .wheels import write_atomically

Files = dict[str, bytes | None]  # contents by path from the root, LF; None: the file is not there


@dataclass
class Plan:
    """A rehearsed change: files by path as bytes on disk (None: no file) before and after it, and the notes kept about it."""

    outcomes: list[Outcome]
    before: Files
    after: Files
    old_state: str | None
    state: str | None
    originals: Files = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def changes(self) -> bool:
        return self.before != self.after


class PlainTree:
    """The folder `root` that holds the package of `series` at release `version`."""

    kind = "plain tree"

    def __init__(self, root: Path, series: Series, version: str):
        self.root, self.series, self.version = root, series, version
        self.package = series.package
        self.journal = Journal(root / f".unsloth-ext-{self.package}")
        self._state = self.journal.folder / "state.json"
        self._originals = self.journal.folder / "originals"

    def refuse_unless_ready(self) -> None:
        """Raises Refused when patched files were edited since, or the tree is no release at all (see `plan`)."""
        recorded = self._recorded()
        edited = [path for path, wanted in recorded.items() if digest(self.root / path) != wanted]
        if edited:
            listed = "".join(f"\n    {path}" for path in edited)
            hint = f"Put them back as they were, or install {self.package} {self.version} anew and delete {self.journal.folder}."
            raise Refused(f"{self.root}: patched files were edited since; nothing was changed:{listed}", hint)

    def _recorded(self) -> dict[str, str | None]:
        """The digests of the patched files after the last apply; empty when the package was installed anew since."""
        if not self._state.is_file():
            return {}
        state = json.loads(self._state.read_text())
        files = state["files"]
        if state["version"] != self.version or all(self._disk(path) == self._kept(path) for path in files):
            return {}
        return files

    @contextmanager
    def plan(self) -> Iterator[Plan]:
        """The series rehearsed on the release, against what the tree holds. Raises Refused for a tree that is neither."""
        with self._rehearsed() as (stage, outcomes, prefix):
            done = {outcome.patch for outcome in outcomes[:prefix] if outcome.commit}
            shown = [Outcome(o.patch, o.id, ALREADY) if o.patch in done else o for o in outcomes]
            touched = self._changed(stage, stage.head)
            paths = {**touched, **dict.fromkeys(self._recorded())}
            originals = {path: self._original(path, _file(stage, stage.start, path)) for path in paths}
            after = {p: self._as_on_disk(p, touched[p]) if p in touched else originals[p] for p in paths}
            before = {path: self._disk(path) for path in paths}
            digests = {path: _digest(after[path]) for path in touched}
            state = json.dumps({"version": self.version, "files": digests}, indent=2) if digests else None
            yield Plan(shown, before, after, self._state_text(), state, originals)

    @contextmanager
    def plan_removal(self) -> Iterator[Plan]:
        """The originals put back."""
        with self._rehearsed() as (stage, outcomes, prefix):
            commits = [stage.start, *(outcome.commit for outcome in outcomes[:prefix] if outcome.commit)]
            paths = {**self._changed(stage, commits[-1]), **dict.fromkeys(self._recorded())}
            before = {path: self._disk(path) for path in paths}
            after = {path: self._original(path, _file(stage, stage.start, path)) for path in paths}
            taken = [Outcome(o.patch, o.id, TAKEN_OUT) for o in outcomes if o.commit] if before != after else []
            yield Plan(taken, before, after, self._state_text(), None)

    @contextmanager
    def _rehearsed(self) -> Iterator[tuple[Rehearsal, list[Outcome], int]]:
        """The series on this release, and how many of its patches the tree has already."""
        repository = pristine_repository(self.package, self.version, self._base())
        start = git(repository, "rev-parse", "base")
        with on_base(self.series) as (based, _):
            borrowed = [repository / "objects", based.objects]
            with rehearsal(start, borrowed) as stage:
                outcomes = try_series(stage, self.series, self.version)
                yield stage, outcomes, self._prefix(stage, outcomes)

    def _base(self) -> Base | None:
        return self.series.base if self.version == self.series.base.version else None

    def _prefix(self, stage: Rehearsal, outcomes: list[Outcome]) -> int:
        """The number N for which the tree is the release with the first N patches, the largest one."""
        pristine = pristine_tree(self.package, self.version, self._base())
        expected = {
            path.relative_to(pristine).as_posix(): with_lf(path.read_bytes())
            for path in (pristine / self.package).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }
        touched = set(self._changed(stage, stage.head)) | set(self._recorded())
        wrong = [path for path, content in expected.items() if path not in touched and self._content(path) != content]
        commits = [stage.start]
        for outcome in outcomes:
            commits.append(outcome.commit or commits[-1])
        actual = {path: self._content(path) for path in touched}
        fitting = [n for n, c in enumerate(commits) if {path: _lf(_file(stage, c, path)) for path in touched} == actual]
        if not wrong and fitting:
            return fitting[-1]
        if not wrong and self._recorded():
            return 0  # another form of the series is in; the digests say that nobody else touched it
        wrong += [path for path in sorted(touched) if actual[path] != expected.get(path)] if not fitting else []
        listed = "".join(f"\n    {path}" for path in sorted(wrong))
        hint = f"Install it anew: pip install --force-reinstall --no-deps {self.package}=={self.version}"
        raise Refused(
            f"{self.root / self.package} differs from release {self.version}; nothing was changed:{listed}", hint
        )

    def _changed(self, stage: Rehearsal, commit: str) -> Files:
        """The files of the package that differ between the release and `commit`, as `commit` has them."""
        listed = git_bytes(
            stage.work, "diff", "--name-only", "-z", "--no-renames", stage.start, commit, "--", self.package
        )
        return {path: _file(stage, commit, path) for path in names(listed)}

    def _disk(self, path: str) -> bytes | None:
        place = self.root / path
        return place.read_bytes() if place.is_file() else None

    def _content(self, path: str) -> bytes | None:
        return _lf(self._disk(path))

    def _as_on_disk(self, path: str, content: bytes | None) -> bytes | None:
        """The content with the line endings of the file that it replaces."""
        present = self._disk(path)
        if content is None or present is None or not is_crlf(present) or b"\r\n" in content:
            return content
        return content.replace(b"\n", b"\r\n")

    def _kept(self, path: str) -> bytes | None:
        kept = self._originals / path
        return kept.read_bytes() if kept.is_file() else None

    def _original(self, path: str, release: bytes | None) -> bytes | None:
        """A file as it was installed: from the notes, else from the release."""
        kept = self._kept(path) if path in self._recorded() else None
        return self._as_on_disk(path, release) if kept is None else kept

    def _state_text(self) -> str | None:
        return self._state.read_text() if self._state.is_file() else None

    def land(self, plan: Plan) -> None:
        """Replace the files; a kill at any point is undone by `recover`. Raises UnslothExtError when one cannot be written."""
        self._replace(plan.before, plan.after, plan.state, plan.originals)

    def take_back(self, plan: Plan) -> None:
        self._replace(plan.after, plan.before, plan.old_state, plan.originals)

    def _replace(self, before: Files, after: Files, state: str | None, originals: Files) -> None:
        changed = [path for path in after if before[path] != after[path]]
        undo = {str(at): before[path] for at, path in enumerate(changed) if before[path] is not None}
        files = [{"path": path, "before": _digest(before[path]), "after": _digest(after[path])} for path in changed]
        self.journal.begin({"files": files, "state": self._state_text()}, undo)
        try:
            for path in changed:
                self._put(path, after[path])
            self._remember(state, originals)
        except OSError as error:
            self.recover()
            hint = "Nothing was changed. Check the permissions and the free space there."
            raise UnslothExtError(f"cannot write into {self.root}: {error}", hint) from error
        self.journal.end()

    def _put(self, path: str, content: bytes | None) -> None:
        place = self.root / path
        if content is not None:
            place.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(place, content)
            return
        place.unlink(missing_ok=True)
        for folder in place.parents:
            if folder == self.root / self.package or (folder.is_dir() and any(folder.iterdir())):
                break
            if folder.is_dir():
                folder.rmdir()

    def _remember(self, state: str | None, originals: Files) -> None:
        if state is None:
            self._state.unlink(missing_ok=True)
            shutil.rmtree(self._originals, ignore_errors=True)
            return
        for path, content in originals.items():
            if content is not None:
                (self._originals / path).parent.mkdir(parents=True, exist_ok=True)
                write_atomically(self._originals / path, content)
        write_atomically(self._state, state.encode())

    def recover(self) -> str | None:
        """Undo what a killed command had begun. Returns a sentence when there was something to do.

        Raises UnslothExtError when a file was edited since, naming it.
        """
        notes = self.journal.pending()
        if notes is None:
            return None
        files = notes["files"]
        edited = [
            file["path"] for file in files if digest(self.root / file["path"]) not in (file["before"], file["after"])
        ]
        if edited:
            hint = f"Install the package anew and delete {self.journal.folder}."
            raise UnslothExtError(
                f"a command was interrupted here and these files were edited since: {', '.join(edited)}", hint
            )
        for at, file in enumerate(files):
            place = self.root / file["path"]
            for left in place.parent.glob(f".{place.name}.*"):
                left.unlink()
            self._put(file["path"], None if file["before"] is None else self.journal.undo_content(str(at)))
        self._remember(notes["state"], {})
        self.journal.end()
        return f"{self.root}: an interrupted command was undone"


def _file(stage: Rehearsal, commit: str, path: str) -> bytes | None:
    done = run(stage.work, "cat-file", "blob", f"{commit}:{path}")
    return None if done.returncode else done.stdout


def _lf(content: bytes | None) -> bytes | None:
    return None if content is None else with_lf(content)


def _digest(content: bytes | None) -> str | None:
    return None if content is None else hashlib.sha256(content).hexdigest()
