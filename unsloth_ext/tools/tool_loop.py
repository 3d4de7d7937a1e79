"""Generate, read the calls, run the functions that are allowed, tell the model, and so on until it answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .parsing import parse


def run_tool_loop(
    generate: Callable[[list[dict]], str],
    messages: Sequence[dict],
    functions: Mapping[str, Callable[..., Any]],
    *,
    max_turns: int = 8,
    calls_after_content: bool = False,
) -> list[dict]:
    """The conversation with what the model and the tools added; it ends with the model's answer, or after `max_turns` turns.

    generate: from messages to the text of the next assistant turn, special tokens kept.
    functions: the functions that may run, by the name that the model calls. No other runs: a call of an unknown one, with
        arguments that the function does not take, or one that fails, is answered with {"error": ...}. A result is turned into
        JSON where it is no text. Arguments are the model's: a function has to check them.
    calls_after_content: whether a call counts that follows content in the same turn without `<|python_tag|>`. Only for a model
        that was trained on such turns (all profiles but meta-3.1 write them so): else a call that the model quotes at the end
        of its answer, out of a user's message for one, would run. A call that is the whole turn runs in any case.
    """
    if max_turns < 1:
        raise ValueError(f"max_turns must be positive, got {max_turns}")
    messages = list(messages)
    for _ in range(max_turns):
        turn = parse(generate(messages), tools=list(functions), calls_after_content=calls_after_content)
        messages.append(turn.as_message())
        if not turn.tool_calls:
            break
        for call in turn.tool_calls:
            messages.append({"role": "tool", "name": call.name, "content": _run(call, functions)})
    return messages


def _run(call, functions: Mapping[str, Callable[..., Any]]) -> str:
    if call.name not in functions:
        return json.dumps({"error": f"no tool is called {call.name[:80]}", "tools": sorted(functions)})
    try:
        result = functions[call.name](**call.arguments)
        return result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)
    except Exception as error:  # whatever a tool raises is the model's to read
        return json.dumps({"error": f"{type(error).__name__}: {error}"[:500]})
