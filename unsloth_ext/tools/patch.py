"""What the tools room changes in Unsloth: the loaders' tokenizers and stop ids, the Llama 3.x templates, masks, vision batches."""

import functools
import sys

from ..patching import Patch, SetAttribute, SetItem, Target

# -- tokenizers and stop ids -------------------------------------------------------------------------------------------------

_TOKENIZERS = "unsloth_zoo.tokenizer_utils"
# The GPU loaders and get_chat_template all end in this function, under three names in fifteen modules.
_PATCH_TOKENIZER = ("f84e85b0ba38e02a",)
# The same in a tree with the first, and with both, of the git patches that change it.
_WITH_SPECIAL_TOKENS, _WITH_STOP_IDS = "73b4244166b77b0b", "6a74c7ff43bd5f0e"
_EVERY_PATCH_TOKENIZER = (*_PATCH_TOKENIZER, _WITH_SPECIAL_TOKENS, _WITH_STOP_IDS)


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


def _restore_special_tokens(patch_tokenizer):
    @functools.wraps(patch_tokenizer)
    def restoring(model, tokenizer):
        from .special_tokens import restore_special_tokens

        # After it: a pad token that it finds among the reserved ones is in use, and stays one.
        model, tokenizer = patch_tokenizer(model, tokenizer)
        restore_special_tokens(tokenizer, model)
        return model, tokenizer

    return restoring


def _widen_stop_ids(patch_tokenizer):
    @functools.wraps(patch_tokenizer)
    def widening(model, tokenizer):
        from .stop_ids import widen_generation_config, widen_vllm_engine

        model, tokenizer = patch_tokenizer(model, tokenizer)
        widen_generation_config(model, tokenizer)
        widen_vllm_engine(model, tokenizer)
        return model, tokenizer

    return widening


def _restore_and_widen_on_cpu(from_pretrained):
    load = from_pretrained.__func__

    @functools.wraps(load)
    def loaded_with_tool_tokens(*args, **kwargs):
        from .special_tokens import restore_special_tokens
        from .stop_ids import widen_generation_config

        model, tokenizer = load(*args, **kwargs)
        restore_special_tokens(tokenizer, model)
        widen_generation_config(model, tokenizer)
        return model, tokenizer

    return staticmethod(loaded_with_tool_tokens)


def _guard_content(patch_tokenizer):
    @functools.wraps(patch_tokenizer)
    def guarding(model, tokenizer):
        from .special_tokens import is_llama3, text_tokenizer

        model, tokenizer = patch_tokenizer(model, tokenizer)
        if is_llama3(tokenizer):
            from .guard import install_guard

            install_guard(text_tokenizer(tokenizer))
        return model, tokenizer

    return guarding


def _read_calls(patch_tokenizer):
    @functools.wraps(patch_tokenizer)
    def reading(model, tokenizer):
        from .special_tokens import is_llama3, text_tokenizer

        model, tokenizer = patch_tokenizer(model, tokenizer)
        # One that the user or the checkpoint has set holds.
        if is_llama3(tokenizer) and getattr(text_tokenizer(tokenizer), "response_template", None) is None:
            from .response_schema import install_response_schema

            install_response_schema(tokenizer)
        return model, tokenizer

    return reading


# -- templates ---------------------------------------------------------------------------------------------------------------

