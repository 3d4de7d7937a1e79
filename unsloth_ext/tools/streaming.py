"""The one reader of model text, and it is incremental: `parsing.parse` feeds it everything at once.

A turn is content, then calls, then a stop token. Where a call may stand:

- after `<|python_tag|>`: JSON, a pythonic list, `<function=...>` or a builtin call; anything else there is code;
- at the beginning of the turn, or right after another call;
- `<function=name>` anywhere;
- after content (the templates write both without a separator): only if nothing but calls follows up to the end of the turn.
  So an example of a call in an explanation, in a code fence or inside a JSON answer stays content.

A call is released once it is complete: before that it is not certain that it is one, and half a call must not run. Content
and the code of a code interpreter are released at once, but for the few characters that may begin a call or a token. Text is
never scanned twice, so the work is linear in its length however it is cut.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .json_calls import call_of_object, tool_names
from .parsed_message import MAX_CALLS, MAX_NAME_CHARS, ParsedMessage, ParseError, ToolCall
from .scanning import DONE, FAILED, OPEN, CallScanner
from .special_tokens import SPECIAL_TOKENS

BUILTIN_TOOLS = ("brave_search", "wolfram_alpha", "code_interpreter")
CODE_INTERPRETER = "code_interpreter"
STOPS = {"<|eot_id|>": "eot", "<|eom_id|>": "eom", "<|end_of_text|>": "eos"}
PAD, START_HEADER, END_HEADER = "<|finetune_right_pad_id|>", "<|start_header_id|>", "<|end_header_id|>"

_CONTROL = re.compile("|".join(map(re.escape, SPECIAL_TOKENS)))
_SPACE = re.compile(r"\s*")
_SEPARATOR = re.compile(r"[\s;]*")
_FUNCTION, _FUNCTION_END = "<function=", "</function>"
_MAX_HEADER = 40


def _proper_prefixes(texts: Iterable[str]) -> frozenset[str]:
    return frozenset(text[:length] for text in texts for length in range(1, len(text)))


_CONTROL_PREFIXES = _proper_prefixes(SPECIAL_TOKENS)
_FUNCTION_END_PREFIXES = _proper_prefixes([_FUNCTION_END])


@dataclass(frozen=True)
class Delta:
    """What a piece of text added: `content`, or of the call number `index` its `name` (once) or a piece of its `arguments` (JSON)."""

    content: str | None = None
    index: int | None = None
    name: str | None = None
    arguments: str | None = None


class StreamingParser:
    """Reads a turn in pieces: `feed` each, then `finish`. The deltas, put together, are the message that `finish` gives.

    tools: as in `parsing.parse`. strict: `feed`, `flush` and `finish` raise ParseError; the parser cannot be used after it.
    """

    def __init__(self, tools: Sequence | None = None, *, strict: bool = False):
        self._strict, self._tools = strict, tool_names(tools)
        builtin = sorted({*BUILTIN_TOOLS, *(self._tools or ())}, key=len, reverse=True)
        openings = [_FUNCTION, *(f"{name}.call(" for name in builtin if len(name) < MAX_NAME_CHARS)]
        self._opening = re.compile("[{[]|" + "|".join(map(re.escape, openings)))
        self._prefixes = _proper_prefixes(openings)
        self._longest_prefix = max(map(len, openings)) - 1
        self._content: list[str] = []
        self._calls: list[ToolCall] = []
        self._stop: str | None = None
        self._out: list[Delta | str] = []  # a str is content: neighbours are joined
        self._unread = ""  # may be the beginning of a control token
        self._rest = ""  # read as plain text, may be the beginning of something
        self._offset = 0  # characters of the text before `_rest`
        self._at = 0  # where the text begins that is being read
        self._flushed = False
        self._state = self._in_content
        self._untouched, self._prose, self._tagged = True, False, False
        self._scanner: CallScanner | None = None
        self._held: list[str] = []  # text of the candidate
        self._block: list[str] | None = None  # text of the calls after content, while they are not certain
        self._tentative: list[ToolCall] = []
        self._gap: list[str] = []  # between a call and what follows it
        self._opened, self._closing = "", False  # how the candidate began; whether </function> may follow
        self._code: list[str] = []
        self._code_known = True

    def feed(self, text_delta: str) -> list[Delta]:
        """The next piece of the model's text, special tokens kept. Gives what is certain by now."""
        if self._flushed:
            raise RuntimeError("feed after flush or finish; make a new StreamingParser for another message")
        text = self._unread + text_delta
        position = 0
        for token in _CONTROL.finditer(text):
            self.feed_plain(text[position : token.start()])
            self.feed_control(token.group())
            position = token.end()
        tail = text.rfind("<", max(position, len(text) - 32))
        tail = tail if tail >= 0 and text[tail:] in _CONTROL_PREFIXES else len(text)
        self._unread = text[tail:]
        self.feed_plain(text[position:tail])
        return self._released()

    def flush(self) -> list[Delta]:
        """The text has ended: what was held back."""
        if not self._flushed:
            self._flushed = True
            self.feed_plain(self._unread)
            self._end_header()
            self._end_segment()
        return self._released()

    def finish(self) -> ParsedMessage:
        """The whole message. Deltas that are still held back: call `flush` before."""
        self.flush()
        return ParsedMessage("".join(self._content), tuple(self._calls), self._stop)

    def _released(self) -> list[Delta]:
        deltas: list[Delta] = []
        content: list[str] = []
        for piece in (*self._out, None):
            if isinstance(piece, str):
                content.append(piece)
                continue
            if content:
                deltas.append(Delta(content="".join(content)))
                content = []
            if piece is not None:
                deltas.append(piece)
        self._out = []
        return deltas

    # Tokens

    def feed_plain(self, text: str) -> None:
        """Text in which nothing is a control token, however it is spelled."""
        if not text:
            return
        if self._stop is not None:
            if self._strict and text.strip():
                raise ParseError(self._offset, "text after the end of the turn")
            return
        text, position = self._rest + text, 0
        self._rest = ""
        while position < len(text):
            self._at = self._offset + position
            after = self._state(text, position)
            if after is None:
                break
            position = after
        else:
            self._offset += len(text)
            return
        self._rest = text[position:]
        self._offset += position

    def feed_control(self, name: str) -> None:
        """A control token."""
        if self._stop is not None:
            if self._strict and name not in STOPS and name != PAD:
                raise ParseError(self._offset, f"{name} after the end of the turn")
        elif name in STOPS:
            self._end_header()
            self._end_segment(stopped=True)
            self._stop = STOPS[name]
        elif name == "<|python_tag|>":
            self._end_header()
            self._end_segment()
            self._state, self._tagged, self._untouched, self._held = self._after_tag, True, False, []
        elif self._untouched and name in (PAD, "<|begin_of_text|>"):
            pass
        elif self._untouched and name == START_HEADER:
            self._state, self._untouched, self._held = self._in_header, False, [name]
        elif name == END_HEADER and self._state == self._in_header:
            self._held, self._state = [], self._after_header
        elif self._strict:
            raise ParseError(self._offset + len(self._rest), f"{name} inside an assistant turn")
        else:
            self.feed_plain(name)
            return
        self._offset += len(name)

    def _in_header(self, text: str, position: int) -> int:
        self._held.append(text[position:])
        if sum(map(len, self._held)) > _MAX_HEADER:
            self._end_header()
        return len(text)

    def _after_header(self, text: str, position: int) -> int | None:
        if len(text) < position + 2 and text[position] == "\n":
            return None
        self._state = self._in_content
        return position + 2 * text.startswith("\n\n", position)

    def _end_header(self) -> None:
        """A header that is none is content."""
        if self._state in (self._in_header, self._after_header):
            if self._strict and self._held:
                raise ParseError(self._offset, "a header that does not end")
            self._write("".join(self._held))
            self._held, self._state = [], self._in_content

    # States: each reads from `position` and gives where it stopped; None: the rest may be the beginning of something.

    def _in_content(self, text: str, position: int) -> int | None:
        self._untouched = False
        opening = self._opening.search(text, position)
        if opening:
            self._write(text[position : opening.start()])
            return self._open(opening)
        end = self._may_begin(text, position)
        self._write(text[position:end])
        if end == len(text):
            return end
        return None if end == position else end

    def _may_begin(self, text: str, position: int) -> int:
        """Where the beginning of an opening may stand at the end of `text`."""
        for start in range(max(position, len(text) - self._longest_prefix), len(text)):
            if text[start:] in self._prefixes:
                return start
        return len(text)

    def _after_tag(self, text: str, position: int) -> int | None:
        start = _SPACE.match(text, position).end()
        if start > position:
            self._held.append(text[position:start])
            return start
        opening = self._opening.match(text, position)
        if opening:
            return self._open(opening)
        if len(text) - position <= self._longest_prefix and text[position:] in self._prefixes:
            return None
        self._held_is_code()
        return position

    def _open(self, opening: re.Match) -> int:
        token = opening.group()
        builtin = token.removesuffix(".call(") if token.endswith(".call(") else None
        after_content = self._prose and self._state == self._in_content and token != _FUNCTION
        if after_content and builtin and builtin not in BUILTIN_TOOLS:  # f.call(...) may be part of a word or of code
            self._write(token)
            return opening.end()
        if after_content:
            self._block = []
        self._scanner = CallScanner("(" if builtin else token, strict=self._strict, name=builtin)
        self._opened = token
        self._held.append(token)
        self._state = self._in_candidate
        return opening.end()

    def _in_candidate(self, text: str, position: int) -> int | None:
        scanner = self._scanner
        end = scanner.feed(text, position)
        self._held.append(text[position:end])
        if scanner.opaque and self._tagged:
            self._held_is_code()
            return end
        if scanner.opaque:
            self._held_is_content()
            if scanner.status is OPEN:
                return end if end > position else None
            self._state = self._in_content
            return end
        if scanner.status is DONE:
            self._complete(scanner, self._offset + end)
        elif scanner.status is FAILED:
            self._no_call(scanner.reason, self._offset + end)
        elif end == position:
            return None
        return end

    def _after_call(self, text: str, position: int) -> int | None:
        start = _SEPARATOR.match(text, position).end()
        if start > position:
            self._between(text[position:start])
            return start
        left = text[position : position + self._longest_prefix + 1]
        if self._closing:
            if left in _FUNCTION_END_PREFIXES:
                return None
            self._closing = False
            if left.startswith(_FUNCTION_END):
                if self._block is not None:
                    self._block.append(_FUNCTION_END)
                return position + len(_FUNCTION_END)
            if self._strict:
                raise ParseError(self._offset + position, f"expected {_FUNCTION_END}")
        opening = self._opening.match(text, position)
        if opening:
            return self._open(opening)
        if left in self._prefixes:
            return None
        self._held_is_content()
        self._state = self._in_content
        return position

    def _in_code(self, text: str, position: int) -> int:
        self._write_code(text[position:])
        return len(text)

    # What was read

    def _write(self, text: str) -> None:
        if text:
            if self._strict and self._calls and not text.isspace():
                raise ParseError(self._at, "text after a call")
            self._content.append(text)
            self._out.append(text)
            self._prose = self._prose or not text.isspace()

    def _between(self, text: str) -> None:
        (self._gap if self._block is None else self._block).append(text)

    def _complete(self, scanner: CallScanner, position: int) -> None:
        calls, reason = self._as_calls(scanner)
        room = MAX_CALLS - len(self._calls) - len(self._tentative)
        if calls and len(calls) > room:
            calls, reason = None, f"a message holds more than {MAX_CALLS} calls"
        if not calls:
            if reason is None and self._tagged:
                self._held_is_code()
            elif reason is None:  # a JSON answer
                self._held_is_content()
                self._state = self._in_content
            else:
                self._no_call(reason, position)
            return
        self._state, self._tagged = self._after_call, False
        self._closing = self._opened == _FUNCTION
        if self._block is not None:
            self._block.extend(self._held)
            self._tentative.extend(calls)
        else:
            self._release(calls)
        self._held, self._gap = [], []

    def _release(self, calls: Sequence[ToolCall]) -> None:
        for call in calls:
            index = len(self._calls)
            self._calls.append(call)
            self._out += (Delta(index=index, name=call.name), Delta(index=index, arguments=call.arguments_json()))

    def _as_calls(self, scanner: CallScanner) -> tuple[list[ToolCall] | None, str | None]:
        """The calls, or none and why; no reason: it is JSON that does not look like a call."""
        if scanner.form == "calls":
            found = scanner.value
        else:
            objects = scanner.value if isinstance(scanner.value, list) else [scanner.value]
            found = []
            for value in objects:
                call, reason = call_of_object(value, strict=self._strict, explicit=self._tagged)
                if call is None:
                    return None, reason
                found.append(call)
        if self._strict and self._tools is not None:
            for name, _ in found:
                if name not in self._tools:
                    return None, f"no tool is called {name[:80]!r}"
        return [
            ToolCall(name, arguments, self._tools is None or name in self._tools) for name, arguments in found
        ], None

    def _no_call(self, reason: str, position: int) -> None:
        """What began as a call is none."""
        scanner = self._scanner
        certain = self._block is None and scanner.call_like
        if self._strict and certain and not (self._tagged and self._python_list()):
            raise ParseError(position, reason)
        if self._tagged and (not scanner.call_like or self._python_list()):
            self._held_is_code()
            return
        self._held_is_content()
        self._state = self._in_content

    def _python_list(self) -> bool:
        """Whether it failed as a list of calls: after the tag that is code, `[f(a=1), 2]`."""
        return self._scanner.status is FAILED and self._opened == "[" and self._scanner.form == "calls"

    def _held_is_content(self) -> None:
        """What was held back is content. The space after a call belongs to it, unless the content begins there."""
        gap, self._gap = "".join(self._gap), []
        self._write(gap if self._content else gap.lstrip(" \t\r\n;"))
        block, self._block, self._tentative = self._block or (), None, []
        held, self._held, self._tagged = self._held, [], False
        self._write("".join((*block, *held)))

    def _held_is_code(self) -> None:
        if len(self._calls) >= MAX_CALLS:
            if self._strict:
                raise ParseError(self._offset, f"a message holds more than {MAX_CALLS} calls")
            self._held_is_content()
            self._state = self._in_content
            return
        held, self._held = self._held, []
        self._begin_code()
        self._write_code("".join(held))

    def _begin_code(self) -> None:
        known = self._tools is None or CODE_INTERPRETER in self._tools
        if self._strict and not known:
            raise ParseError(self._offset, f"code, and no tool is called {CODE_INTERPRETER!r}")
        self._state, self._code_known, self._code = self._in_code, known, []
        index = len(self._calls)
        self._out += (Delta(index=index, name=CODE_INTERPRETER), Delta(index=index, arguments='{"code": "'))

    def _write_code(self, text: str) -> None:
        if text:
            self._code.append(text)
            escaped = json.dumps(text, ensure_ascii=False)[1:-1]
            self._out.append(Delta(index=len(self._calls), arguments=escaped))

    def _end_code(self) -> None:
        self._out.append(Delta(index=len(self._calls), arguments='"}'))
        self._calls.append(ToolCall(CODE_INTERPRETER, {"code": "".join(self._code)}, self._code_known))

    def _end_segment(self, stopped: bool = False) -> None:
        """The turn, or the part of it before a `<|python_tag|>`, is over: what was uncertain is decided."""
        rest, self._rest = self._rest, ""
        if self._state == self._after_tag and (stopped or rest):
            self._held_is_code()
        if self._state == self._in_code:
            self._write_code(rest)
            self._end_code()
        elif self._state == self._in_candidate:
            self._cut_off(rest)
        elif self._state == self._after_call:
            self._end_calls(rest)
        elif self._state == self._in_content:
            self._write(rest)
        self._offset += len(rest)
        self._state, self._tagged, self._scanner = self._in_content, False, None
        self._held, self._gap = [], []

    def _cut_off(self, rest: str) -> None:
        self._held.append(rest)
        if self._strict and self._block is None and self._scanner.call_like and not self._scanner.opaque:
            raise ParseError(self._offset + len(rest), "the text ends inside a call")
        if self._tagged and not self._scanner.call_like:
            self._held_is_code()
            if self._state == self._in_code:
                self._end_code()
        else:
            self._held_is_content()

    def _end_calls(self, rest: str) -> None:
        if self._strict and self._closing:
            raise ParseError(self._offset + len(rest), f"expected {_FUNCTION_END}")
        if rest:
            self._held_is_content()
            self._write(rest)
        self._release(self._tentative)
        self._block, self._tentative = None, []
