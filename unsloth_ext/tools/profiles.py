"""Four ways to write a tool call, because Llama 3's own references do not agree.

| profile        | source                                                | a call of a custom function                          |
| -------------- | ----------------------------------------------------- | ---------------------------------------------------- |
| `hf`           | the template of Hugging Face and Unsloth (default)     | `{"name": "f", "parameters": {...}}` and eot          |
| `meta-3.1`     | Meta's prompt-format document of 3.1                   | python_tag, `{"type": "function", ...}` and eom       |
| `chatformat`   | `ChatFormat` of the `llama-models` package             | `{"type": "function", ...}`, eot (eom: `stop_reason`) |
| `pythonic-3.2` | Meta's prompt-format document of 3.2                   | `[f(a=1), g(b="x")]` and eot; calls may be parallel   |

A builtin tool is one that `builtin_tools` names: `<|python_tag|>brave_search.call(query="...")<|eom_id|>`, and for
`code_interpreter` the code itself.

Tools are listed as `json.dumps(tool, indent=4)`, as the installed template does. Meta's 3.1 document shows the same listing with
other white space in the JSON (`"required": ["n"]` on one line), so a prompt of `meta-3.1` with `tools=` differs from it there, and
only there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

DateString = str | None | Literal[False]


@dataclass(frozen=True)
class Profile:
    """What sets a profile apart. The rest is the same for all of them (reference.py)."""

    name: str
    parallel_calls: bool = False
    # Does ChatFormat's way of encoding hold: each piece by itself, so that no token spans a header and its content?
    piecewise: bool = False
    # Where tools are described: "user" or "system".
    tools_in: str = "user"
    # Today's date where the caller gives none; "now": the clock's; None: no date.
    default_date: str | None = None


PROFILES = {
    profile.name: profile
    for profile in (
        Profile("hf"),  # its date is the template's
        Profile("meta-3.1", default_date="26 Jul 2024"),
        Profile("chatformat", piecewise=True),
        Profile("pythonic-3.2", parallel_calls=True, tools_in="system", default_date="now"),
    )
}


def profile_named(name: str) -> Profile:
    """The profile of that name. Raises ValueError with the names there are."""
    if name not in PROFILES:
        raise ValueError(f"profile must be one of {', '.join(PROFILES)}, got {name!r}")
    return PROFILES[name]


def render(
    messages: Sequence[dict],
    *,
    profile: str = "hf",
    tools: Sequence | None = None,
    builtin_tools: Sequence[str] | None = None,
    date_string: DateString = None,
    add_generation_prompt: bool = False,
    tools_in_user_message: bool | None = None,
    base_template: str | None = None,
    preamble: str | None = None,
) -> str:
    """The text that the model sees, from `<|begin_of_text|>` on.

    Args:
        messages: what `normalize` takes; it is normalized here.
        profile: `hf`, `meta-3.1`, `chatformat` or `pythonic-3.2`.
        tools: JSON schemas or functions. None and [] are the same.
        builtin_tools: names among brave_search, wolfram_alpha and code_interpreter (others are written alike).
        date_string: None is the profile's date; False or "" leaves the date out.
        tools_in_user_message: None is the profile's place for the tools.
        base_template: where the instructions before the tools are taken from (default: the installed Unsloth's Llama 3.1
            template). Only asked for where tools are given, and by `hf` for its date.
        preamble: the instructions instead; the tools follow, or stand where it says `{tools}`. Not for `hf`.

    Raises MessageError for a conversation that the profile cannot write, ValueError for other arguments.
    """
    from .reference import segments

    parts = segments(
        messages,
        profile=profile,
        tools=tools,
        builtin_tools=builtin_tools,
        date_string=date_string,
        add_generation_prompt=add_generation_prompt,
        tools_in_user_message=tools_in_user_message,
        base_template=base_template,
        preamble=preamble,
    )
    return "".join(part.text for part in parts)
