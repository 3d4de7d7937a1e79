"""Everything that has to hold between a series, this repository and upstream's conventions, found in one pass.

A problem is a sentence; the list is empty when all is well. Nothing is written.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path

from ..errors import UnslothExtError
from .export import formatted, replay
from .git import git_bytes, names, text
from .layout import SERIES_OF, Repository, Series
from .mail import ID, MailPatch
from .rehearse import Rehearsal, base_of, rehearsal
from .rooms import carried_files
from .upstream_format import format_like_upstream, is_formatted_upstream, lint_like_upstream

REQUIRED = ("Forwarded", "Applies-To", "License", ID)
_SHOWN_LINES = 20  # of a difference


def check(repository: Repository) -> list[str]:
    """The problems of all series and of what they share."""
    problems = []
    series = repository.all_series()
    if not series:
        problems.append(
            f"{repository.patches} holds no series; create one with: unsloth-ext patches base unsloth VERSION"
        )
    for one in series:
        try:
            for problem in check_series(one):
                problems.append(f"{one.name}: {problem}")
        except UnslothExtError as error:
            problems.append(f"{one.name}: {error}")
    present = [one for one in series if (one.folder / "series").is_file()]
    patches = [(one, one.folder / name) for one in present for name in one.listed if (one.folder / name).is_file()]
    return problems + list(_companions(repository, [MailPatch.read(path) for _, path in patches]))


def check_series(series: Series) -> Iterator[str]:
    """The problems of one series. Raises UnslothExtError for one that hides the rest: an unreadable BASE, a patch that fails."""
    yield from _listing(series)
    if series.package != SERIES_OF.get(series.name, series.package):
        yield f"BASE is of {series.package}, the folder is for {SERIES_OF[series.name]}"
    for patch in series.patches:
        yield from _trailers(series, patch)
    yield from _shared_names(series)
    yield from _replayed(series)


def _listing(series: Series) -> Iterator[str]:
    present = {path.name for path in series.folder.glob("*.patch")}
    for name in series.listed:
        if series.listed.count(name) > 1:
            yield f"{name} is listed twice in `series`; keep one line"
    for name in sorted(present - set(series.listed)):
        yield f"{name} is not listed in `series`; list it in its place or delete it"


def _trailers(series: Series, patch: MailPatch) -> Iterator[str]:
    for key in REQUIRED:
        if not any(patch.all(key)):
            yield f"{patch.name} has no {key}: trailer; add it to the commit's message and export"
    if not patch.description:
        yield f"{patch.name} does not say why it exists; write that between its subject and its trailers"
    for forwarded in patch.all("Forwarded"):
        if forwarded not in ("not-yet", "no") and not forwarded.startswith("https://"):
            yield f"{patch.name}: Forwarded: {forwarded} is none of not-yet, no, https://..."
    own = [line for line in patch.all("Applies-To") if patch.requirement(line).name.replace("-", "_") == series.package]
    if patch.all("Applies-To") and not own:
        yield f"{patch.name}: no Applies-To line speaks of {series.package}; write: Applies-To: {series.package} >={series.base.version}"
    if not patch.applies_to(series.package, series.base.version):
        yield f"{patch.name}: Applies-To excludes the base {series.base.version}; correct one of the two"


def _shared_names(series: Series) -> Iterator[str]:
    """Two patches with one id could not be told apart in a checkout; two that carry one place would undo each other."""
    owners: dict[str, str] = {}
    for patch in series.patches:
        places = [f"{ID}: {patch.id}"] if patch.id else []
        places += [f"{target}:{source.partition(':')[2]}" for source, target in patch.pairs("Room-Code")]
        places += [target for key in ("Room-File", "Upstream-Test") for _, target in patch.pairs(key)]
        for place in places:
            if place in owners:
                yield f"{owners[place]} and {patch.name} both have {place}; only one patch may"
            owners.setdefault(place, patch.name)


def _replayed(series: Series) -> Iterator[str]:
    """Pristine base, each patch in turn: in sync with this repository, formatted, and exporting as the file that is there."""
    start, objects = base_of(series)
    with rehearsal(start, [objects]) as stage:
        for patch in series.patches:
            before = stage.head
            outcome = stage.am(patch)
            if not outcome.commit:
                raise UnslothExtError(
                    f"{outcome} on its own base", "Repair the patch in a checkout and export it again."
                )
            stale = []
            for path, wanted in carried_files(series.repository, patch, series.patches, stage.read).items():
                if stage.read(path) != wanted:
                    stale.append(path)
                    shown = _difference(
                        stage.read(path) or b"", wanted, f"{path} in the patch", f"{path} from this repository"
                    )
                    yield f"{patch.name} is behind this repository; run: unsloth-ext patches export\n{shown}"
            yield from _style(stage, before, patch)
            if stale:
                stage.back_to(before)
                replay(stage, series, patch, series.patches)
        made = formatted(stage, start)
    if list(made) != series.listed:
        yield f"the files should be named {', '.join(made)}; run: unsloth-ext patches export"
    for patch, content in zip(series.patches, made.values(), strict=True):
        if content != patch.content:
            shown = _difference(patch.content, content, patch.name, "exported again")
            yield f"{patch.name} does not export to itself; run: unsloth-ext patches export\n{shown}"


def _style(stage: Rehearsal, before: str, patch: MailPatch) -> Iterator[str]:
    """What is new, and what was clean, has to be clean. Most of unsloth_zoo is not, and a patch must not reformat it."""
    listed = names(git_bytes(stage.work, "diff", "--name-status", "--no-renames", "-z", before, "HEAD"))
    for status, path in zip(listed[::2], listed[1::2], strict=True):
        if status == "D" or not is_formatted_upstream(path):
            continue
        new = text(stage.read(path) or b"")
        old = None if status == "A" else text(git_bytes(stage.work, "cat-file", "blob", f"{before}:{path}"))
        if old is None or format_like_upstream(old) == old:
            wanted = format_like_upstream(new)
            if wanted != new:
                shown = _difference(new.encode(), wanted.encode(), path, "in upstream's format")
                yield f"{patch.name}: {path} is not in upstream's format; correct it and export\n{shown}"
        known = set() if old is None else {_finding(line) for line in lint_like_upstream(old)}
        for line in lint_like_upstream(new):
            if _finding(line) not in known:
                yield f"{patch.name}: {path}:{line}; correct it and export"


def _finding(line: str) -> str:
    """A linter's line without its position."""
    return line.partition(": ")[2]


