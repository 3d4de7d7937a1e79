"""One Jinja template a profile, for `tokenizer.chat_template`: what servers and trainers run when they know nothing of this package.

`hf` is the installed template with the edits of llama_template.py. The others are written here: their markers are facts of the
format, while the sentences about tools come from the base template, found by rendering it once with a tool and cutting them out.
The `{% generation %}` markers around the assistant's part are transformers' extension of Jinja (TRL reads them for
`assistant_only_loss`); an export for another engine takes them out with `strip_generation_markers`.
"""

from __future__ import annotations

import ast
import json
from dataclasses import dataclass
from datetime import date
from functools import lru_cache

from .llama_template import apply_edits, strip_generation_markers
from .profiles import profile_named
from .template_text import TEXTS

_SYSTEM_PLACEHOLDER = "{system_message}"  # Unsloth's get_chat_template puts the default system message there


@lru_cache(maxsize=1)
def installed_template() -> str | None:
    """The Llama 3.1 template in the files of the installed Unsloth, which is not imported; None without an Unsloth.

    It is the template as Unsloth ships it, also where a patch has changed it in memory.
    """
    from ..patching.release import folder_of

    folder = folder_of("unsloth")
    file = folder / "chat_templates.py" if folder else None
    if file is None or not file.is_file():
        return None
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "llama31_template":
            return ast.literal_eval(node.value)
    return None


@dataclass(frozen=True)
class Prose:
    """What a base template says in words, and how it treats them."""

    user_tools: str  # before the tools in the first user message
    system_tools: str  # before the tools in the system message
    system_message: str  # where the conversation has none
    date: str
    trim: bool  # is content stripped of white space at its ends?


def prose_of(base_template: str) -> Prose:
    """The words of a Llama 3.1 template. Raises ValueError where they are not where that template has them."""
    return _prose_of(base_template, date.today())


@lru_cache(maxsize=16)
def _prose_of(base_template: str, today: date) -> Prose:
    template = _environment().from_string(strip_generation_markers(base_template.replace(_SYSTEM_PLACEHOLDER, "")))
    marks = {"bos_token": "", "add_generation_prompt": False}
    tool, user = {"probe": 1}, {"role": "user", "content": " user "}
    shown = json.dumps(tool, indent=4)

    def turn(role: str, **arguments) -> str:
        messages = [{"role": "system", "content": "system"}, user]
        return template.render(messages=messages, **marks, **arguments).split(f"{role}<|end_header_id|>\n\n")[1]

    try:
        plain = template.render(messages=[user], tools=None, **marks)
        today_is, rest = plain.split("Today Date: ")[1].split("\n\n", 1)
        user_tools = turn("user", tools=[tool]).split(shown)[0]
        in_system = turn("system", tools=[tool], tools_in_user_message=False).split(shown)[0]
        return Prose(
            user_tools=user_tools,
            system_tools=in_system.split("Today Date: ")[1].split("\n\n", 1)[1],
            system_message=rest.split("<|eot_id|>")[0],
            date=today_is,
            trim="\n\nuser<|eot_id|>" in plain,
        )
    except (IndexError, ValueError) as error:
        raise ValueError(
            "base_template is not a Llama 3.1 template with tools: its instructions cannot be found"
        ) from error


def _environment():
    """Jinja as transformers sets it up for chat templates (`utils/chat_template_utils.py`)."""
    from datetime import datetime

    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, **{"ensure_ascii": False, **options})
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def chat_template(
    profile: str = "hf", base_template: str | None = None, *, generation: bool = True, preamble: str | None = None
) -> str:
    """The profile's template, to be set as `tokenizer.chat_template` or passed to `apply_chat_template`.

    It takes what the installed one takes: `tools`, `builtin_tools`, `date_string` (None: the profile's date; False: no date),
    `tools_in_user_message`. Arguments of calls are best dicts: Jinja cannot parse a JSON string and writes it as it is. A None in
    a dict is left out, since that is how a row from an Arrow table says that a call has no such argument; a null that is meant
    stands in a JSON string.

    Args:
        base_template: Unsloth's Llama 3.1 template or the tokenizer's own. A `{system_message}` in it is kept, for Unsloth's
            `get_chat_template` to fill. Default: the installed Unsloth's, with no default system message.
        generation: with `{% generation %}` markers.
        preamble: the words before the tools; the tools follow, or stand where it says `{tools}`. Not for `hf`.

    Raises ValueError: the base template is another one (the edit that does not fit is named), or there is none.
    """
    style = profile_named(profile)
    if base_template is None and (base_template := installed_template()):
        base_template = base_template.replace(_SYSTEM_PLACEHOLDER, "")
    if profile == "hf":
        if base_template is None:
            raise ValueError(
                "base_template is needed: hf is made from Unsloth's template, and Unsloth is not installed"
            )
        if preamble is not None:
            raise ValueError("preamble: hf has the words of its base template; take another profile to change them")
        template = apply_edits(base_template)
    else:
        if preamble is None and profile == "pythonic-3.2":
            from .reference import PYTHONIC_PREAMBLE as preamble
        elif preamble is None:
            if base_template is None:
                raise ValueError("base_template or preamble is needed: there are no words to go before the tools")
            preamble = prose_of(base_template).user_tools
        before, _, after = preamble.partition("{tools}")
        default_system = _SYSTEM_PLACEHOLDER if _SYSTEM_PLACEHOLDER in (base_template or "") else ""
        template = TEXTS[profile]
        for name, value in {
            "DATE": f'"{style.default_date}"' if style.default_date else "false",
            "BEFORE": json.dumps(before, ensure_ascii=False),
            "AFTER": json.dumps(after, ensure_ascii=False),
            "DEFAULT_SYSTEM": f'"{default_system}"',
        }.items():
            template = template.replace(f"<{name}>", value)
    return template if generation else strip_generation_markers(template)
