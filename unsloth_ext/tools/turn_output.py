"""What a turn has come to so far: its content, its calls, and the deltas that tell a caller about them."""

from __future__ import annotations

import json
from dataclasses import dataclass

from .code_spans import CodeSpans
from .parsed_message import ToolCall

CODE_INTERPRETER = "code_interpreter"


@dataclass(frozen=True)
class Delta:
    """What a piece of text added: `content`, or of the call number `index` its `name` (once) or a piece of its `arguments` (JSON)."""

    content: str | None = None
    index: int | None = None
    name: str | None = None
    arguments: str | None = None


class TurnOutput:
    """Content, calls, and what of them has not been told yet (`take`). `prose`: the content is more than white space."""

    def __init__(self):
        self.calls: list[ToolCall] = []
        self.prose = False
        self._content: list[str] = []
        self._spans = CodeSpans()
        self._untold: list[Delta | str] = []  # a str is content: neighbours are joined
        self._code: list[str] = []
        self._code_known = True

    @property
    def content(self) -> str:
        return "".join(self._content)

    @property
    def has_content(self) -> bool:
        return bool(self._content)

    @property
    def in_code_span(self) -> bool:
        """Whether the content has come to stand in a code fence or between backticks."""
        return self._spans.inside

    def write(self, text: str) -> None:
        """More content."""
        self._content.append(text)
        self._untold.append(text)
        self._spans.feed(text)
        self.prose = self.prose or not text.isspace()

    def call(self, call: ToolCall) -> None:
        """A whole call."""
        index = len(self.calls)
        self.calls.append(call)
        self._untold += (Delta(index=index, name=call.name), Delta(index=index, arguments=call.arguments_json()))

    def begin_code(self, known: bool) -> None:
        """A call of the code interpreter, whose code comes in pieces."""
        self._code_known, self._code = known, []
        index = len(self.calls)
        self._untold += (Delta(index=index, name=CODE_INTERPRETER), Delta(index=index, arguments='{"code": "'))

    def write_code(self, text: str) -> None:
        if text:
            self._code.append(text)
            escaped = json.dumps(text, ensure_ascii=False)[1:-1]
            self._untold.append(Delta(index=len(self.calls), arguments=escaped))

    def end_code(self) -> None:
        self._untold.append(Delta(index=len(self.calls), arguments='"}'))
        self.calls.append(ToolCall(CODE_INTERPRETER, {"code": "".join(self._code)}, self._code_known))

    def take(self) -> list[Delta]:
        """What has been added since the last time."""
        deltas: list[Delta] = []
        content: list[str] = []
        for piece in (*self._untold, None):
            if isinstance(piece, str):
                content.append(piece)
                continue
            if content:
                deltas.append(Delta(content="".join(content)))
                content = []
            if piece is not None:
                deltas.append(piece)
        self._untold = []
        return deltas
