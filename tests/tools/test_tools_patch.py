"""The run-time patches of the room on the installed Unsloth, and what each template change does to the 44 conversations."""

import json
import os
from importlib.util import find_spec
from pathlib import Path

import pytest

from unsloth_ext.tools.llama_template import apply_edits
from unsloth_ext.tools.patch import PATCHES
from unsloth_ext.tools.template_patches import TEMPLATE_CHANGES, TEMPLATE_STATES

ROOT = Path(__file__).parents[2]
CONVERSATIONS = json.loads((Path(__file__).parent / "data" / "conversations.json").read_text(encoding="utf-8"))
PAGES = {
    "tool_lists": "Llama-3.1-template-no-tools-and-no-builtin-tools-are-none",
    "call_arguments": "Llama-3.1-template-take-a-call-s-arguments-as-they-come",
    "builtin_calls": "Llama-3.1-template-write-builtin-calls-as-the-tools-read-them",
    "message_text": "Llama-3.1-template-keep-the-text-beside-a-call-and-of-a-tool",
    "generation_markers": "Llama-3.1-template-mark-what-the-assistant-says",
}

pytestmark = pytest.mark.skipif(find_spec("unsloth") is None, reason="Unsloth is not installed: make setup")


@pytest.fixture(scope="module")
def states(llama31_template):
    """{name of a change: (the template before, after it)}, as the patches apply them one after the other."""
    found, before = {}, llama31_template
    for name, _, edits in TEMPLATE_CHANGES:
        after = apply_edits(before, edits)
        found[name] = before, after
        before = after
    return found


def rendered(template, conversation):
    """The text, or the error's class and message."""
    from transformers.utils.chat_template_utils import render_jinja_template

    arguments = dict(conversation["template_kwargs"])
    try:
        texts, _ = render_jinja_template(
            conversations=[conversation["messages"]],
            tools=arguments.pop("tools", None),
            chat_template=template,
            bos_token="<|begin_of_text|>",
            **arguments,
        )
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return texts[0]


def difference(before, after):
    """What differs, with the turn's end that it stands in: short enough for a table."""
    if "<|begin_of_text|>" not in before or "<|begin_of_text|>" not in after:
        return tuple(_shown(x[-90:] if x.startswith("<|begin_of_text|>") else x[:90]) for x in (before, after))
    start = len(os.path.commonprefix([before, after]))
    end = len(os.path.commonprefix([before[start:][::-1], after[start:][::-1]]))
    start, end = max(start - 12, 0), max(end - 12, 0)
    return tuple(_shown(x[start : len(x) - end][:120]) for x in (before, after))


def _shown(text):
    return "`" + text.replace("\n", "\\n").replace("|", "\\|").replace("`", "'") + "`"


def changed_rows(before, after):
    rows = []
    for conversation in CONVERSATIONS:
        one, other = rendered(before, conversation), rendered(after, conversation)
        if one != other:
            rows.append((conversation["name"].replace("|", "\\|"), *difference(one, other)))
    return rows


def page_part(rows):
    same = len(CONVERSATIONS) - len(rows)
    if not rows:
        return f"All {same} tried conversations render (or are refused) byte for byte as before.\n"
    lines = [
        f"Of {len(CONVERSATIONS)} tried conversations {same} render (or are refused) byte for byte as before. The others:",
        "",
        "| conversation | before | after |",
        "| --- | --- | --- |",
        *(f"| {name} | {before} | {after} |" for name, before, after in rows),
    ]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("name", PAGES)
def test_the_page_of_a_template_change_shows_what_it_changes(states, name):
    page = (ROOT / "pr_descriptions" / f"{PAGES[name]}.md").read_text(encoding="utf-8")
    assert page_part(changed_rows(*states[name])) in page


