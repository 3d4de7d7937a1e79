"""What the layers train, exchanged once a step: gathered before the first layer, reduced after the last gradient.

FSDP2 gathers a unit's parameters before each use and reduces its gradients after its backward. For LoRA that is three collectives a
layer and step for a few MiB each, and in each of them every rank waits for the slowest, with multiprocessors taken from the matrix
products. But adapters change once a step and are small beside what they adapt, so they can be whole on each rank while a step runs,
as in ZeRO's first two stages (Rajbhandari et al. 2020), with parts of parameters, gradients and optimizer states in between.

FSDP2 does so for parameters of the root unit. They are given to it here: the root is sharded first and takes them, the layers leave
them out (`ignored_params`). It costs a rank the whole of them, once as parameters, once as gradients and once more while these are
reduced: 0.5 GiB for rank 16 on an 8B model. A layer is then left with frozen weights, which copies (peer_gather.py) can gather
without any collective.
"""

from __future__ import annotations

import functools
import weakref

import torch
from bitsandbytes.nn import Params4bit
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..errors import UsageError
from .nf4_parameter import NF4Shard
from .row_shard import RowShard

__all__ = ["ADAPTERS", "NothingToGather", "affordable", "gather_with_layers", "limit_of", "places"]

ADAPTERS = ("auto", "step", "layer")
_SHARE, _LEAST = 0.05, 1 << 30  # of a card's memory, and bytes, that "auto" spends on it


def places(
    layers: list[nn.Module], apart: set[nn.Parameter], outside: list[nn.Parameter], adapters: str, offloaded: bool
) -> list[tuple[nn.Module, str]]:
    """(module, name) of what the root is to shard of `layers`: what is trained, and frozen adapters beside it (DPO's reference).

    apart: parameters that nobody shards. outside: trained parameters that the root has anyway. Empty where layers keep all of theirs;
    of what is returned "auto" leaves out what is too large (`affordable`). Raises `UsageError` where "step" is impossible.
    """
    if adapters not in ADAPTERS:
        raise UsageError(f"adapters must be {', '.join(ADAPTERS[:-1])} or {ADAPTERS[-1]}, got {adapters!r}")
    found = [
        (module, name)
        for layer in layers
        for module in layer.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter not in apart and not isinstance(parameter, (NF4Shard, RowShard, Params4bit))
    ]
    dtypes = {p.dtype for p in (*_parameters(found), *outside) if p.requires_grad}
    reason = None
    if offloaded:
        reason = "with cpu_offload nothing stays on the card for a step"
    elif len(dtypes) > 1:  # FSDP2 reduces a unit's gradients in one dtype
        reason = f"trained parameters have several dtypes: {', '.join(sorted(map(str, dtypes)))}"
    if reason and adapters == "step":
        raise UsageError(f"adapters='step' is not possible: {reason}", "Leave it at 'auto'.")
    if reason or adapters == "layer":
        return []
    trained = _trained(found)
    # Else there are frozen weights that are not in 4 bits.
    return found if _bytes(found) <= 3 * _bytes(trained) else trained


def limit_of(device: torch.device) -> int:
    """Bytes that "auto" spends on a device."""
    if device.type != "cuda":
        return _LEAST
    memory = torch.cuda.get_device_properties(device).total_memory
    fraction = getattr(torch.cuda, "get_per_process_memory_fraction", lambda _: 1.0)(device)
    return max(_LEAST, int(_SHARE * memory * fraction))


def affordable(found: list[tuple[nn.Module, str]], limit: int) -> list[tuple[nn.Module, str]]:
    """All of it, what is trained, or nothing: what "auto" exchanges once a step. limit: the same on every rank."""
    trained = _trained(found)
    return next((some for some in (found, trained) if 2 * _bytes(trained) + _bytes(some) <= limit), [])


def _trained(found):
    return [(module, name) for module, name in found if module._parameters[name].requires_grad]


