"""transformers' Trainer, and trl's that build on it, over a sharded model.

`Trainer.__init__` is where every trainer hands over its model with the adapters on it and before an optimizer exists; there the
model is sharded. accelerate then sees one more model that it need not wrap: it still spreads the batches over the ranks, scales
and clips. What the Trainer must do otherwise with shards is little:

* accelerate's `prepare_model` leaves a sharded model where it is, without DDP; a frozen reference model is sharded there too
* backwards run in the thread that trains, so that cuBLAS has one workspace a card and not two
* micro-batches before the last of a step are not reduced: accelerate asks the model for `no_sync`, as it asks DDP
* optimizers step on each rank's own parts, and gradients are clipped there, without the dispatch of DTensors
* a float16 gradient scaler agrees over ranks whether a step overflowed
* saving, resuming and loading the best model go through this package's checkpoints (trainer_saving.py)

Nothing of the training loop is replaced. Each function here takes the method it stands in for and gives it whatever is not a
model that we sharded. They are put in by patch.py when the switch is on (switch.py).
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import weakref

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ..errors import Refused, UsageError
from . import clipping, switch, trainer_config
from .generation import serve_generation
from .head_readers import serve_head_readers
from .nf4_parameter import NF4Shard
from .optimizers import on_local_shards, step_quickly
from .processes import default_mesh
from .row_shard import RowShard
from .sharding import accumulate, shard

__all__ = ["is_ours", "serve", "shard_for_trainer"]

_NEEDS_WHOLE_GRADIENTS = ("galore", "apollo", "lomo", "grokadamw", "schedule_free", "stable_adamw", "muon")


def is_ours(model) -> bool:
    """True for a model that `shard` has sharded."""
    return isinstance(model, FSDPModule) and "_unsloth_ext_resident" in vars(model)


def _four_bit(model: nn.Module) -> bool:
    return any(isinstance(p, NF4Shard) or type(p).__name__ == "Params4bit" for p in model.parameters())


def shard_for_trainer(model, arguments=None, *, optimizers=(None, None), model_init=None):
    """Shard `model` for a Trainer with `TrainingArguments` `arguments`; gives it back as it is where that is not our task.

    Raises Refused or UsageError on every rank for what a sharded run cannot do.
    """
    settings = switch.requested()
    if settings is None or is_ours(model):
        return model if settings is None else serve(model)
    if switch.world_size() == 1 and not (dist.is_initialized() and dist.get_world_size() > 1):
        switch.say(
            "is on, but this is a single process: nothing is sharded. Start it with torchrun, for example "
            "`torchrun --nproc-per-node 2 your_script.py`."
        )
        return model
    if model_init is not None:
        raise Refused(
            "Trainer(model_init=...) makes a new model when training starts, which would not be sharded",
            "Build the model and pass it as Trainer(model=...).",
        )
    if not isinstance(model, nn.Module) or _somebody_else(model):
        return model
    if not _four_bit(model) and not hasattr(model, "peft_config"):
        switch.say(
            "this model is neither in 4 bits nor has it adapters; it is left to accelerate (DDP, or FSDP by its own "
            "configuration)."
        )
        return model
    settings = trainer_config.from_arguments(arguments, settings) if arguments is not None else settings
    _refuse(arguments, optimizers)
    return _shard_with(model, settings, getattr(arguments, "device", None))


def _shard_with(model: nn.Module, settings: switch.Settings, device) -> nn.Module:
    precision = settings.mixed_precision and getattr(torch, settings.mixed_precision)
    model = shard(
        model, default_mesh(device), reshard_after_forward=settings.reshard_after_forward,
        cpu_offload=settings.cpu_offload, residency=settings.residency, gather=settings.gather, mixed_precision=precision,
    )  # fmt: skip
    model._unsloth_ext_settings = settings, device  # for the reference model of this policy
    return serve(model)


def _somebody_else(model: nn.Module) -> bool:
    if any(isinstance(m, FSDPModule) for m in model.modules()):
        switch.say("the model came sharded by somebody else's FSDP2; it is left as it is.")
        return True
    return switch.unsloth_shards()


def _refuse(arguments, optimizers) -> None:
    if optimizers and optimizers[0] is not None:
        raise Refused(
            "Trainer(optimizers=...) got an optimizer over the parameters as they were before sharding",
            "Leave it out and choose TrainingArguments(optim=...), or shard the model first: unsloth_ext.fsdp2.shard(model).",
        )
    name = str(getattr(getattr(arguments, "optim", ""), "value", getattr(arguments, "optim", ""))).lower()
    if word := next((word for word in _NEEDS_WHOLE_GRADIENTS if word in name), None):
        raise Refused(f"optim={name!r} ({word}) needs whole gradients, which no rank has", "Choose an AdamW, or Lion.")
    for option in ("fp16_full_eval", "bf16_full_eval"):
        if getattr(arguments, option, False):
            raise Refused(
                f"{option}=True converts the model in place, which a sharded one does not allow", "Leave it out."
            )


def serve(model: nn.Module) -> nn.Module:
    """What a Trainer asks of a sharded model: `no_sync`, a head that can be read, generation in step."""
    if "no_sync" not in vars(model):

        @contextlib.contextmanager
        def no_sync():
            accumulate(model, last=False)
            try:
                yield
            finally:
                accumulate(model, last=True)

        model.no_sync = no_sync
        serve_head_readers(model)
        serve_generation(model)
    return model


# -- what stands in for the Trainer's methods ----------------------------------------------------------------------------------


def init(original):
    names = [n for n in inspect.signature(original).parameters if n != "self"]

    @functools.wraps(original)
    def __init__(self, *args, **kwargs):
        if switch.requested() is not None:
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            shard_for_trainer(
                given.get("model"), given.get("args"), optimizers=given.get("optimizers"),
                model_init=given.get("model_init"),
            )  # fmt: skip
        original(self, *args, **kwargs)

    return __init__


def arguments_post_init(original):
    @functools.wraps(original)
    def __post_init__(self):
        # This is where transformers starts torch.distributed, with NCCL alone; offloaded gradients are reduced over gloo.
        settings = switch.requested()
        if settings is not None and switch.world_size() > 1 and not dist.is_initialized():
            config = getattr(self, "fsdp_config", None)
            asked = [str(getattr(self, "fsdp", "") or "").lower(), *(config if isinstance(config, dict) else ())]
            if settings.cpu_offload or any("offload" in text for text in asked):
                default_mesh("cpu" if getattr(self, "use_cpu", False) else None)
        original(self)

    return __post_init__


def create_accelerator_and_postprocess(original):
    @functools.wraps(original)
    def wrapped(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        if switch.requested() is not None:
            _attach(self.accelerator, weakref.ref(self))
        return result

    return wrapped


def _attach(accelerator, trainer) -> None:
    """Teach this one accelerator, not the class, about sharded models. trainer: a weak reference to its owner."""
    prepare_model, clip = accelerator.prepare_model, accelerator.clip_grad_norm_

    @functools.wraps(prepare_model)
    def prepare(model, device_placement=None, evaluation_mode=False):
        if evaluation_mode and not is_ours(model) and _frozen_reference(model):
            policy = getattr(getattr(trainer(), "model", None), "_unsloth_ext_settings", None)
            shard_for_trainer(model) if policy is None else _shard_with(model, *policy)
        if not is_ours(model):
            return prepare_model(model, device_placement=device_placement, evaluation_mode=evaluation_mode)
        # evaluation_mode leaves out DDP and keeps autocast, which is what one card gets.
        return prepare_model(model, device_placement=False, evaluation_mode=True)

    @functools.wraps(clip)
    def clip_grad_norm_(parameters, max_norm, norm_type=2):
        parameters = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
        if not any(isinstance(parameter, DTensor) for parameter in parameters):
            return clip(parameters, max_norm, norm_type)
        accelerator.unscale_gradients()
        return clipping.clip_grad_norm_(parameters, max_norm, norm_type)

    accelerator.prepare_model, accelerator.clip_grad_norm_ = prepare, clip_grad_norm_
    if getattr(accelerator, "scaler", None) is not None and switch.world_size() > 1:
        if accelerator.device.type not in ("cuda", "cpu"):
            raise Refused(
                f"fp16=True scales the loss, and the scaler of sharded gradients knows no {accelerator.device.type} device",
                "Train with TrainingArguments(bf16=True).",
            )
        from .gradient_scaler import ShardedScaler

        handler = getattr(accelerator, "scaler_handler", None)
        options = handler.to_kwargs() if handler is not None else {}
        # The Trainer multiplies each rank's loss by their number, so their gradients overflow that much earlier.
        options.setdefault("init_scale", 2.0**16 / accelerator.num_processes)
        accelerator.scaler = ShardedScaler(**{"device": accelerator.device.type, **options})


def _frozen_reference(model) -> bool:
    """A 4-bit model that nobody trains, such as DPO's reference: whole on every rank, it would undo what sharding saves."""
    if not isinstance(model, nn.Module) or switch.world_size() == 1 or any(p.requires_grad for p in model.parameters()):
        return False
    return any(isinstance(p, (NF4Shard, RowShard)) or type(p).__name__ == "Params4bit" for p in model.parameters())


def create_optimizer(original):
    @functools.wraps(original)
    def wrapped(self, *args, **kwargs):
        made = self.optimizer is None
        optimizer = original(self, *args, **kwargs)
        inner = getattr(optimizer, "optimizer", optimizer)
        if made and is_ours(self.model) and type(inner).__module__.startswith("bitsandbytes"):
            if self.model._unsloth_ext_offloads:
                raise UsageError(
                    "bitsandbytes' optimizers run on the card, and cpu_offload keeps gradients in host memory",
                    'Choose TrainingArguments(optim="adamw_torch").',
                )
            on_local_shards(inner)
        elif made and is_ours(self.model) and isinstance(inner, torch.optim.Optimizer):
            step_quickly(inner)
        return optimizer

    return wrapped


def move_model_to_device(original):
    @functools.wraps(original)
    def _move_model_to_device(self, model, device):
        return None if is_ours(model) else original(self, model, device)

    return _move_model_to_device
