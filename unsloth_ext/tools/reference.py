"""The four formats in plain Python: a conversation becomes segments. The templates are tested against this, not used by it.

A segment is a control token or a stretch of plain text, and says whether it is trained on. Trained is what the assistant
itself must produce: its content, its calls and the token that ends its turn; never a header, which the caller writes.

Sources: the Llama 3.1 template that Unsloth installs (`hf`), the prompt-format documents of Llama 3.1 and 3.2 and
`llama3/chat_format.py` in the `llama-models` package (the other three). The sentences that tell the model about tools are not
in this file: they are taken from the installed template, or are the caller's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from .messages import MessageError, normalize, tool_schemas
from .profiles import Profile, profile_named

BOS, EOT, EOM = "<|begin_of_text|>", "<|eot_id|>", "<|eom_id|>"
START, END, PYTHON_TAG = "<|start_header_id|>", "<|end_header_id|>", "<|python_tag|>"
CODE_INTERPRETER = "code_interpreter"
ENVIRONMENT = "Environment: ipython"
DATE_LINES = "Cutting Knowledge Date: December 2023\nToday Date: "
# Ours: what `pythonic-3.2` says before the tools unless the caller says it better.
PYTHONIC_PREAMBLE = (
    "You can call the functions below. To call some, reply with nothing but a list of calls, for example "
    '[first(city="Oslo", days=3), second()].\n\n'
)


@dataclass(frozen=True)
class Segment:
    """A control token by its name, or plain text. `trained`: the assistant must produce it."""

    text: str
    kind: str  # "control" or "content"
    trained: bool = False


def segments(
    messages: Sequence[dict],
    *,
    profile: str = "hf",
    tools: Sequence | None = None,
    builtin_tools: Sequence[str] | None = None,
    date_string: str | bool | None = None,
    add_generation_prompt: bool = False,
    tools_in_user_message: bool | None = None,
    base_template: str | None = None,
    preamble: str | None = None,
) -> list[Segment]:
    """The conversation in pieces; arguments and errors as those of `profiles.render`."""
    style = profile_named(profile)
    if preamble is not None and profile == "hf":
        raise ValueError("preamble: hf has the words of its base template; take another profile to change them")
    builtin_tools = _builtin_names(builtin_tools)
    tools = tool_schemas(tools)
    messages = normalize(messages, tools=tools)
    in_user = style.tools_in == "user" if tools_in_user_message is None else bool(tools_in_user_message)
    parts = _Parts(style, frozenset(builtin_tools))
    parts.control(BOS)
    if profile == "hf":
        messages = _open_hf(parts, messages, tools, builtin_tools, date_string, in_user, base_template)
    else:
        messages = _open_meta(parts, messages, tools, builtin_tools, date_string, in_user, base_template, preamble)
    for index, message in messages:
        parts.message(index, message)
    if add_generation_prompt:
        parts.header("assistant")
    return [part for part in parts.written if part.text]


class _Parts:
    """The segments written so far, and how a message is written."""

    def __init__(self, style: Profile, builtin: frozenset):
        self.style, self.builtin, self.trim, self.written = style, builtin, False, []

    def control(self, token: str, trained: bool = False) -> None:
        self.written.append(Segment(token, "control", trained))

    def text(self, text: str, trained: bool = False) -> None:
        self.written.append(Segment(text, "content", trained))

    def header(self, role: str) -> None:
        self.control(START)
        self.text(role)
        self.control(END)
        self.text("\n\n")

    def turn(self, role: str, text: str) -> None:
        self.header(role)
        self.text(text)
        self.control(EOT)

    def message(self, index: int, message: dict) -> None:
        role, content = message["role"], message["content"]
        calls = message.get("tool_calls")
        if role == "tool":
            self.turn("ipython", content)
        elif role != "assistant":
            role = "system" if role == "developer" and self.style.name != "hf" else role
            self.turn(role, content.strip() if self.trim else content)
        elif not calls:
            self.header("assistant")
            self.text(content.strip() if self.trim else content, trained=True)
            self.control(EOM if _asks_for_eom(self.style, message) else EOT, trained=True)
        else:
            self.header("assistant")
            self.calls(index, message, content, [call["function"] for call in calls])

    def calls(self, index: int, message: dict, content: str, calls: list[dict]) -> None:
        name = self.style.name
        builtin = [call["name"] in self.builtin for call in calls]
        if len(calls) > 1 and (not self.style.parallel_calls or any(builtin)):
            what = "a turn with a builtin call" if self.style.parallel_calls else f"a turn of the profile {name}"
            remedy = f"{what} holds one call; make a turn of each, or use pythonic-3.2 for functions of yours"
            raise MessageError(index, "tool_calls", [call["name"] for call in calls], remedy)
        self.text(content, trained=True)
        if builtin[0]:
            self.builtin_call(index, content, calls[0])
        elif name == "pythonic-3.2":
            self.text("[" + ", ".join(_pythonic(index, call) for call in calls) + "]", trained=True)
        elif name == "hf":
            self.text(
                f'{{"name": {_json(calls[0]["name"])}, "parameters": {_json(calls[0]["arguments"])}}}', trained=True
            )
        else:
            if name == "meta-3.1":
                self.control(PYTHON_TAG, trained=True)
            call = {"type": "function", "name": calls[0]["name"], "parameters": calls[0]["arguments"]}
            # ChatFormat writes ASCII: json.dumps as it comes.
            self.text(json.dumps(call, ensure_ascii=name == "chatformat"), trained=True)
        eom = {
            "hf": bool(self.builtin),  # the environment that the system message announces
            "meta-3.1": True,
            "chatformat": _asks_for_eom(self.style, message),
            "pythonic-3.2": builtin[0],
        }[name]
        self.control(EOM if eom else EOT, trained=True)

    def builtin_call(self, index: int, content: str, call: dict) -> None:
        name, arguments, chatformat = call["name"], call["arguments"], self.style.name == "chatformat"
        if name == CODE_INTERPRETER:
            if list(arguments) != ["code"] or not isinstance(arguments["code"], str):
                raise MessageError(index, f"arguments of {name}", arguments, "it takes one argument: code, a text")
            if chatformat and content:  # ChatFormat puts the tag before the content
                raise MessageError(index, "content", content, "chatformat would run it as code; leave it out")
            self.control(PYTHON_TAG, trained=True)
            self.text(arguments["code"], trained=True)
            return
        for key in arguments:
            if not key.isidentifier():
                raise MessageError(index, f"an argument's name of {name}", key, "it must be an identifier")
        if chatformat:
            query = arguments.get("query")
            if list(arguments) != ["query"] or not isinstance(query, str) or _json(query) != f'"{query}"':
                remedy = "chatformat writes one text, query, as it stands: no quotes, backslashes or line breaks"
                raise MessageError(index, f"arguments of {name}", arguments, remedy)
        if not chatformat:
            self.control(PYTHON_TAG, trained=True)
        self.text(f"{name}.call({', '.join(_quoted(*item) for item in arguments.items())})", trained=True)


def _open_hf(parts, messages, tools, builtin_tools, date_string, in_user, base_template):
    """The system turn, and the tools in the first user turn. Gives the messages that are left, with their indices."""
    prose = _prose(base_template)
    parts.trim = prose.trim
    left = list(enumerate(messages))
    system = prose.system_message
    if messages[0]["role"] == "system":
        system = left.pop(0)[1]["content"]
        system = system.strip() if prose.trim else system
    date = prose.date if date_string is None else date_string
    parts.header("system")
    if builtin_tools or tools:
        parts.text(f"{ENVIRONMENT}\n")
    listed = [name for name in builtin_tools if name != CODE_INTERPRETER]
    if listed:
        parts.text(f"Tools: {', '.join(listed)}\n\n")
    if date:
        parts.text(f"{DATE_LINES}{date}\n\n")
    if tools and not in_user:
        parts.text(_with_tools(prose.system_tools, [_indented(tool) + "\n\n" for tool in tools]))
    parts.text(system)
    parts.control(EOT)
    if tools and in_user:
        if not left or left[0][1]["role"] != "user":
            role = left[0][1]["role"] if left else None
            remedy = "the tools stand in the first user message; start with one, or pass tools_in_user_message=False"
            raise MessageError(left[0][0] if left else None, "the first message's role", role, remedy)
        first = left.pop(0)[1]["content"]
        parts.header("user")
        parts.text(_with_tools(prose.user_tools, [_indented(tool) + "\n\n" for tool in tools]))
        parts.text(first.strip() if prose.trim else first)
        parts.control(EOT)
    return left


def _open_meta(parts, messages, tools, builtin_tools, date_string, in_user, base_template, preamble):
    """The system turn where it has something to say, and a user turn that describes the tools. Gives the messages left."""
    name, left = parts.style.name, list(enumerate(messages))
    described = ""
    if tools and name == "pythonic-3.2":
        listing = json.dumps([tool.get("function", tool) for tool in tools], indent=4, ensure_ascii=False)
        described = _with_tools(preamble or PYTHONIC_PREAMBLE, [listing])
    elif tools:
        instructions = preamble or _prose(base_template).user_tools
        described = _with_tools(instructions, ["\n\n".join(_indented(tool) for tool in tools)])
    system = ""
    if messages[0]["role"] in ("system", "developer"):
        system = left.pop(0)[1]["content"]
    if name == "chatformat":
        if len(left) < len(messages):
            parts.header("system")
            parts.text(system)
            parts.control(EOT)
    else:
        date = parts.style.default_date if date_string is None else date_string
        date = datetime.now().strftime("%d %b %Y") if date == "now" else date
        environment = bool(builtin_tools) or (bool(tools) and name == "meta-3.1")
        text = _system(environment, builtin_tools, date, "" if in_user else described, system)
        if text:
            parts.turn("system", text)
    if described and (in_user or name == "chatformat"):
        parts.turn("user", described)
    return left


def _system(environment: bool, builtin_tools: Sequence[str], date: str, described: str, system: str) -> str:
    """Meta's system turn: blocks of lines, and a blank line before what is said freely."""
    text = before_date = before_words = ""
    if environment:
        text, before_date, before_words = ENVIRONMENT, "\n\n", "\n\n"
        listed = [name for name in builtin_tools if name != CODE_INTERPRETER]
        if listed:
            text, before_date, before_words = f"{text}\nTools: {', '.join(listed)}\n", "", "\n"
    if date:
        text, before_words = f"{text}{before_date}{DATE_LINES}{date}\n", "\n"
    words = "\n\n".join(block for block in (described, system) if block)
    return f"{text}{before_words}{words}" if words else text