def _bytes(found) -> int:
    return sum(p.numel() * p.itemsize for p in _parameters(found))


def _parameters(found) -> list[nn.Parameter]:
    return list(dict.fromkeys(module._parameters[name] for module, name in found))


_roots: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def _after_a_step(*_) -> None:
    for root in list(_roots):
        root._unsloth_ext_apart()


@functools.cache
def _watch_optimizers() -> None:
    register_optimizer_step_post_hook(_after_a_step)


def gather_with_layers(root: nn.Module, layers: list[nn.Module], found: list[tuple[nn.Module, str]]) -> None:
    """Hooks on a sharded model whose root has the layers' trained parameters.

    They stay gathered from a training forward to the end of its backward, and are freed at once by a forward without gradients. Code that
    calls the decoder and not the root (TRL's chunked losses) finds them gathered by the first layer, and freed by the last.

    While they are gathered, the modules have plain parameters in the place of this rank's parts. So they are freed too by an optimizer's
    step, which makes the whole ones old, and before `model.parameters()` is listed, for an optimizer or for `zero_grad`, by which the
    whole ones would be taken for the model's own. A backward that comes after gathers them again.
    """
    owner, name = found[0]
    reference = weakref.ref(root)
    by_layer = running = False  # they were gathered here, not by the root's own forward; the root's forward runs

    def apart() -> None:
        """Free what is gathered, unless it is in use."""
        model = reference()
        if model is None or running or isinstance(owner._parameters[name], DTensor):
            return
        in_backward = torch._C._current_graph_task_id() != -1  # as FSDP2 asks
        if not in_backward and not getattr(model, "_unsloth_ext_all_gathered", False):
            model.reshard()

    def gather(*_) -> None:
        nonlocal by_layer
        if isinstance(owner._parameters[name], DTensor) and (model := reference()) is not None:
            model.unshard()
            by_layer = True

    @torch.compiler.disable
    def layer_begins(module, inputs) -> None:
        gather()

    @torch.compiler.disable
    def layers_end(module, inputs, output) -> None:
        nonlocal by_layer
        if torch.is_grad_enabled():
            hidden = output[0] if isinstance(output, tuple) else output
            if isinstance(hidden, torch.Tensor) and hidden.requires_grad:
                hidden.register_hook(gather)  # of the root's own output FSDP2 sees to it
        elif by_layer:
            apart()
        by_layer = False

    for layer in layers:
        layer.register_forward_pre_hook(layer_begins, prepend=True)
        layer._unsloth_ext_adapters = reference  # for sharding.gathered
    layers[-1].register_forward_hook(layers_end)

    # FSDP2 asks when the forward ends. In between the answer is yes, for `generate`, which passes forward by.
    @torch.compiler.disable
    def begins(module, inputs) -> None:
        nonlocal running
        running = True
        if not getattr(module, "_unsloth_ext_all_gathered", False):
            module.set_reshard_after_forward(not torch.is_grad_enabled(), recurse=False)

    @torch.compiler.disable
    def ended(module, inputs, output) -> None:
        nonlocal running
        running = False
        if output is not None and not getattr(module, "_unsloth_ext_all_gathered", False):
            module.set_reshard_after_forward(True, recurse=False)

    root.set_reshard_after_forward(True, recurse=False)
    root.register_forward_pre_hook(begins, prepend=True)
    root.register_forward_hook(ended, always_call=True)  # after an exception too, with None

    def named_parameters(*args, **kwargs):
        apart()
        model = reference()
        return type(model).named_parameters(model, *args, **kwargs)

    root.named_parameters = named_parameters
    root._unsloth_ext_apart = apart
    _roots.add(root)
    _watch_optimizers()


class NothingToGather:
    """FSDP2's collective (`FSDPModule.set_custom_all_gather`) for a unit of which copies bring everything."""

    def allocate(self, size, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor, input_tensor, group, async_op: bool = False) -> None:
        return None
