"""What the tools room changes in Unsloth."""

import functools

from ..patching import Patch, SetAttribute, SetItem, Target


def _heal_pad_token(from_pretrained):
    load = from_pretrained.__func__

    @functools.wraps(load)
    def loaded_with_pad_token(*args, **kwargs):
        from unsloth_zoo.pad_token import fix_pad_token

        model, tokenizer = load(*args, **kwargs)
        # The loader has set pad = eos where there was none, which is one of the states that this mends. Never a new token:
        # adapters may already sit on the embeddings.
        fix_pad_token(tokenizer, model=model, allow_add=False)
        return model, tokenizer

    return staticmethod(loaded_with_pad_token)


def _edit_llama31_template(module, target):
    from .llama_template import plain_turn_without_calls

    old = module.llama31_template
    new = plain_turn_without_calls(old)
    changes = [SetAttribute(module, "llama31_template", new)]
    for key, entry in module.CHAT_TEMPLATES.items():  # six keys, llama-3.1 to llama-33, share the text
        if entry[0] == old:
            changes.append(SetItem(module.CHAT_TEMPLATES, key, (new, *entry[1:])))
    return changes


PATCHES = (
    Patch(
        id="tools.cpu_pad_token",
        challenge="D",
        summary="the CPU loader picks a pad token as the GPU loader does, instead of pad = eos",
        targets=(
            Target(
                "unsloth_zoo.cpu.loader",
                "FastCPUModel.from_pretrained",
                ">=2026.10.9",
                ("46715d5895805c31",),
                patched=("0100880ea95142fb",),
            ),
        ),
        relies_on=(Target("unsloth_zoo.pad_token", "fix_pad_token", ">=2026.10.9", ("89905228caf32b13",)),),
        replace=_heal_pad_token,
    ),
    Patch(
        id="tools.empty_tool_calls",
        challenge="D",
        summary="the Llama 3.x templates render a turn whose tool_calls is [] or None (any Arrow-backed row) as a plain turn",
        targets=(
            Target(
                "unsloth.chat_templates",
                "llama31_template",
                ">=2026.8.1",
                ("dd2b02f1d93dc00f",),
                patched=("42b52124ca768c0e",),
            ),
        ),
        changes=_edit_llama31_template,
    ),
)
