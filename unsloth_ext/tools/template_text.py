"""The Jinja text of `meta-3.1`, `chatformat` and `pythonic-3.2`, put together from pieces that they share.

Line by line it says what reference.py says, with the means that every engine has: no Python method of a string, no namespace.
`<NAME>` stands for what a profile puts there; DATE, BEFORE, AFTER and DEFAULT_SYSTEM are left for `templates.chat_template`.
"""

_START = r"""{{- bos_token }}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- if not builtin_tools is defined %}
    {%- set builtin_tools = none %}
{%- endif %}
{%- set listed_tools = (builtin_tools or []) | reject('equalto', 'code_interpreter') | list %}

{#- A text, a list of text parts, or nothing #}
{%- macro text_of(content) %}
    {%- if content is string %}
        {{- content }}
    {%- elif content is defined and content is not none %}
        {%- for part in content %}
            {%- if part.type != 'text' %}
                {{- raise_exception("Content must be a text or a list of text parts!") }}
            {%- endif %}
            {{- part.text }}
        {%- endfor %}
    {%- endif %}
{%- endmacro %}

{#- A tool's result: its text, or its JSON #}
{%- macro result_of(content) %}
    {%- if content is undefined or content is none or content is string or (content is not mapping and content is iterable and content and content[0].type == 'text') %}
        {{- text_of(content) }}
    {%- else %}
        {{- content | tojson }}
    {%- endif %}
{%- endmacro %}

{#- brave_search.call(query="...") #}
{%- macro builtin_call(name, arguments) %}
    {{- name + ".call(" }}
    {%- for key, value in arguments | items if value is not none %}
        {{- key + "=" }}
        {{- (value if value is string else value | tojson) | tojson }}
        {%- if not loop.last %}
            {{- ", " }}
        {%- endif %}
    {%- endfor %}
    {{- ")" }}
{%- endmacro %}

{#- A None is how a row from an Arrow table says that there is no such argument #}
{%- macro check_only(arguments, name, words) %}
    {%- if arguments[name] is not string %}
        {{- raise_exception(words) }}
    {%- endif %}
    {%- for key, value in arguments | items if value is not none and key != name %}
        {{- raise_exception(words) }}
    {%- endfor %}
{%- endmacro %}

{%- set system_message = <DEFAULT_SYSTEM> %}
{%- set has_system = false %}
{%- if messages and messages[0]['role'] in ['system', 'developer'] %}
    {%- set system_message = text_of(messages[0]['content']) %}
    {%- set has_system = true %}
    {%- set messages = messages[1:] %}
{%- endif %}
"""

# Meta's system turn: blocks of lines, and a blank line before what is said freely (reference._system).
_SYSTEM = r"""
{%- set head = "" %}
{%- set before_date = "" %}
{%- set before_words = "" %}
{%- if <ENVIRONMENT> %}
    {%- set head = "Environment: ipython" %}
    {%- set before_date = "\n\n" %}
    {%- set before_words = "\n\n" %}
    {%- if listed_tools %}
        {%- set head = head + "\nTools: " + listed_tools | join(", ") + "\n" %}
        {%- set before_date = "" %}
        {%- set before_words = "\n" %}
    {%- endif %}
{%- endif %}
{%- if date_string %}
    {%- set head = head + before_date + "Cutting Knowledge Date: December 2023\nToday Date: " + date_string + "\n" %}
    {%- set before_words = "\n" %}
{%- endif %}
{%- if described and not tools_in_user_message %}
    {%- set system_message = described + ("\n\n" + system_message if system_message else "") %}
{%- endif %}
{%- if head or system_message %}
    {{- "<|start_header_id|>system<|end_header_id|>\n\n" + head }}
    {{- before_words + system_message if system_message else "" }}
    {{- "<|eot_id|>" }}
{%- endif %}
"""

_DATE = r"""
{%- if not date_string is defined or date_string is none %}
    {%- set date_string = <DATE> %}
{%- endif %}
"""

_DATE_NOW = r"""
{%- if not date_string is defined or date_string is none %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = false %}
    {%- endif %}
{%- endif %}
"""

