"""Edits to Unsloth's Llama 3.1 chat template (Hugging Face's is the same text but for `| trim` and the date's form). The text
itself stays upstream's; only the edits are ours.

Each is (name, old, new) and fits the template exactly once after those before it. Edits of one name belong to one change and
make one pull request. They are written as upstream's source spells them (`\\n` in a Jinja string); `apply_edits` finds the
spelling of the template at hand, where Python may have made line breaks of them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import NamedTuple


class Edit(NamedTuple):
    name: str
    old: str
    new: str


EDITS = (
    # A row that went through Arrow has every key in every message, so an assistant turn without calls says `tool_calls: None`.
    Edit(
        "empty tool_calls",
        "message.role == 'tool' or 'tool_calls' in message) %}",
        "message.role == 'tool' or message.tool_calls) %}",
    ),
    Edit("empty tool_calls", "{%- elif 'tool_calls' in message %}", "{%- elif message.tool_calls %}"),
    # None and [] are no builtin tools, and code_interpreter alone leaves nothing to list.
    Edit("builtin tools line", "{%- if builtin_tools is defined or tools", "{%- if builtin_tools or tools"),
    Edit(
        "builtin tools line",
        '{%- if builtin_tools is defined %}\n    {{- "Tools: "',
        "{%- if builtin_tools and builtin_tools | reject('equalto', 'code_interpreter') | list %}\n    {{- \"Tools: \"",
    ),
    Edit(
        "builtin tools line",
        "{%- if builtin_tools is defined and tool_call.name in",
        "{%- if builtin_tools and tool_call.name in",
    ),
    Edit(
        "builtin tools line",
        "{%- if builtin_tools is defined %}\n            {#- This means",
        "{%- if builtin_tools %}\n            {#- This means",
    ),
    Edit("empty tools", "{%- if not tools is defined %}", "{%- if not tools %}"),
    Edit(
        "missing arguments and flat calls",
        "{%- set tool_call = message.tool_calls[0].function %}",
        "{%- set tool_call = message.tool_calls[0].function | default(message.tool_calls[0], true) %}\n"
        "        {%- set arguments = tool_call.arguments | default({}, true) %}",
    ),
    Edit("missing arguments and flat calls", "{{- tool_call.arguments | tojson }}", "{{- arguments | tojson }}"),
    Edit("missing arguments and flat calls", "in tool_call.arguments | items %}", "in arguments | items %}"),
    # Jinja cannot parse it, so it stands as it is; what is no object at all would be no call.
    Edit(
        "arguments as a JSON string",
        "{{- arguments | tojson }}",
        "{%- if arguments is mapping %}\n"
        "                {{- arguments | tojson }}\n"
        "            {%- elif arguments is string and (arguments | trim)[:1] == '{' and (arguments | trim)[-1:] == '}' %}\n"
        "                {{- arguments | trim }}\n"
        "            {%- else %}\n"
        '                {{- raise_exception("The arguments of a call must be an object, or the JSON of one!") }}\n'
        "            {%- endif %}",
    ),
    # Arrow gives the arguments of a call those of all other calls, as None. A null that is meant stands in a JSON string.
    Edit(
        "arguments that are none",
        "{#- This block extracts the system message",
        "{#- JSON without the keys whose value is none #}\n"
        "{%- macro json_of(value) %}\n"
        "    {%- if value is mapping %}\n"
        "        {{- '{' }}\n"
        "        {%- for key, inner in value | items if inner is not none %}\n"
        "            {{- ', ' if not loop.first else '' }}\n"
        "            {{- key | string | tojson + ': ' }}\n"
        "            {{- json_of(inner) }}\n"
        "        {%- endfor %}\n"
        "        {{- '}' }}\n"
        "    {%- elif value is iterable and value is not string %}\n"
        "        {{- '[' }}\n"
        "        {%- for inner in value %}\n"
        "            {{- ', ' if not loop.first else '' }}\n"
        "            {{- json_of(inner) }}\n"
        "        {%- endfor %}\n"
        "        {{- ']' }}\n"
        "    {%- else %}\n"
        "        {{- value | tojson }}\n"
        "    {%- endif %}\n"
        "{%- endmacro %}\n"
        "{#- This block extracts the system message",
    ),
    Edit("arguments that are none", "{{- arguments | tojson }}", "{{- json_of(arguments) }}"),
    Edit("arguments that are none", "in arguments | items %}", "in arguments | items if arg_val is not none %}"),
    Edit(
        "escaped names",
        """'{"name": "' + tool_call.name + '", ' }}""",
        """'{"name": ' }}\n            {{- tool_call.name | tojson + ', ' }}""",
    ),
    # The value is a JSON string, so it cannot end its own quotes; a number is quoted too, as before.
    Edit(
        "builtin arguments",
        """{{- arg_name + '="' + arg_val + '"' }}""",
        "{{- arg_name + '=' }}\n"
        "                {{- (arg_val if arg_val is string else arg_val | tojson) | tojson }}",
    ),
    # What follows the tag is the code that the tool runs.
    Edit(
        "code interpreter",
        '{{- "<|python_tag|>" + tool_call.name + ".call(" }}\n            {%- for arg_name',
        '{{- "<|python_tag|>" }}\n'
        "            {%- if tool_call.name == 'code_interpreter' %}\n"
        "                {%- if arguments is not mapping or arguments.code is not string %}\n"
        '                    {{- raise_exception("code_interpreter takes one argument: code, a string") }}\n'
        "                {%- endif %}\n"
        "                {%- for arg_name, arg_val in arguments | items if arg_val is not none and arg_name != 'code' %}\n"
        '                    {{- raise_exception("code_interpreter takes one argument: code, a string") }}\n'
        "                {%- endfor %}\n"
        "                {{- arguments.code }}\n"
        "            {%- else %}\n"
        '            {{- tool_call.name + ".call(" }}\n            {%- for arg_name',
    ),
    Edit(
        "code interpreter",
        '            {{- ")" }}\n        {%- else  %}',
        '            {{- ")" }}\n            {%- endif %}\n        {%- else  %}',
    ),
    Edit(
        "content None or in parts",
        "{#- This block extracts the system message",
        "{#- A text, a list of text parts, or nothing #}\n"
        "{%- macro text_of(content) %}\n"
        "    {%- if content is string %}\n"
        "        {{- content }}\n"
        "    {%- elif content is defined and content is not none %}\n"
        "        {%- for part in content %}\n"
        "            {%- if part.type != 'text' %}\n"
        '                {{- raise_exception("Content must be a text or a list of text parts!") }}\n'
        "            {%- endif %}\n"
        "            {{- part.text }}\n"
        "        {%- endfor %}\n"
        "    {%- endif %}\n"
        "{%- endmacro %}\n"
        "{#- This block extracts the system message",
    ),
    Edit(
        "content None or in parts",
        "set system_message = messages[0]['content']",
        "set system_message = text_of(messages[0]['content'])",
    ),
    Edit(
        "content None or in parts",
        "set first_user_message = messages[0]['content']",
        "set first_user_message = text_of(messages[0]['content'])",
    ),
    Edit("content None or in parts", "\\n\\n'+ message['content'] ", "\\n\\n'+ text_of(message['content']) "),
    # A string is iterable too, so every result was quoted once more.
    Edit(
        "raw tool results",
        "{%- if message.content is mapping or message.content is iterable %}",
        "{%- if message.content is undefined or message.content is none or message.content is string or (message.content is"
        " not mapping and message.content is iterable and message.content and message.content[0].type == 'text') %}\n"
        "            {{- text_of(message.content) }}\n"
        "        {%- elif message.content is mapping or message.content is iterable %}",
    ),
    # One header before both kinds of call, so that what comes before a call has a place.
    Edit(
        "content beside a call",
        "{%- if builtin_tools and tool_call.name in builtin_tools %}\n"
        "            {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}\n",
        "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}\n"
        "        {{- text_of(message.content) }}\n"
        "        {%- if builtin_tools and tool_call.name in builtin_tools %}\n",
    ),
    Edit(
        "content beside a call",
        "{%- else  %}\n            {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}\n",
        "{%- else  %}\n",
    ),
    # Else the assistant's words would stand under the user's name.
    Edit(
        "first message is the user's",
        "{%- if messages | length != 0 %}",
        "{%- if messages | length != 0 and messages[0]['role'] == 'user' %}",
    ),
    Edit(
        "optional date",
        "{%- if not date_string is defined %}",
        "{%- if not date_string is defined or date_string is none %}",
    ),
    Edit(
        "optional date",
        '{{- "Cutting Knowledge Date: December 2023\\n" }}\n{{- "Today Date: " + date_string + "\\n\\n" }}',
        "{%- if date_string %}\n"
        '    {{- "Cutting Knowledge Date: December 2023\\n" }}\n'
        '    {{- "Today Date: " + date_string + "\\n\\n" }}\n'
        "{%- endif %}",
    ),
    # What the assistant itself must produce. The header is not part of it.
    Edit(
        "generation markers",
        "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ text_of(message['content'])<trim> + '<|eot_id|>' }}",
        "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}\n"
        "        {%- if message['role'] == 'assistant' %}\n"
        "            {%- generation %}\n"
        "            {{- text_of(message['content'])<trim> + '<|eot_id|>' }}\n"
        "            {%- endgeneration %}\n"
        "        {%- else %}\n"
        "            {{- text_of(message['content'])<trim> + '<|eot_id|>' }}\n"
        "        {%- endif %}",
    ),
    Edit(
        "generation markers",
        "        {{- text_of(message.content) }}\n        {%- if builtin_tools and tool_call",
        "        {%- generation %}\n        {{- text_of(message.content) }}\n        {%- if builtin_tools and tool_call",
    ),
    Edit(
        "generation markers",
        '            {{- "<|eot_id|>" }}\n        {%- endif %}\n    {%- elif message.role == "tool"',
        '            {{- "<|eot_id|>" }}\n        {%- endif %}\n        {%- endgeneration %}\n    {%- elif message.role == "tool"',
    ),
)
EDIT_NAMES = tuple(dict.fromkeys(edit.name for edit in EDITS))


def apply_edits(template: str, names: Collection[str] = EDIT_NAMES) -> str:
    """The template with the edits of these names, in the order of EDITS (a later name may build on the earlier ones).

    Raises ValueError that names the edit which does not fit exactly once: this is then not the template we know.
    """
    unknown = set(names) - set(EDIT_NAMES)
    if unknown:
        raise ValueError(f"there are no edits named {sorted(unknown)}; there are {list(EDIT_NAMES)}")
    return _edited(template, [edit for edit in EDITS if edit.name in names])


def _edited(template: str, edits: Iterable[Edit]) -> str:
    spelled = "<|end_header_id|>\\n\\n" in template
    trim = " | trim" if _TRIMMED.search(template) else ""
    for edit in edits:
        old, new = (text.replace("<trim>", trim) for text in edit[1:])
        if not spelled:
            old, new = old.replace("\\n", "\n"), new.replace("\\n", "\n")
        if template.count(old) != 1:
            raise ValueError(
                f"edit {edit.name!r}: expected exactly one {old!r} in the template, found {template.count(old)}"
            )
        template = template.replace(old, new)
    return template


# -- generation markers --------------------------------------------------------------------------------------------------------

_TRIMMED = re.compile(r"message\['content'\]\)? \| trim")
_GENERATION = re.compile(r"\{%([-+]?)\s*(?:end)?generation\s*([-+]?)%\}")


def strip_generation_markers(template: str) -> str:
    """The template without `{% generation %}` tags, rendering the same text: for GGUF, Ollama and engines without that tag.

    An empty comment takes the place of each, since it treats the white space around it as the tag did.
    """
    return _GENERATION.sub(r"{#\1 \2#}", template)


# The markers of the other profiles' templates (template_text.py), which no edit has put there.
_OWN_MARKERS = (
    "{%- generation %}\n        {%- if message.tool_calls %}\n            {%- set tool_call",
    "        {%- endif %}\n        {%- endgeneration %}\n    {%- elif message.role == 'tool'",
)
_PUT_BACK = (
    tuple(edit._replace(old=strip_generation_markers(edit.new)) for edit in EDITS if edit.name == "generation markers"),
    tuple(Edit("generation markers", strip_generation_markers(text), text) for text in _OWN_MARKERS),
)


def put_generation_markers_back(template: str) -> str | None:
    """What `strip_generation_markers` made of one of our templates, with its markers; None for any other template."""
    for edits in _PUT_BACK:
        try:
            return _edited(template, edits)
        except ValueError:
            continue
    return None


def as_exported(template: str) -> str:
    """The template as other engines should get it: without markers if they are ours and can be put back, else as it is."""
    without = strip_generation_markers(template)
    return without if without != template and put_generation_markers_back(without) == template else template
