"""What the fsdp2 room changes at run time.

fsdp2.native_generate and fsdp2.native_resume mend Unsloth's own FSDP2 (native_fixes.py). fsdp2.trainer and fsdp2.loading are out
until the switch is on (switch.py). They change transformers, not Unsloth, and wrap methods from outside without a copy of their
text, so they hold for every source that has these methods with these arguments.
"""

import contextlib
import functools
import inspect
import sys
from importlib import import_module

from ..patching import Patch, SetAttribute, Target
from .switch import VARIABLE


class _AnySource(tuple):
    """Fingerprints of a definition that is called, never rewritten: what counts is checked by `_method`."""

    def __contains__(self, found) -> bool:
        return found is not None


ANY_SOURCE = _AnySource(("any with these arguments",))
# Method of Trainer -> (our function that wraps it, the first arguments that it must have).
_TRAINER = {
    "__init__": ("trainer", "init", ("model", "args")),
    "create_accelerator_and_postprocess": ("trainer", "create_accelerator_and_postprocess", ()),
    "create_optimizer": ("trainer", "create_optimizer", ()),
    "_move_model_to_device": ("trainer", "move_model_to_device", ("model", "device")),
    "train": ("trainer_saving", "train", ("resume_from_checkpoint",)),
    "save_model": ("trainer_saving", "save_model", ("output_dir", "_internal_call")),
    "_save_optimizer_and_scheduler": ("trainer_saving", "save_optimizer_and_scheduler", ("output_dir",)),
    "_load_from_checkpoint": ("trainer_saving", "load_from_checkpoint", ("resume_from_checkpoint",)),
    "_load_optimizer_and_scheduler": ("trainer_saving", "load_optimizer_and_scheduler", ("checkpoint",)),
    "_load_best_model": ("trainer_saving", "load_best_model", ()),
}


def _method(owner, name: str, arguments: tuple[str, ...]):
    method = vars(owner).get(name)
    if method is None:
        raise RuntimeError(f"upstream changed: {owner.__name__} has no {name}")
    found = tuple(inspect.signature(method).parameters)[1 : len(arguments) + 1]
    if found != arguments:
        raise RuntimeError(f"upstream changed: {owner.__name__}.{name} takes {found}, known is {arguments}")
    return method


def _trainer_changes(module, target):
    # A sharded checkpoint's files are checked and read by names of this package; nothing of them is imported before a save.
    changes = []
    for name, (where, wrapper, arguments) in _TRAINER.items():
        method = _method(module.Trainer, name, arguments)
        wrap = getattr(import_module(f".{where}", __package__), wrapper)
        changes.append(SetAttribute(module.Trainer, name, wrap(method)))
    arguments_class = module.TrainingArguments
    post_init = _method(arguments_class, "__post_init__", ())
    wrap = import_module(".trainer", __package__).arguments_post_init
    return [*changes, SetAttribute(arguments_class, "__post_init__", wrap(post_init))]


def _loading_changes(module, target):
    owner = module.PreTrainedModel
    original = vars(owner)["from_pretrained"]
    if not isinstance(original, classmethod):
        raise RuntimeError("upstream changed: PreTrainedModel.from_pretrained is no classmethod")
    wrap = import_module(".sharded_from_pretrained", __package__).from_pretrained
    return [SetAttribute(owner, "from_pretrained", wrap(original))]


_NATIVE = "unsloth.models.fsdp2_native"


def _settled(original):
    @contextlib.contextmanager
    @functools.wraps(original)
    def native_fsdp2_unsharded(model):
        native = sys.modules[_NATIVE]
        if native.is_native_fsdp2(model):
            import_module(".native_fixes", __package__).settle_root(native._native_root(model))
        with original(model) as found:
            yield found

    return native_fsdp2_unsharded


def _by_name(original):
    @functools.wraps(original)
    def native_load_optimizer(model, optimizer, path_or_state):
        import os

        import torch

        native, state = sys.modules[_NATIVE], path_or_state
        if isinstance(state, (str, os.PathLike)) and os.path.isfile(state):
            state = torch.load(state, map_location="cpu", weights_only=True)
        if isinstance(state, dict):
            root, inner = native._native_root(model), native._inner_optimizer(optimizer)
            state = import_module(".native_fixes", __package__).optimizer_state_by_name(root, inner, state)
        return original(model, optimizer, state)

    return native_load_optimizer


PATCHES = (
    Patch(
        id="fsdp2.native_generate",
        challenge="B",
        summary="under Unsloth's own FSDP2 generate() works before the first forward, and training after it",
        targets=(
            Target(_NATIVE, "native_fsdp2_unsharded", ">=2026.10.9", ("a5ea80040dd405f6",), ("a1b5f8793f3e6d9c",)),
        ),
        replace=_settled,
        relies_on=(Target(_NATIVE, "_native_root", ">=2026.10.9", ("6118c30b2500c799",)),),
    ),
    Patch(
        id="fsdp2.native_resume",
        challenge="B",
        summary="Unsloth's own FSDP2 resumes a checkpoint that one GPU or DDP wrote, optimizer included",
        targets=(
            Target(_NATIVE, "native_load_optimizer", ">=2026.10.9", ("ab973eca7e9f41af",), ("0e4881fa9d925a24",)),
        ),
        replace=_by_name,
        relies_on=(
            Target(_NATIVE, "_native_root", ">=2026.10.9", ("6118c30b2500c799",)),
            Target(_NATIVE, "split_param_groups", ">=2026.10.9", ("cf3d3e81da306c7a",)),
        ),
    ),
    Patch(
        id="fsdp2.trainer",
        challenge="B",
        summary="under torchrun a Trainer shards 4-bit LoRA models, saves and resumes them",
        targets=(Target("transformers.trainer", "Trainer.__init__", ">=4.53", ANY_SOURCE),),
        changes=_trainer_changes,
        run_time_only="it wraps transformers, of which there is no patch series",
        switch=VARIABLE,
    ),
    Patch(
        id="fsdp2.loading",
        challenge="B",
        summary="under torchrun from_pretrained reads each rank's part of a 4-bit model",
        targets=(Target("transformers.modeling_utils", "PreTrainedModel.from_pretrained", ">=4.53", ANY_SOURCE),),
        changes=_loading_changes,
        run_time_only="it wraps transformers, of which there is no patch series",
        switch=VARIABLE,
    ),
)
