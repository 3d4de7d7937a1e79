"""Reads one string of a call, JSON's or Python's, a piece of text at a time.

Strict reading refuses what lenient reading takes: raw line breaks, the escape `\\'` in JSON, and half a surrogate pair (U+FFFD).
"""

from __future__ import annotations

import re

_SURROGATE = re.compile("[\ud800-\udfff]")
_HEX = re.compile(r"[0-9a-fA-F]*")
_OCTAL = re.compile(r"[0-7]{1,3}")
_PLAIN = {  # what a string holds up to its quote, a backslash or what it may not hold
    (quote, breaks): re.compile(rf"[^{quote}\\{'' if breaks else chr(10) + chr(13)}]+")
    for quote in "\"'"
    for breaks in (False, True)
}
_PLAIN_JSON = re.compile(r'[^"\\\x00-\x1f]+')

_JSON_ESCAPES = {'"': '"', "\\": "\\", "/": "/", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
_PYTHON_ESCAPES = {
    **{"\\": "\\", "'": "'", '"': '"', "a": "\a", "b": "\b", "f": "\f", "n": "\n"},
    **{"r": "\r", "t": "\t", "v": "\v", "\n": ""},
}
_HEX_DIGITS = {"x": 2, "u": 4, "U": 8}


class Wrong(Exception):
    """(position, reason): the text at `position` does not fit."""


class StringLiteral:
    """A string whose opening `quote` is read. `feed` moves on; `value` is None until its closing quote is read."""

    def __init__(self, quote: str, *, python: bool, strict: bool):
        self.value: str | None = None
        self._quote, self._python, self._strict = quote, python, strict
        self._parts: list[str] = []
        if python:
            self._plain = _PLAIN[quote[0], not strict or len(quote) == 3]
        else:
            self._plain = _PLAIN_JSON if strict else _PLAIN['"', True]

    def feed(self, text: str, position: int) -> int:
        """Up to the end of the string, or of the text, or to an escape that is not whole yet. Raises Wrong."""
        plain, quote, parts = self._plain, self._quote, self._parts
        while position < len(text):
            stretch = plain.match(text, position)
            if stretch:
                parts.append(stretch.group())
                position = stretch.end()
                if position == len(text):
                    break
            character = text[position]
            if character == "\\":
                after = self._escape(text, position)
                if after == position:
                    break
                position = after
            elif character != quote[0]:
                raise Wrong(position, f"a string holds {character!r}; it must be escaped")
            elif text.startswith(quote, position):
                self.value = self._finished("".join(parts), position)
                return position + len(quote)
            elif position + 3 > len(text) and quote.startswith(text[position:]):
                break
            else:
                parts.append(character)
                position += 1
        return position

    def _escape(self, text: str, position: int) -> int:
        kind = text[position + 1 : position + 2]
        if not kind:
            return position
        simple = _PYTHON_ESCAPES if self._python else _JSON_ESCAPES
        if kind in simple:
            self._parts.append(simple[kind])
            return position + 2
        if kind == "u" or (self._python and kind in "xU"):
            wanted = _HEX_DIGITS[kind]
            end = _HEX.match(text, position + 2, position + 2 + wanted).end()
            if end < position + 2 + wanted:
                if end == len(text):
                    return position
                raise Wrong(position, f"a \\{kind} escape needs {wanted} hexadecimal digits")
            code = int(text[position + 2 : end], 16)
            if code > 0x10FFFF:
                raise Wrong(position, "a \\U escape is no character")
            self._parts.append(chr(code))
            return end
        if self._python and kind in "01234567":
            octal = _OCTAL.match(text, position + 1)
            if octal.end() == len(text) and len(octal.group()) < 3:
                return position
            self._parts.append(chr(int(octal.group(), 8)))
            return octal.end()
        if self._python and kind != "N":
            self._parts.append("\\" + kind)  # as Python reads it
            return position + 2
        if not self._python and not self._strict and kind == "'":
            self._parts.append(kind)
            return position + 2
        raise Wrong(position, f"\\{kind} is no escape")

    def _finished(self, text: str, position: int) -> str:
        if not _SURROGATE.search(text):
            return text
        # \ud83d\ude00 is one character, written as JSON writes it.
        units = text.encode("utf-16", "surrogatepass")
        try:
            return units.decode("utf-16")
        except UnicodeDecodeError:
            if self._strict:
                raise Wrong(position, "a string holds half of a surrogate pair") from None
            return units.decode("utf-16", "replace")
