"""What the fsdp2 room changes at run time.

fsdp2.native_generate, fsdp2.native_resume and fsdp2.native_resume_alone mend Unsloth's own FSDP2 (native_fixes.py). fsdp2.trainer, fsdp2.loading and
fsdp2.rotary_tables are out until the switch is on (switch.py). The first two change transformers, not Unsloth, and wrap methods from outside without a copy of their
text, so they hold for every source that has these methods with these arguments.
"""

import contextlib
import functools
import inspect
import sys
from importlib import import_module

from ..patching import ANY_SOURCE, Patch, SetAttribute, Target
from . import switch
from .switch import VARIABLE

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


def _heard(lost: str):
    """Somebody who set the variable, and runs plain transformers, hears of no status table: one line says what is lost."""

    def decorate(changes):
        @functools.wraps(changes)
        def wrapped(module, target):
            try:
                if target.versions.startswith("<"):
                    raise RuntimeError(f"transformers {target.versions.removeprefix('<')} or newer is needed")
                return changes(module, target)
            except Exception as error:
                switch.say_not_in(f"{lost}: {error}")
                raise

        return wrapped

    return decorate


def _wrapped(module: str, attribute: str) -> tuple[Target, ...]:
    """Where a method of transformers is; of releases that are too old for it too, so that somebody says so."""
    return tuple(Target(module, attribute, versions, ANY_SOURCE) for versions in (">=4.53", "<4.53"))


@_heard("no Trainer shards its model, every rank holds the whole of it")
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


@_heard("4-bit models are loaded whole on every rank")
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


def _whole(original):
    @functools.wraps(original)
    def native_load_optimizer_sharded(model, optimizer, directory):
        native = sys.modules[_NATIVE]
        if native.is_native_fsdp2(model):
            return original(model, optimizer, directory)
        fixes, inner = import_module(".native_fixes", __package__), native._inner_optimizer(optimizer)
        state = fixes.whole_optimizer_state(directory)
        import_module("unsloth.models.fsdp2_bnb_optim").rename_optimizer_state_for(inner, state)
        inner.load_state_dict(fixes.optimizer_state_by_number(native._native_root(model), inner, state))
        return state

    return native_load_optimizer_sharded


def _resumed_alone(original):
    @functools.wraps(original)
    def _load_optimizer_and_scheduler(self, checkpoint, *args, **kwargs):
        import os

        if checkpoint is None or os.path.isfile(os.path.join(checkpoint, "optimizer.pt")):
            return original(self, checkpoint, *args, **kwargs)
        native, folder = import_module(_NATIVE), os.path.join(checkpoint, "optimizer_dcp")
        others = native.is_native_fsdp2(self.model) or self.is_fsdp_enabled or self.is_deepspeed_enabled
        if others or not native._is_dcp_dir(folder):
            return original(self, checkpoint, *args, **kwargs)
        import torch

        native.native_load_optimizer(self.model, self.optimizer, folder)
        scheduler = os.path.join(checkpoint, "scheduler.pt")
        if os.path.isfile(scheduler):
            self.lr_scheduler.load_state_dict(torch.load(scheduler, weights_only=True))

    return _load_optimizer_and_scheduler


def _resume_alone(module, target):
    # The Trainer of one process has none of the hooks of Unsloth's FSDP2, whose module (light to import) may never be used there.
    native, trainer = import_module(_NATIVE), import_module("transformers.trainer").Trainer
    load = _method(trainer, "_load_optimizer_and_scheduler", ("checkpoint",))
    return [
        SetAttribute(native, "native_load_optimizer_sharded", _whole(native.native_load_optimizer_sharded)),
        SetAttribute(trainer, "_load_optimizer_and_scheduler", _resumed_alone(load)),
    ]


_ROWS = 8192  # Unsloth's tables grow by so many


def _few_rows(original):
    """A table begins with the rows that a forward asks for, and grows with what the next ones ask for; Unsloth's begins with 32768, 16
    MiB where heads are 128 wide. Every reader asks first: for the batch's length or max_seq_length, or all that the model knows where
    positions are given. Where the model knows no more than Unsloth's beginning, its decoding counts on the whole table.
    """

    @functools.wraps(original)
    def _init_rope_cache_state(self, dtype):
        original(self, dtype)
        if switch.world_size() > 1 and self._rope_cache_floor < self.max_position_embeddings:
            self._rope_cache_floor = self._rope_cache_needed = min(self._rope_cache_floor, _ROWS)

    return _init_rope_cache_state


_LLAMA = "unsloth.models.llama"


def _asks(attribute: str, fingerprint: str) -> Target:
    return Target(_LLAMA, attribute, ">=2026.10.9", (fingerprint,))


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
        id="fsdp2.native_resume_alone",
        challenge="B",
        summary="one process resumes the optimizer that the ranks of Unsloth's own FSDP2 saved in parts (UNSLOTH_FSDP2_DCP_OPTIM=1)",
        targets=(
            Target(
                "unsloth.models._utils",
                "patch_gradient_accumulation_fix",
                ">=2026.10.9",
                ("04a591ad3ff6da09",),
                ("ad8b93cd5c3596a8",),
            ),
        ),
        changes=_resume_alone,
        relies_on=(
            Target(_NATIVE, "native_load_optimizer_sharded", ">=2026.10.9", ("615d73c9b29f61e8",)),
            Target(_NATIVE, "_is_dcp_dir", ">=2026.10.9", ("b8038822782f8288",)),
        ),
    ),
    Patch(
        id="fsdp2.trainer",
        challenge="B",
        summary="under torchrun a Trainer shards 4-bit LoRA models, saves and resumes them",
        targets=_wrapped("transformers.trainer", "Trainer.__init__"),
        changes=_trainer_changes,
        run_time_only="it wraps transformers, of which there is no patch series",
        switch=VARIABLE,
    ),
    Patch(
        id="fsdp2.loading",
        challenge="B",
        summary="under torchrun from_pretrained reads each rank's part of a 4-bit model",
        targets=_wrapped("transformers.modeling_utils", "PreTrainedModel.from_pretrained"),
        changes=_loading_changes,
        run_time_only="it wraps transformers, of which there is no patch series",
        switch=VARIABLE,
    ),
    Patch(
        id="fsdp2.rotary_tables",
        challenge="B",
        summary="under torchrun rotary tables have the rows that are asked for: 4 MiB a card in place of 16 for Llama 3.1",
        targets=(Target(_LLAMA, "_PerDeviceRopeCache._init_rope_cache_state", ">=2026.10.9", ("8e856009ef62edde",)),),
        replace=_few_rows,
        relies_on=(
            _asks("_PerDeviceRopeCache._rope_cache_rows", "0d340cdeb128521a"),
            _asks("_PerDeviceRopeCache._rope_cache_stale", "dfe56841c98cc340"),
            _asks("_PerDeviceRopeCache._ensure_rope_cache", "fed40850388c3167"),
            _asks("_PerDeviceRopeCache.get_cached", "11c7707d59df12d6"),
            _asks("_PerDeviceRopeCache.extend_rope_embedding", "bb4616fabc1e8c04"),
            _asks("LlamaModel_fast_forward", "0290956913cf0a15"),
            _asks("LlamaAttention_fast_forward", "0a2feb1a6c52a652"),
            _asks("LlamaAttention_fast_forward_inference", "2bfaa09525d7c134"),
            _asks("_decode_rotary_seq_len", "9a3c4a2d8c2f4c25"),
        ),
        run_time_only="one card has the memory, and Unsloth has chosen to keep the positions it began with",
        switch=VARIABLE,
    ),
)
