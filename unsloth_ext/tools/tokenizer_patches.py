"""What the loaders and get_chat_template do to a tokenizer of Llama 3: its special tokens and stops, its guard, its parser, and which
chat template it has and saves.
"""

import functools

from ..patching import Patch, Target

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


def _guard(tokenizer):
    from .guard import install_guard
    from .special_tokens import text_tokenizer

    install_guard(text_tokenizer(tokenizer))


def _read_calls(tokenizer):
    from .response_schema import follow_chat_template, install_response_schema, profile_of
    from .special_tokens import text_tokenizer

    inner = text_tokenizer(tokenizer)
    follow_chat_template(inner)
    # A vision model's template is its processor's.
    if inner is not tokenizer and inner.chat_template is None and inner.response_template is None:
        if (profile := profile_of(getattr(tokenizer, "chat_template", None))) is not None:
            install_response_schema(tokenizer, profile)


def _mend_template(tokenizer):
    from .saved_template import load_checkpoint_template, save_plain_template

    save_plain_template(load_checkpoint_template(tokenizer))


# What is done to the tokenizer object of a Llama 3 model when it is loaded, by the patch that does it.
_ON_LLAMA3 = {
    "tools.injection_guard": _guard,
    "tools.response_template": _read_calls,
    "tools.checkpoint_template": _mend_template,
}


def _after_patch_tokenizer(patch_id):
    def replace(patch_tokenizer):
        @functools.wraps(patch_tokenizer)
        def patched(model, tokenizer):
            from .special_tokens import is_llama3

            model, tokenizer = patch_tokenizer(model, tokenizer)
            if is_llama3(tokenizer):
                _ON_LLAMA3[patch_id](tokenizer)
            return model, tokenizer

        return patched

    return replace


def _as_on_gpu(from_pretrained):
    load = from_pretrained.__func__

    @functools.wraps(load)
    def loaded_as_on_gpu(*args, **kwargs):
        from .. import status
        from .special_tokens import is_llama3

        model, tokenizer = load(*args, **kwargs)
        if is_llama3(tokenizer):
            wanted = {row.id for row in status() if row.state in ("applied", "pending")}
            for patch_id, change in _ON_LLAMA3.items():
                if patch_id in wanted:
                    change(tokenizer)
        return model, tokenizer

    return staticmethod(loaded_as_on_gpu)


def _save_without_markers(get_chat_template):
    @functools.wraps(get_chat_template)
    def with_plain_saves(*args, **kwargs):
        from .saved_template import has_markers, save_plain_template

        tokenizer = get_chat_template(*args, **kwargs)
        return save_plain_template(tokenizer) if has_markers(tokenizer) else tokenizer

    return with_plain_saves


def _export_without_markers(fix_tokenizer_config_json):
    @functools.wraps(fix_tokenizer_config_json)
    def with_plain_template(tokenizer, *args, **kwargs):
        from .saved_template import exported_template

        if tokenizer is None:
            return fix_tokenizer_config_json(tokenizer, *args, **kwargs)
        with exported_template(tokenizer):
            return fix_tokenizer_config_json(tokenizer, *args, **kwargs)

    return with_plain_template


TOKENIZER_PATCHES = (
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
        summary="user and tool text that spells Llama 3's control tokens is encoded as text in apply_chat_template",
        targets=(Target(_TOKENIZERS, "patch_tokenizer", ">=2026.8.13", _EVERY_PATCH_TOKENIZER),),
        replace=_after_patch_tokenizer("tools.injection_guard"),
        run_time_only="the guard changes the class of a tokenizer object, which upstream would do in transformers, not in Unsloth",
    ),
    Patch(
        id="tools.response_template",
        challenge="D",
        summary="parse_response, and with it TRL's GRPO tools=, reads the tool calls of Llama 3.x",
        # With an older Unsloth a tokenizer that has a response_template cannot be saved (AddedToken is not JSON serializable).
        targets=(Target(_TOKENIZERS, "patch_tokenizer", ">=2026.10.5", _EVERY_PATCH_TOKENIZER),),
        replace=_after_patch_tokenizer("tools.response_template"),
        run_time_only="the parser behind it is this package's own, too large for a patch",
    ),
    Patch(
        id="tools.checkpoint_template",
        challenge="D",
        summary="the Llama 3.1 template that comes with a checkpoint gets the same edits, and its markers back after a reload",
        targets=(Target(_TOKENIZERS, "patch_tokenizer", ">=2026.8.13", _EVERY_PATCH_TOKENIZER),),
        replace=_after_patch_tokenizer("tools.checkpoint_template"),
        run_time_only="a checkpoint's template is its author's; Unsloth's own copy of it has git patches",
    ),
    Patch(
        id="tools.cpu_tokenizer",
        challenge="D",
        summary="the CPU loader guards content, reads calls and mends the checkpoint's template as the GPU loaders do",
        targets=(
            Target(
                "unsloth_zoo.cpu.loader",
                "FastCPUModel.from_pretrained",
                ">=2026.10.9",
                ("46715d5895805c31", "0100880ea95142fb", "64cf824b3f32aefd"),
            ),
        ),
        replace=_as_on_gpu,
        run_time_only="what it does on a CPU is run-time only on a GPU as well",
    ),
    Patch(
        id="tools.saved_template",
        challenge="D",
        summary="save_pretrained writes the chat template without generation tags, which other engines do not know",
        targets=(
            Target(
                "unsloth.chat_templates",
                "get_chat_template",
                ">=2026.9.14",
                ("f6f78e1ad52a3084", "31e17229731fc897", "9ca9ab79a02ebedf", "657be18d326ec6c7"),
            ),
        ),
        replace=_save_without_markers,
        run_time_only="only tools.checkpoint_template puts the tags back after a reload",
    ),
    Patch(
        id="tools.exported_config",
        challenge="D",
        summary="merged and GGUF exports write the chat template without generation tags too",
        targets=(
            Target("unsloth_zoo.saving_utils", "fix_tokenizer_config_json", ">=2026.8.13", ("52b899e8645f2684",)),
        ),
        replace=_export_without_markers,
        run_time_only="only tools.checkpoint_template puts the tags back after a reload",
    ),
)
