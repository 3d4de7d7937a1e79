"""Is upstream's source still the one that a patch was written against? A hash of the definition answers.

Comments, blank lines and spaces at the end of a line do not count outside of strings (upstream trims its comments often); every
other character does. The text is read from the file that the object came from, so the same hash comes out of a running Unsloth
and out of an unpacked wheel that nobody has imported (`of_definition`), on every Python.
"""

from __future__ import annotations

import io
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path


def of_object(value: Any) -> str | None:
    """The fingerprint of a live function, staticmethod, classmethod or string; None where no source can be found."""
    if isinstance(value, str):
        return _digest(value)
    if isinstance(value, (staticmethod, classmethod)):
        value = value.__func__
    while hasattr(value, "__wrapped__"):
        value = value.__wrapped__
    code = getattr(value, "__code__", None)
    if code is None:
        return None
    import linecache

    lines = linecache.getlines(code.co_filename, getattr(value, "__globals__", None))
    return _of_block(lines, code.co_firstlineno) if lines else None


def of_definition(path: Path, qualified_name: str) -> str | None:
    """The fingerprint of a definition in a source file: a function, a method (`Class.name`), a string or another assignment."""
    text = path.read_text(encoding="utf-8")
    place = _places(text).get(qualified_name)
    if place is None:
        return None
    if isinstance(place, int):  # readlines, as splitlines finds more line ends than Python does
        return _of_block(io.StringIO(text).readlines(), place)
    return _digest(place)


# Patches ask for many definitions of a few large files (32 today), and reading one into a tree takes the time.
@lru_cache(maxsize=64)
def _places(text: str) -> dict[str, int | str]:
    """{qualified name: the first line of a function or method, decorators included, or an assigned string, or another value's source}.

    The last definition of a name is the one that counts; of a class that stands twice, the first.
    """
    import ast

    found: dict[str, int | str] = {}
    lines = text.encode().splitlines(keepends=True)

    def segment(node: ast.expr) -> str:  # as ast.get_source_segment, which splits the whole text each time
        rows = lines[node.lineno - 1 : node.end_lineno]
        rows[-1] = rows[-1][: node.end_col_offset]
        rows[0] = rows[0][node.col_offset :]
        return b"".join(rows).decode()

    def read(body: list[ast.stmt], owner: str) -> None:
        seen: set[str] = set()
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                found[owner + node.name] = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            elif isinstance(node, ast.Assign):
                value = node.value
                whole = isinstance(value, ast.Constant) and isinstance(value.value, str)
                for target in node.targets:
                    if isinstance(target, ast.Name):
                        found[owner + target.id] = value.value if whole else segment(value)
            elif isinstance(node, ast.ClassDef) and node.name not in seen:
                seen.add(node.name)
                read(node.body, f"{owner}{node.name}.")

    read(ast.parse(text).body, "")
    return found


def _of_block(lines: list[str], first_line: int) -> str:
    import inspect

    return _digest(_without_comments("".join(inspect.getblock(lines[first_line - 1 :]))))


def _without_comments(source: str) -> str:
    # Cut by position instead of joining tokens: Python 3.12 splits f-strings into several tokens, 3.11 does not.
    import tokenize

    lines = source.split("\n")
    in_string: set[int] = set()  # lines that end, and so continue, inside a string: there a space counts
    opened = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        kind = tokenize.tok_name[token.type]
        if kind == "COMMENT":
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
        elif kind.endswith("STRING_START"):
            opened.append(token.start[0])
        elif kind == "STRING" or kind.endswith("STRING_END"):
            in_string.update(range(opened.pop() if opened and kind != "STRING" else token.start[0], token.end[0]))
    kept = []
    for number, line in enumerate(lines, 1):
        if number in in_string:
            kept.append(line)
        elif line.strip():
            kept.append(line.rstrip())
    return "\n".join(kept)


def _digest(text: str) -> str:
    import hashlib

    return hashlib.sha256(text.encode()).hexdigest()[:16]