_JSON_TOOLS = r"""
{#- JSON without the keys whose value is none #}
{%- macro json_of(value) %}
    {%- if value is mapping %}
        {{- "{" }}
        {%- for key, inner in value | items if inner is not none %}
            {{- ", " if not loop.first else "" }}
            {{- key | tojson<ASCII> + ": " }}
            {{- json_of(inner) }}
        {%- endfor %}
        {{- "}" }}
    {%- elif value is iterable and value is not string %}
        {{- "[" }}
        {%- for inner in value %}
            {{- ", " if not loop.first else "" }}
            {{- json_of(inner) }}
        {%- endfor %}
        {{- "]" }}
    {%- else %}
        {{- value | tojson<ASCII> }}
    {%- endif %}
{%- endmacro %}
{%- set described = "" %}
{%- if tools %}
    {%- set described %}
        {{- <BEFORE> }}
        {%- for tool in tools %}
            {{- tool | tojson(indent=4) }}
            {%- if not loop.last %}
                {{- "\n\n" }}
            {%- endif %}
        {%- endfor %}
        {{- <AFTER> }}
    {%- endset %}
{%- endif %}
"""

_PYTHONIC_TOOLS = r"""
{#- A value as a Python literal: JSON's strings and numbers are Python's too #}
{%- macro literal(value) %}
    {%- if value is mapping %}
        {{- "{" }}
        {%- for key, inner in value | items if inner is not none %}
            {{- key | tojson + ": " }}
            {{- literal(inner) }}
            {{- ", " if not loop.last else "" }}
        {%- endfor %}
        {{- "}" }}
    {%- elif value is string %}
        {{- value | tojson }}
    {%- elif value is none %}
        {{- "None" }}
    {%- elif value is boolean %}
        {{- "True" if value else "False" }}
    {%- elif value is iterable %}
        {{- "[" }}
        {%- for inner in value %}
            {{- literal(inner) }}
            {{- ", " if not loop.last else "" }}
        {%- endfor %}
        {{- "]" }}
    {%- else %}
        {{- value | tojson }}
    {%- endif %}
{%- endmacro %}

{#- Whatever is no name would be read as code #}
{%- macro checked(name, letters) %}
    {%- for letter in name %}
        {%- if letter not in letters or (loop.first and letter in '.0123456789') %}
            {{- raise_exception("Names of functions and arguments must be identifiers in a pythonic call!") }}
        {%- endif %}
    {%- endfor %}
    {{- name }}
{%- endmacro %}
{%- set letters = 'abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_0123456789' %}
{%- set described = "" %}
{%- if tools %}
    {%- set described %}
        {{- <BEFORE> }}
        {{- "[" }}
        {%- for tool in tools %}
            {{- "\n    " + (tool.function | default(tool, true)) | tojson(indent=4) | replace("\n", "\n    ") }}
            {{- "," if not loop.last else "" }}
        {%- endfor %}
        {{- "\n]" }}
        {{- <AFTER> }}
    {%- endset %}
{%- endif %}
"""

_TURNS = r"""
{%- if described and tools_in_user_message %}
    {{- "<|start_header_id|>user<|end_header_id|>\n\n" + described + "<|eot_id|>" }}
{%- endif %}

{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- "<|start_header_id|>assistant<|end_header_id|>\n\n" }}
        {%- generation %}
        {%- if message.tool_calls %}
            {%- set tool_call = message.tool_calls[0].function | default(message.tool_calls[0], true) %}
            {%- set arguments = tool_call.arguments | default({}, true) %}
            {%- set is_builtin = tool_call.name in (builtin_tools or []) %}
            {%- if arguments is not mapping <AND_NEEDS_MAPPING>%}
                {{- raise_exception("Arguments must be a dict here, not a JSON string!") }}
            {%- endif %}
            {%- if arguments is not mapping and ((arguments | trim)[:1] != '{' or (arguments | trim)[-1:] != '}') %}
                {{- raise_exception("The arguments of a call must be an object, or the JSON of one!") }}
            {%- endif %}
            {%- if message.tool_calls | length > 1 <AND_NOT_PARALLEL>%}
                {{- raise_exception("Only one call fits into a turn here!") }}
            {%- endif %}
            {{- text_of(message.content) }}
            {%- if is_builtin and tool_call.name == 'code_interpreter' %}
                {{- check_only(arguments, 'code', "code_interpreter takes one argument: code, a string") }}
<NO_CONTENT>                {{- "<|python_tag|>" + arguments.code }}
            {%- elif is_builtin %}
<BUILTIN>
            {%- else %}
<CALL>
            {%- endif %}
            {{- <CLOSING> }}
        {%- else %}
            {{- text_of(message.content) }}
            {{- <PLAIN_CLOSING> }}
        {%- endif %}
        {%- endgeneration %}
    {%- elif message.role == 'tool' or message.role == 'ipython' %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\n\n" + result_of(message.content) + "<|eot_id|>" }}
    {%- elif message.role in ['user', 'system', 'developer'] %}
        {{- "<|start_header_id|>" + ('user' if message.role == 'user' else 'system') + "<|end_header_id|>\n\n" }}
        {{- text_of(message.content) + "<|eot_id|>" }}
    {%- else %}
        {{- raise_exception("A message's role must be system, user, assistant or tool!") }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|start_header_id|>assistant<|end_header_id|>\n\n" }}
{%- endif %}
"""

