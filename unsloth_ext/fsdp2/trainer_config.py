"""An FSDP configuration that was written for accelerate, read as settings of this sharding.

People have one already: `accelerate launch` with an `fsdp_config:` (variables FSDP_* and ACCELERATE_USE_FSDP), or
`TrainingArguments(fsdp=..., fsdp_config=...)`. Both say what to do with parameters between forward and backward, and whether
they live in host memory. accelerate itself would wrap the model a second time, and leaves packed uint8 weights whole on every
rank, so what is understood here is taken out of its sight.

What has no counterpart is refused by name where it changes the result (XLA, hybrid sharding by name, size-based wrapping) and
passed over where it does not: units are always decoder layers, every rank's own files are read, checkpoints are always sharded.
"""

from __future__ import annotations

import os
from dataclasses import replace

from ..errors import Refused, UsageError
from .switch import Settings, say

__all__ = ["from_arguments", "from_environment"]

_TRUE = ("1", "true", "yes", "on")


def from_environment(settings: Settings) -> tuple[Settings, bool]:
    """(settings, whether activations are to be checkpointed) of `accelerate launch`; its variable is removed."""
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() not in _TRUE:
        return settings, False
    given = {name[5:].lower(): value for name, value in os.environ.items() if name.startswith("FSDP_")}
    settings, checkpointing = _read(given, settings, "the accelerate configuration (FSDP_*)")
    os.environ.pop("ACCELERATE_USE_FSDP")
    return settings, checkpointing


def from_arguments(arguments, settings: Settings) -> Settings:
    """settings with those of `TrainingArguments(fsdp=...)`, which are removed from the arguments. Changes `arguments`.

    Raises Refused for what this sharding cannot do, UsageError for a value that is not one.
    """
    settings, checkpointing = from_environment(settings)
    wish = getattr(arguments, "fsdp", None)
    if wish or getattr(arguments, "fsdp_plugin_args", None) is not None:
        config = getattr(arguments, "fsdp_config", None) or {}
        given = {str(name).removeprefix("fsdp_"): value for name, value in config.items()}
        given.update(getattr(arguments, "fsdp_plugin_args", None) or {})
        words = [] if wish is True or wish is None else wish.split() if isinstance(wish, str) else list(wish)
        for word in (str(getattr(word, "value", word)).lower() for word in words):
            if word == "offload":
                given["cpu_offload"] = True
            elif word in ("full_shard", "shard_grad_op", "hybrid_shard", "hybrid_shard_zero2", "no_shard"):
                given["reshard_after_forward"] = word
        settings, asked = _read(given, settings, "TrainingArguments(fsdp=...)")
        checkpointing = checkpointing or asked
        arguments.fsdp = [] if isinstance(wish, list) else None
        if hasattr(arguments, "fsdp_plugin_args"):
            arguments.fsdp_plugin_args = None
    if checkpointing:
        for name in ("gradient_checkpointing", "activation_checkpointing"):  # the second since transformers 5.23
            if hasattr(arguments, name):
                kwargs = dict(getattr(arguments, f"{name}_kwargs", None) or {})
                setattr(arguments, name, True)
                setattr(arguments, f"{name}_kwargs", {"use_reentrant": False, **kwargs})
    return settings


def _read(given: dict, settings: Settings, where: str) -> tuple[Settings, bool]:
    def flag(name: str) -> bool:
        return str(given.get(name, "")).lower() in _TRUE

    if flag("xla"):
        raise Refused(f"{where} asks for XLA; unsloth_ext shards with torch's FSDP2", "Leave `xla` out.")
    if str(given.get("auto_wrap_policy", "")).lower() == "size_based_wrap":
        raise Refused(f"{where} asks for size_based_wrap; units are decoder layers here", "Leave auto_wrap_policy out.")
    after = str(given.get("reshard_after_forward", given.get("sharding_strategy", ""))).lower().rpartition(".")[2]
    kept = {"shard_grad_op": False, "2": False, "false": False, "full_shard": True, "1": True, "true": True}
    if "hybrid" in after or after in ("4", "5", "no_shard", "3"):
        raise Refused(
            f"{where} asks for {after}; a Trainer shards over all ranks here",
            "Leave it out, or call unsloth_ext.fsdp2.shard(model, mesh) with a mesh of two dimensions.",
        )
    changes = {}
    if after:
        if after not in kept:
            raise UsageError(f"{where} has reshard_after_forward = {after!r}, which is no known value")
        changes["reshard_after_forward"] = kept[after]
    if flag("cpu_offload") or flag("offload_params"):
        changes["cpu_offload"] = True
    settings = replace(settings, **changes)
    listed = ", ".join(f"{k}={v}" for k, v in changes.items()) or "defaults"
    say(f"{where} is read as settings of this sharding ({listed}); accelerate itself does not wrap the model.")
    return settings, flag("activation_checkpointing")
