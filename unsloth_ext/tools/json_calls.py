"""Which JSON objects are calls, and which tools there are."""

from __future__ import annotations

from collections.abc import Sequence

from .parsed_message import MAX_NAME_CHARS
from .scanning import DONE, CallScanner

_MARKS = frozenset(("type", "function", "id", "index"))
_FUNCTION = frozenset(("name", "parameters", "arguments"))


def tool_names(tools: Sequence | None) -> frozenset[str] | None:
    """The names in a list of tools: JSON schemas (with or without "function"), functions, or names. None: nothing is known."""
    if tools is None:
        return None
    if isinstance(tools, (str, dict)):
        raise TypeError(f"tools must be a list of JSON schemas, functions or names, got {type(tools).__name__}")
    names = set()
    for tool in tools:
        name = tool
        if isinstance(tool, dict):
            function = tool.get("function")
            name = (function if isinstance(function, dict) else tool).get("name")
        elif callable(tool):
            name = getattr(tool, "__name__", None)
        if not isinstance(name, str) or not name:
            raise TypeError(f"a tool must be a JSON schema with a name, a function or a name, got {tool!r:.100}")
        names.add(name)
    return frozenset(names)


def call_of_object(value: object, *, strict: bool, explicit: bool) -> tuple[tuple[str, dict] | None, str | None]:
    """((name, arguments), None) of a JSON call; (None, reason) of a wrong one; (None, None) of JSON that is no call.

    explicit: the text said that this is a call (`<|python_tag|>`), so the arguments may be missing.
    """
    if not isinstance(value, dict):
        return None, None
    body, inner = value, value.get("function")
    if "type" in value:
        if value["type"] != "function":
            return None, None
        explicit = True
    if isinstance(inner, dict):
        if not value.keys() <= _MARKS or not inner.keys() <= _FUNCTION:
            return None, None  # the description of a tool, for one
        body, explicit = inner, True
    elif not value.keys() <= _MARKS | _FUNCTION:
        return None, None
    name = body.get("name")
    if isinstance(inner, str) and "name" not in value and not strict:
        name = inner  # {"function": "f", "parameters": {...}}
    elif inner is not None and body is value:
        return None, "function must be an object with name and arguments" if strict and isinstance(inner, str) else None
    given = [key for key in ("parameters", "arguments") if key in body]
    if "name" not in body and not isinstance(inner, str) or not (given or explicit):
        return None, None
    if not isinstance(name, str) or not 0 < len(name) < MAX_NAME_CHARS:
        return None, f"a call's name must be a text of 1 to {MAX_NAME_CHARS - 1} characters"
    if len(given) == 2:
        return None, "a call has both parameters and arguments"
    arguments = body[given[0]] if given else {}
    if isinstance(arguments, str) and not strict:
        arguments = _read_object(arguments, strict) if arguments.strip() else {}
    if arguments is None and given and body[given[0]] is None:
        arguments = {}
    if not isinstance(arguments, dict):
        return None, "a call's arguments must be an object"
    return (name, arguments), None


def _read_object(text: str, strict: bool) -> dict | None:
    """The object that `text` holds and nothing else; None where it holds something else."""
    scanner = CallScanner("object", strict=strict)
    end = scanner.feed(text, 0)
    return scanner.value[0][1] if scanner.status is DONE and not text[end:].strip() else None
