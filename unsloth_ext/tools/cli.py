"""`unsloth-ext tools render | check | parse`: what a model will see of a file of conversations, before a training run does.

A file holds one JSON value a line: a list of messages, or a row with `messages` (or `conversations`), and perhaps `tools`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import UsageError
from .profiles import PROFILES
from .terminal import visible

_SPELLED = re.compile(
    r"<\|(?:begin_of_text|end_of_text|finetune_right_pad_id|start_header_id|end_header_id|eom_id|eot_id|python_tag"
    r"|step_id|image|reserved_special_token_\d+)\|>"
)


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `tools` and its commands; each parsed result has `handler`, a function from it to an exit code."""
    parser = subparsers.add_parser("tools", help="conversations with tool calls: what the model will see of them")
    commands = parser.add_subparsers(dest="tools_command", required=True, metavar="COMMAND")
    render = commands.add_parser(
        "render",
        help="print each conversation as the model will see it, what is trained on in green",
        description="Prints each conversation as the model will see it. On a terminal, what is trained on is green, control "
        "tokens are dim, and text that only spells a control token is red.",
    )
    check = commands.add_parser(
        "check",
        help="say which messages are malformed (exit code 1) and which spell control tokens",
        description="Says which messages cannot be rendered, and which spell control tokens. Exit code 1 if any cannot.",
    )
    for command, handler in ((render, _render), (check, _check)):
        command.add_argument("file", type=Path, metavar="FILE", help="conversations, one JSON value a line")
        command.add_argument("--profile", choices=tuple(PROFILES), default="hf", help="(default: %(default)s)")
        command.add_argument(
            "--tools", type=Path, metavar="FILE", help="a JSON list of tools, for rows without their own"
        )
        command.add_argument("--builtin-tools", metavar="NAMES", help="for example brave_search,code_interpreter")
        command.add_argument(
            "--ignore", metavar="KEYS", help="keys of messages whose text may be left out, as source,lang"
        )
        command.add_argument("--date", metavar="DATE", help="today's date for the model; 'none' leaves it out")
        command.add_argument("--tokenizer", metavar="PATH", help="a Llama 3 tokenizer: count tokens, use its template")
        command.add_argument("--limit", type=int, metavar="N", help="only the first N conversations")
        command.add_argument("--json", action="store_true", help="print one JSON object a conversation")
        command.set_defaults(handler=handler)
    from .parse_command import add_parse_arguments

    parse = commands.add_parser("parse", help="read a model's text back: content and tool calls")
    add_parse_arguments(parse)
    parse.set_defaults(handler=_parse)


def _parse(args: argparse.Namespace) -> int:
    from .parse_command import run_parse

    return run_parse(args)


@dataclass
class _Conversation:
    """One line of the file, and what became of it."""

    line: int
    problems: list[str] = field(default_factory=list)
    hostile: list[str] = field(default_factory=list)
    parts: list = field(default_factory=list)
    tokens: int | None = None
    trained_tokens: int | None = None

    def as_dict(self) -> dict:
        text, trained = "", []
        for part in self.parts:
            if part.trained:
                trained.append([len(text), len(text) + len(part.text)])
            text += part.text
        whole = {"line": self.line, "text": text if self.parts else None, "trained": trained}
        whole |= {"problems": self.problems, "hostile": self.hostile}
        counts = {"tokens": self.tokens, "trained_tokens": self.trained_tokens}
        return whole | (counts if self.tokens is not None else {})


def _conversations(args: argparse.Namespace) -> Iterator[_Conversation]:
    if args.limit is not None and args.limit < 1:
        raise UsageError(f"--limit must be positive, got {args.limit}.")
    try:
        file = open(args.file, encoding="utf-8-sig")
    except OSError as error:
        raise UsageError(f"{args.file} cannot be read: {error.strerror}.") from error
    tools = _tools(args.tools) if args.tools else None
    tokenizer, base_template = _tokenizer(args.tokenizer)
    options = {
        "profile": args.profile,
        "builtin_tools": _names(args.builtin_tools),
        "date_string": False if args.date == "none" else args.date,
        "base_template": base_template,
    }
    seen = 0
    with file:
        try:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                yield _conversation(number, line, tools, tokenizer, _names(args.ignore), options)
                seen += 1
                if seen == args.limit:
                    break
        except UnicodeDecodeError as error:
            raise UsageError(f"{args.file} is not UTF-8: {error}.") from error
    if not seen:
        raise UsageError(f"{args.file} holds no conversation.", "One JSON value a line: a list of messages, or a row.")


