"""The values in a message: what is text, what JSON can hold, and what becomes of what Arrow, pandas and NumPy make of them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

_MAX_DEPTH = 64  # json.dumps and Jinja recurse: far below Python's limit, far above any real call


class MessageError(ValueError):
    """A message that cannot be rendered. `index` is its place in the conversation (None: the conversation as a whole)."""

    def __init__(self, index: int | None, field: str, value: Any, remedy: str):
        self.index, self.field, self.value, self.remedy = index, field, value, remedy
        shown = repr(value)
        shown = shown if len(shown) <= 120 else shown[:117] + "..."
        where = "the conversation" if index is None else f"message {index}"
        super().__init__(f"{where}: {field} is {shown}; {remedy}")

    def __reduce__(self):  # datasets.map(num_proc=...) sends it between processes
        return type(self), (self.index, self.field, self.value, self.remedy)


def unboxed(value: Any) -> Any:
    """NumPy's arrays as lists and its scalars as Python's; anything else as it is. NumPy is not imported for it."""
    return value.tolist() if type(value).__module__.partition(".")[0] == "numpy" and hasattr(value, "tolist") else value


def unboxed_all(value: Any) -> Any:
    """The same, also inside dicts and lists."""
    value = unboxed(value)
    if isinstance(value, Mapping):
        return {key: unboxed_all(inner) for key, inner in value.items()}
    return [unboxed_all(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def holds_text(value: Any) -> bool:
    """Whether there is a text in it that is more than white space."""
    left = [value]
    while left:
        value = unboxed(left.pop())
        if isinstance(value, str):
            if value.strip():
                return True
        elif isinstance(value, Mapping):
            left += value.values()
        elif isinstance(value, (list, tuple)):
            left += value
    return False


def parsed_json(index: int, field: str, text: str) -> Any:
    """What the JSON `text` holds. Raises MessageError."""

    def refuse(constant):
        raise MessageError(index, field, text, f"{constant} is not JSON; write a number or null")

    try:
        return json.loads(text, parse_constant=refuse)
    except (json.JSONDecodeError, RecursionError) as error:
        raise MessageError(index, field, text, f"it is not valid JSON ({error})") from error
    except MessageError:
        raise
    except ValueError as error:  # an integer beyond sys.get_int_max_str_digits()
        raise MessageError(index, field, text, f"it cannot be read ({error})") from error


def json_value(index: int, field: str, value: Any, schema: Any, keep_null: bool, depth: int = 0) -> Any:
    """A copy that JSON can hold. `keep_null`: None is a value; else it is one only where `schema` allows null.

    Raises MessageError.
    """
    if depth > _MAX_DEPTH:
        raise MessageError(index, field, value, f"it is nested deeper than {_MAX_DEPTH} levels")
    value = unboxed(value)
    if isinstance(value, Mapping):
        properties = schema.get("properties") if isinstance(schema, Mapping) else None
        properties = properties if isinstance(properties, Mapping) else {}
        copied = {}
        for key, inner in value.items():
            if not isinstance(key, str):
                raise MessageError(index, field, key, "the keys of a JSON object must be strings")
            inner_schema = properties.get(key)
            if inner is not None or keep_null or _allows_null(inner_schema):
                key = checked_text(index, field, key)
                copied[key] = json_value(index, f"{field}.{key}", inner, inner_schema, keep_null, depth + 1)
        return copied
    if isinstance(value, (list, tuple)):
        items = schema.get("items") if isinstance(schema, Mapping) else None
        return [json_value(index, f"{field}[{n}]", inner, items, keep_null, depth + 1) for n, inner in enumerate(value)]
    if isinstance(value, str):
        return checked_text(index, field, value)
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        raise MessageError(index, field, value, "JSON has no such number; write a finite one or null")
    raise MessageError(index, field, value, f"a {type(value).__name__} is not JSON; convert it to text or numbers")


def _allows_null(schema: Any) -> bool:
    if not isinstance(schema, Mapping):
        return False
    types = schema.get("type")
    if types == "null" or (isinstance(types, (list, tuple)) and "null" in types) or schema.get("nullable") is True:
        return True
    if isinstance(schema.get("enum"), (list, tuple)) and None in schema["enum"]:
        return True
    return any(_allows_null(choice) for key in ("anyOf", "oneOf") for choice in schema.get(key) or ())


def checked_text(index: int, field: str, text: str) -> str:
    """The text as a str. Raises MessageError for one that UTF-8 cannot hold."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        remedy = "it holds half of a surrogate pair, which is no text; decode it again from its source"
        raise MessageError(index, field, text, remedy) from None
    return str(text)
