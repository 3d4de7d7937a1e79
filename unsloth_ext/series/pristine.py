"""The fingerprint of a definition in a release as pip installs it: what a run-time patch names as the source it was written for."""

from __future__ import annotations

from ..errors import UsageError
from ..patching.fingerprint import of_definition
from .base import pristine_tree
from .layout import Repository
from .wheels import checked_version


def pristine_fingerprint(repository: Repository, module: str, attribute: str, release: str | None = None) -> str:
    """The fingerprint of `module`.`attribute` in the base of its package's series, or in another release of that package.

    Raises UsageError when there is no such series, module or definition.
    """
    package, *inner = module.split(".")
    bases = {series.package: series.base for series in repository.all_series()}
    if package not in bases:
        raise UsageError(f"no series is made on {package!r}", f"Give a module of {' or '.join(bases)}.")
    base = bases[package]
    version = checked_version(release) if release else base.version
    place = pristine_tree(package, version, base if version == base.version else None).joinpath(package, *inner)
    file = place / "__init__.py" if place.is_dir() else place.with_name(f"{place.name}.py")
    if not file.is_file():
        raise UsageError(f"{package} {version} has no module {module}", "Give the module that defines it, with dots.")
    found = of_definition(file, attribute)
    if found is None:
        raise UsageError(
            f"{module} of {package} {version} defines no {attribute}",
            "Give a function, a method as Class.name, or a module-level string.",
        )
    return found
