"""Text of models and users on a terminal: it may neither drive it, nor hide or turn around what is shown."""

from __future__ import annotations

import unicodedata

# Without a width, though Unicode counts them as letters and marks: fillers, joiners and selectors. The two selectors of emoji stay.
_INVISIBLE = frozenset(
    (0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, *range(0x180B, 0x1810), 0x3164, 0xFFA0, *range(0xFE00, 0xFE0E))
) | frozenset(range(0xE0100, 0xE01F0))


def visible(text: str) -> str:
    """The text with control characters (but tab and line feed), direction controls and characters of no width made visible.

    Those below U+0020 and U+007F become Unicode's pictures of them, others `<U+202E>`.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(map(_shown, text))


def _shown(character: str) -> str:
    code = ord(character)
    if character in "\t\n" or (character.isprintable() and code not in _INVISIBLE):
        return character
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "\u2421"
    return character if unicodedata.category(character) == "Zs" else f"<U+{code:04X}>"
