"""Which release of Unsloth is it? Read from the package's own files, so that it also works for an unpacked wheel, a patched
checkout on PYTHONPATH, or a package that is not imported yet."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

# Where `__version__` has been kept: `_version.py` since 2026.8, `models/_utils.py` before; unsloth_zoo in its `__init__`.
_VERSION_FILES = ("_version.py", "__init__.py", "models/_utils.py")
_VERSION = re.compile(r"""^__version__\s*=\s*["']([0-9][^"']*)["']""", re.MULTILINE)


def folder_of(package: str) -> Path | None:
    """The folder of an installed package, imported or not; None if there is none."""
    module = sys.modules.get(package)
    if module is None:
        from importlib.util import find_spec

        try:
            module_path = getattr(find_spec(package), "submodule_search_locations", None)
        except (ImportError, ValueError):
            return None
    else:
        module_path = getattr(module, "__path__", None)
    from pathlib import Path  # here, not above: 8 ms of the budget of `import unsloth_ext`

    return Path(next(iter(module_path))) if module_path else None


def release_in(folder: Path) -> str | None:
    """The version that a package folder says of itself, e.g. "2026.10.9", or that its installer wrote down beside it."""
    for name in _VERSION_FILES:
        file = folder / name
        if file.is_file() and (found := _VERSION.search(file.read_text(encoding="utf-8", errors="replace"))):
            return found.group(1)
    infos = sorted(folder.parent.glob(f"{folder.name}-*.dist-info"))
    return infos[0].name.removesuffix(".dist-info").partition("-")[2] if len(infos) == 1 else None


def installed_release(package: str) -> str | None:
    """The release of `package` that an import takes, or None if it is not installed."""
    folder = folder_of(package)
    release = release_in(folder) if folder else None
    if release is None:
        from importlib import metadata

        try:
            release = metadata.version(package)
        except metadata.PackageNotFoundError:
            return None
    return release
