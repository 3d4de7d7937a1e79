"""What a parsed assistant turn is, how a wrong one is reported, and the limits within which model text is read.

Model text is untrusted. The limits bound memory, nesting and time; what exceeds one is not a call (strict: a ParseError).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

MAX_DEPTH = 80  # containers in one another. messages.normalize allows 65 in arguments; around them stand at most 4 more
MAX_CALL_CHARS = 1 << 20  # text of one call, or of one list of calls
MAX_CALLS = 128  # calls in one message
MAX_NAME_CHARS = 256  # a tool's name, and a keyword of a pythonic call
MAX_NUMBER_CHARS = 400  # longer than any float, and below the limit at which Python refuses to read an integer


class ParseError(ValueError):
    """Text that strict parsing refuses. `position`: the character at which it went wrong; `reason`: why."""

    def __init__(self, position: int, reason: str):
        self.position, self.reason = position, reason
        super().__init__(f"at character {position}: {reason}")

    def __reduce__(self):
        return type(self), (self.position, self.reason)


@dataclass(frozen=True)
class ToolCall:
    """One call. `known` is False where the parser was given tools and none has this name."""

    name: str
    arguments: dict[str, Any]
    known: bool = True

    def as_message(self) -> dict:
        """The canonical form: {"type": "function", "function": {"name", "arguments"}}."""
        return {"type": "function", "function": {"name": self.name, "arguments": self.arguments}}

    def arguments_json(self) -> str:
        """The arguments as the JSON text that OpenAI's API carries."""
        return json.dumps(self.arguments, ensure_ascii=False)


@dataclass(frozen=True)
class ParsedMessage:
    """An assistant turn. `stop` is the token that ended it: "eot", "eom", "eos"; None where the text was cut off."""

    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    stop: str | None = None

    def as_message(self) -> dict:
        """The canonical assistant message, as `messages.normalize` gives it."""
        message: dict = {"role": "assistant", "content": self.content}
        if self.tool_calls:
            message["tool_calls"] = [call.as_message() for call in self.tool_calls]
        if self.stop == "eom":  # Meta's ChatFormat asks the message for it
            message["stop_reason"] = "end_of_message"
        return message
