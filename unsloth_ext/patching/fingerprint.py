"""Is upstream's source still the one that a patch was written against? A hash of the definition answers.

Comments, blank lines and spaces at the end of a line do not count outside of strings (upstream trims its comments often); every
other character does. The text is read from the file that the object came from, so the same hash comes out of a running Unsloth
and out of an unpacked wheel that nobody has imported (`of_definition`), on every Python.
"""

from __future__ import annotations

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
    import ast

    text = path.read_text(encoding="utf-8")
    *owners, name = qualified_name.split(".")
    body = ast.parse(text).body
    for owner in owners:
        body = next((node.body for node in body if isinstance(node, ast.ClassDef) and node.name == owner), [])
    found = None
    for node in body:  # the last definition of a name is the one that counts
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name == name:
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found = _of_block(text.splitlines(keepends=True), first)
        elif isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
            if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
                found = _digest(node.value.value)
            else:
                found = _digest(ast.get_source_segment(text, node.value))
    return found


def _of_block(lines: list[str], first_line: int) -> str:
    import inspect

    return _digest(_without_comments("".join(inspect.getblock(lines[first_line - 1 :]))))


def _without_comments(source: str) -> str:
    # Cut by position instead of joining tokens: Python 3.12 splits f-strings into several tokens, 3.11 does not.
    import io
    import tokenize

    lines = source.splitlines()
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
