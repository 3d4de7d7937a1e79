"""`use_gradient_checkpointing="auto"`, "12GiB" or 0.8 in Unsloth's `get_peft_model`, and in `from_pretrained` of a saved adapter.

Unsloth takes True, False and "unsloth" there, and hands any other value through without a word. Here an amount of memory goes to
`memory_budget`, and Unsloth prepares the model as for no checkpointing. Everything else is Unsloth's as before.
"""

from __future__ import annotations

import functools
import inspect
from importlib import import_module

from ..patching import Patch, SetAttribute, Target

# FastLlamaModel.patch_peft_model and FastBaseModel.get_peft_model, release by release.
_LLAMA = {
    "e62114e714d45745": "2026.9.14 and 2026.10.1",
    "930b0871ab5c74c5": "2026.10.2",
    "cf4c503df53aa3a2": "2026.10.3",
    "eeb1693755d703e1": "2026.10.4 to 2026.10.6",
    "48d81006eec3cf93": "2026.10.7",
    "e169e96b7278ad14": "2026.10.8",
    "4e69656c6f5510b4": "2026.10.9",
}
_BASE = {
    "17f156813aa5e547": "2026.9.14",
    "c3edf10a1faf6542": "2026.10.1",
    "d8ca7f041c99070f": "2026.10.2 and 2026.10.3",
    "f6207721231ec6e0": "2026.10.4",
    "38fd058593884231": "2026.10.5",
    "69e030c7249df636": "2026.10.6",
    "fd5c937343bc4f82": "2026.10.7",
    "034eea23906a3c9e": "2026.10.8",
    "f2a3dea853b7ffb8": "2026.10.9",
}
_NAME = "use_gradient_checkpointing"


def budget_of(value) -> str | float | None:
    """The memory budget that `use_gradient_checkpointing` names, or None for what is none: "auto", a number or a string with one.

    Raises ValueError for an amount that cannot be: a wrong unit, less than nothing.
    """
    if value is None or isinstance(value, bool) or not isinstance(value, (str, float, int)) or value in (0, 1):
        return None
    if isinstance(value, str) and value.strip().lower() != "auto" and not any(c.isdigit() for c in value):
        return None  # "unsloth", "True", and whatever other word: a run that asks for no budget stays what it is
    import_module(".memory_amount", __package__).parse(value)
    return value


def with_budget(original):
    """`original`, a staticmethod's function that takes use_gradient_checkpointing and returns a model, with budgets allowed."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def function(*args, **kwargs):
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            return original(*args, **kwargs)  # its own message
        budget = budget_of(bound.arguments.get(_NAME))
        if budget is None:
            return original(*args, **kwargs)
        # Unsloth's releases before 2026.10 need a model that is prepared for checkpointing; the budget turns the flag off later.
        bound.arguments[_NAME] = hasattr(import_module("unsloth.models._utils"), "arm_gradient_checkpointing") is False
        model = original(*bound.args, **bound.kwargs)
        controller = import_module(".memory_controller", __package__)
        if (before := controller.budget_on(model)) is not None:
            before.remove()
        controller.memory_budget(model, budget)  # `budget_on(model)` finds it
        return model

    return function


def _replace(owner, *names):
    return [SetAttribute(owner, name, staticmethod(with_budget(getattr(owner, name)))) for name in names]


PATCHES = (
    Patch(
        id="compiling.memory_budget",
        challenge="C",
        summary='use_gradient_checkpointing takes "auto", an amount ("12GiB") or a share of the card (0.8): the fastest step that fits',
        targets=(Target("unsloth.models.llama", "FastLlamaModel.patch_peft_model", ">=2026.9.14", tuple(_LLAMA)),),
        changes=lambda module, target: _replace(module.FastLlamaModel, "get_peft_model", "patch_peft_model"),
        run_time_only="the planner behind it is this package's own, too large for a patch",
    ),
    Patch(
        id="compiling.memory_budget_fast_model",
        challenge="C",
        summary="the same in FastModel.get_peft_model",
        targets=(Target("unsloth.models.vision", "FastBaseModel.get_peft_model", ">=2026.9.14", tuple(_BASE)),),
        changes=lambda module, target: _replace(module.FastBaseModel, "get_peft_model"),
        run_time_only="the planner behind it is this package's own, too large for a patch",
    ),
)
