"""The one reader of model text, and it is incremental: `parsing.parse` feeds it everything at once.

A turn is content, then calls, then a stop token. Where a call may stand:

- after `<|python_tag|>`: JSON, a pythonic list, `<function=...>` or a builtin call; anything else there is code;
- at the beginning of the turn, or right after such a call, whatever follows it;
- after content (the templates write both without a separator), in each of these forms but code: only if nothing but calls
  follows up to the end of the turn, and not in a code fence or between backticks (see `code_spans`). Where the parser knows the
  tools, only calls of these count there. With `calls_after_content=False` none does.

So an example of a call in an explanation, in a code fence or inside a JSON answer stays content. A spelled `<|python_tag|>` in a
code fence or between backticks is content too; one that comes as a token id is always the token.

What no rule can tell: a turn that ends with a call that it only quotes, bare, of a tool that there is (`You asked about {"name":
"rm", ...}`), reads as the templates' content{call}; so does one that consists of nothing else. What runs calls with an effect
should pass `calls_after_content=False`, unless the model was trained to speak before it calls, and check what it is asked to run.
The other way round, a call that was meant stays content after an odd backtick in its line, or in a fence that was left open.

A call is released once it is complete: before that it is not certain that it is one, and half a call must not run. Content
and the code of a code interpreter are released at once, but for the few characters that may begin a call or a token. Text is
never scanned twice, so the work is linear in its length however it is cut.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from .parsed_message import ParsedMessage, ParseError
from .special_tokens import SPECIAL_TOKENS
from .turn_output import Delta
from .turn_reader import TurnReader, proper_prefixes

STOPS = {"<|eot_id|>": "eot", "<|eom_id|>": "eom", "<|end_of_text|>": "eos"}
PYTHON_TAG, PAD = "<|python_tag|>", "<|finetune_right_pad_id|>"
START_HEADER, END_HEADER = "<|start_header_id|>", "<|end_header_id|>"

_CONTROL = re.compile("|".join(map(re.escape, SPECIAL_TOKENS)))
_CONTROL_PREFIXES = proper_prefixes(SPECIAL_TOKENS)
_MAX_HEADER = 40


class StreamingParser(TurnReader):
    """Reads a turn in pieces: `feed` each, then `finish`. The deltas, put together, are the message that `finish` gives.

    tools, calls_after_content: as in `parsing.parse`. strict: `feed`, `flush` and `finish` raise ParseError; the parser cannot be
    used after it.
    """

    def __init__(self, tools: Sequence | None = None, *, strict: bool = False, calls_after_content: bool = True):
        super().__init__(tools, strict, calls_after_content)
        self._stop: str | None = None
        self._unread = ""  # may be the beginning of a control token
        self._flushed = False

    def feed(self, text_delta: str) -> list[Delta]:
        """The next piece of the model's text, special tokens kept. Gives what is certain by now."""
        if self._flushed:
            raise RuntimeError("feed after flush or finish; make a new StreamingParser for another message")
        text = self._unread + text_delta
        position = 0
        for token in _CONTROL.finditer(text):
            self.feed_plain(text[position : token.start()])
            if token.group() == PYTHON_TAG and self._quotes():
                self.feed_plain(PYTHON_TAG)
            else:
                self.feed_control(token.group())
            position = token.end()
        tail = text.rfind("<", max(position, len(text) - 32))
        tail = tail if tail >= 0 and text[tail:] in _CONTROL_PREFIXES else len(text)
        self._unread = text[tail:]
        self.feed_plain(text[position:tail])
        return self._turn.take()

    def flush(self) -> list[Delta]:
        """The text has ended: what was held back."""
        if not self._flushed:
            self._flushed = True
            self.feed_plain(self._unread)
            self._end_header()
            self._end_segment()
        return self._turn.take()

    def finish(self) -> ParsedMessage:
        """The whole message. Deltas that are still held back: call `flush` before."""
        self.flush()
        return ParsedMessage(self._turn.content, tuple(self._turn.calls), self._stop)

    def feed_plain(self, text: str) -> None:
        """Text in which nothing is a control token, however it is spelled."""
        if not text:
            return
        if self._stop is not None:
            if self._strict and text.strip():
                raise ParseError(self._offset, "text after the end of the turn")
            return
        self._read(text)

    def feed_control(self, name: str) -> None:
        """A control token."""
        if self._stop is not None:
            if self._strict and name not in STOPS and name != PAD:
                raise ParseError(self._offset, f"{name} after the end of the turn")
        elif name in STOPS:
            self._end_header()
            self._end_segment(stopped=True)
            self._stop = STOPS[name]
        elif name == PYTHON_TAG:
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

    def _quotes(self) -> bool:
        """Whether the text stands in code, as Markdown writes it."""
        return self._stop is None and self._state == self._in_content and self._turn.in_code_span

    # The header that a turn may begin with: two more states

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
