"""The Modelfile template of Llama 3.1, read by hand where no Ollama is: the pieces of it that write a
system turn and an assistant turn, with Go's rule that `{{-` takes the white space before it away."""

import unsloth  # noqa: F401 (before transformers and unsloth_zoo)
import re

import pytest

from unsloth.chat_templates import CHAT_TEMPLATES
from unsloth.ollama_template_mappers import OLLAMA_TEMPLATES

NAMES = ("llama-3.1", "llama-31", "llama-3.2", "llama-32", "llama-3.3", "llama-33")


@pytest.fixture(params = NAMES)
def actions(request):
    """The template as a flat list of texts and {{actions}}, white space trimmed."""
    modelfile = CHAT_TEMPLATES[request.param][3]
    assert modelfile == OLLAMA_TEMPLATES.get(request.param, modelfile)
    template = modelfile.partition('TEMPLATE """')[2].partition('"""')[0]
    template = re.sub(r"\s*\{\{- ", "{{ ", template)
    return [piece for piece in re.split(r"(\{\{.*?\}\})", template) if piece]


def block(pieces, opening):
    """What stands between an opening action and its own end, and what follows that."""
    start = pieces.index(opening)
    depth = 0
    for i, piece in enumerate(pieces[start:], start):
        word = piece[2:-2].split()[0] if piece.startswith("{{") else ""
        depth += (word in ("if", "range")) - (word == "end")
        if depth == 0:
            return pieces[start + 1 : i], pieces[i + 1 :]
    raise AssertionError(f"{opening} never ends")


def test_eot_closes_the_system_turn_only_where_there_is_one(actions):
    inside, after = block(actions, "{{ if or .System .Tools }}")
    assert inside[-1] == "<|eot_id|>"
    assert after[0] == "{{ range $i, $_ := .Messages }}"


def calls(actions):
    inside, _ = block(actions, "{{ if .ToolCalls }}")
    return inside[: inside.index("{{ else }}")]


def test_a_call_follows_the_header_and_its_newlines(actions):
    assert "".join(calls(actions)).startswith("\n\n{{ .Content }}{{ range ")


def test_a_call_ends_with_eot_unless_it_is_the_last_message(actions):
    assert calls(actions)[-3:] == ["{{ if not $last }}", "<|eot_id|>", "{{ end }}"]


def test_calls_are_separated(actions):
    opening = next(piece for piece in calls(actions) if piece.startswith("{{ range "))
    inside, _ = block(calls(actions), opening)
    assert inside[:3] == ["{{ if $j }}", "; ", "{{ end }}"]


def test_a_call_is_json_as_before(actions):
    assert '{"name": "{{ .Function.Name }}", "parameters": {{ .Function.Arguments }}}' in "".join(
        calls(actions)
    )


def test_the_rest_is_as_before(actions):
    text = "".join(actions)
    assert text.endswith("{{ .Response }}{{ if .Response }}<|eot_id|>{{ end }}")
    assert (
        text.count("<|start_header_id|>ipython<|end_header_id|>\n\n{{ .Content }}<|eot_id|>") == 1
    )
