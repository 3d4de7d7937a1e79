"""Ollama's Llama 3.1 template, rendered before and after the repair by an interpreter of the part of Go's text/template it uses.

No Go is needed. The interpreter is checked on Go's own documented rules first; what it renders is then compared with the chat
template's text of the same conversation.
"""

import ast
import json
import re
from importlib.util import find_spec

import pytest

from unsloth_ext.tools.ollama import EDITS, repair

pytestmark = pytest.mark.skipif(find_spec("unsloth") is None, reason="Unsloth is not installed: make setup")


# -- the subset of text/template: text, {{ pipeline }}, if / else if / else, range with and without variables, trim markers --------


class Json(dict):
    """Arguments and tools, which Ollama prints as JSON."""

    __str__ = json.dumps


def execute(source, data):
    pieces = re.split(r"(\{\{.*?\}\})", source, flags=re.DOTALL)
    for i in range(1, len(pieces), 2):
        action = pieces[i]
        if action.startswith("{{- "):
            pieces[i - 1] = pieces[i - 1].rstrip(" \t\r\n")
            action = "{{" + action[3:]
        if action.endswith(" -}}"):
            pieces[i + 1] = pieces[i + 1].lstrip(" \t\r\n")
            action = action[:-3] + "}}"
        pieces[i] = ("action", action[2:-2].strip())
    body, rest, _ = parse(pieces)
    assert not rest
    return run(body, data, {"$": data})


def parse(pieces):
    """(nodes, what is left, the action that ended them)"""
    nodes = []
    while pieces:
        piece, pieces = pieces[0], pieces[1:]
        if isinstance(piece, str):
            nodes.append(piece)
            continue
        word, _, rest = piece[1].partition(" ")
        if word in ("end", "else"):
            return nodes, pieces, piece[1]
        if word in ("if", "range"):
            branches = [(rest, *parse(pieces))]
            while branches[-1][3].startswith("else if "):
                branches.append((branches[-1][3][8:], *parse(branches[-1][2])))
            final = []
            pieces = branches[-1][2]
            if branches[-1][3] == "else":
                final, pieces, closing = parse(pieces)
                assert closing == "end"
            nodes.append((word, [(condition, body) for condition, body, _, _ in branches], final))
        else:
            nodes.append(("print", piece[1]))
    return nodes, pieces, None


def run(nodes, dot, variables):
    out = []
    for node in nodes:
        if isinstance(node, str):
            out.append(node)
        elif node[0] == "print":
            name, is_set, expression = node[1].partition(" := ")
            if is_set:
                variables[name] = evaluate(expression, dot, variables)
            else:
                out.append(str(evaluate(node[1], dot, variables)))
        elif node[0] == "if":
            body = next((body for condition, body in node[1] if evaluate(condition, dot, variables)), node[2])
            out.append(run(body, dot, dict(variables)))
        else:
            ((header, body),) = node[1]
            names, _, expression = header.rpartition(" := ")
            for index, item in enumerate(evaluate(expression, dot, variables)):
                inner = dict(variables)
                if names:
                    key, value = names.split(", ")
                    inner |= {key: index, value: item}
                out.append(run(body, item, inner))
    return "".join(out)


def evaluate(expression, dot, variables):
    words = re.findall(r'"[^"]*"|\([^()]*(?:\([^()]*\)[^()]*)*\)|[^\s()]+', expression)
    values = [operand(word, dot, variables) for word in words[words[0] in FUNCTIONS :]]
    return FUNCTIONS[words[0]](*values) if words[0] in FUNCTIONS else values[0]


FUNCTIONS = {
    "or": lambda *values: next((v for v in values if v), values[-1]),
    "and": lambda *values: next((v for v in values if not v), values[-1]),
    "not": lambda value: not value,
    "eq": lambda a, b: a == b,
    "len": len,
    "slice": lambda value, start: value[start:],
}


def operand(word, dot, variables):
    if word.startswith("("):
        return evaluate(word[1:-1], dot, variables)
    if word[0] == '"' or word.isdigit():
        return ast.literal_eval(word)
    head, *path = word.split(".")
    value = variables[head] if head.startswith("$") else dot
    for name in path:
        if name:
            value = value[name] if not isinstance(value, dict) or name in value else ""
    return value


@pytest.mark.parametrize(
    "source, wanted",
    [
        ("a {{- .X }} b", "a1 b"),
        ("a\n\n{{- if .X }}\n\nx{{ else }}y{{ end -}}\n c", "a\n\nxc"),
        ("{{ range $i, $_ := .L }}{{ if $i }}, {{ end }}{{ . }}{{ end }}", "u, v"),
        ("{{ range .L }}{{ $.X }}{{ . }}{{ end }}", "1u1v"),
        ("{{ $n := eq (len (slice .L 1)) 1 }}{{ if and $n .X }}last{{ end }}", "last"),
        ("{{ if .None }}a{{ else if not .None }}b{{ else }}c{{ end }}", "b"),
    ],
)
def test_the_interpreter_follows_gos_rules(source, wanted):
    assert execute(source, {"X": 1, "L": ["u", "v"], "None": ""}) == wanted


