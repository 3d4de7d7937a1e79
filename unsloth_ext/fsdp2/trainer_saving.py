"""`checkpoint-N` folders of a Trainer over a sharded model.

    checkpoint-N/adapter_model.safetensors, adapter_config.json   the adapter, as on one card: peft reads it. Others than "default"
                                                                  have a folder of their names, as PEFT has it
    checkpoint-N/sharded_optimizer/                               adapter, optimizer, scheduler and RNG, each rank's part; checked
    checkpoint-N/trainer_state.json, rng_state_*.pth, ...         the Trainer's own

The Trainer decides when to save, what to delete (`save_total_limit`) and which is the best; only the methods that write and read
weights and optimizer are stood in for. A run resumes on another number of ranks, on one, and from a checkpoint that one card or
DDP wrote. `resume_from_checkpoint=True` takes the newest checkpoint that is whole: one that a killed run left half written, or
whose files have changed, is passed over with a line.

A Trainer without the switch finds a folder with "optimizer" in its name and no optimizer.pt, and stops rather than going on with
an empty optimizer.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
from pathlib import Path

import torch
from torch import nn

from ..errors import UsageError
from . import switch
from .complete import SHARDED
from .trainer import is_ours

__all__ = ["newest_whole", "why_not_whole"]

_NUMBERED = re.compile(r"checkpoint-(\d+)")


def why_not_whole(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None. Reads the whole of its sharded part to check it."""
    from .atomic_folder import Damaged, read_manifest, verify

    try:
        json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"trainer_state.json cannot be read ({type(error).__name__})"
    if (folder / SHARDED).is_dir():
        try:
            verify(folder / SHARDED, read_manifest(folder / SHARDED))
        except (Damaged, OSError) as error:
            return str(error)
    elif not any((*folder.glob("adapter_model.*"), *folder.glob("*/adapter_model.*"))):
        return "it has no adapter"
    return None


def newest_whole(output_dir: str | Path) -> Path | None:
    """The newest checkpoint-N that can be resumed from; others are named in one line each on rank 0."""
    found = {int(m[1]): p for p in Path(output_dir).glob("checkpoint-*") if (m := _NUMBERED.fullmatch(p.name))}
    for number in sorted(found, reverse=True):
        problem = why_not_whole(found[number])
        if problem is None:
            return found[number]
        switch.say(f"{found[number]} is passed over: {problem}", once=False)
    return None


def train(original):
    @functools.wraps(original)
    def wrapped(self, resume_from_checkpoint=None, *args, **kwargs):
        if resume_from_checkpoint is True and switch.requested() is not None and _trains_adapters(self.model):
            from .team import Team

            chosen = Team(f"looking for a checkpoint in {self.args.output_dir}").on_first(
                newest_whole, self.args.output_dir
            )
            if chosen is None:
                raise UsageError(
                    f"resume_from_checkpoint=True: {self.args.output_dir} has no whole checkpoint-N folder"
                )
            resume_from_checkpoint = str(chosen)
        return original(self, resume_from_checkpoint, *args, **kwargs)

    return wrapped


def _trains_adapters(model) -> bool:
    return isinstance(model, nn.Module) and hasattr(model, "peft_config")


def _adapter_of(model) -> str:
    """The adapter that is saved beside the checkpoint: "default", or the active one where there is none of that name."""
    adapters = getattr(model, "peft_config", {"default": None})
    active = () if "default" in adapters else model.active_adapters
    return next(iter(active() if callable(active) else active), "default")


def _folder_of(checkpoint, adapter: str) -> str:
    return str(checkpoint) if adapter == "default" else os.path.join(checkpoint, adapter)


def _reads(self, checkpoint) -> bool:
    """A sharded model reads every checkpoint with this package; a whole one only what a sharded run wrote."""
    return is_ours(self.model) or (_trains_adapters(self.model) and os.path.isdir(os.path.join(checkpoint, SHARDED)))


def _source(checkpoint) -> str:
    inner = os.path.join(checkpoint, SHARDED)
    return inner if os.path.isdir(inner) else str(checkpoint)


def save_model(original):
    @functools.wraps(original)
    def wrapped(self, output_dir=None, _internal_call=False):
        if not is_ours(self.model):
            return original(self, output_dir, _internal_call=_internal_call)
        from .adapter_state import save_adapter

        output_dir = output_dir or self.args.output_dir
        for name in getattr(self.model, "peft_config", ["default"]):
            save_adapter(self.model, _folder_of(output_dir, name), adapter_name=name)
        if self.args.should_save:
            tokenizer = self.processing_class or getattr(self.data_collator, "tokenizer", None)
            if tokenizer is not None:
                tokenizer.save_pretrained(output_dir)
            torch.save(self.args, os.path.join(output_dir, "training_args.bin"))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=getattr(self.args, "hub_revision", None))

    return wrapped


def save_optimizer_and_scheduler(original):
    @functools.wraps(original)
    def wrapped(self, output_dir):
        if not is_ours(self.model):
            result = original(self, output_dir)
            if (
                self.args.should_save
            ):  # of a run on more ranks that got as far before: it would be read in the place of this
                shutil.rmtree(os.path.join(output_dir, SHARDED), ignore_errors=True)
            return result
        from .checkpointing import save_checkpoint

        extra = {"global_step": self.state.global_step}
        save_checkpoint(
            os.path.join(output_dir, SHARDED), self.model, self.optimizer, self.lr_scheduler,
            extra=extra, adapter_name=None,
        )  # fmt: skip  # the adapter lies beside it already
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, "scheduler.pt"))
            Path(output_dir, "optimizer.pt").unlink(missing_ok=True)

    return wrapped


def load_from_checkpoint(original):
    @functools.wraps(original)
    def wrapped(self, resume_from_checkpoint, model=None):
        if not _reads(self, resume_from_checkpoint):
            return original(self, resume_from_checkpoint, model)
        from .checkpointing import load_checkpoint

        load_checkpoint(_source(resume_from_checkpoint), self.model, adapter_name=_adapter_of(self.model))

    return wrapped


def load_optimizer_and_scheduler(original):
    @functools.wraps(original)
    def wrapped(self, checkpoint, *args, **kwargs):
        if checkpoint is None or not _reads(self, checkpoint):
            return original(self, checkpoint, *args, **kwargs)
        source = _source(checkpoint)
        if source == str(checkpoint) and not os.path.isfile(os.path.join(checkpoint, "optimizer.pt")):
            switch.say(f"{checkpoint} holds no optimizer (save_only_model?): it starts anew.", once=False)
            return None
        from .checkpointing import load_checkpoint

        load_checkpoint(source, self.model, self.optimizer, self.lr_scheduler, adapter_name=_adapter_of(self.model))

    return wrapped


def load_best_model(original):
    @functools.wraps(original)
    def wrapped(self, *args, **kwargs):
        best = self.state.best_model_checkpoint
        if best is None or not _reads(self, best):
            return original(self, *args, **kwargs)
        from .checkpointing import load_checkpoint

        load_checkpoint(_source(best), self.model, adapter_name=_adapter_of(self.model))

    return wrapped
