"""What of a call to `apply_chat_template` is data, whether it spells a control token, and how its spellings are told from the
template's own: by a mark after each character that could begin one.

Two rules. Control tokens mean nothing in what a user, a tool or a system message says, in tools and in arguments. In what the
assistant says, only those that open a turn mean nothing: people write `<|python_tag|>` and `<|eom_id|>` into the assistant's
content to train on calls, and that stays.
"""

from __future__ import annotations

import numbers
import re
import secrets
from collections.abc import Mapping, Sequence
from datetime import date, time, timedelta
from functools import lru_cache

from .encoding import CONTROL_NAMES

SUBSTITUTE = "\u200b"
OPENS_TURN = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>")
_CLOSED = tuple(name for name in CONTROL_NAMES if name not in OPENS_TURN)
_FIRST = "<"  # of every control token, and nowhere else in one
_LONGEST = max(map(len, CONTROL_NAMES))
_ASSISTANTS = ("assistant", "gpt", "model")
_OWN_WORDS = ("content", "value", "reasoning_content", "reasoning", "thinking")  # of the assistant; its calls are not
_MEDIA = ("image", "audio", "video")  # keys of content parts whose values are no text
_HARMLESS = frozenset((bool, int, float, type(None)))


def _any_of(names) -> re.Pattern:
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))))


def _beginnings(names) -> frozenset[str]:
    return frozenset(name[:end] for name in names for end in range(1, len(name)))


_ALL = _any_of(CONTROL_NAMES), _beginnings(CONTROL_NAMES)
_OPENING = _any_of(OPENS_TURN), _beginnings(OPENS_TURN)
# Where a mark goes: everywhere, or not before a token that the assistant may write.
_EVERYWHERE = re.compile(_FIRST)
_UNLESS_ALLOWED = re.compile(f"{_FIRST}(?!{'|'.join(re.escape(name[1:]) for name in _CLOSED)})")


class _Unfamiliar(Exception):
    """Something that is no text, number, dict, list or tuple."""


def spells_control_tokens(value) -> bool:
    """Does a text in `value` (conversations, tools, ...) spell a control token, or end in the beginning of one?

    Raises _Unfamiliar, for `as_plain` to mend, where it holds anything but JSON's types.
    """
    return _spells(value, _ALL)


def _spells(value, names) -> bool:
    kind = type(value)
    if kind is str:
        last = value.rfind(_FIRST)
        if last < 0:
            return False
        pattern, beginnings = names
        return pattern.search(value) is not None or (len(value) - last < _LONGEST and value[last:] in beginnings)
    if kind in _HARMLESS:
        return False
    if kind is list or kind is tuple:
        return any(_spells(inner, names) for inner in value)
    if kind is dict:
        own = _own_words(value)
        return any(
            _spells(key, names) or _spells(inner, _OPENING if key in own else names) for key, inner in value.items()
        )
    raise _Unfamiliar


def _own_words(message: Mapping) -> tuple[str, ...]:
    return _OWN_WORDS if message.get("role", message.get("from")) in _ASSISTANTS else ()


def as_plain(value):
    """`value` in JSON's types. Raises TypeError for what cannot be looked into: it is not let by."""
    if isinstance(value, (str, bool, int, float, type(None))) and not hasattr(value, "tolist"):  # np.str_ is a str
        return value
    if isinstance(value, Mapping):
        return {
            as_plain(key): inner
            if key in _MEDIA and not isinstance(inner, (str, Mapping, list, tuple))
            else as_plain(inner)
            for key, inner in value.items()
        }
    for method in ("tolist", "to_pylist", "as_py", "model_dump"):  # numpy, pandas and torch; Arrow; pydantic
        if callable(found := getattr(value, method, None)) and not isinstance(value, type):
            return as_plain(found())
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray, memoryview)):
        return [as_plain(inner) for inner in value]
    if callable(value) or isinstance(value, (numbers.Number, date, time, timedelta)):
        return value
    raise TypeError(
        f"a {type(value).__name__} in a conversation, its tools or the template's arguments cannot be searched for special "
        "tokens; pass texts, numbers, dicts and lists, or guard=False to apply_chat_template if it can be trusted"
    )


def new_mark(value) -> str:
    """A string that no text in `value` holds. ASCII letters: it passes through JSON and every filter of a template as it is."""
    while any((mark := secrets.token_hex(8)) in text for text in _texts(value)):
        pass
    return mark


def _texts(value):
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _texts(key)
            yield from _texts(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _texts(inner)


def marked(value, mark: str):
    """`value` with the mark after each character that could begin a control token which means nothing there."""
    return _marked(value, mark, _EVERYWHERE)


def _marked(value, mark, where):
    if isinstance(value, str):
        return where.sub(_FIRST + mark, value)
    if isinstance(value, Mapping):
        own = _own_words(value)
        return {
            _marked(key, mark, where): _marked(inner, mark, _UNLESS_ALLOWED if key in own else where)
            for key, inner in value.items()
        }
    return [_marked(inner, mark, where) for inner in value] if isinstance(value, (list, tuple)) else value


class Rendered:
    """A template's output for marked data: which of its spellings are control tokens, and what the rest says."""

    def __init__(self, text: str, mark: str, control: frozenset[str]):
        self.text, self.mark, self.pattern = text, mark, _pattern_of(control)

    def pieces(self):
        """(start, piece, is a control token?), in order."""
        place = 0
        for found in self.pattern.finditer(self.text):
            if found.start() > place:
                yield place, self.text[place : found.start()], False
            yield found.start(), found.group(), True
            place = found.end()
        if place < len(self.text):
            yield place, self.text[place:], False

    def unmarked(self, piece: str):
        """The piece without marks, and a function from a place in that to the place in `piece`."""
        from bisect import bisect_right

        stretches = piece.split(self.mark)
        starts, total = [], 0
        for stretch in stretches:
            starts.append(total)
            total += len(stretch)
        return "".join(stretches), lambda place: place + len(self.mark) * (bisect_right(starts, place) - 1)

    def is_forged(self) -> bool:
        """Does what is no control token spell one?"""
        return any(
            self.pattern.search(piece.replace(self.mark, ""))
            for _, piece, is_control in self.pieces()
            if not is_control
        )

    def defused(self) -> str:
        """A plain string in which only the control tokens are spelled: the forged ones hold a zero width space."""
        said = []
        for _, piece, is_control in self.pieces():
            if not is_control:
                piece = piece.replace(self.mark, "")
                piece = self.pattern.sub(lambda found: _FIRST + SUBSTITUTE + found.group()[1:], piece)
            said.append(piece)
        return "".join(said)


_pattern_of = lru_cache(maxsize=16)(_any_of)