# -- the template ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def before():
    """The Modelfile in the files of the installed Unsloth."""
    from pathlib import Path

    source = Path(next(iter(find_spec("unsloth").submodule_search_locations)), "ollama_template_mappers.py")
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "llama31_ollama":
            return node.value.value
    raise AssertionError("no llama31_ollama")


def template(modelfile):
    return modelfile.partition('TEMPLATE """')[2].partition('"""')[0]


def ollama(modelfile, messages, tools=()):
    """What Ollama's chat endpoint makes of it: the system messages are also given joined, as `.System`."""
    listed = []
    for message in messages:
        calls = [
            {"Function": {"Name": c["function"]["name"], "Arguments": Json(c["function"]["arguments"])}}
            for c in message.get("tool_calls", ())
        ]
        listed.append({"Role": message["role"], "Content": message["content"], "ToolCalls": calls})
    system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
    return execute(
        template(modelfile),
        {"Messages": listed, "System": system, "Tools": json.dumps(list(tools)) if tools else "", "Response": ""},
    )


def chat(text):
    """The chat template's words without what only one of the two has: bos, and the system turn with its date."""
    text = text.removeprefix("<|begin_of_text|>")
    return text.partition("<|eot_id|>")[2] if text.startswith("<|start_header_id|>system") else text


def call(name, **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


HELLO = {"role": "user", "content": "Weather?"}
ANSWER = {"role": "assistant", "content": "Warm."}
RESULT = {"role": "tool", "content": '{"t": 25}'}
CALLS = {"role": "assistant", "content": "", "tool_calls": [call("weather", city="Bern")]}
EOT, HEADER = "<|eot_id|>", "<|start_header_id|>{}<|end_header_id|>\n\n"


def test_no_turn_no_eot(before):
    assert ollama(before, [HELLO]).startswith(EOT)
    assert ollama(repair(before), [HELLO]) == HEADER.format("user") + "Weather?" + EOT + HEADER.format("assistant")


def test_a_call_has_its_newlines_and_its_eot(before):
    wrong = (
        "assistant<|end_header_id|>" + '{"name": "weather", "parameters": {"city": "Bern"}}<|start_header_id|>ipython'
    )
    right = (
        "assistant<|end_header_id|>\n\n"
        + '{"name": "weather", "parameters": {"city": "Bern"}}<|eot_id|><|start_header_id|>ipython'
    )
    assert wrong in ollama(before, [HELLO, CALLS, RESULT]) and right in ollama(repair(before), [HELLO, CALLS, RESULT])


def test_text_beside_calls_is_kept_and_calls_stay_apart(before):
    turn = {"role": "assistant", "content": "Look: ", "tool_calls": [call("a", x=1), call("b")]}
    assert '{"name": "a", "parameters": {"x": 1}}{"name": "b", "parameters": {}}' in ollama(before, [HELLO, turn])
    assert (
        ollama(repair(before), [HELLO, turn, RESULT]).count(
            HEADER.format("assistant")
            + 'Look: {"name": "a", "parameters": {"x": 1}}; {"name": "b", "parameters": {}}'
            + EOT
        )
        == 1
    )


def test_random_conversations_say_what_the_chat_template_says(before, llama31_template, fuzz):
    from transformers.utils.chat_template_utils import render_jinja_template

    from unsloth_ext.tools.llama_template import apply_edits

    hf, after = apply_edits(llama31_template), repair(before)
    for _ in range(200):
        messages = [{"role": "system", "content": "Be brief."}] * fuzz.randrange(2)
        for _ in range(fuzz.randrange(1, 4)):
            messages.append({"role": "user", "content": fuzz.choice(["Hi", "a\n\nb", " spaced "])})
            if fuzz.random() < 0.5:
                arguments = {"n": fuzz.randrange(9), "s": fuzz.choice(["x", 'q"q', "ü"])}
                messages.append({"role": "assistant", "content": "", "tool_calls": [call("f", **arguments)]})
                messages.append({"role": "tool", "content": fuzz.choice(["25 C", '{"t": 1}'])})
            messages.append({"role": "assistant", "content": fuzz.choice(["Yes.", "No\n"])})
        messages.append(HELLO)  # both end by asking the assistant
        (wanted,), _ = render_jinja_template(
            conversations=[messages], chat_template=hf, bos_token="", add_generation_prompt=True
        )
        found = ollama(after, messages).replace(r"\u00fc", "ü")
        assert chat(found) == chat(wanted), messages


@pytest.mark.parametrize("tools", [(), ({"name": "f"},)], ids=["no tools", "tools"])
def test_without_calls_and_with_a_system_turn_nothing_changes(before, tools):
    system = {"role": "system", "content": "Be brief."}
    for messages in ([system, HELLO], [system, HELLO, ANSWER, HELLO], [system, HELLO, ANSWER], [system, HELLO, RESULT]):
        assert ollama(repair(before), messages, tools) == ollama(before, messages, tools)


def test_another_text_is_an_error(before):
    with pytest.raises(ValueError, match="expected exactly one"):
        repair(repair(before))
    assert len(EDITS) == 3
