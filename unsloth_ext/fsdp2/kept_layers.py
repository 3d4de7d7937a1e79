"""Layers that stay gathered from their forward to their backward: a gather less each, for the memory of its weights.

FSDP2 frees a unit after its forward and gathers it again for its backward. A layer that is kept needs no second gather, and over the
micro-batches of an accumulated step one gather in all. The last layers are kept first: the time between their two uses is shortest.

While a unit is gathered its modules have whole tensors in the place of this rank's parts, and `model.parameters()` lists those. So what
no backward will free is freed here.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from .held import gathered_bytes

__all__ = ["count_within", "free_in_time", "gathered_now", "keep", "limit_of"]

_SHARE = 0.05  # of the memory that a rank may use of its card
_units: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # all that are kept, of all models


def limit_of(device: torch.device) -> int:
    """Bytes of gathered layers that residency="auto" keeps on a device; none where it is no CUDA card."""
    if device.type != "cuda":
        return 0
    memory = torch.cuda.get_device_properties(device).total_memory
    fraction = getattr(torch.cuda, "get_per_process_memory_fraction", lambda _: 1.0)(device)
    return int(_SHARE * memory * fraction)


def count_within(sizes: list[int], limit: float) -> int:
    """How many layers of these sizes in bytes, counted from the last one on, `limit` bytes are enough for."""
    for count, size in enumerate(reversed(sizes)):
        if size > limit:
            return count
        limit -= size
    return len(sizes)


def keep(layers: list[nn.Module], limit: float, apart: Iterable[nn.Parameter]) -> tuple[nn.Module, ...]:
    """Let the last of these sharded layers stay gathered, up to `limit` bytes, and return them.

    limit: the same on every rank: one that gathers a layer waits for all others. apart: parameters that are not sharded.
    """
    apart = set(apart)
    count = count_within([gathered_bytes(layer, apart) for layer in layers], limit)
    kept = tuple(layers[len(layers) - count :])
    for layer in kept:
        layer.set_reshard_after_forward(False, recurse=False)
    return kept


def gathered_now() -> set[int]:
    """The ids of trained parameters that stand in their parts' places at the moment."""
    trained = (parameter for unit in _units for parameter in unit.parameters() if parameter.requires_grad)
    return {id(parameter) for parameter in trained if not isinstance(parameter, DTensor)}


def free_in_time(model: nn.Module, layers: Iterable[nn.Module], ends: Iterable[nn.Module], root_trains: bool) -> None:
    """Free these kept units of a sharded model after a forward without gradients, and before `model.zero_grad`.

    After an evaluation they would take memory until the next step, and an optimizer that is made then would train whole tensors which
    nobody reads again. `zero_grad` between forward and backward would leave the gradients of this rank's parts as they are. FSDP2 keeps
    the root gathered after every forward; where it trains something (root_trains) it is freed likewise. A backward that comes after
    gathers all of them again. All ranks come to these places alike, as a gather needs it.

    What counts is not a layer's own forward but that of the modules around it: decoder, causal model, peft's. Reentrant checkpoints,
    Unsloth's among them, run a layer's first forward without gradients and its second one within the backward. To keep the layer
    saves a gather there too: FSDP2 leaves it gathered after the first, finds it so for the second, and frees it once that one's
    gradients are there. Around the layer gradients are on then, and off in an evaluation. Embedding and head are not checkpointed.
    """
    layers, root = list(layers), weakref.ref(model)
    _units.update([*layers, *ends])

    def free(units: Iterable[nn.Module]) -> None:
        # Not in a backward, where a checkpoint runs forwards, nor where generation.py keeps everything gathered.
        if torch._C._current_graph_task_id() == -1 and not getattr(root(), "_unsloth_ext_all_gathered", False):
            for unit in units:
                unit.reshard()

    def freeing(units: list[nn.Module], itself: bool):
        @torch.compiler.disable
        def hook(module, inputs, output) -> None:
            if not torch.is_grad_enabled():
                free([*units, module] if itself else units)

        return hook

    for end in ends:
        end.register_forward_hook(freeing([], True))
    within = {inner for layer in layers for inner in layer.modules()}
    for module in model.modules():
        if module not in within:
            inside = set(module.modules()) if layers else ()
            units, itself = [layer for layer in layers if layer in inside], module is model and root_trains
            if units or itself:
                module.register_forward_hook(freeing(units, itself))

    def zero_grad(set_to_none: bool = True) -> None:
        owner = root()
        free([*layers, *ends, owner])
        type(owner).zero_grad(owner, set_to_none)

    model.zero_grad = zero_grad
