"""One form for a conversation, whatever its dataset held.

The formats of Llama 3.x are written from one canonical message (plain dicts in OpenAI's and Hugging Face's shape):

    {"role": "system" | "developer" | "user" | "assistant" | "tool", "content": str,
     "tool_calls": [{"type": "function", "function": {"name": str, "arguments": dict}}]}      # only where there are calls

`id`, `tool_call_id`, `name` and `stop_reason` are kept where they are given; other keys are left out. What a dataset holds
instead, and what becomes of it:

- arguments as a JSON string are parsed, missing ones are {}; a flat call ({"name", "arguments"}) and the older `function_call`
  are calls; a row that went through Arrow has every key of every row, so a None is no value, except in arguments where the
  tool's schema allows null, or where they are a JSON string, into which Arrow cannot write;
- a list of text parts is their text; a tool's result is its text as it is, or one line of JSON where it is a structure;
- `ipython` and `function` are the role `tool`; ShareGPT's from / value are read as role / content.

Everything else is refused: nothing is guessed and no text is dropped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

ROLES = ("system", "developer", "user", "assistant", "tool")
_OTHER_NAMES = {"ipython": "tool", "function": "tool"}
_SHAREGPT = {"human": "user", "gpt": "assistant", "observation": "tool", "function_response": "tool"}
_KEPT = ("tool_call_id", "name", "stop_reason")
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


def normalize(messages: Sequence[Mapping], *, tools: Sequence | None = None) -> list[dict]:
    """The conversation in the canonical form (see above), as new objects.

    `tools` (JSON schemas or functions) are asked which arguments may be null. Raises MessageError, which names the message,
    the field, its value and what to do.
    """
    schemas = _prepared(messages, tools)
    return [_message(index, message, schemas) for index, message in enumerate(messages)]


def problems(messages: Sequence[Mapping], *, tools: Sequence | None = None) -> list[MessageError]:
    """What `normalize` would refuse: the first error of each message, where it stops at the first of all."""
    found = []
    try:
        schemas = _prepared(messages, tools)
    except MessageError as error:
        return [error]
    for index, message in enumerate(messages):
        try:
            _message(index, message, schemas)
        except MessageError as error:
            found.append(error)
    return found


def _prepared(messages: Any, tools: Sequence | None) -> dict:
    """The tools' parameter schemas by name, once it is clear that there are messages."""
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise MessageError(None, "its type", type(messages).__name__, "it must be a list of messages")
    if not messages:
        raise MessageError(None, "it", [], "it must have at least one message")
    schemas = {}
    for tool in tool_schemas(tools) or ():
        function = tool.get("function") if isinstance(tool.get("function"), Mapping) else tool
        schemas[function.get("name")] = function.get("parameters")
    return schemas


def tool_schemas(tools: Sequence | None) -> list[dict] | None:
    """The tools as JSON schemas; None where there are none. Functions are read by transformers' `get_json_schema`."""
    if not tools:
        return None
    if isinstance(tools, (str, Mapping)):
        raise MessageError(None, "tools", tools, "it must be a list of JSON schemas or functions")
    schemas = []
    for tool in tools:
        if callable(tool):
            from transformers.utils import get_json_schema

            tool = get_json_schema(tool)
        if not isinstance(tool, Mapping):
            raise MessageError(None, "tools", tool, "each tool must be a JSON schema (a dict) or a function")
        schemas.append(tool)
    return schemas


def without_filling(tools: Sequence[Mapping]) -> list[dict]:
    """Tool schemas as they were before Arrow gave each of them every key of every other: keys whose value is None are left out."""

    def clean(value):
        if isinstance(value, Mapping):
            return {key: clean(inner) for key, inner in value.items() if inner is not None}
        return [clean(inner) for inner in value] if isinstance(value, (list, tuple)) else value

    return [clean(tool) for tool in tools]


def _message(index: int, message: Any, schemas: Mapping) -> dict:
    if not isinstance(message, Mapping):
        raise MessageError(index, "its type", type(message).__name__, "a message must be a dict with role and content")
    if message.get("role") is None and message.get("from") is not None:
        message = {**message, "role": message["from"], "content": message.get("value")}
        message["role"] = _SHAREGPT.get(message["role"], message["role"])
        if message["role"] == "function_call":
            message |= {"role": "assistant", "content": "", "function_call": message["content"]}
    role = message.get("role")
    role = _OTHER_NAMES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise MessageError(index, "role", message.get("role"), f"it must be one of {', '.join(ROLES)} (or ipython)")
    calls = _calls(index, message)
    if calls and role != "assistant":
        raise MessageError(
            index, "tool_calls", calls, f"only the assistant calls tools, and this message is the {role}'s"
        )
    if "content" not in message and not calls:
        raise MessageError(index, "content", None, "it is missing; give a text, which may be empty")
    canonical = {"role": role, "content": _content(index, role, message.get("content"))}
    if calls:
        canonical["tool_calls"] = [
            _call(index, f"tool_calls[{place}]", call, schemas) for place, call in enumerate(calls)
        ]
    for key in _KEPT:
        if message.get(key) is not None:
            canonical[key] = message[key]
    return canonical


