"""Reads one possible call, a piece of text at a time: an automaton with a stack, for JSON and for Python's literals.

Every character is looked at once. The automaton never goes back: where it fails, the text so far is no call, and the caller
goes on from the character that did not fit. That makes parsing linear in the length and the same however the text is cut
into pieces. There is no `eval` and no recursion; values are built as they are read.

JSON is RFC 8259. Lenient reading also takes raw line breaks in strings, the escape `\\'`, and Python's True / False / None
(pythonic calls: JSON's true / false / null); of a key that comes twice the last value counts, and half a surrogate pair
becomes U+FFFD. Strict reading refuses all of these. NaN and infinities are refused by both.
"""

from __future__ import annotations

import re
from typing import Any

from .parsed_message import MAX_CALL_CHARS, MAX_DEPTH, MAX_NAME_CHARS, MAX_NUMBER_CHARS
from .string_literal import StringLiteral, Wrong

_CALL_KEYS = frozenset(
    ("name", "type", "function", "parameters", "arguments")
)  # one of them tells a call from an answer
_ALLOWED_KEYS = _CALL_KEYS | {"id", "index"}

_SPACE = re.compile(r"[ \t\r\n]*")
_NUMBER_RUN = re.compile(rf"[-+.0-9eE]{{1,{MAX_NUMBER_CHARS + 1}}}")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?")
_KEYWORD = re.compile(rf"[^\W\d]\w{{0,{MAX_NAME_CHARS - 1}}}")
_DOTTED_NAME = re.compile(rf"[^\W\d][\w.-]{{0,{MAX_NAME_CHARS - 1}}}")
_TAG_NAME = re.compile(rf"[^<>{{}}\s\"]{{1,{MAX_NAME_CHARS}}}")

_JSON_WORDS = {"true": True, "false": False, "null": None}
_PYTHON_WORDS = {"True": True, "False": False, "None": None}

OPEN, DONE, FAILED = "open", "done", "failed"


