"""Trainers step the parameters of an 8-bit optimizer together (eight_bit_steps.py), with Unsloth or without.

A Trainer's optimizer is looked at where it is made, and once more where the learning-rate scheduler gets it: some trainers
(Unsloth's with `embedding_learning_rate` or `loraplus_lr_ratio`) and users make it by themselves. One that cannot step so is left as
it is. On by itself where there is a CUDA card; UNSLOTH_EXT_EIGHT_BIT_STEPS=0 turns it off, =1 has it on a CPU too.
"""

from __future__ import annotations

import functools
import inspect
import os
from importlib import import_module

from ..patching import ANY_SOURCE, NotHere, Patch, SetAttribute, Target

_SWITCH = "UNSLOTH_EXT_EIGHT_BIT_STEPS"


def _together(optimizer) -> None:
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper holds it
    if not any(cls.__module__.startswith("bitsandbytes") for cls in type(optimizer).__mro__):
        return
    steps = import_module(".eight_bit_steps", __package__)
    if "step" not in vars(optimizer) and steps.refusal(optimizer) is None:
        steps.step_together(optimizer)


def _create_optimizer(original):
    @functools.wraps(original)
    def create_optimizer(self, *args, **kwargs):
        optimizer = original(self, *args, **kwargs)
        _together(optimizer)
        return optimizer

    return create_optimizer


def _create_scheduler(original):
    @functools.wraps(original)
    def create_scheduler(self, num_training_steps, optimizer=None, *args, **kwargs):
        _together(self.optimizer if optimizer is None else optimizer)
        return original(self, num_training_steps, optimizer, *args, **kwargs)

    return create_scheduler


def _changes(module, target):
    if not os.environ.get(_SWITCH):
        import torch

        if not torch.cuda.is_available() or torch.version.hip is not None:
            raise NotHere(f"for CUDA cards: {_SWITCH}=1 has it here")
    trainer = module.Trainer
    create_scheduler = vars(trainer)["create_scheduler"]
    found = tuple(inspect.signature(create_scheduler).parameters)[1:3]
    if found != ("num_training_steps", "optimizer"):
        raise RuntimeError(f"upstream changed: Trainer.create_scheduler takes {found}")
    return [
        SetAttribute(trainer, "create_optimizer", _create_optimizer(vars(trainer)["create_optimizer"])),
        SetAttribute(trainer, "create_scheduler", _create_scheduler(create_scheduler)),
    ]


PATCHES = (
    Patch(
        id="compiling.eight_bit_steps",
        challenge="C",
        summary="bitsandbytes' 8-bit optimizers (adamw_8bit) step many parameters by one kernel, bit for bit as one by one (CUDA)",
        targets=(Target("transformers.trainer", "Trainer.create_optimizer", ">=4.53", ANY_SOURCE),),
        changes=_changes,
        run_time_only="it wraps transformers, of which there is no patch series",
        switch=_SWITCH,
        on_unless_switched_off=True,
    ),
)