def _content(index: int, role: str, content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return _text(index, "content", content)
    if isinstance(content, (list, tuple)) and (role != "tool" or _is_parts(content)):
        return "".join(_part(index, place, part) for place, part in enumerate(content))
    if role != "tool":
        raise MessageError(index, "content", content, "it must be a text or a list of text parts")
    return json.dumps(_value(index, "content", content, None, keep_null=True), ensure_ascii=False)


def _is_parts(content: Sequence) -> bool:
    return bool(content) and isinstance(content[0], Mapping) and content[0].get("type") == "text"


def _part(index: int, place: int, part: Any) -> str:
    if isinstance(part, Mapping) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        part = part["text"]
    if not isinstance(part, str):
        remedy = "only text parts can be rendered here (images need the processor of a vision model)"
        raise MessageError(index, f"content[{place}]", part, remedy)
    return _text(index, f"content[{place}]", part)


def _calls(index: int, message: Mapping) -> list:
    calls = message.get("tool_calls")
    if isinstance(calls, str):
        calls = _parsed(index, "tool_calls", calls) if calls.strip() else None
    if isinstance(calls, Mapping):
        calls = [calls]
    if calls is not None and not isinstance(calls, (list, tuple)):
        raise MessageError(index, "tool_calls", calls, "it must be a list of calls")
    calls = [call for call in calls or () if call is not None]
    older = message.get("function_call")
    if older is not None and older not in ("", {}, []):
        if calls:
            raise MessageError(index, "function_call", older, "the message has tool_calls too; keep one of them")
        older = _parsed(index, "function_call", older) if isinstance(older, str) else older
        calls = list(older) if isinstance(older, (list, tuple)) else [older]
    return calls


def _call(index: int, field: str, call: Any, schemas: Mapping) -> dict:
    if isinstance(call, str):
        call = _parsed(index, field, call)
    if not isinstance(call, Mapping):
        raise MessageError(index, field, call, "a call must be a dict with the function's name and arguments")
    if call.get("type") not in (None, "function"):
        raise MessageError(index, f"{field}.type", call["type"], "only calls of type function can be rendered")
    function = call.get("function")
    if isinstance(function, str):  # {"function": "name", "arguments": ...}
        function = {"name": function, "arguments": call.get("arguments")}
    function = call if function is None else function
    if not isinstance(function, Mapping):
        raise MessageError(index, f"{field}.function", function, "it must be a dict with name and arguments")
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise MessageError(index, f"{field}.name", name, "give the function's name")
    given = function.get("arguments")
    given = function.get("parameters") if given is None else given
    arguments = _arguments(index, f"{field}.arguments", given, schemas.get(name))
    canonical = {
        "type": "function",
        "function": {"name": _text(index, f"{field}.name", name), "arguments": arguments},
    }
    if call.get("id") is not None:
        canonical["id"] = call["id"]
    return canonical


def _arguments(index: int, field: str, given: Any, schema: Any) -> dict:
    as_text = isinstance(given, str)
    if as_text:
        given = _parsed(index, field, given) if given.strip() else {}
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise MessageError(index, field, given, "it must be a dict, or a JSON string that holds an object")
    return _value(index, field, given, schema, keep_null=as_text)


def _parsed(index: int, field: str, text: str) -> Any:
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


def _value(index: int, field: str, value: Any, schema: Any, keep_null: bool, depth: int = 0) -> Any:
    """A copy that JSON can hold. `keep_null`: None is a value; else it is one only where `schema` allows null."""
    if depth > _MAX_DEPTH:
        raise MessageError(index, field, value, f"it is nested deeper than {_MAX_DEPTH} levels")
    if isinstance(value, Mapping):
        properties = schema.get("properties") if isinstance(schema, Mapping) else None
        properties = properties if isinstance(properties, Mapping) else {}
        copied = {}
        for key, inner in value.items():
            if not isinstance(key, str):
                raise MessageError(index, field, key, "the keys of a JSON object must be strings")
            inner_schema = properties.get(key)
            if inner is not None or keep_null or _allows_null(inner_schema):
                key = _text(index, field, key)
                copied[key] = _value(index, f"{field}.{key}", inner, inner_schema, keep_null, depth + 1)
        return copied
    if isinstance(value, (list, tuple)):
        items = schema.get("items") if isinstance(schema, Mapping) else None
        return [_value(index, f"{field}[{n}]", inner, items, keep_null, depth + 1) for n, inner in enumerate(value)]
    if isinstance(value, str):
        return _text(index, field, value)
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


def _text(index: int, field: str, text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        remedy = "it holds half of a surrogate pair, which is no text; decode it again from its source"
        raise MessageError(index, field, text, remedy) from None
    return str(text)
