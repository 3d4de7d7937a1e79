"""Code is written once, in this package, and the exporter carries it into the patches.

A patch names what it carries in its trailers (see mail.py). Sources are read with `ast`, never imported, and rendered in
upstream's format:

- `Room-Code: unsloth_ext.loss.keywords:read -> unsloth_zoo/x.py` replaces the top-level definition `read` (function, class or
  constant) of the target. The target must already define the name: that is how the author of a patch says where it belongs.
- `Room-File: unsloth_ext/nf4/x.py -> unsloth/kernels/x.py` replaces the whole file, except for the comment lines at its very top.
  Those stay as the target has them, because they are the licence header that upstream wants there; ours are left out.
- Imports of our own modules are rewritten to where the modules live upstream: the Room-File pairs of the whole series say where,
  and `Room-Import: our.module -> their.module` lines add to that. An import with no such home is an error.
- `Upstream-Test: upstream_tests/unsloth/tests/test_x.py -> tests/test_x.py` copies the file as it is.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path

from ..errors import UsageError
from .git import data, text
from .layout import Repository
from .mail import MailPatch
from .upstream_format import format_like_upstream

OURS = "unsloth_ext"
_IMPORT = re.compile(r"(\s*(?:from|import)\s+)([.\w]+)")


def carried_files(
    repository: Repository, patch: MailPatch, siblings: list[MailPatch], read: Callable[[str], bytes | None]
) -> dict[str, bytes]:
    """The files of the patched tree that a patch carries from this repository, by path, as they should be.

    `siblings` are the patches of the series, `read(path)` gives a file of the tree with the patch applied, or None.
    Raises UsageError when a source or its place is missing.
    """
    homes = module_homes(patch, siblings)
    wanted: dict[str, bytes] = {}
    for source, target in patch.pairs("Upstream-Test"):
        wanted[target] = _source(repository, patch, source)
    for source, target in patch.pairs("Room-File"):
        current = read(target)
        code = text(_source(repository, patch, source))
        code = _rewritten_imports(code, _module(source), _module(target), homes, f"{patch.name}: {source}")
        body = "\n".join(code.split("\n")[_header_length(code) :]).lstrip("\n")
        header = "\n".join(text(current).split("\n")[: _header_length(text(current))]) if current else ""
        wanted[target] = data(format_like_upstream(f"{header}\n\n{body}" if header else body))
    for source, target in patch.pairs("Room-Code"):
        module, _, name = source.partition(":")
        code = text(_source(repository, patch, module.replace(".", "/") + ".py"))
        definition = _definition(code, name)
        if definition is None:
            raise UsageError(
                f"{patch.name}: {module} defines no {name}", "Correct the Room-Code trailer, or the function's name."
            )
        start, end = definition
        rendered = "\n".join(code.split("\n")[start:end]) + "\n"
        rendered = _rewritten_imports(rendered, module, _module(target), homes, f"{patch.name}: {source}")
        current = wanted.get(target) or read(target)
        place = _definition(text(current), name) if current else None
        if place is None:
            hint = f"Define {name} there once, with any body, to say where it belongs; the exporter fills it in."
            raise UsageError(f"{patch.name}: {target} has no top-level {name}", hint)
        lines = text(current).split("\n")
        lines[place[0] : place[1]] = format_like_upstream(rendered).rstrip("\n").split("\n")
        wanted[target] = data("\n".join(lines))
    return wanted


def module_homes(patch: MailPatch, siblings: list[MailPatch]) -> dict[str, str]:
    """Where our modules live upstream, by dotted name."""
    pairs = [pair for sibling in siblings for pair in sibling.pairs("Room-File")]
    homes = {_module(source): _module(target) for source, target in pairs}
    return homes | dict(patch.pairs("Room-Import"))


def _source(repository: Repository, patch: MailPatch, path: str) -> bytes:
    try:
        return (repository.root / path).read_bytes()
    except OSError as error:
        raise UsageError(
            f"{patch.name} carries {path}, which cannot be read", "Restore the file, or drop the trailer."
        ) from error


def _module(path: str) -> str:
    return str(Path(path).with_suffix("")).replace("/", ".").removesuffix(".__init__")


def _header_length(code: str) -> int:
    """How many lines at the top are comments."""
    lines = code.split("\n")
    return next((at for at, line in enumerate(lines) if not line.startswith("#")), len(lines))


def _definition(code: str, name: str) -> tuple[int, int] | None:
    """The first line (from 0) and the line after the last of a top-level definition, its decorators included."""
    for node in ast.parse(code).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found = node.name == name
            first = min(part.lineno for part in (node, *node.decorator_list))
        else:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            found = any(isinstance(target, ast.Name) and target.id == name for target in targets)
            first = node.lineno
        if found:
            return first - 1, node.end_lineno
    return None


def _rewritten_imports(code: str, module: str, target: str, homes: dict[str, str], where: str) -> str:
    """The code with every import of one of our modules turned to that module's home upstream."""
    lines = code.split("\n")
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom):
            package = module.split(".")[: -node.level] if node.level else []
            imported = ".".join([*package, *(node.module or "").split(".")]).strip(".")
        elif isinstance(node, ast.Import):
            imported = next((name.name for name in node.names if name.name.split(".")[0] == OURS), "")
        else:
            continue
        if imported.split(".")[0] != OURS:
            continue
        if imported not in homes or (isinstance(node, ast.Import) and len(node.names) > 1):
            hint = f"Carry that module with Room-File, or say where it lives: Room-Import: {imported} -> unsloth.some.module"
            raise UsageError(f"{where} line {node.lineno} imports {imported}, which has no home upstream", hint)
        home = homes[imported]
        if isinstance(node, ast.ImportFrom) and home.rpartition(".")[0] == target.rpartition(".")[0]:
            home = f".{home.rpartition('.')[2]}"  # a neighbour: upstream writes `from .utils import`
        line = lines[node.lineno - 1]
        head, tail = line[: node.col_offset], line[node.col_offset :]
        lines[node.lineno - 1] = head + _IMPORT.sub(lambda found, home=home: found.group(1) + home, tail, count=1)
    return "\n".join(lines)
