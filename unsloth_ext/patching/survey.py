"""What would the patches do on a release that is not imported here? Judged from its files alone.

The same guards as at run time (release, superseded, fingerprint) over an unpacked wheel or an installed package, so that the
README can show another release and `unsloth-ext status --no-import` answers at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from .fingerprint import of_definition
from .patch import Patch
from .registry import PatchStatus, StatusTable, choose_target, describe_change
from .release import release_in


def survey(patches: Iterable[Patch], folders: Mapping[str, Path]) -> StatusTable:
    """`folders` maps a package ("unsloth") to its folder. The state is `applied` where the patch would be applied."""
    return StatusTable(_judge(patch, folders.get(patch.package)) for patch in patches)


def _judge(patch: Patch, folder: Path | None) -> PatchStatus:
    release = release_in(folder) if folder else None
    verdict, target = choose_target(patch, release)
    if verdict is None:
        file = folder.joinpath(*target.module.split(".")[1:]).with_suffix(".py")
        found = of_definition(file, target.attribute) if file.is_file() else None
        if found in target.fingerprints:
            verdict = ("applied", "")
        else:
            verdict = ("skipped", describe_change(target, release, found))
    state, reason = verdict
    return PatchStatus(
        id=patch.id,
        challenge=patch.challenge,
        state=state,
        reason=reason,
        summary=patch.summary,
        target=str(target or patch.targets[0]),
        release=release or "",
    )
