"""`unsloth-ext tools parse`: what a parser makes of what a model wrote.

The input is one turn as text, or one JSON value a line: a string, a list of token ids, or a row with `text`, `completion`,
`response` or `ids`. Token ids need --tokenizer.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import UsageError
from .terminal import visible

_FIELDS = ("text", "completion", "response", "ids")


def add_parse_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `parse`."""
    parser.add_argument("file", metavar="FILE", help="what the model wrote: text, or JSON lines; - is standard input")
    parser.add_argument("--strict", action="store_true", help="refuse what is malformed (exit code 1)")
    parser.add_argument("--tools", type=Path, metavar="FILE", help="a JSON list of tools: marks calls of others")
    parser.add_argument("--tokenizer", metavar="PATH", help="for token ids")
    parser.add_argument(
        "--no-calls-after-content", action="store_true", help="after content, no call but one with its tag"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object a turn")


def run_parse(arguments: argparse.Namespace) -> int:
    """Print the turns of the file. 1 if one was refused (by --strict, or for ids that are none), else 0.

    Raises UsageError for what cannot be read.
    """
    from .parsing import ParseError, parse

    tools = _tools(arguments.tools)
    turns = list(_turns(arguments.file))
    tokenizer = None
    if any(not isinstance(turn, str) for _, turn in turns):
        tokenizer = _tokenizer(arguments.tokenizer, arguments.file)
    refused = 0
    for line, turn in turns:
        try:
            message = parse(
                turn,
                tokenizer=tokenizer,
                tools=tools,
                strict=arguments.strict,
                calls_after_content=not arguments.no_calls_after_content,
            )
        except ValueError as error:
            refused += 1
            found = {"line": line, "error": str(error)}
            if isinstance(error, ParseError):
                found |= {"error": error.reason, "position": error.position}
            _show(found, arguments.json)
            continue
        calls = [
            {"name": call.name, "arguments": call.arguments, **({} if call.known else {"known": False})}
            for call in message.tool_calls
        ]
        _show({"line": line, "content": message.content, "tool_calls": calls, "stop": message.stop}, arguments.json)
    return 1 if refused else 0


def _show(found: dict, as_json: bool) -> None:
    if as_json:
        print(json.dumps(found))
        return
    where = f"{found['line']}: " if found["line"] else ""
    if "error" in found:
        place = f" at character {found['position']}" if "position" in found else ""
        print(f"{where}refused{place}: {visible(found['error'])}")
        return
    # json.dumps keeps what a model wrote from driving the terminal.
    if found["content"] or not found["tool_calls"]:
        print(f"{where}content {json.dumps(found['content'])}")
    for call in found["tool_calls"]:
        unknown = "" if call.get("known", True) else "  (no such tool)"
        print(f"{where}call {_printable(call['name'])} {json.dumps(call['arguments'])}{unknown}")
    print(f"{where}stop {found['stop'] or 'none: cut off'}")


def _printable(name: str) -> str:
    return name if name.isascii() and name.isprintable() else json.dumps(name)


def _turns(file: str) -> Iterator[tuple[int, str | list[int]]]:
    """(line, turn): the line is 0 where the whole file is one turn."""
    text = _read(file)
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    rows = [(number, _row(line)) for number, line in lines]
    if not rows:
        raise UsageError(f"{file} is empty.", "Give what a model wrote, with its special tokens.")
    if any(row is None for _, row in rows):  # no JSON lines: the text of one turn
        yield 0, text.removesuffix("\n")
        return
    yield from rows


def _row(line: str) -> str | list[int] | None:
    try:
        value: Any = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if isinstance(value, dict):
        value = next((value[field] for field in _FIELDS if field in value), None)
    is_ids = isinstance(value, list) and value and all(type(one) is int for one in value)
    return value if isinstance(value, str) or is_ids else None


def _read(file: str) -> str:
    try:
        return sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{file} is no UTF-8 text: {error.reason} at byte {error.start}.") from error


def _tools(file: Path | None) -> list | None:
    if file is None:
        return None
    from .json_calls import tool_names

    try:
        tools = json.loads(_read(str(file)))
        tool_names(tools)
    except (ValueError, TypeError) as error:
        raise UsageError(f"--tools {file} is no list of tools: {error}.") from error
    return tools


def _tokenizer(path: str | None, file: str):
    if path is None:
        raise UsageError(
            f"{file} holds token ids; they need --tokenizer.", "Give the folder or the name of the model's tokenizer."
        )
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"--tokenizer {path} cannot be loaded: {str(error).splitlines()[0]}") from error
