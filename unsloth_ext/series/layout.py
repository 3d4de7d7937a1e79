"""Where the parts of a contribution stand in this repository, and a series as read from its folder.

patches/<name>/BASE      the release that the series is made for
patches/<name>/series    the patch files, one a line, in the order in which they apply; `#` starts a comment
patches/<name>/*.patch
upstream_tests/<name>/   tests that travel inside the patches
pr_descriptions/<patch name without number>.md
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ..errors import UsageError
from .base import Base
from .mail import MailPatch

SERIES_OF = {"unsloth": "unsloth", "unsloth-zoo": "unsloth_zoo"}  # folder name: import name, as PyPI has them


@dataclass(frozen=True)
class Repository:
    """A checkout of this project."""

    root: Path

    @property
    def patches(self) -> Path:
        return self.root / "patches"

    @property
    def upstream_tests(self) -> Path:
        return self.root / "upstream_tests"

    @property
    def descriptions(self) -> Path:
        return self.root / "pr_descriptions"

    def series(self, name: str) -> Series:
        """One series by its folder name. Raises UsageError when it does not exist."""
        if not (self.patches / name / "BASE").is_file():
            hint = f"Create it with: unsloth-ext patches base {name} VERSION"
            raise UsageError(f"{self.patches / name} has no BASE file", hint)
        return Series(self, name)

    def all_series(self) -> list[Series]:
        return [Series(self, path.parent.name) for path in sorted(self.patches.glob("*/BASE"))]


@dataclass(frozen=True)
class Series:
    """The patches on one package."""

    repository: Repository
    name: str

    @property
    def folder(self) -> Path:
        return self.repository.patches / self.name

    @cached_property
    def base(self) -> Base:
        return Base.read(self.folder / "BASE")

    @property
    def package(self) -> str:
        return self.base.package

    @cached_property
    def listed(self) -> list[str]:
        """The file names in `series`."""
        path = self.folder / "series"
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise UsageError(f"cannot read {path}: {error}", "Create it, empty if there is no patch yet.") from error
        return [name for line in lines if (name := line.partition("#")[0].strip())]

    @cached_property
    def patches(self) -> list[MailPatch]:
        """The listed patches. Raises UsageError for one that is missing."""
        missing = [name for name in self.listed if not (self.folder / name).is_file()]
        if missing:
            hint = "Restore the files, or take their lines out of `series`."
            raise UsageError(f"{self.folder / 'series'} lists files that do not exist: {', '.join(missing)}", hint)
        return [MailPatch.read(self.folder / name) for name in self.listed]


def find_repository(root: str | None = None) -> Repository:
    """The checkout at `root`, else the one that this package is imported from, else the one around the current folder."""
    here = Path.cwd()
    candidates = [Path(root)] if root else [Path(__file__).resolve().parents[2], here, *here.parents]
    for candidate in candidates:
        if any((candidate / "patches" / name).is_dir() for name in SERIES_OF):
            return Repository(candidate.resolve())
    where = f"{root} holds no" if root else "neither this installation nor the current folder holds a"
    raise UsageError(
        f"{where} patches/unsloth folder",
        "The patch files live in the repository: clone it and run the command there, or give --root PATH.",
    )
