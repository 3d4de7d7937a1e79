"""What the tools room changes in Unsloth: the loaders' tokenizers and stop ids, the Llama 3.x templates, masks, vision batches."""

import functools

from ..patching import Patch, SetAttribute, Target
from .template_patches import TEMPLATE_PATCHES
from .tokenizer_patches import TOKENIZER_PATCHES


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
    *TOKENIZER_PATCHES,
    *TEMPLATE_PATCHES,
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
