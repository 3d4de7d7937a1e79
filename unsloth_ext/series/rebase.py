"""Trying each series on other releases, one or many, and moving it there when all of it fits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from packaging.utils import canonicalize_name
from packaging.version import Version

from ..errors import Refused, UsageError
from .base import Base, make_base, pristine_repository
from .export import Exported, formatted, write_series
from .git import git
from .layout import SERIES_OF, Repository, Series
from .rehearse import CONFLICT, NOT_FOR, THERE, Outcome, Rehearsal, on_base, rehearsal, try_series
from .wheels import (
    checked_version,
    fetch_wheel,
    metadata_requirement,
    release_lock,
    released_versions,
    write_atomically,
)


@dataclass(frozen=True)
class Trial:
    """One series on one release."""

    series: str
    release: str  # of Unsloth, which the release of the zoo goes with
    version: str  # of the package that the series is made on
    base: str
    patches: tuple[Outcome, ...]

    @property
    def fits(self) -> bool:
        return all(outcome.result not in (CONFLICT, NOT_FOR) for outcome in self.patches)

    def as_json(self) -> dict:
        return {**vars(self), "patches": [outcome.as_json() for outcome in self.patches]}

    def __str__(self) -> str:
        head = f"{self.series} {self.version} (series made for {self.base})"
        return "\n".join([head, *("  " + str(outcome).replace("\n", "\n  ") for outcome in self.patches)])


def zoo_version_for(release: str) -> str:
    """The release of unsloth_zoo that goes with one of unsloth: the newest that is not newer than it and that it admits."""
    with release_lock("unsloth", release):
        required = metadata_requirement(fetch_wheel("unsloth", release), "unsloth_zoo") or release
    admitted = [v for v in released_versions("unsloth_zoo") if Version(required) <= Version(v) <= Version(release)]
    return admitted[-1] if admitted else required


def versions_for(repository: Repository, release: str, zoo_version: str | None = None) -> dict[str, str]:
    """The release of each series' package that goes with a release of Unsloth, by series name."""
    versions = {}
    for series in repository.all_series():
        if SERIES_OF.get(series.name) == "unsloth_zoo":
            versions[series.name] = zoo_version or zoo_version_for(release)
        else:
            versions[series.name] = release
    return versions


@contextmanager
def _on_release(series: Series, version: str) -> Iterator[tuple[Rehearsal, list[Outcome]]]:
    repository = pristine_repository(series.package, version, series.base if version == series.base.version else None)
    with on_base(series) as (based, _):
        borrowed = [repository / "objects", based.objects]
        with rehearsal(git(repository, "rev-parse", "base"), borrowed) as stage:
            yield stage, try_series(stage, series, version)


def rebase(
    repository: Repository, release: str, zoo_version: str | None = None, write: bool = False
) -> tuple[list[Trial], list[Exported]]:
    """Try every series on a release; with `write`, make that its base.

    Patches that upstream has by then leave the series. Raises Refused, with nothing written, when one conflicts or excludes the
    release.
    """
    release, zoo_version = checked_version(release), zoo_version and checked_version(zoo_version)
    trials, rewritten = [], []
    for name, version in versions_for(repository, release, zoo_version).items():
        series = repository.series(name)
        with _on_release(series, version) as (stage, outcomes):
            trials.append(Trial(name, release, version, series.base.version, tuple(outcomes)))
            if write and trials[-1].fits:
                rewritten.append((series, make_base(series.package, version), formatted(stage, stage.start)))
    if not write:
        return trials, []
    unfit = [trial for trial in trials if not trial.fits]
    if unfit:
        hint = "Resolve these in a checkout of that release (or correct Applies-To, or take the patch out), then export from it."
        raise Refused("\n".join(["not everything fits; nothing was written", *map(str, unfit)]), hint)
    return trials, [_write(series, base, files) for series, base, files in rewritten]


def _write(series: Series, base: Base, files: dict[str, bytes]) -> Exported:
    base.write(series.folder / "BASE")
    return write_series(Series(series.repository, series.name), files)


def matrix(repository: Repository, releases: int) -> list[Trial]:
    """Every series on each of the newest releases of Unsloth, newest first."""
    trials = []
    for release in reversed(released_versions("unsloth")[-releases:]):
        trials += rebase(repository, release)[0]
    return trials


def new_base(repository: Repository, name: str, version: str) -> Base:
    """Write BASE, and an empty `series` where there is none. Raises Refused when patches were made for another release."""
    name = canonicalize_name(name)
    if name not in SERIES_OF:
        raise UsageError(f"no series is named {name}", f"Give one of {', '.join(SERIES_OF)}.")
    version = checked_version(version)
    series = Series(repository, name)
    listed = (series.folder / "series").is_file() and series.listed
    if listed and series.base.version != version:
        hint = f"Move them with: unsloth-ext patches rebase {version} --write"
        raise Refused(
            f"{series.folder} holds {len(listed)} patches made for {series.base.version}; nothing was written", hint
        )
    base = make_base(SERIES_OF[name], version)
    series.folder.mkdir(parents=True, exist_ok=True)
    base.write(series.folder / "BASE")
    if not (series.folder / "series").is_file():
        write_atomically(series.folder / "series", b"")
    return base


def dropped(trial: Trial) -> list[str]:
    """The patches that a written rebase leaves out because upstream has them."""
    return [outcome.patch for outcome in trial.patches if outcome.result == THERE]