def test_the_fingerprints_are_those_of_the_installed_template_and_its_edits():
    from unsloth_ext.patching.fingerprint import of_object
    from unsloth_ext.tools.templates import installed_template

    template, found = installed_template(), []
    for _, _, edits in (*TEMPLATE_CHANGES, ("", "", ())):
        found.append(of_object(template))
        template = apply_edits(template, edits)
    assert tuple(found) == TEMPLATE_STATES
    assert template == apply_edits(installed_template())


TARGETS = sorted({target.module for patch in PATCHES for target in patch.targets})
SNAPSHOT = f"""
import importlib, sys, types
import unsloth
for name in {TARGETS!r}: importlib.import_module(name)
chat, mappers = (sys.modules["unsloth." + n] for n in ("chat_templates", "ollama_template_mappers"))
def snapshot():
    found = {{}}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in ("unsloth", "unsloth_zoo") and isinstance(module, types.ModuleType):
            for attribute, value in vars(module).items():
                if attribute != "__warningregistry__":
                    found[name, attribute] = value
                if isinstance(value, type):
                    found.update({{(name, attribute, key): entry for key, entry in vars(value).items()}})
    for table in (chat.CHAT_TEMPLATES, mappers.OLLAMA_TEMPLATES):
        found.update({{(id(table), key): value for key, value in table.items()}})
    return found
def difference(a, b):
    return sorted(str(key) for key in a.keys() | b.keys() if a.get(key) is not b.get(key))
"""


def test_imported_after_unsloth_each_patch_goes_in_and_leaves_nothing_behind(python):
    python(
        SNAPSHOT + "pristine = snapshot()\nimport unsloth_ext\n"
        "rows = {row.id: row for row in unsloth_ext.status() if row.id.startswith('tools.')}\n"
        "assert {row.state for row in rows.values()} == {'applied'}, unsloth_ext.status()\n"
        "every = difference(pristine, snapshot())\n"
        "for one in rows:\n"
        "    unsloth_ext.disable(one)\n"
        "    assert {row.id: row.state for row in unsloth_ext.status()}[one] == 'disabled'\n"
        "    unsloth_ext.enable()\n"
        "    assert {row.state for row in unsloth_ext.status() if row.id in rows} == {'applied'}, unsloth_ext.status()\n"
        "    assert difference(pristine, snapshot()) == every\n"
        "unsloth_ext.disable()\n"
        "assert difference(pristine, snapshot()) == []\n"
    )


def test_imported_before_unsloth_the_ollama_text_comes_and_goes_in_both_modules(python):
    python(
        "import unsloth_ext\n" + SNAPSHOT + "new = mappers.llama31_ollama\n"
        "keys = [k for k, v in chat.CHAT_TEMPLATES.items() if v[3] == new]\n"
        "assert len(keys) == 6 and chat.llama31_ollama == new and '{{ if $j }}; ' in new, keys\n"
        "unsloth_ext.disable('tools.ollama_template')\n"
        "old = mappers.llama31_ollama\n"
        "assert old != new and chat.llama31_ollama == old and {chat.CHAT_TEMPLATES[k][3] for k in keys} == {old}\n"
        "assert all('endgeneration' in chat.CHAT_TEMPLATES[k][0] for k in keys)\n"
        "unsloth_ext.enable()\n"
        "assert {chat.CHAT_TEMPLATES[k][3] for k in keys} == {new}\n"
        "unsloth_ext.disable()\n"
        "assert {chat.CHAT_TEMPLATES[k][3] for k in keys} == {old}\n"
        "assert not any('endgeneration' in chat.CHAT_TEMPLATES[k][0] for k in keys)\n"
        # A template change without those before it says so.
        "for one in ('empty_tool_calls', 'tool_lists', 'call_arguments', 'message_text'): unsloth_ext.enable('tools.' + one)\n"
        "rows = {row.id: (row.state, row.reason) for row in unsloth_ext.status()}\n"
        "assert rows['tools.call_arguments'][0] == 'applied', rows\n"
        "assert 'it builds on tools.builtin_calls, which is not in' in rows['tools.message_text'][1], rows\n"
    )
