"""One form for a conversation, whatever its dataset held.

The formats of Llama 3.x are written from one canonical message (plain dicts in OpenAI's and Hugging Face's shape):

    {"role": "system" | "developer" | "user" | "assistant" | "tool", "content": str,
     "tool_calls": [{"type": "function", "function": {"name": str, "arguments": dict}}]}      # only where there are calls

`id`, `tool_call_id`, `name` and `stop_reason` are kept where they are given; numbers and empty values of other keys are left out.
What a dataset holds instead, and what becomes of it:

- arguments as a JSON string are parsed, missing ones are {}; a flat call ({"name", "arguments"}) and the older `function_call`
  are calls; a row that went through Arrow has every key of every row, so a None is no value, except in arguments where the
  tool's schema allows null, or where they are a JSON string, into which Arrow cannot write;
- a list of text parts is their text; a tool's result is its text as it is, or one line of JSON where it is a structure;
- `ipython` and `function` are the role `tool`; ShareGPT's from / value are read as role / content;
- NumPy's arrays and numbers, which pandas makes of a Parquet file, are lists and numbers.

Everything else is refused: nothing is guessed, and no text is dropped (`reasoning_content`, `refusal`, any unknown key) unless
the caller names its key in `ignore`.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from .message_values import MessageError, checked_text, holds_text, json_value, parsed_json, unboxed, unboxed_all

ROLES = ("system", "developer", "user", "assistant", "tool")
_OTHER_NAMES = {"ipython": "tool", "function": "tool"}
_SHAREGPT = {"human": "user", "gpt": "assistant", "observation": "tool", "function_response": "tool"}
_KEPT = ("tool_call_id", "name", "stop_reason")
_READ = frozenset(("tool_calls", "function_call", *_KEPT))  # and role / content or from / value


def normalize(messages: Sequence[Mapping], *, tools: Sequence | None = None, ignore: Sequence[str] = ()) -> list[dict]:
    """The conversation in the canonical form (see above), as new objects.

    `tools` (JSON schemas or functions) are asked which arguments may be null. `ignore`: keys of messages that the formats have no
    place for and whose text may be left out, ["source"] for one. Raises MessageError, which names the message, the field, its
    value and what to do.
    """
    messages, schemas = _prepared(messages, tools, ignore)
    return [_message(index, message, schemas, ignore) for index, message in enumerate(messages)]


def problems(
    messages: Sequence[Mapping], *, tools: Sequence | None = None, ignore: Sequence[str] = ()
) -> list[MessageError]:
    """What `normalize` would refuse: the first error of each message, where it stops at the first of all."""
    found = []
    try:
        messages, schemas = _prepared(messages, tools, ignore)
    except MessageError as error:
        return [error]
    for index, message in enumerate(messages):
        try:
            _message(index, message, schemas, ignore)
        except MessageError as error:
            found.append(error)
    return found


def _prepared(messages: Any, tools: Sequence | None, ignore: Sequence[str]) -> tuple[Sequence, dict]:
    """The messages, and the tools' parameter schemas by name."""
    if isinstance(ignore, str):
        raise ValueError(f"ignore must be a list of keys, got the text {ignore!r}")
    messages = unboxed(messages)
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise MessageError(None, "its type", type(messages).__name__, "it must be a list of messages")
    if not messages:
        raise MessageError(None, "it", [], "it must have at least one message")
    schemas = {}
    for tool in tool_schemas(tools) or ():
        function = tool.get("function") if isinstance(tool.get("function"), Mapping) else tool
        if isinstance(function.get("name"), str):
            schemas[function["name"]] = function.get("parameters")
    return messages, schemas


def tool_schemas(tools: Sequence | None) -> list[dict] | None:
    """The tools as JSON schemas; None where there are none. Functions are read by transformers' `get_json_schema`."""
    tools = unboxed(tools)
    if not tools:
        return None
    if isinstance(tools, (str, Mapping)) or not isinstance(tools, Iterable):
        raise MessageError(None, "tools", tools, "it must be a list of JSON schemas or functions")
    schemas = []
    for tool in tools:
        if callable(tool):
            from transformers.utils import get_json_schema

            tool = get_json_schema(tool)
        if not isinstance(tool, Mapping):
            raise MessageError(None, "tools", tool, "each tool must be a JSON schema (a dict) or a function")
        schemas.append(unboxed_all(tool))
    return schemas


