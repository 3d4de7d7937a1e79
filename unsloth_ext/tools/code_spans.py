"""Whether a Markdown text, read a piece at a time, has come to stand in code: what is quoted there is no call.

A run of three or more backticks (of tildes: at a line's start) opens a fence. It is closed by one at least as long that stands
alone on its line, or on the line that opened it; a shorter run of backticks is closed by one of the same length, or by the line's
end. In doubt a text is in code: a fence that never ends quotes the rest of the turn. But right after a closing fence it is not, as
the templates write a call without a separator.

Source: CommonMark 0.31, "Fenced code blocks" and "Code spans", of which this is the part that can be decided without looking ahead.
"""

from __future__ import annotations

import re

_MARK = re.compile(r"`+|~+|\n")
_LINE_START = re.compile(r"[\s>*+\-.)0-9]*")  # indentation, quotes and the bullets of lists
_FENCE = 3


class CodeSpans:
    """`feed` the text; then `inside` tells whether its end is in code."""

    def __init__(self):
        self._run, self._length = (
            "",
            0,
        )  # the mark at the end of the text and how often it stands there: more may follow
        self._line_begins = True  # the line holds nothing yet that counts
        self._fence, self._fence_length = "", 0  # the run that opened it
        self._opened_here = self._closes = False  # on this line; this line so far is a closing fence
        self._span = 0  # the length of the run that opened it

    def feed(self, text: str) -> None:
        """The next piece of the text."""
        position = 0
        for mark in _MARK.finditer(text):
            self._words(text[position : mark.start()])
            position = mark.end()
            if mark.group() == "\n":
                self._end_line()
                continue
            if self._run != mark.group()[0]:
                self._end_run()
            self._run, self._length = mark.group()[0], self._length + len(mark.group())
        self._words(text[position:])

    @property
    def inside(self) -> bool:
        """Whether what comes next stands in code, if it is no mark itself."""
        self._end_run()
        return bool((self._fence and not self._closes) or self._span)

    def _words(self, text: str) -> None:
        if text:
            self._end_run()
            self._closes = self._closes and text.isspace()
            self._line_begins = self._line_begins and _LINE_START.fullmatch(text) is not None

    def _end_run(self) -> None:
        if not self._run:
            return
        mark, length, begins = self._run, self._length, self._line_begins
        self._run, self._length, self._line_begins, self._closes = "", 0, False, False
        if self._fence:
            if mark == self._fence and length >= self._fence_length:
                if self._opened_here:
                    self._fence = ""
                else:
                    self._closes = begins
        elif length >= _FENCE and (mark == "`" or begins):
            self._fence, self._fence_length, self._opened_here, self._span = mark, length, True, 0
        elif mark == "`":
            self._span = 0 if self._span == length else self._span or length

    def _end_line(self) -> None:
        self._end_run()
        if self._closes:
            self._fence = ""
        self._line_begins, self._opened_here, self._closes, self._span = True, False, False, 0
