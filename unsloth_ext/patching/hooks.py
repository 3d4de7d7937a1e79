"""Run a function right after a module has been executed and before anyone can import from it.

That is the moment to patch: `from unsloth.kernels.utils import fast_dequantize` in fifty modules then binds the replacement,
and nobody has to be chased. (wrapt has such hooks too; its import alone costs more than the whole budget of
`import unsloth_ext`, and a hook there fires at once for a module that another thread is still executing.)
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


class _NotifyingLoader:
    """Stands in for a module's loader while the module is executed, then is gone from it without a trace."""

    def __init__(self, loader: Any, notify: Callable[[ModuleType], None]):
        self._loader = loader
        self._notify = notify

    def __getattr__(self, name: str) -> Any:  # get_source, get_filename, is_package, ...
        if name.startswith("__"):  # copy and pickle ask before there is a `_loader`
            raise AttributeError(name)
        return getattr(self._loader, name)

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if getattr(module, "__loader__", None) is self:
            module.__loader__ = self._loader
        if getattr(module, "__spec__", None) is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        # A module may have put another object in its own place.
        self._notify(sys.modules.get(module.__name__, module))


class PostImportFinder:
    """Calls `notify(module)` for each of `watched` that is imported while this finder stands in `sys.meta_path`.

    An exception from `notify` fails that import; `notify` decides what may escape.
    """

    def __init__(self, notify: Callable[[ModuleType], None]):
        self.watched: set[str] = set()
        self._notify = notify

    def find_spec(self, fullname, path=None, target=None):
        if fullname not in self.watched:
            return None
        for finder in list(sys.meta_path):
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None and hasattr(spec.loader, "exec_module"):
                    spec.loader = _NotifyingLoader(spec.loader, self._notify)
                return spec
        return None

    def watch(self, names: set[str]) -> None:
        self.watched |= names
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)

    def remove(self) -> None:
        self.watched.clear()
        if self in sys.meta_path:
            sys.meta_path.remove(self)


def is_executing(module: ModuleType) -> bool:
    """True while the module's body is still running (its names are not all there yet)."""
    return bool(getattr(getattr(module, "__spec__", None), "_initializing", False))


def rebind_everywhere(replacements: dict[int, Any]) -> None:
    """In every imported module's namespace, put `replacements[id(value)]` in the place of `value`.

    For modules that did `from x import f` before we came, the user's own script included. By identity, so that an equal but
    different function stays, and through `vars`, so that no lazy module is made to load anything.
    """
    if not replacements:
        return
    for module in list(sys.modules.values()):
        try:
            namespace = vars(module)
        except TypeError:  # not a module
            continue
        # A copy first: another thread may be adding names to it while we look.
        for name, value in namespace.copy().items():
            if id(value) in replacements:
                namespace[name] = replacements[id(value)]