def _prose(base_template: str | None):
    from .templates import installed_template, prose_of

    base_template = base_template or installed_template()
    if base_template is None:
        raise ValueError(
            "base_template is needed: Unsloth is not installed, and the words around the tools are its template's"
        )
    return prose_of(base_template)


def _builtin_names(builtin_tools: Sequence[str] | None) -> list[str]:
    if isinstance(builtin_tools, str) or not all(isinstance(name, str) and name for name in builtin_tools or ()):
        raise ValueError(f"builtin_tools must be a list of names, got {builtin_tools!r}")
    return list(builtin_tools or ())


def _with_tools(preamble: str, tools: list[str]) -> str:
    before, _, after = preamble.partition("{tools}")
    return before + "".join(tools) + after


def _indented(tool: dict) -> str:
    return json.dumps(tool, indent=4, ensure_ascii=False)


def _json(value) -> str:
    return json.dumps(value, ensure_ascii=False)


def _quoted(key: str, value) -> str:
    """`key="value"`: a JSON string, so that no value ends its own quotes; what is no text is its JSON."""
    return f"{key}={_json(value if isinstance(value, str) else _json(value))}"


def _asks_for_eom(style: Profile, message: dict) -> bool:
    return style.name == "chatformat" and message.get("stop_reason") == "end_of_message"


def _pythonic(index: int, call: dict) -> str:
    for name in (*call["name"].split("."), *call["arguments"]):
        if not (name.isascii() and name.isidentifier()):
            raise MessageError(index, "a name in the call", name, "pythonic-3.2 can only write ASCII identifiers")
    return f"{call['name']}({', '.join(f'{key}={_literal(value)}' for key, value in call['arguments'].items())})"


def _literal(value) -> str:
    """A Python literal. JSON's strings and numbers are Python's too."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_json(key)}: {_literal(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_literal(inner) for inner in value) + "]"
    return str(value) if value is None or isinstance(value, bool) else _json(value)
