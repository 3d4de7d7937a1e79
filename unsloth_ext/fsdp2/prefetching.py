"""What is gathered before it is needed, so that the gather runs beside what comes before it.

FSDP2 asks for a unit when the unit begins, unless it is told in advance (`set_modules_to_forward_prefetch`, `set_modules_to_backward_prefetch`).
"""

from __future__ import annotations

import torch
from torch import nn

from .held import gathered_bytes

__all__ = ["arrange", "first_layer_first"]

_AHEAD = 256 << 20  # bytes of a gathered layer up to which a second one is gathered ahead


def arrange(model: nn.Module, layers: list[nn.Module], ends: list[nn.Module], by_copies: bool = False) -> None:
    """Ask for the next layers' gathers when a layer begins: they run beside the layer, at the price of their memory.

    The next one, and where layers are small the one after it: ranks run apart by some milliseconds, which a gather that is asked
    for one layer early may not cover. Where such layers come by copies the first one asks for none: that takes the
    host a millisecond in which the card has nothing to do yet, and the second one's gather a third of that (8B, two H200). The
    embedding asks for the first layers, the last layer for the head. The embedding itself is the first thing that a step asks for: it
    is as large as several layers, and gathered while the host prepares the rest.
    """
    depth = 2 if layers and gathered_bytes(layers[0]) <= _AHEAD else 1
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    config = getattr(model, "config", None)
    if ends and ends[0] is embedding and not getattr(config, "is_encoder_decoder", False):
        ends[0].set_modules_to_forward_prefetch(layers[:depth])
        model.register_forward_pre_hook(_embedding_first(ends[0]), with_kwargs=True, prepend=True)
    order = [*layers, *(end for end in ends if end is not embedding)]
    for index, layer in enumerate(layers):
        following = order[index + 1 : index + 1 + depth]
        if following and (index or not by_copies or depth == 1):
            layer.register_forward_pre_hook(_prefetcher(layer, following), prepend=True)  # before FSDP2's, which asks
        before = layers[max(0, index - depth) : index][::-1]
        # Left alone, FSDP2 asks for what ran before it: for the first layer that is the embedding, which, frozen, has no backward.
        layer.set_modules_to_backward_prefetch(before or [layer])


def first_layer_first(model: nn.Module, layers: list[nn.Module]) -> None:
    """Where the embedding is read by rows: ask for the first layer when the model begins. Once FSDP2 has been initialised, which asks too."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        model.set_modules_to_forward_prefetch(layers[:1])


def _embedding_first(embedding: nn.Module):
    @torch.compiler.disable
    def hook(module, args, kwargs) -> None:
        if kwargs.get("inputs_embeds") is None and (args or kwargs.get("input_ids") is not None):
            embedding.unshard(async_op=True)

    return hook


def _prefetcher(layer: nn.Module, following: list[nn.Module]):
    """Not when a checkpoint runs the layer again in its backward: the layers after it are done with then, and would be gathered
    for nothing and stay so until the backward ends."""
    asks = False

    @torch.compiler.disable
    def hook(module, inputs) -> None:
        nonlocal asks
        wanted = torch._C._current_graph_task_id() == -1  # what torch.utils.checkpoint and FSDP2 know a backward by
        if asks != wanted:
            layer.set_modules_to_forward_prefetch(following if wanted else [])
            asks = wanted

    return hook
