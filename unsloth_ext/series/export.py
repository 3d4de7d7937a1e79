"""Writing the patch files: from commits to mails that come out byte for byte the same on every machine.

Each commit is replayed in a rehearsal on the base, what it carries from this repository is brought up to date (see rooms.py),
and `git format-patch` writes it with every option that a configuration could change spelled out. So exporting a series that
nobody touched writes what is already there.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from ..errors import Refused, UnslothExtError, UsageError
from .git import git, git_bytes, run
from .layout import Series
from .mail import ID, MailPatch, split_message, values
from .rehearse import CONFLICT, THERE, Rehearsal, base_of, rehearsal
from .rooms import carried_files
from .wheels import write_atomically

# fmt: off
_FORMAT = (
    "format-patch", "--zero-commit", "--no-signature", "--full-index", "--no-numbered", "--no-stat", "--patch", "--binary",
    "--subject-prefix=PATCH", "--suffix=.patch", "--filename-max-length=160", "--no-attach", "--no-thread", "--no-cover-letter",
    "--no-notes", "--no-base", "--encode-email-headers", "--no-to", "--no-cc", "--no-add-header", "--no-color", "--no-ext-diff",
    "--no-textconv", "--no-renames", "--diff-algorithm=myers", "--indent-heuristic", "--unified=3", "--inter-hunk-context=0",
    "--src-prefix=a/", "--dst-prefix=b/", "--no-relative", "--submodule=short", "--no-function-context",
)
# fmt: on


@dataclass(frozen=True)
class Exported:
    """What an export found: file names by what happened to them. All empty but `same` means zero difference."""

    series: str
    written: tuple[str, ...]
    removed: tuple[str, ...]
    same: tuple[str, ...]


def replay(stage: Rehearsal, series: Series, patch: MailPatch, siblings: list[MailPatch]) -> None:
    """Apply a patch in the rehearsal and bring what it carries up to date. Raises UnslothExtError when it does not apply."""
    outcome = stage.am(patch)
    if outcome.result in (CONFLICT, THERE):
        hint = "If code that an earlier patch carries was just changed here, the later patch has to be made anew in a checkout."
        raise UnslothExtError(f"{series.name}: {outcome}", hint)
    wanted = carried_files(series.repository, patch, siblings, stage.read)
    changed = {path: content for path, content in wanted.items() if stage.read(path) != content}
    if changed:
        stage.amend(changed)


def formatted(stage: Rehearsal, start: str) -> dict[str, bytes]:
    """The commits since `start` as patch files, by name, in order."""
    folder = stage.work.parent / "formatted"
    git(stage.work, *_FORMAT, "--output-directory", str(folder), f"{start}..HEAD")
    files = {path.name: path.read_bytes() for path in sorted(folder.glob("*.patch"))}
    shutil.rmtree(folder, ignore_errors=True)
    return files


def committed(stage: Rehearsal, commit: str) -> MailPatch:
    """One commit that the rehearsal can see, as a patch; its content is empty for a merge."""
    return MailPatch(f"commit {commit[:12]}", git_bytes(stage.work, *_FORMAT, "--stdout", "-1", commit))


def rendered(series: Series, patches: list[MailPatch], borrowed: list[Path] | None = None) -> dict[str, bytes]:
    """The files that a series should have, made from `patches` on its base."""
    start, objects = base_of(series)
    with rehearsal(start, [objects, *(borrowed or [])]) as stage:
        for patch in patches:
            replay(stage, series, patch, patches)
        return formatted(stage, start)


def export(series: Series, checkout: Path | None = None) -> Exported:
    """Write a series' patch files anew, from the commits in a patched git checkout or else from the files themselves.

    Raises UsageError or Refused, with nothing written, when the checkout is not one of this base with this kind of commits.
    """
    if checkout is None:
        files = rendered(series, series.patches)
    else:
        patches = _commits(series, checkout)
        objects = Path(git(checkout, "rev-parse", "--path-format=absolute", "--git-path", "objects", theirs=True))
        files = rendered(series, patches, [objects])
    return write_series(series, files)


def write_series(series: Series, files: dict[str, bytes]) -> Exported:
    """Make the folder hold exactly these patches, in this order. Comments in `series` are kept when the list is the same."""
    present = {path.name: path.read_bytes() for path in series.folder.glob("*.patch")}
    written = [name for name, content in files.items() if present.get(name) != content]
    removed = sorted(set(present) - set(files))
    for name in written:
        write_atomically(series.folder / name, files[name])
    listed = series.listed if (series.folder / "series").is_file() else None
    if listed != list(files):
        write_atomically(series.folder / "series", "".join(f"{name}\n" for name in files).encode())
    for name in removed:
        (series.folder / name).unlink()
    return Exported(series.name, tuple(written), tuple(removed), tuple(name for name in files if name not in written))


def _commits(series: Series, checkout: Path) -> list[MailPatch]:
    """Our commits in a checkout, oldest first, each as the mail that it would be."""
    if run(checkout, "rev-parse", "--git-dir", theirs=True).returncode:
        raise UsageError(
            f"{checkout} is no git checkout", "Export from a git clone with the series applied, or give no path at all."
        )
    if git(checkout, "status", "--porcelain", "--untracked-files=no", theirs=True):
        raise Refused(
            f"{checkout} has uncommitted changes", "Commit them into the patch that they belong to, then export."
        )
    found: list[str] = []
    for commit in git(checkout, "rev-list", "--first-parent", "HEAD", theirs=True).split("\n"):
        _, trailers = split_message(git(checkout, "log", "-1", "--format=%B", "--encoding=UTF-8", commit, theirs=True))
        if not values(trailers, ID):
            break
        found.insert(0, commit)
    start = git(checkout, "rev-parse", f"{found[0]}^" if found else "HEAD", theirs=True)
    _check_start(series, checkout, start)
    objects = Path(git(checkout, "rev-parse", "--path-format=absolute", "--git-path", "objects", theirs=True))
    shallow = Path(git(checkout, "rev-parse", "--path-format=absolute", "--git-path", "shallow", theirs=True))
    with rehearsal(start, [objects], shallow) as stage:
        mails = [committed(stage, commit) for commit in found]
    empty = [mail.name for mail in mails if not mail.content]
    if empty:
        hint = "Take them out with `git rebase -i`: a series is a straight line of changes."
        raise Refused(f"{checkout}: these commits are merges or change nothing: {', '.join(empty)}", hint)
    return mails


def _check_start(series: Series, checkout: Path, start: str) -> None:
    """Below our commits the package folder must be the base's, or the patches would be made for something else."""
    here = git(checkout, "rev-parse", f"{start}:{series.package}", theirs=True)
    commit, objects = base_of(series)
    there = git(objects.parent, "rev-parse", f"{commit}:{series.package}")
    if here != there:
        subject = git(checkout, "log", "-1", "--format=%h %s", start, theirs=True)
        raise Refused(
            f"{checkout}: below the last commit without a {ID} trailer ({subject}) the package is not {series.package}"
            f" {series.base.version}",
            f"Give each of your commits a {ID} trailer, on top of release {series.base.version}; for another release use"
            " `unsloth-ext patches rebase`.",
        )