# The template's fingerprints: as released, then after each of the changes below, which build on one another.
_TEMPLATE_STATES = (
    "dd2b02f1d93dc00f",
    "42b52124ca768c0e",
    "6df2378c0dc6631b",
    "623d5e866c71e4e1",
    "abbe47eff48f1599",
    "c6f8fe0ee5f9d123",
    "778afc3fa5e7a685",
)
_TEMPLATE_CHANGES = (  # (name, what gets better, the edits of llama_template.EDITS)
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
        "the Llama 3.x templates take a call's arguments as a JSON string, missing or flat, and escape its name",
        ("missing arguments and flat calls", "arguments as a JSON string", "escaped names"),
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
        if of_object(old) != _TEMPLATE_STATES[number]:
            raise RuntimeError(f"it builds on tools.{_TEMPLATE_CHANGES[number - 1][0]}, which is not in")
        new = apply_edits(old, _TEMPLATE_CHANGES[number][2])
        made = [SetAttribute(module, "llama31_template", new)]
        for key, entry in module.CHAT_TEMPLATES.items():  # six keys, llama-3.1 to llama-33, share the text
            if entry[0] == old:
                made.append(SetItem(module.CHAT_TEMPLATES, key, (new, *entry[1:])))
        return made

    return changes


def _template_patch(number):
    name, summary, _ = _TEMPLATE_CHANGES[number]
    known, after = _TEMPLATE_STATES[: number + 1], _TEMPLATE_STATES[number + 1 :]
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


# -- masks and batches ---------------------------------------------------------------------------------------------------------


def _let_newlines_merge(find_common_token_ids):
    @functools.wraps(find_common_token_ids)
    def _find_common_token_ids(component, tokenizer, *args, **kwargs):
        from .response_masks import without_merging_newline

        must, left, right = find_common_token_ids(component, tokenizer, *args, **kwargs)
        must, right = without_merging_newline(must, right, tokenizer)
        return must, left, right

    return _find_common_token_ids


def _bound_by_longer_side(init):
    from .image_size import bound_by_longer_side

    return bound_by_longer_side(init)


def _copy_messages(module, target):
    from .collator import copy_prompt_and_completion, copy_selected

    collator = module.UnslothVisionDataCollator
    return [
        SetAttribute(collator, name, copying(vars(collator)[name]))
        for name, copying in (
            ("_select_messages_or_raw", copy_selected),
            ("_collate_prompt_completion", copy_prompt_and_completion),
        )
    ]


_VISION = "unsloth_zoo.vision_utils"

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
                patched=("0100880ea95142fb", "64cf824b3f32aefd"),
            ),
        ),
        relies_on=(Target("unsloth_zoo.pad_token", "fix_pad_token", ">=2026.10.9", ("89905228caf32b13",)),),
        replace=_heal_pad_token,
    ),
    Patch(
        id="tools.special_tokens",
        challenge="D",
        summary="<|eom_id|> and <|python_tag|> get their names back where a Llama 3 vocabulary holds reserved tokens in their slots",
        targets=(
            Target(
                _TOKENIZERS,
                "patch_tokenizer",
                ">=2026.8.13",
                _PATCH_TOKENIZER,
                patched=(_WITH_SPECIAL_TOKENS, _WITH_STOP_IDS),
            ),
        ),
        replace=_restore_special_tokens,
    ),
    Patch(
        id="tools.stop_ids",
        challenge="D",
        summary="Llama 3 models stop at end of text, eom and eot, in generate, in vLLM and in what is saved",
        targets=(
            Target(
                _TOKENIZERS,
                "patch_tokenizer",
                ">=2026.8.13",
                (*_PATCH_TOKENIZER, _WITH_SPECIAL_TOKENS),
                patched=(_WITH_STOP_IDS,),
            ),
        ),
        replace=_widen_stop_ids,
    ),
    Patch(
        id="tools.cpu_tool_tokens",
        challenge="D",
        summary="the CPU loader restores Llama 3's tool tokens and stop ids as the GPU loaders do",
        targets=(
            Target(
                "unsloth_zoo.cpu.loader",
                "FastCPUModel.from_pretrained",
                ">=2026.10.9",
                ("46715d5895805c31", "0100880ea95142fb"),
                patched=("64cf824b3f32aefd",),
            ),
        ),
        replace=_restore_and_widen_on_cpu,
    ),
    Patch(
        id="tools.injection_guard",
        challenge="D",
        summary="user and tool text that spells Llama 3's special tokens is encoded as text in apply_chat_template",
        targets=(Target(_TOKENIZERS, "patch_tokenizer", ">=2026.8.13", _EVERY_PATCH_TOKENIZER),),
        replace=_guard_content,
        run_time_only="the guard changes the class of a tokenizer object, which upstream would do in transformers, not in Unsloth",
    ),
    Patch(
        id="tools.response_template",
        challenge="D",
        summary="parse_response, and with it TRL's GRPO tools=, reads the tool calls of Llama 3.x",
        # With an older Unsloth a tokenizer that has a response_template cannot be saved (AddedToken is not JSON serializable).
        targets=(Target(_TOKENIZERS, "patch_tokenizer", ">=2026.10.5", _EVERY_PATCH_TOKENIZER),),
        replace=_read_calls,
        run_time_only="the parser behind it is this package's own, too large for a patch",
    ),
    *map(_template_patch, range(len(_TEMPLATE_CHANGES))),
    Patch(
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
    ),
    Patch(
        id="tools.response_newline",
        challenge="D",
        summary="train_on_responses_only trains on an answer that starts with a newline instead of leaving the turn out",
        targets=(
            Target(
                "unsloth_zoo.dataset_utils",
                "_find_common_token_ids",
                ">=2026.9.9",
                ("a40920fe3e76e6e2",),
                patched=("0b3e168d515e9efb",),
            ),
        ),
        replace=_let_newlines_merge,
    ),
    Patch(
        id="tools.image_size",
        challenge="D",
        summary="the vision collator bounds an image by its longer side, not by its width alone",
        targets=(
            Target(
                _VISION,
                "UnslothVisionDataCollator.__init__",
                ">=2026.8.13",
                ("9e0bb219f60e14d3", "3b01bc795f271836", "127e1228ee70f9d7", "098d3f811adcbc83", "6b214d710e7cad0c"),
                patched=("bdc5cadd884c4d08",),
            ),
        ),
        replace=_bound_by_longer_side,
    ),
    Patch(
        id="tools.collator_copies",
        challenge="D",
        summary="the vision collator no longer changes the caller's messages",
        targets=(
            Target(
                _VISION,
                "UnslothVisionDataCollator._select_messages_or_raw",
                ">=2026.8.13",
                ("8fd43db31c6a5d2f",),
                patched=("48ce75f938503b58",),
            ),
        ),
        relies_on=(
            Target(
                _VISION,
                "UnslothVisionDataCollator._collate_prompt_completion",
                ">=2026.8.13",
                (
                    "5999e03fa7c5f6ee",
                    "ee95866f66e721b2",
                    "10f22b54d11fd192",
                    "6b32d2a1b97a1979",
                    "ec7b08502d838a5b",
                    "b6ac7107b37454b9",
                ),
            ),
        ),
        changes=_copy_messages,
    ),
)