def without_filling(tools: Sequence[Mapping]) -> list[dict]:
    """Tool schemas as they were before Arrow gave each of them every key of every other: keys whose value is None are left out."""

    def clean(value):
        value = unboxed(value)
        if isinstance(value, Mapping):
            return {key: clean(inner) for key, inner in value.items() if inner is not None}
        return [clean(inner) for inner in value] if isinstance(value, (list, tuple)) else value

    return [clean(tool) for tool in unboxed(tools)]


def _message(index: int, message: Any, schemas: Mapping, ignore: Collection[str]) -> dict:
    if not isinstance(message, Mapping):
        raise MessageError(index, "its type", type(message).__name__, "a message must be a dict with role and content")
    sharegpt = message.get("role") is None and message.get("from") is not None
    _refuse_lost_text(index, message, ("from", "value", *ignore) if sharegpt else ("role", "content", *ignore))
    if sharegpt:
        role = message["from"]
        role = _SHAREGPT.get(role, role) if isinstance(role, str) else role
        message = {**message, "role": role, "content": message.get("value")}
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
    content = unboxed(message.get("content"))
    if content is None and role in ("system", "developer", "user"):
        raise MessageError(index, "content", None, f"it must be the {role}'s text, which may be empty")
    canonical = {"role": role, "content": _content(index, role, content)}
    if calls:
        canonical["tool_calls"] = [
            _call(index, f"tool_calls[{place}]", call, schemas) for place, call in enumerate(calls)
        ]
    for key in _KEPT:
        if message.get(key) is not None:
            canonical[key] = message[key]
    return canonical


def _refuse_lost_text(index: int, message: Mapping, read: Collection[str]) -> None:
    lost = [key for key, value in message.items() if key not in _READ and key not in read and holds_text(value)]
    if lost:
        remedy = f"no format has a place for it; put it into content, or first normalize(messages, ignore={lost}) to leave it out"
        raise MessageError(index, str(lost[0]), message[lost[0]], remedy)


def _content(index: int, role: str, content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return checked_text(index, "content", content)
    if isinstance(content, (list, tuple)) and (role != "tool" or _is_parts(content)):
        return "".join(_part(index, place, part) for place, part in enumerate(content))
    if role != "tool":
        raise MessageError(index, "content", content, "it must be a text or a list of text parts")
    return json.dumps(json_value(index, "content", content, None, keep_null=True), ensure_ascii=False)


def _is_parts(content: Sequence) -> bool:
    return bool(content) and isinstance(content[0], Mapping) and content[0].get("type") == "text"


def _part(index: int, place: int, part: Any) -> str:
    if isinstance(part, Mapping) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        part = part["text"]
    if not isinstance(part, str):
        remedy = "only text parts can be rendered here (images need the processor of a vision model)"
        raise MessageError(index, f"content[{place}]", part, remedy)
    return checked_text(index, f"content[{place}]", part)


def _calls(index: int, message: Mapping) -> list:
    calls = unboxed(message.get("tool_calls"))
    if isinstance(calls, str):
        calls = parsed_json(index, "tool_calls", calls) if calls.strip() else None
    if isinstance(calls, Mapping):
        calls = [calls]
    if calls is not None and not isinstance(calls, (list, tuple)):
        raise MessageError(index, "tool_calls", calls, "it must be a list of calls")
    calls = [call for call in calls or () if call is not None]
    older = unboxed(message.get("function_call"))
    if older is not None and older not in ("", {}, []):
        if calls:
            raise MessageError(index, "function_call", older, "the message has tool_calls too; keep one of them")
        older = parsed_json(index, "function_call", older) if isinstance(older, str) else older
        calls = list(older) if isinstance(older, (list, tuple)) else [older]
    return calls


def _call(index: int, field: str, call: Any, schemas: Mapping) -> dict:
    if isinstance(call, str):
        call = parsed_json(index, field, call)
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
    if given is not None and function.get("parameters") is not None:
        raise MessageError(
            index, f"{field}.parameters", function["parameters"], "the call has arguments too; keep one of them"
        )
    given = function.get("parameters") if given is None else given
    arguments = _arguments(index, f"{field}.arguments", given, schemas.get(name))
    canonical = {
        "type": "function",
        "function": {"name": checked_text(index, f"{field}.name", name), "arguments": arguments},
    }
    if call.get("id") is not None:
        canonical["id"] = call["id"]
    return canonical


def _arguments(index: int, field: str, given: Any, schema: Any) -> dict:
    as_text = isinstance(given, str)
    if as_text:
        given = parsed_json(index, field, given) if given.strip() else {}
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise MessageError(index, field, given, "it must be a dict, or a JSON string that holds an object")
    return json_value(index, field, given, schema, keep_null=as_text)
