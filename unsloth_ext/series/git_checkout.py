"""A git checkout of upstream as the place to apply a series to.

The commits are made in a rehearsal that borrows the checkout's objects. Landing them takes three steps: their objects are packed
into the checkout's own store (a fetch would leave FETCH_HEAD and ask for remotes; borrowed objects would vanish with the
rehearsal), the intended move is noted in the journal, and `git reset --keep` moves branch, index and files, refusing by itself
when a local change is in the way. Taking patches out is the same move in the other direction, or a rehearsed revert.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import Refused, UnslothExtError, UsageError
from .export import committed
from .git import data, git, git_bytes, names, run, text
from .journal import Journal
from .layout import Series
from .mail import ID, REVERTS, MailPatch, split_message, values
from .rehearse import (
    ALREADY,
    CONFLICT,
    REVERTED,
    TAKEN_OUT,
    Outcome,
    Rehearsal,
    on_base,
    rehearsal,
    try_series,
)

_IN_PROGRESS = {
    "MERGE_HEAD": "a merge",
    "rebase-merge": "a rebase",
    "rebase-apply": "a rebase or git am",
    "CHERRY_PICK_HEAD": "a cherry-pick",
    "REVERT_HEAD": "a revert",
    "index.lock": "another git command (or one that was killed and left index.lock)",
}


@dataclass
class Plan:
    """A rehearsed change: `land` makes it, `take_back` undoes it."""

    outcomes: list[Outcome]
    old: str
    new: str
    stage: Rehearsal
    notes: list[str] = field(default_factory=list)

    @property
    def changes(self) -> bool:
        return self.old != self.new


class GitCheckout:
    """The checkout at `root` (its top folder), with the package of `series` at release `version`."""

    kind = "git checkout"

    def __init__(self, root: Path, series: Series, version: str):
        self.root, self.series, self.version = root, series, version
        self._git_dir = Path(self._git("rev-parse", "--absolute-git-dir"))
        self.journal = Journal(self._git_dir / "unsloth-ext")

    def _git(self, *args: str, **options) -> str:
        return git(self.root, *args, theirs=True, **options)

    def _path(self, name: str) -> Path:
        return Path(self._git("rev-parse", "--path-format=absolute", "--git-path", name))

    @property
    def head(self) -> str:
        found = run(self.root, "rev-parse", "--verify", "-q", "HEAD", theirs=True)
        if found.returncode:
            raise UsageError(f"{self.root} has no commit yet", "Check out a release of upstream first.")
        return text(found.stdout).strip()

    def refuse_unless_ready(self) -> None:
        """Raises Refused when something of the user's is unfinished here."""
        for name, what in _IN_PROGRESS.items():
            if self._path(name).exists():
                hint = "Finish or abort it (git status says how), then try again."
                raise Refused(f"{self.root} is in the middle of {what}; nothing was changed", hint)
        changed = names(
            git_bytes(self.root, "status", "--porcelain", "-z", "--untracked-files=no", "--no-renames", theirs=True)
        )
        if changed:
            listed = "".join(f"\n    {line}" for line in changed)
            hint = "Commit or stash them, then try again."
            raise Refused(f"{self.root} has uncommitted changes; nothing was changed:{listed}", hint)

    def applied(self) -> dict[str, str]:
        """The patches in the history of HEAD that were not taken back again: commit by id."""
        form = ("--format=%H%x00%B%x00", "--encoding=UTF-8", "--no-show-signature")
        log = self._git("log", "-E", f"--grep=^({ID}|{REVERTS}): |^This reverts commit ", *form)
        fields = log.split("\0")
        reverted: set[str] = set()
        found: dict[str, str] = {}
        for commit, message in zip(fields[::2], fields[1::2], strict=False):
            commit = commit.strip()
            if commit in reverted:
                continue
            reverted |= set(re.findall(r"^This reverts commit ([0-9a-f]{40})", message, re.MULTILINE))
            trailers = split_message(message)[1]
            for name in values(trailers, ID)[:1]:
                if not values(trailers, REVERTS):
                    found.setdefault(name, commit)
        return found

    @contextmanager
    def plan(self) -> Iterator[Plan]:
        """The series rehearsed on HEAD, without what is there already."""
        head, applied = self.head, self.applied()
        missing = [patch for patch in self.series.patches if patch.id not in applied]
        with on_base(self.series) as (based, _), self._stage(head, based if missing else None) as stage:
            outcomes = try_series(stage, self.series, self.version, frozenset(applied))
            present = [
                patch for patch, outcome in zip(self.series.patches, outcomes, strict=True) if outcome.result == ALREADY
            ]
            notes = [
                f"{patch.name}: {applied[patch.id][:12]} has other lines than the series has now; to renew it, unapply and apply again"
                for patch in present
                if patch.changed_lines != committed(stage, applied[patch.id]).changed_lines
            ]
            yield Plan(outcomes, head, stage.head, stage, notes)

    @contextmanager
    def plan_removal(self) -> Iterator[Plan]:
        """HEAD moved below the series' commits, or reverts of them when other commits came later."""
        head, applied = self.head, self.applied()
        listed = {patch.id: patch for patch in self.series.patches}
        ours = {
            commit: listed[name] for name, commit in applied.items() if name in listed
        }  # newest first, as in the log
        below, taken = head, set()
        while below in ours:
            taken.add(below)
            below = self._git("rev-parse", f"{below}^")
        with self._stage(head, None) as stage:
            if taken == set(ours):
                outcomes = [Outcome(patch.name, patch.id, TAKEN_OUT, commit) for commit, patch in ours.items()]
                hint = f"HEAD was {head}; `git reset --keep {head[:12]}` brings it back"
                yield Plan(outcomes, head, below, stage, [hint] if ours else [])
            else:
                yield Plan(self._reverted(stage, ours), head, stage.head, stage)

    def _reverted(self, stage: Rehearsal, ours: dict[str, MailPatch]) -> list[Outcome]:
        outcomes = []
        for commit, patch in ours.items():
            before = stage.head
            stage.check_out(patch.files)
            done = run(stage.work, "revert", "--no-edit", commit)
            if done.returncode:
                conflicts = tuple(stage.conflicts(patch, text(done.stdout + b"\n" + done.stderr)))
                stage.back_to(before)
                outcomes.append(Outcome(patch.name, patch.id, CONFLICT, commit, conflicts))
                continue
            message = git(stage.work, "log", "-1", "--format=%B").strip()
            git(stage.work, "commit", "--amend", "--quiet", "-m", f"{message}\n\n{REVERTS}: {patch.id}")
            outcomes.append(Outcome(patch.name, patch.id, REVERTED, stage.head))
        return outcomes

    @contextmanager
    def _stage(self, head: str, based: Rehearsal | None) -> Iterator[Rehearsal]:
        borrowed = [self._path("objects")]
        if based:
            borrowed.append(based.objects)  # which borrows the base itself
        with rehearsal(head, borrowed, self._path("shallow")) as stage:
            yield stage

    def land(self, plan: Plan) -> None:
        """Move branch, index and files to the planned commit. Raises Refused when a file of the user's is in the way."""
        self._refuse_overwriting(plan)
        if run(plan.stage.work, "merge-base", "--is-ancestor", plan.new, plan.old).returncode:
            wanted = data(f"{plan.new}\n^{plan.old}\n")
            pack = git_bytes(plan.stage.work, "pack-objects", "--revs", "--stdout", "--quiet", stdin=wanted)
            git_bytes(self.root, "unpack-objects", "-q", stdin=pack, theirs=True)
        self._move(plan.old, plan.new)

    def take_back(self, plan: Plan) -> None:
        self._move(plan.new, plan.old)

    def _refuse_overwriting(self, plan: Plan) -> None:
        """`git reset --keep` guards untracked files but not those that .gitignore names."""
        added = names(
            git_bytes(
                plan.stage.work, "diff", "--name-only", "-z", "--no-renames", "--diff-filter=A", plan.old, plan.new
            )
        )
        blocked = [path for path in added if self._occupied(path)]
        if blocked:
            listed = "".join(f"\n    {path}" for path in blocked)
            hint = "Move these untracked files away, then try again."
            raise Refused(
                f"{self.root}: the patches would overwrite untracked files; nothing was changed:{listed}", hint
            )

    def _occupied(self, path: str) -> bool:
        place = self.root / path
        above = [parent for parent in place.parents if self.root in parent.parents]
        return place.is_symlink() or place.exists() or any(p.is_symlink() or p.is_file() for p in above)

    def _move(self, old: str, new: str) -> None:
        if self.head != old:
            raise Refused(
                f"{self.root} moved from {old[:12]} meanwhile", "Nothing was changed by this command; try again."
            )
        self.journal.begin({"old": old, "new": new}, {})
        moved = run(self.root, "reset", "--keep", "--quiet", new, theirs=True)
        if moved.returncode:
            self.recover()
            said = text(moved.stderr).strip()
            raise Refused(
                f"git would not change {self.root}; nothing was changed:\n{said}",
                "Clear what git names, then try again.",
            )
        self.journal.end()

    def recover(self) -> str | None:
        """Finish what a killed command left: the tree as it was before. Returns a sentence when there was something to do.

        Raises UnslothExtError when a file was edited since, naming it.
        """
        notes = self.journal.pending()
        if notes is None:
            return None
        old, new = notes["old"], notes["new"]
        if self._path("index.lock").exists():
            lock = self._path("index.lock")
            raise Refused(
                f"a command was interrupted and {lock} exists", f"If no git is running, delete {lock}, then try again."
            )
        done = None
        if self.head == old:  # the branch moves last
            paths = names(git_bytes(self.root, "diff", "--name-only", "-z", "--no-renames", old, new, theirs=True))
            edited = [path for path in paths if not self._restorable(path, old, new)]
            if edited:
                hint = f"Save your edits elsewhere, `git checkout -- FILE` them, and delete {self.journal.folder}."
                raise UnslothExtError(
                    f"a command was interrupted here and these files were edited since: {', '.join(edited)}", hint
                )
            self._git("reset", "--quiet", old, "--", *paths)
            for path in paths:
                if self._blob(path, old):
                    self._git("checkout-index", "--force", "--", path)
                else:
                    (self.root / path).unlink(missing_ok=True)
            done = f"{self.root}: an interrupted command was undone"
        self.journal.end()
        return done

    def _blob(self, path: str, commit: str) -> str:
        return text(run(self.root, "rev-parse", "--verify", "-q", f"{commit}:{path}", theirs=True).stdout).strip()

    def _restorable(self, path: str, old: str, new: str) -> bool:
        """Whether a file holds nothing of the user's: it is as before, as after, or the first part of that."""
        place = self.root / path
        if not place.is_file():
            return not place.exists()
        blobs = [blob for commit in (old, new) if (blob := self._blob(path, commit))]
        if self._git("hash-object", f"--path={path}", str(place)) in blobs:
            return True
        after = self._blob(path, new)
        return bool(after) and git_bytes(
            self.root, "cat-file", "--filters", f"--path={path}", after, theirs=True
        ).startswith(place.read_bytes())
