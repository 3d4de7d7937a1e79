"""Edits to Unsloth's Llama 3.1 chat template. The text itself stays upstream's; only the edit is ours."""

# A row that went through Arrow has every key in every message, so an assistant turn without calls says `tool_calls: None`.
_NO_CALLS_IS_PLAIN = (
    ("message.role == 'tool' or 'tool_calls' in message) %}", "message.role == 'tool' or message.tool_calls) %}"),
    ("{%- elif 'tool_calls' in message %}", "{%- elif message.tool_calls %}"),
)


def plain_turn_without_calls(template: str) -> str:
    """The template with `tool_calls` asked for its value, not its presence: [] and None make a plain turn.

    Raises ValueError if the template does not hold each edited place exactly once.
    """
    for old, new in _NO_CALLS_IS_PLAIN:
        if template.count(old) != 1:
            raise ValueError(f"expected exactly one {old!r} in the template, found {template.count(old)}")
        template = template.replace(old, new)
    return template
