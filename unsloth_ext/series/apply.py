"""Applying series to a person's trees and taking them out again: rehearse all, then change all, or change nothing.

A target is a git checkout of upstream or a plain installed package; which one is found out from the path. Every refusal comes
before the first change. If the second of two targets fails while it is being changed, the first is put back.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import Refused, UsageError
from ..patching.release import release_in
from .git import run, text
from .git_checkout import GitCheckout
from .layout import Repository, Series
from .plain_tree import PlainTree
from .rehearse import ALREADY, CONFLICT, MERGED, NOT_FOR, REVERTED, TAKEN_OUT, THERE, Outcome

Target = GitCheckout | PlainTree


@dataclass
class Report:
    """What was done to one target."""

    series: str
    path: str
    kind: str
    version: str
    base: str
    changed: bool
    patches: list[Outcome]
    notes: list[str] = field(default_factory=list)

    def as_json(self) -> dict:
        return {**vars(self), "patches": [outcome.as_json() for outcome in self.patches]}

    def __str__(self) -> str:
        results = [outcome.result for outcome in self.patches]
        lines = [f"{self.series}: {self._summary(results)}", f"  {self.kind} {self.path}"]
        lines += [f"  {outcome.result:<16} {outcome.patch}" for outcome in self.patches]
        if THERE in results:
            lines.append(f"  `{THERE}`: this change is already in release {self.version}")
        return "\n".join(lines + [f"  {note}" for note in self.notes])

    def _summary(self, results: list[str]) -> str:
        if not self.changed:
            return "already applied, nothing to do" if ALREADY in results else "nothing to do"
        if TAKEN_OUT in results or REVERTED in results:
            return f"taken out of {self.version}"
        how = "merged onto" if MERGED in results or self.version != self.base else "applied to"
        made_for = f" (series made for {self.base})" if self.version != self.base else ""
        rest = " (the rest; some were applied already)" if ALREADY in results else ""
        return f"{how} {self.version}{made_for}{rest}"


def open_target(series: Series, path: Path) -> Target:
    """The checkout or tree at `path`, which may also be the package folder itself. Raises UsageError when it is neither."""
    path = path.resolve()
    package = series.package
    root = path if (path / package).is_dir() else path.parent
    if not (root / package / "__init__.py").is_file() or root / package not in (path, path / package):
        raise UsageError(
            f"{path} holds no package {package}", f"Give a checkout, or the folder that contains {package}/."
        )
    version = release_in(root / package)
    if version is None:
        raise UsageError(f"{root / package} says its __version__ nowhere", f"Is this the source of {package}?")
    top = run(root, "rev-parse", "--show-toplevel", theirs=True)
    in_git = top.returncode == 0 and Path(text(top.stdout).rstrip("\n")).resolve() == root
    if (root / ".git").exists() and not in_git:
        raise UsageError(
            f"git cannot use the checkout {root}:\n{text(top.stderr).strip()}", "Do what git says, then try again."
        )
    return (GitCheckout if in_git else PlainTree)(root, series, version)


def apply(repository: Repository, paths: dict[str, Path]) -> list[Report]:
    """Apply the series named by each key to the target at its path.

    Raises Refused, with nothing changed anywhere, for a target that is not as it should be or a patch that does not fit.
    """
    return _carry_out(repository, paths, lambda target: target.plan())


def unapply(repository: Repository, paths: dict[str, Path]) -> list[Report]:
    """Take the series out of each target again. Raises like `apply`."""
    return _carry_out(repository, paths, lambda target: target.plan_removal())


def _carry_out(
    repository: Repository, paths: dict[str, Path], planner: Callable[[Target], AbstractContextManager]
) -> list[Report]:
    if not paths:
        raise UsageError("no target given", "Give --unsloth PATH, --zoo PATH, or both.")
    targets = [open_target(repository.series(name), path) for name, path in paths.items()]
    with ExitStack() as stack:
        recovered = []
        for target in targets:
            stack.enter_context(target.journal.locked())
            recovered.append([note] if (note := target.recover()) else [])
            target.refuse_unless_ready()
        plans = []
        for target in targets:
            plan = stack.enter_context(planner(target))
            _refuse_unfit(target, plan.outcomes)
            plans.append(plan)
        landed = []
        try:
            for target, plan in zip(targets, plans, strict=True):
                if plan.changes:
                    target.land(plan)
                    landed.append((target, plan))
        except BaseException:
            for target, plan in reversed(landed):
                target.take_back(plan)
            raise
        return [
            Report(
                target.series.name,
                str(target.root),
                target.kind,
                target.version,
                target.series.base.version,
                plan.changes,
                plan.outcomes,
                notes + plan.notes,
            )
            for target, plan, notes in zip(targets, plans, recovered, strict=True)
        ]


def _refuse_unfit(target: Target, outcomes: list[Outcome]) -> None:
    base, series = target.series.base, target.series
    excluded = [outcome for outcome in outcomes if outcome.result == NOT_FOR]
    if excluded:
        wanted = {patch.name: ", ".join(patch.all("Applies-To")) for patch in series.patches}
        listed = "".join(f"\n    {outcome.patch}: {wanted[outcome.patch]}" for outcome in excluded)
        raise Refused(
            f"{target.root} is {base.package} {target.version}, which these patches exclude; nothing was changed:{listed}",
            f"Use a checkout of release {base.version}, or see what fits: unsloth-ext patches rebase {target.version}",
        )
    conflicts = [outcome for outcome in outcomes if outcome.result == CONFLICT]
    if conflicts:
        listed = "".join(f"\n{outcome}" for outcome in conflicts)
        raise Refused(
            f"{series.name}: {len(conflicts)} of {len(outcomes)} patches do not fit {target.root}"
            f" ({target.version}, series made for {base.version}); nothing was changed:{listed}",
            f"Use a checkout of release {base.version}, or resolve these places in one and export the series from there.",
        )
