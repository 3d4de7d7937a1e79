"""Whether the Trainer shards, and how: one switch, off unless somebody asks.

    UNSLOTH_EXT_FSDP2=1 torchrun --nproc-per-node 2 train.py                      # an unchanged script
    UNSLOTH_EXT_FSDP2=cpu_offload,residency=2GiB torchrun --nproc-per-node 2 train.py
    unsloth_ext.fsdp2.enable(cpu_offload=True)                                    # the same, in the script, before the model is loaded

Off, transformers is not touched. On, the fsdp2.trainer and fsdp2.loading patches are in (`unsloth_ext.status()`), and an FSDP
configuration, whether from `accelerate launch` or from `TrainingArguments(fsdp=...)`, is read as settings of this sharding
(trainer_config.py).
Imports nothing heavy: it is read while `unsloth_ext` is imported.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, fields, replace

from ..errors import UnslothExtError, UsageError
from ..switches import OFF

__all__ = ["PATCHES", "Settings", "disable", "enable", "requested", "say", "say_not_in", "settings", "unsloth_shards",
           "world_size"]  # fmt: skip

VARIABLE = "UNSLOTH_EXT_FSDP2"
PATCHES = ("fsdp2.trainer", "fsdp2.loading")
_WITH_UNSLOTH = ("fsdp2.rotary_tables",)  # which a run does without, too
_YES, _NO = ("1", "true", "yes", "on"), ("", *OFF)
_UNITS = {"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}


@dataclass(frozen=True)
class Settings:
    """What `shard` and `load` are called with. See their docstrings.

    reshard_after_forward, cpu_offload, gather, mixed_precision ("bfloat16", "float16" or "float32"): as in `shard`.
    residency: layers that stay gathered from forward to backward, as in `shard`: "auto" (at most 5% of the card), "all", or a number
        of bytes; 0 for the least memory.
    sharded_load: from_pretrained of a 4-bit model reads each rank's part only. False: whole on every rank, then cut.
    """

    reshard_after_forward: bool = True
    cpu_offload: bool = False
    residency: int | str = "auto"
    gather: str = "auto"
    mixed_precision: str | None = None
    sharded_load: bool = True

    def __post_init__(self):
        for name in ("reshard_after_forward", "cpu_offload", "sharded_load"):
            if not isinstance(value := getattr(self, name), bool):
                raise UsageError(f"{name} must be true or false, got {value!r}")
        size = self.residency
        if size not in ("auto", "all") and (isinstance(size, bool) or not isinstance(size, int) or size < 0):
            raise UsageError(f"residency must be a number of bytes, such as 2GiB, 'auto' or 'all', got {size!r}")
        if self.gather not in ("auto", "collective", "copies"):
            raise UsageError(f"gather must be auto, collective or copies, got {self.gather!r}")
        if self.mixed_precision not in (None, "bfloat16", "float16", "float32"):
            raise UsageError(f"mixed_precision must be bfloat16, float16 or float32, got {self.mixed_precision!r}")


def parse(text: str) -> Settings | None:
    """Settings from the variable's value; None for off. Raises UsageError that names what it does not know."""
    text = text.strip().lower()
    if text in _NO:
        return None
    given = {}
    for part in () if text in _YES else filter(None, (p.strip() for p in text.split(","))):
        name, _, value = part.partition("=")
        name, value = name.strip(), value.strip()
        if name not in {field.name for field in fields(Settings)}:
            known = ", ".join(field.name for field in fields(Settings))
            raise UsageError(f"{VARIABLE} has no setting {name!r}", f"It is 1, 0, or a list of: {known}.")
        given[name] = _value(name, value)
    return Settings(**given)


def _value(name: str, value: str):
    if name == "mixed_precision":
        return {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}.get(value, value)
    if name == "residency":
        number, unit = value.rstrip("kmgib "), _UNITS.get(value.lstrip("0123456789. "))
        if value.isdigit():
            return int(value)
        try:
            return int(float(number) * unit) if unit else value
        except ValueError:
            return value
    return True if not value or value in _YES else False if value in _NO else value


_enabled: Settings | None = None
_read: dict[str, Settings | None] = {}


def requested() -> Settings | None:
    """The settings if the switch is on, by `enable` or by the environment; None if it is off."""
    if _enabled is not None:
        return _enabled
    text = os.environ.get(VARIABLE, "")
    if text not in _read:
        _read[text] = parse(text)
    return _read[text]


def settings() -> Settings:
    return requested() or Settings()


def enable(**changes) -> Settings:
    """Shard 4-bit LoRA models that a Trainer gets from now on, and read them in parts. Before the model is loaded.

    changes: of `Settings`. Has no effect in a single process, other than a line that says so. Raises UsageError for an unknown
    setting or a wrong value, UnslothExtError where transformers is one that cannot be changed so.
    """
    import unsloth_ext

    global _enabled
    if unknown := sorted(set(changes) - {field.name for field in fields(Settings)}):
        known = ", ".join(field.name for field in fields(Settings))
        raise UsageError(f"enable() has no setting {', '.join(unknown)}", f"There are: {known}.")
    _enabled = replace(requested() or Settings(), **changes)
    unsloth_ext.enable(*PATCHES, *_WITH_UNSLOTH)
    for row in unsloth_ext.status():
        if row.id in PATCHES and row.state in ("failed", "skipped"):
            disable()
            raise UnslothExtError(f"the Trainer cannot be made to shard: {row.id} {row.state}: {row.reason}")
    return _enabled


def disable() -> None:
    """Take the Trainer's patches out again. Models that are sharded already stay sharded."""
    import unsloth_ext

    global _enabled
    _enabled = None
    unsloth_ext.disable(*PATCHES, *_WITH_UNSLOTH)


def world_size() -> int:
    """How many processes torchrun started; 1 without it."""
    text = os.environ.get("WORLD_SIZE", "")
    return int(text) if text.isdigit() and "RANK" in os.environ else 1


def unsloth_shards() -> bool:
    """True where UNSLOTH_FSDP2 asks an Unsloth that can (2026.10.9 on) to shard: nothing is sharded twice, so it does and we do not."""
    if os.environ.get("UNSLOTH_FSDP2", "").strip().lower() not in _YES:
        return False
    folder = next(iter(getattr(sys.modules.get("unsloth"), "__path__", ())), None)
    if folder is None or not os.path.isfile(os.path.join(folder, "models", "fsdp2_native.py")):
        return False
    say(
        "UNSLOTH_FSDP2 is set too, so Unsloth's own FSDP2 shards this model and unsloth_ext does not. Unset UNSLOTH_FSDP2 "
        "for what it lacks: reading a 4-bit checkpoint in parts, and a sharded quant state."
    )
    return True


def say_not_in(what: str) -> None:
    """One line where the variable asks for sharding that this transformers cannot have. `enable` raises instead."""
    if _enabled is None and requested() is not None:
        say(f"{VARIABLE} is set, but {what}.")


_said: set[str] = set()


def say(line: str, *, once: bool = True) -> None:
    """One line on rank 0's standard error."""
    if os.environ.get("RANK", "0") == "0" and not (once and line in _said):
        _said.add(line)
        print(f"unsloth_ext.fsdp2: {line}", file=sys.stderr, flush=True)
