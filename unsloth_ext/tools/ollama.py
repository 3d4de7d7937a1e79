"""Edits to Unsloth's Ollama template of Llama 3.1, so that Ollama shows the model what it was trained on.

The text is upstream's; only the edits are ours. What Ollama makes of a conversation is then what the chat template makes of it,
from the first header to the last eot (the date and the words before the tools are Ollama's own, as they were):

- eot ends the system turn; without a system message and without tools there is no turn and no eot;
- a call comes after the header's two newlines, with the content before it, and ends with eot unless it is the last thing;
- several calls are separated by "; ", which is how vLLM's and SGLang's parsers for this family read them.
"""

from __future__ import annotations

EDITS = (
    # "{{-" takes the newline before it away, so eot follows the text and closes a turn that is there.
    ("{{- end }}\n{{- end }}<|eot_id|>\n", "{{- end }}<|eot_id|>\n{{- end }}\n"),
    (
        "{{- if .ToolCalls }}\n\n{{- range .ToolCalls }}{",
        "{{- if .ToolCalls }}\n\n{{ .Content }}{{ range $j, $_ := .ToolCalls }}{{ if $j }}; {{ end }}{",
    ),
    (".Function.Arguments }}}{{ end }}\n", ".Function.Arguments }}}{{ end }}{{ if not $last }}<|eot_id|>{{ end }}\n"),
)


def repair(template: str) -> str:
    """The Modelfile with the edits. Raises ValueError if it does not hold each edited place exactly once."""
    for old, new in EDITS:
        if template.count(old) != 1:
            raise ValueError(f"expected exactly one {old!r} in the Ollama template, found {template.count(old)}")
        template = template.replace(old, new)
    return template
