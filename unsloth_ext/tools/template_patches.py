"""The templates that Unsloth holds, edited in its memory: Llama 3.x's chat template, in six steps that are a pull request each, and
its copy for Ollama.
"""

import sys

from ..patching import Patch, SetAttribute, SetItem, Target

# The template's fingerprints: as released, then after each of the changes below, which build on one another.
TEMPLATE_STATES = (
    "dd2b02f1d93dc00f",
    "42b52124ca768c0e",
    "6df2378c0dc6631b",
    "0bc06ea3d5d7d159",
    "272e9be7ca4c0f3a",
    "7ada70c47e6e3758",
    "97206f7a89a85392",
)
TEMPLATE_CHANGES = (  # (name, what gets better, the edits of llama_template.EDITS)
    (
        "empty_tool_calls",
        "the Llama 3.x templates render a turn whose tool_calls is [] or None (any Arrow-backed row) as a plain turn",
        ("empty tool_calls",),
    ),
    (
        "tool_lists",
        "the Llama 3.x templates take tools=[] and builtin_tools=[] or None for none, and a date of None for none given",
        ("builtin tools line", "empty tools", "first message is the user's", "optional date"),
    ),
    (
        "call_arguments",
        "the Llama 3.x templates take a call's arguments as JSON, missing, flat or merged by Arrow, and escape its name",
        ("missing arguments and flat calls", "arguments as a JSON string", "arguments that are none", "escaped names"),
    ),
    (
        "builtin_calls",
        "the Llama 3.x templates write code_interpreter's code as it is and escape the arguments of the other builtin tools",
        ("builtin arguments", "code interpreter"),
    ),
    (
        "message_text",
        "the Llama 3.x templates keep content beside a call, take typed parts and None, and write a tool's text unquoted",
        ("content None or in parts", "raw tool results", "content beside a call"),
    ),
    (
        "generation_markers",
        "the Llama 3.x templates mark what the assistant says, so that assistant_only_loss trains on it",
        ("generation markers",),
    ),
)


def _edit_llama31_template(number):
    def changes(module, target):
        from ..patching.fingerprint import of_object
        from .llama_template import apply_edits

        old = module.llama31_template
        if of_object(old) != TEMPLATE_STATES[number]:
            raise RuntimeError(f"it builds on tools.{TEMPLATE_CHANGES[number - 1][0]}, which is not in")
        new = apply_edits(old, TEMPLATE_CHANGES[number][2])
        made = [SetAttribute(module, "llama31_template", new)]
        for key, entry in module.CHAT_TEMPLATES.items():  # six keys, llama-3.1 to llama-33, share the text
            if entry[0] == old:
                made.append(SetItem(module.CHAT_TEMPLATES, key, (new, *entry[1:])))
        return made

    return changes


def _template_patch(number):
    name, summary, _ = TEMPLATE_CHANGES[number]
    known, after = TEMPLATE_STATES[: number + 1], TEMPLATE_STATES[number + 1 :]
    return Patch(
        id=f"tools.{name}",
        challenge="D",
        summary=summary,
        targets=(Target("unsloth.chat_templates", "llama31_template", ">=2026.8.1", known, patched=after),),
        changes=_edit_llama31_template(number),
    )


class _InChatTemplates:
    """The Ollama text in `unsloth.chat_templates`, which copies it from the mappers when it is imported, maybe after us.

    A change like SetItem, of an entry of CHAT_TEMPLATES or (key None) of the module's own name for the text.
    """

    def __init__(self, key, old, value):
        self.key, self.old, self.value, self.before = key, old, value, None

    def _module(self):
        module = sys.modules.get("unsloth.chat_templates")
        return module if module is not None and self.key in (None, *vars(module).get("CHAT_TEMPLATES", ())) else None

    @property
    def slot(self):
        module = self._module()
        if module is None:
            return id(self), self.key
        return (id(module), "llama31_ollama") if self.key is None else (id(module.CHAT_TEMPLATES), self.key)

    def current(self):
        module = self._module()
        if module is None:
            return self.value
        return (
            vars(module).get("llama31_ollama", self.value) if self.key is None else module.CHAT_TEMPLATES[self.key][3]
        )

    def make(self):
        module = self._module()
        self.before = module and self.key and module.CHAT_TEMPLATES[self.key]
        self._put(self.value)

    def undo(self):
        module = self._module()
        if self.before and module and module.CHAT_TEMPLATES[self.key][:3] == self.before[:3]:
            module.CHAT_TEMPLATES[self.key] = self.before
        else:
            self._put(self.old)

    def _put(self, text):
        module = self._module()
        if module is None:
            return
        if self.key is None:
            if "llama31_ollama" in vars(module):
                module.llama31_ollama = text
        else:
            entry = module.CHAT_TEMPLATES[self.key]
            module.CHAT_TEMPLATES[self.key] = (*entry[:3], text, *entry[4:])


def _repair_ollama(module, target):
    from .ollama import repair

    old = module.llama31_ollama
    new = repair(old)
    keys = [key for key, text in module.OLLAMA_TEMPLATES.items() if text == old]
    made = [SetAttribute(module, "llama31_ollama", new)]
    made += [SetItem(module.OLLAMA_TEMPLATES, key, new) for key in keys]
    return made + [_InChatTemplates(key, old, new) for key in (None, *keys)]


OLLAMA_PATCH = Patch(
    id="tools.ollama_template",
    challenge="D",
    summary="Ollama's Llama 3.1 template: no eot without a turn, calls end with one, several calls stay apart",
    targets=(
        Target(
            "unsloth.ollama_template_mappers",
            "llama31_ollama",
            ">=2026.9.14",
            ("1c210c0948231119",),
            patched=("128cbbc4224b29d0",),
        ),
    ),
    changes=_repair_ollama,
)
TEMPLATE_PATCHES = (*map(_template_patch, range(len(TEMPLATE_CHANGES))), OLLAMA_PATCH)