_IN_USER = r"""{%- if not tools_in_user_message is defined or tools_in_user_message is none %}
    {%- set tools_in_user_message = <IN_USER> %}
{%- endif %}
"""


def _assemble(*pieces: str, **values: str) -> str:
    text = "".join(pieces)
    for name, value in values.items():
        text = text.replace(f"<{name}>", value)
    return text


_EOT, _EOM = '"<|eot_id|>"', '"<|eom_id|>"'
_BUILTIN = '                {{- "<|python_tag|>" + builtin_call(tool_call.name, arguments) }}'
_JSON_CALL = (
    '                {{- \'<TAG>{"type": "function", "name": \' }}\n'
    "                {{- tool_call.name | tojson<ASCII> }}\n"
    "                {{- ', \"parameters\": ' }}\n"
    "                {{- arguments | trim if arguments is string else json_of(arguments) }}\n"
    '                {{- "}" }}'
)
TEXTS = {
    "meta-3.1": _assemble(
        _START, _DATE, _IN_USER, _JSON_TOOLS, _SYSTEM, _TURNS,
        IN_USER="true", ENVIRONMENT="builtin_tools or tools", AND_NEEDS_MAPPING="and is_builtin ", AND_NOT_PARALLEL="", NO_CONTENT="",
        BUILTIN=_BUILTIN, CALL=_JSON_CALL, TAG="<|python_tag|>", ASCII="", CLOSING=_EOM, PLAIN_CLOSING=_EOT,
    ),
    "chatformat": _assemble(
        _START, _JSON_TOOLS,
        '{%- set tools_in_user_message = true %}\n'
        '{%- if has_system or system_message %}\n'
        '    {{- "<|start_header_id|>system<|end_header_id|>\\n\\n" + system_message + "<|eot_id|>" }}\n'
        '{%- endif %}\n',
        _TURNS,
        AND_NEEDS_MAPPING="and is_builtin ", AND_NOT_PARALLEL="", NO_CONTENT="                {%- if text_of(message.content) %}\n"
        '                    {{- raise_exception("Content beside a call of code_interpreter would be run as code!") }}\n'
        "                {%- endif %}\n",
        BUILTIN="                {{- check_only(arguments, 'query', \"A builtin tool takes one argument here: query, a text\") }}\n"
        "                {%- if arguments.query | tojson != '\"' + arguments.query + '\"' %}\n"
        '                    {{- raise_exception("A builtin tool takes one argument here: query, a text without quotes,'
        ' backslashes or line breaks") }}\n'
        "                {%- endif %}\n"
        "                {{- builtin_call(tool_call.name, arguments) }}",
        CALL=_JSON_CALL, TAG="", ASCII="(ensure_ascii=true)",
        CLOSING=f"{_EOM} if message.stop_reason == 'end_of_message' else {_EOT}",
        PLAIN_CLOSING=f"{_EOM} if message.stop_reason == 'end_of_message' else {_EOT}",
    ),
    "pythonic-3.2": _assemble(
        _START, _DATE_NOW, _IN_USER, _PYTHONIC_TOOLS, _SYSTEM, _TURNS,
        IN_USER="false", ENVIRONMENT="builtin_tools", AND_NEEDS_MAPPING="", AND_NOT_PARALLEL="and (message.tool_calls | selectattr('function', 'defined')"
        " | map(attribute='function.name') | select('in', builtin_tools or []) | list) ", NO_CONTENT="",
        BUILTIN=_BUILTIN,
        CALL='                {{- "[" }}\n'
        "                {%- for call in message.tool_calls %}\n"
        "                    {%- set call = call.function | default(call, true) %}\n"
        '                    {{- checked(call.name, letters + ".") + "(" }}\n'
        "                    {%- for key, value in call.arguments | default({}, true) | items if value is not none %}\n"
        '                        {{- checked(key, letters) + "=" + literal(value) }}\n'
        '                        {{- ", " if not loop.last else "" }}\n'
        "                    {%- endfor %}\n"
        '                    {{- ")" }}\n'
        '                    {{- ", " if not loop.last else "" }}\n'
        "                {%- endfor %}\n"
        '                {{- "]" }}',
        CLOSING=f"{_EOM} if is_builtin else {_EOT}", PLAIN_CLOSING=_EOT,
    ),
}  # fmt: skip