def _companions(repository: Repository, patches: list[MailPatch]) -> Iterator[str]:
    """Tests and descriptions: one for each patch, none left over."""
    carried = {source for patch in patches for source, _ in patch.pairs("Upstream-Test")}
    for path in _files(repository.upstream_tests):
        name = path.relative_to(repository.root).as_posix()
        if name not in carried:
            yield f"{name} travels in no patch; name it in one (Upstream-Test: {name} -> tests/...) or delete it"
    described = {patch.stem: patch.name for patch in patches}
    for patch in patches:
        page = repository.descriptions / f"{patch.stem}.md"
        if not page.is_file():
            yield f"{patch.name} has no {page.relative_to(repository.root)}; write it"
        if described[patch.stem] != patch.name:
            yield f"{patch.name} and {described[patch.stem]} share the name {patch.stem}; change a subject"
    for path in _files(repository.descriptions):
        if path.suffix != ".md" or path.stem not in described:
            yield f"{path.relative_to(repository.root)} describes no patch; rename it after the patch file or delete it"


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)


def _difference(old: bytes, new: bytes, old_name: str, new_name: str) -> str:
    lines = list(
        difflib.unified_diff(text(old).split("\n"), text(new).split("\n"), old_name, new_name, lineterm="", n=1)
    )
    more = [f"... {len(lines) - _SHOWN_LINES} more lines"] if len(lines) > _SHOWN_LINES else []
    return "\n".join(f"    {line}" for line in lines[:_SHOWN_LINES] + more)
