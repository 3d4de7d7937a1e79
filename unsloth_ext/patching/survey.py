"""What would the patches do on a release that is not imported here? Judged from its files alone.

The same guards as at run time (release, superseded, fingerprints) over an unpacked wheel or an installed package, so that the
README can show another release and `unsloth-ext status --no-import` answers at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from .patch import Patch
from .registry import PatchStatus, StatusTable, choose_target, judge_source, of_target
from .release import release_in


def survey(patches: Iterable[Patch], folders: Mapping[str, Path]) -> StatusTable:
    """`folders` maps a package ("unsloth") to its folder. The state is `applied` where the patch would be applied."""
    return StatusTable(_judge(patch, folders.get(patch.package)) for patch in patches)


def _judge(patch: Patch, folder: Path | None) -> PatchStatus:
    release = release_in(folder) if folder else None
    verdict, target = choose_target(patch, release)
    if verdict is None:
        verdict = judge_source(patch, target, release, of_target(folder, target), folder) or ("applied", "")
    return PatchStatus.of(patch, *verdict, target, release)