class CallScanner:
    """One candidate, from its opening (`{`, `[`, `<function=` or a builtin's `name.call(`), which is already read.

    `feed` moves on; then `status` tells whether it is still open, done or failed (`reason`). `value` is what a finished one
    holds: an object or a list of objects ("json"), or a list of (name, arguments) ("calls"; see `form`). `opaque`: it can
    be no call any more and is read on only to find its end. `call_like`: it began as a call does.
    """

    def __init__(self, opening: str, *, strict: bool, name: str | None = None):
        self.strict = strict
        self.status, self.reason, self.form = OPEN, "", "json"
        self.opaque = self.call_like = False
        self.value: Any = None
        self._python = False
        self._stack: list[list] = []  # [kind, container, key]; kinds: object, list, calls, keywords
        self._name = name
        self._read = len(opening)
        self._calls_at = 0  # the depth of the objects that may be calls; 0: none (the body of <function=...>)
        self._string: StringLiteral | None = None
        if opening == "{":
            self._calls_at = 1
            self._push("object", {}, 0)
        elif opening == "[":
            self._state = self._bracket
        elif opening == "<function=":
            self.form, self.call_like, self._state = "calls", True, self._tag_name
        elif opening == "(":  # the arguments of a builtin tool
            self.form, self.value, self.call_like, self._python = "calls", [], True, True
            self._push("keywords", {}, 0)
        else:  # "object": the text is one object and nothing else
            self._state = self._tag_body
            self._name, self.form = "", "calls"

    def feed(self, text: str, position: int) -> int:
        """Read on from `position`; gives the position up to which it has read. What is left needs more text, or did not fit."""
        begin = position
        try:
            while self.status is OPEN:
                before = position
                if self._string is not None:
                    position = self._in_string(text, position)
                else:
                    position = _SPACE.match(text, position).end()
                    if position < len(text):
                        before = position
                        position = self._state(text, position)
                if self._read + position - begin > MAX_CALL_CHARS:
                    raise Wrong(position, f"a call is longer than {MAX_CALL_CHARS} characters")
                if position == before or position >= len(text):
                    break
        except Wrong as wrong:
            position, self.reason = wrong.args
            self.status = FAILED
        self._read += position - begin
        return position

    # Containers

    def _push(self, kind: str, container: Any, position: int) -> None:
        if len(self._stack) >= MAX_DEPTH:
            raise Wrong(position, f"values are nested deeper than {MAX_DEPTH} levels")
        self._stack.append([kind, container, None])
        self._state = {"object": self._first_key, "list": self._first_item, "keywords": self._first_keyword}.get(
            kind, self._call_name
        )

    def _pop(self, position: int) -> int:
        kind, container, _ = self._stack.pop()
        if kind == "keywords":
            self.call_like = True
            self.value.append((self._name, container))
        if not self._stack:
            if self.form == "json":
                self.value = container
            elif kind == "object":
                self.value = [(self._name, container)]
            self.status = DONE
        self._state = self._next
        return position + 1

    def _put(self, value: Any, _: int = 0) -> None:
        kind, container, key = self._stack[-1]
        if kind == "list":
            container.append(value)
        else:
            container[key] = value
        self._state = self._next

    def _key(self, key: str, position: int) -> None:
        frame = self._stack[-1]
        if self.strict and key in frame[1]:
            raise Wrong(position, f"the key {key[:40]!r} comes twice")
        if len(self._stack) == self._calls_at and not self.opaque:
            self.opaque = key not in _ALLOWED_KEYS
            self.call_like = not self.opaque and (self.call_like or key in _CALL_KEYS)
        frame[2] = key
        self._state = self._colon

    # States. Each reads one token at `position`, which holds no space, and gives the position after it; the same position
    # means that the token may go on in the next piece of text.

    def _bracket(self, text: str, position: int) -> int:
        character = text[position]
        if _KEYWORD.match(character):
            self.form, self.value, self._python = "calls", [], True
            self._push("calls", None, position)
            return self._call_name(text, position)
        self._push("list", [], position)
        self._calls_at = 2
        self.opaque = character != "{"  # [] and lists of values: JSON, and no call
        return self._first_item(text, position)

    def _first_item(self, text: str, position: int) -> int:
        return self._pop(position) if text[position] == "]" else self._item(text, position)

    def _item(self, text: str, position: int) -> int:
        character = text[position]
        if character == '"' or (character == "'" and self._python):
            return self._open_string(text, position, self._put)
        if character in "{[":
            container: Any = {} if character == "{" else []
            if len(self._stack) + 1 == self._calls_at and character == "[":
                self.opaque = True
            self._put(container)
            self._push("object" if character == "{" else "list", container, position)
            return position + 1
        if character in "-0123456789":
            return self._number(text, position)
        word = self._word(_KEYWORD, text, position, "a value")
        if word is None:
            return position
        for words in (_PYTHON_WORDS, _JSON_WORDS) if self._python else (_JSON_WORDS, _PYTHON_WORDS):
            if word in words:
                self._put(words[word])
                return position + len(word)
            if self.strict:
                break
        raise Wrong(position, f"{word[:40]!r} is no value")

    def _number(self, text: str, position: int) -> int:
        run = _NUMBER_RUN.match(text, position)
        if len(run.group()) > MAX_NUMBER_CHARS:
            raise Wrong(position, f"a number is longer than {MAX_NUMBER_CHARS} characters")
        if run.end() == len(text):
            return position
        number = _NUMBER.fullmatch(run.group())
        if not number:
            raise Wrong(position, f"{run.group()[:40]!r} is no number")
        value = float(number.group()) if number.group(1) or number.group(2) else int(number.group())
        if value in (float("inf"), float("-inf")):
            raise Wrong(position, f"{number.group()[:40]!r} is too large for a number")
        self._put(value)
        return run.end()

    def _word(self, pattern: re.Pattern, text: str, position: int, wanted: str) -> str | None:
        """The word at `position`; None where it may go on."""
        word = pattern.match(text, position)
        if not word:
            raise Wrong(position, f"expected {wanted}, got {text[position]!r}")
        if len(word.group()) >= MAX_NAME_CHARS:
            raise Wrong(position, f"a name is longer than {MAX_NAME_CHARS - 1} characters")
        return None if word.end() == len(text) else word.group()

    def _first_key(self, text: str, position: int) -> int:
        if text[position] != "}":
            return self._next_key(text, position)
        if len(self._stack) == self._calls_at:
            self.opaque = True
        return self._pop(position)

    def _next_key(self, text: str, position: int) -> int:
        character = text[position]
        if character == '"' or (character == "'" and self._python):
            return self._open_string(text, position, self._key)
        raise Wrong(position, f"expected a key in quotes, got {character!r}")

    def _colon(self, text: str, position: int) -> int:
        return self._expect(":", self._item, text, position)

    def _next(self, text: str, position: int) -> int:
        kind, character = self._stack[-1][0], text[position]
        if character == {"object": "}", "keywords": ")"}.get(kind, "]"):
            return self._pop(position)
        if character != ",":
            raise Wrong(position, f"expected a comma or the end of the {kind}, got {character!r}")
        if self._python:  # Python allows a comma before the closing bracket
            after = {"object": self._first_key, "list": self._first_item, "keywords": self._first_keyword}
        else:
            after = {"object": self._next_key, "list": self._item}
        self._state = after.get(kind, self._first_call_name)
        return position + 1

    def _first_call_name(self, text: str, position: int) -> int:
        return self._pop(position) if text[position] == "]" else self._call_name(text, position)

    def _call_name(self, text: str, position: int) -> int:
        self._state = self._call_name
        name = self._word(_DOTTED_NAME, text, position, "the name of a function")
        if name is None:
            return position
        self._name, self._state = name, self._parenthesis
        return position + len(name)

    def _parenthesis(self, text: str, position: int) -> int:
        position = self._expect("(", self._first_keyword, text, position)
        self._push("keywords", {}, position)
        return position

    def _first_keyword(self, text: str, position: int) -> int:
        if text[position] == ")":
            return self._pop(position)
        keyword = self._word(_KEYWORD, text, position, "an argument's name")
        if keyword is None:
            return position
        if self.strict and keyword in self._stack[-1][1]:
            raise Wrong(position, f"the argument {keyword!r} comes twice")
        self._stack[-1][2], self._state = keyword, self._equals
        return position + len(keyword)

    def _equals(self, text: str, position: int) -> int:
        position = self._expect("=", self._item, text, position)
        self.call_like = True
        return position

    def _tag_name(self, text: str, position: int) -> int:
        if self._name is None:
            name = self._word(_TAG_NAME, text, position, "a function's name")
            if name is None:
                return position
            self._name = name
            return position + len(name)
        return self._expect(">", self._tag_body, text, position)

    def _tag_body(self, text: str, position: int) -> int:
        position = self._expect("{", self._first_key, text, position)
        self._push("object", {}, position)
        return position

    def _expect(self, wanted: str, then, text: str, position: int) -> int:
        if text[position] != wanted:
            raise Wrong(position, f"expected {wanted!r}, got {text[position]!r}")
        self._state = then
        return position + 1

    # Strings

    def _open_string(self, text: str, position: int, then) -> int:
        quote = text[position]
        if self._python and text.startswith(quote * 2, position):
            if position + 2 == len(text):
                return position  # '' or the beginning of '''
            quote *= 3 if text[position + 2] == quote else 1
        elif self._python and position + 1 == len(text):
            return position
        self._string, self._then = StringLiteral(quote, python=self._python, strict=self.strict), then
        return position + len(quote)

    def _in_string(self, text: str, position: int) -> int:
        end = self._string.feed(text, position)
        if (value := self._string.value) is not None:
            self._string = None
            self._then(value, end - 1)
        return end
