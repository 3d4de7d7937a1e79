"""Texts for the parser's tests: every form that Llama 3.x models write, and random ones made of their pieces."""

from __future__ import annotations

import json
import random

TAG, EOT, EOM, EOS = "<|python_tag|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"
F, G = (
    ("get_weather", {"city": "San Francisco", "days": 3}),
    ("find", {"text": 'a "b" \\ é\n', "deep": {"x": None}, "list": [1, "[f(a=1)]"]}),
)


def hf(name, arguments):
    return json.dumps({"name": name, "parameters": arguments}, ensure_ascii=False)


def meta(name, arguments):
    return json.dumps({"type": "function", "name": name, "parameters": arguments})


def tag(name, arguments):
    return f"<function={name}>{json.dumps(arguments)}</function>"


def pythonic(*calls):
    return "[" + ", ".join(f"{n}({', '.join(f'{k}={v!r}' for k, v in a.items())})" for n, a in calls) + "]"


# name -> (text, content, calls, stop)
FORMS = {
    "content": (f"It is 20 C.{EOT}", "It is 20 C.", [], "eot"),
    "content, cut off": ("It is 20", "It is 20", [], None),
    "json": (hf(*F) + EOT, "", [F], "eot"),
    "json, arguments": (json.dumps({"name": F[0], "arguments": F[1]}) + EOT, "", [F], "eot"),
    "json, arguments first": (json.dumps({"arguments": F[1], "name": F[0]}) + EOT, "", [F], "eot"),
    "json, eos": (hf(*G) + EOS, "", [G], "eos"),
    "json, no stop": (hf(*G), "", [G], None),
    "json, indented": (json.dumps({"name": F[0], "parameters": F[1]}, indent=4) + EOT, "", [F], "eot"),
    "tagged json": (TAG + hf(*F) + EOM, "", [F], "eom"),
    "typed json": (meta(*G) + EOT, "", [G], "eot"),
    "tagged typed json": (TAG + meta(*G) + EOM, "", [G], "eom"),
    "openai": (
        json.dumps({"type": "function", "function": {"name": F[0], "arguments": F[1]}}) + EOT,
        "",
        [F],
        "eot",
    ),
    "openai, id first": (
        json.dumps({"id": "c1", "type": "function", "function": {"name": F[0], "arguments": F[1]}}) + EOT,
        "",
        [F],
        "eot",
    ),
    "semicolons": (f"{hf(*F)}; {hf(*G)}{EOT}", "", [F, G], "eot"),
    "lines": (f"{TAG}{hf(*F)}\n{meta(*G)}\n{EOM}", "", [F, G], "eom"),
    "list": (f"[{hf(*F)}, {hf(*G)}]{EOT}", "", [F, G], "eot"),
    "pythonic": (pythonic(F) + EOT, "", [F], "eot"),
    "pythonic, parallel": (pythonic(F, G) + EOT, "", [F, G], "eot"),
    "pythonic, tagged": (TAG + pythonic(G) + EOT, "", [G], "eot"),
    "pythonic, keywords": (
        "[f(as=1, class='x', None=2)]" + EOT,
        "",
        [("f", {"as": 1, "class": "x", "None": 2})],
        "eot",
    ),
    "pythonic, no arguments": ("[now()]" + EOT, "", [("now", {})], "eot"),
    "function tag": (tag(*F) + EOT, "", [F], "eot"),
    "function tags": (tag(*F) + tag(*G) + EOM, "", [F, G], "eom"),
    "brave_search": (f'{TAG}brave_search.call(query="x y"){EOM}', "", [("brave_search", {"query": "x y"})], "eom"),
    "wolfram_alpha": (f'wolfram_alpha.call(query="2^10"){EOT}', "", [("wolfram_alpha", {"query": "2^10"})], "eot"),
    "code": (
        f"{TAG}import os\nprint([x for x in (1, 2)]){EOM}",
        "",
        [("code_interpreter", {"code": "import os\nprint([x for x in (1, 2)])"})],
        "eom",
    ),
    "content, json": (f"I'll look.{hf(*F)}{EOT}", "I'll look.", [F], "eot"),
    "content, tagged json": (f"I'll look.\n{TAG}{hf(*F)}{EOM}", "I'll look.\n", [F], "eom"),
    "content, function tag": (f"I'll look. {tag(*F)}{EOT}", "I'll look. ", [F], "eot"),
    "content, code, json": (f"As `x`:\n```py\nx = 1\n```{hf(*F)}{EOT}", "As `x`:\n```py\nx = 1\n```", [F], "eot"),
    "content, pythonic": (f"Both:\n{pythonic(F, G)}{EOT}", "Both:\n", [F, G], "eot"),
}

PIECES = [
    *(TAG, EOT, EOM, EOS, "<|start_header_id|>", "<|end_header_id|>", "<|eot", "<|", "<function=", "</function>", "f>"),
    *(
        "{",
        "}",
        "[",
        "]",
        "(",
        ")",
        '"',
        "'",
        '"""',
        "\\",
        "\\u12",
        "\\ud83d",
        "\\",
        ":",
        ",",
        "=",
        ";",
        "\n",
        " ",
        "```json\n",
        "\n```\n",
        "`",
        "~~~",
    ),
    *(
        '"name"',
        '"parameters"',
        '"arguments"',
        '"type": "function"',
        '"function"',
        '{"id": "x", ',
        '<function=f>{"a": 1}</function>',
        '{"name": "f", "parameters": {',
        "}}",
    ),
    *(
        "brave_search.call(",
        "query=",
        "[f(a=",
        "1",
        "-",
        "1e999",
        "NaN",
        "null",
        "None",
        "true",
        "True",
        "é",
        "😀",
        "\ud800",
        "\0",
    ),
    *("brave_sea", "word", "assistant", "9" * 500, "[" * 100),
]


def random_text(rng: random.Random) -> str:
    """Pieces in any order, or a real turn with some pieces cut out, doubled or put in."""
    if rng.random() < 0.4:
        return "".join(rng.choices(PIECES, k=rng.randrange(1, 25)))
    text = rng.choice(list(FORMS.values()))[0]
    for _ in range(rng.randrange(1, 5)):
        at, end = sorted((rng.randrange(len(text) + 1), rng.randrange(len(text) + 1)))
        change = rng.randrange(4)
        if change == 0:
            text = text[:at] + rng.choice(PIECES) + text[at:]
        elif change == 1:
            text = text[:at] + text[min(end, at + 8) :]
        elif change == 2:
            text = text[:end] + text[at : at + 40] + text[end:]
        else:
            text = text[:at] + chr(rng.randrange(32, 127)) + text[at + 1 :]
    return text[:2000]
