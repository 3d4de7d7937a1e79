"""The text of a turn between its control tokens, read in pieces: where a call may stand, and what is one (see `streaming`)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache

from .json_calls import call_of_object, tool_names
from .parsed_message import MAX_CALLS, MAX_NAME_CHARS, ParseError, ToolCall
from .scanning import DONE, FAILED, OPEN, CallScanner
from .turn_output import CODE_INTERPRETER, TurnOutput

BUILTIN_TOOLS = ("brave_search", "wolfram_alpha", CODE_INTERPRETER)

_SPACE = re.compile(r"\s*")
_SEPARATOR = re.compile(r"[\s;]*")
_FUNCTION, _FUNCTION_END = "<function=", "</function>"


def proper_prefixes(texts: Iterable[str]) -> frozenset[str]:
    """What each of the texts may have begun with."""
    return frozenset(text[:length] for text in texts for length in range(1, len(text)))


_FUNCTION_END_PREFIXES = proper_prefixes([_FUNCTION_END])


@lru_cache(maxsize=32)
def _openings(tools: frozenset[str]) -> tuple[re.Pattern, frozenset[str], int]:
    """How a call may begin, what that may have begun with, and the length of the longest such beginning."""
    names = sorted({*BUILTIN_TOOLS, *tools}, key=len, reverse=True)
    openings = [_FUNCTION, *(f"{name}.call(" for name in names if len(name) < MAX_NAME_CHARS)]
    pattern = re.compile("[{[]|" + "|".join(map(re.escape, openings)))
    return pattern, proper_prefixes(openings), max(map(len, openings)) - 1


class TurnReader:
    """Reads plain text (`_read`) in which nothing is a control token; `_end_segment` decides what was uncertain."""

    def __init__(self, tools: Sequence | None, strict: bool, calls_after_content: bool):
        self._strict, self._tools, self._calls_after_content = strict, tool_names(tools), calls_after_content
        self._opening, self._prefixes, self._longest_prefix = _openings(self._tools or frozenset())
        self._turn = TurnOutput()
        self._rest = ""  # may be the beginning of something
        self._offset = 0  # characters of the text before `_rest`
        self._at = 0  # where the text begins that is being read
        self._state = self._in_content
        self._untouched, self._tagged = True, False
        self._scanner: CallScanner | None = None
        self._held: list[str] = []  # text of the candidate
        self._block: list[str] | None = None  # text of the calls after content, while they are not certain
        self._tentative: list[ToolCall] = []
        self._gap: list[str] = []  # between a call and what follows it
        self._opened, self._closing = "", False  # how the candidate began; whether </function> may follow

    def _read(self, text: str) -> None:
        text, position = self._rest + text, 0
        self._rest = ""
        while position < len(text):
            self._at = self._offset + position
            after = self._state(text, position)
            if after is None:
                break
            position = after
        self._rest = text[position:]
        self._offset += position

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
        if self._turn.prose and self._state == self._in_content:
            # f.call(...) of another tool may be part of a word or of code.
            allowed = self._calls_after_content and (builtin is None or builtin in BUILTIN_TOOLS)
            if not allowed or self._turn.in_code_span:
                self._write(token)
                return opening.end()
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
            (self._gap if self._block is None else self._block).append(text[position:start])
            return start
        left = text[position : position + self._longest_prefix + 1]
        if self._closing:
            if left in _FUNCTION_END_PREFIXES:
                return None
            if left.startswith(_FUNCTION_END):
                self._closing = False
                if self._block is not None:
                    self._block.append(_FUNCTION_END)
                return position + len(_FUNCTION_END)
        opening = self._opening.match(text, position)
        if not opening and left in self._prefixes:
            return None
        if self._refused_unclosed(self._offset + position) or not opening:
            self._held_is_content()
            self._state = self._in_content
            return position
        return self._open(opening)

    def _in_code(self, text: str, position: int) -> int:
        self._turn.write_code(text[position:])
        return len(text)

    # What was read

    def _write(self, text: str) -> None:
        if text:
            if self._strict and self._turn.calls and not text.isspace():
                raise ParseError(self._at, "text after a call")
            self._turn.write(text)

    def _refused_unclosed(self, position: int) -> bool:
        """Whether a `<function=...>` without its end is no call. After content that is so where it is strict."""
        unclosed, self._closing = self._closing and self._strict, False
        if unclosed and self._block is None:
            raise ParseError(position, f"expected {_FUNCTION_END}")
        return unclosed

    def _complete(self, scanner: CallScanner, position: int) -> None:
        calls, reason = self._as_calls(scanner)
        room = MAX_CALLS - len(self._turn.calls) - len(self._tentative)
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
            for call in calls:
                self._turn.call(call)
        self._held, self._gap = [], []

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
        if self._tools is not None and (self._strict or self._block is not None):
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
        self._write(gap if self._turn.has_content else gap.lstrip(" \t\r\n;"))
        block, self._block, self._tentative = self._block or (), None, []
        held, self._held, self._tagged = self._held, [], False
        self._write("".join((*block, *held)))

    def _held_is_code(self) -> None:
        if len(self._turn.calls) >= MAX_CALLS:
            if self._strict:
                raise ParseError(self._offset, f"a message holds more than {MAX_CALLS} calls")
            self._held_is_content()
            self._state = self._in_content
            return
        known = self._tools is None or CODE_INTERPRETER in self._tools
        if self._strict and not known:
            raise ParseError(self._offset, f"code, and no tool is called {CODE_INTERPRETER!r}")
        held, self._held, self._state = self._held, [], self._in_code
        self._turn.begin_code(known)
        self._turn.write_code("".join(held))

    def _end_segment(self, stopped: bool = False) -> None:
        """The turn, or the part of it before a `<|python_tag|>`, is over: what was uncertain is decided."""
        rest, self._rest = self._rest, ""
        if self._state == self._after_tag and (stopped or rest):
            self._held_is_code()
        if self._state == self._in_code:
            self._turn.write_code(rest)
            self._turn.end_code()
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
                self._turn.end_code()
        else:
            self._held_is_content()

    def _end_calls(self, rest: str) -> None:
        if self._refused_unclosed(self._offset + len(rest)) or rest:
            self._held_is_content()
            self._write(rest)
        for call in self._tentative:
            self._turn.call(call)
        self._block, self._tentative = None, []