def _conversation(
    number: int, line: str, tools: list | None, tokenizer, ignore: list[str], options: dict
) -> _Conversation:
    from .encoding import encode_segments
    from .messages import normalize, problems
    from .profiles import profile_named
    from .reference import segments

    conversation = _Conversation(number)
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        conversation.problems.append(f"the line is not JSON ({error})")
        return conversation
    try:
        messages = row
        if isinstance(row, dict):
            messages = row.get("messages") if row.get("messages") is not None else row.get("conversations")
            tools = _own_tools(row) or tools
        conversation.problems = [str(problem) for problem in problems(messages, tools=tools, ignore=ignore)]
        if not conversation.problems:
            messages = normalize(messages, tools=tools, ignore=ignore)
            conversation.parts = segments(messages, tools=tools, **options)
    except (ValueError, TypeError, RecursionError) as error:
        conversation.problems.append(str(error))
    for part in conversation.parts:
        if part.kind == "content":
            conversation.hostile += _SPELLED.findall(part.text)
    if tokenizer is not None and conversation.parts:
        try:
            encoded = encode_segments(
                tokenizer, conversation.parts, piecewise=profile_named(options["profile"]).piecewise
            )
        except ValueError as error:
            raise UsageError(str(error)) from error
        conversation.tokens, conversation.trained_tokens = len(encoded.input_ids), sum(encoded.assistant_mask)
    return conversation


def _names(listed: str | None) -> list[str]:
    return [name.strip() for name in (listed or "").split(",") if name.strip()]


def _own_tools(row: dict) -> list | None:
    """The tools of a row, as a list or as the JSON of one. Raises ValueError that names the field."""
    from .messages import without_filling

    own = row.get("tools")
    if isinstance(own, str) and own.strip():
        try:
            own = json.loads(own)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"the row's tools: {row['tools']!r:.80} is not valid JSON ({error})") from error
    if own is None or own == [] or (isinstance(own, str) and not own.strip()):
        return None
    if not isinstance(own, list):
        raise ValueError(f"the row's tools: {own!r:.80} is no list of tool schemas, nor the JSON of one")
    try:
        return without_filling(own)
    except RecursionError:
        raise ValueError("the row's tools: they are nested too deeply") from None


def _tools(path: Path) -> list:
    try:
        tools = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"--tools {path} cannot be read: {error}.", "It holds a JSON list of tool schemas.") from error
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UsageError(f"--tools {path} must hold a JSON list of tool schemas.")
    return tools


def _tokenizer(path: str | None):
    """The tokenizer, and its template if that is one of Llama 3.1; else the installed Unsloth's is taken."""
    if path is None:
        return None, None
    from transformers import AutoTokenizer

    from .templates import prose_of

    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"--tokenizer {path} cannot be loaded: {error}") from error
    try:
        prose_of(tokenizer.chat_template or "")
    except ValueError:
        return tokenizer, None
    return tokenizer, tokenizer.chat_template


def _render(args: argparse.Namespace) -> int:
    failed = 0
    for conversation in _conversations(args):
        failed += bool(conversation.problems)
        if args.json:
            print(_json(conversation.as_dict()))
            continue
        _heading(conversation)
        if sys.stdout.isatty():
            _print_coloured(conversation.parts)
        else:
            print("".join(part.text for part in conversation.parts))
    return 1 if failed else 0


def _check(args: argparse.Namespace) -> int:
    total = failed = hostile = 0
    for conversation in _conversations(args):
        total += 1
        failed += bool(conversation.problems)
        hostile += bool(conversation.hostile)
        if args.json:
            print(_json({k: v for k, v in conversation.as_dict().items() if k not in ("text", "trained")}))
        elif conversation.problems or conversation.hostile:
            _heading(conversation)
    if not args.json:
        print(f"{total} conversations: {failed} malformed, {hostile} spell control tokens.")
        if hostile:
            print("Train on those with the injection guard: unsloth_ext.tools.install_guard(tokenizer).")
    return 1 if failed else 0


def _heading(conversation: _Conversation) -> None:
    counts = (
        ""
        if conversation.tokens is None
        else f" ({conversation.tokens} tokens, {conversation.trained_tokens} trained on)"
    )
    print(f"line {conversation.line}{counts}")
    for problem in conversation.problems:
        print(f"  malformed: {_printable(problem)}")
    if conversation.hostile:
        print(f"  spells control tokens: {' '.join(dict.fromkeys(conversation.hostile))}")


def _printable(text: str) -> str:
    return visible(text) if sys.stdout.isatty() else text


def _json(found: dict) -> str:
    """Readable, but on a terminal, which the text of a row could drive."""
    return json.dumps(found, ensure_ascii=sys.stdout.isatty())


def _print_coloured(parts: list) -> None:
    from rich.console import Console
    from rich.text import Text

    text = Text()
    for part in parts:
        style = "bold green" if part.trained else ""
        if part.kind == "control":
            text.append(part.text, style=f"{style} dim".strip())
            continue
        place = 0
        for found in _SPELLED.finditer(part.text):
            text.append(_printable(part.text[place : found.start()]), style=style)
            text.append(found.group(), style="bold white on red")
            place = found.end()
        text.append(_printable(part.text[place:]), style=style)
    Console(highlight=False, soft_wrap=True).print(text)
