"""`keep_dense_weights(model)`: memory that is left over, spent on what every compiled step would dequantise again.

The last level of the ladder of memory_controller.py: once nothing is computed again, NF4 weights that stay dense beside their 4 bits save
the dequantising, 2% of an 8B step on an H200, for 2 bytes a parameter. For 8B that is 13 GiB: an eighth of the speed that the same
memory buys as activations, so those come first, and `memory_budget` does it by itself only where even a generous estimate of
all else leaves the room. The weights are the same bit for bit (nf4/dense_copies.py).
"""

from __future__ import annotations

import torch

from ..nf4 import dense_copies
from ..nf4.quant_state import quant_type
from . import memory_layers


class DenseWeights:
    """The dense copies of a model's NF4 weights. Made by `keep_dense_weights`."""

    def __init__(self, copies: list[dense_copies.Copy], states: list):
        self._copies, self._states = copies, states

    @property
    def nbytes(self) -> int:
        return sum(copy.nbytes for copy in self._copies)

    def is_current(self) -> bool:
        """False if one of the 4-bit weights was written to or moved since."""
        # A parameter of bitsandbytes sends each question through Python otherwise.
        with torch._C.DisableTorchFunctionSubclass():
            return all([copy.is_current() for copy in self._copies])

    def remove(self) -> None:
        """Free them. Graphs that were traced with them are traced anew."""
        dense_copies.drop(self._states)
        self._copies, self._states = [], []


def keep_dense_weights(model: torch.nn.Module) -> DenseWeights:
    """Keep the NF4 weights of a model's decoder layers dense too, for graphs that are traced from now on.

    model: as for `memory_budget`, loaded in 4 bit; layers in other formats stay as they are. Takes 2 bytes a parameter and no time
    worth mentioning. Losses and gradients stay what they are but for the order of sums; saving and eager code go on with the 4 bits.
    Who writes into a 4-bit weight or its scales afterwards must call `remove()` (a budget looks for that by itself, at each step, in
    the packed weights).

    Returns a DenseWeights, whose `remove()` undoes it. Raises `UnsupportedModel` for a model without decoder layers, ValueError for
    one without an NF4 weight to keep or that FSDP2 has sharded, torch.OutOfMemoryError, with nothing kept, where memory is short.
    """
    copies, states = [], []
    try:
        for linear in _linears_of(model):
            copies.append(dense_copies.keep(linear.weight, linear.weight.quant_state))
            states.append(linear.weight.quant_state)
    except BaseException:
        DenseWeights(copies, states).remove()
        raise
    if not copies:
        raise ValueError(
            f"{type(model).__name__} has no NF4 weights in its decoder layers, so there is nothing to keep dense"
        )
    return DenseWeights(copies, states)


def bytes_wanted(model: torch.nn.Module) -> int:
    """What `keep_dense_weights` would take; 0 where there is nothing to keep."""
    return sum(dense_copies.size_of(linear.weight.quant_state) for linear in _linears_of(model))


def activations_at_most(model: torch.nn.Module, tokens: int) -> int:
    """A generous estimate of what the decoder layers keep of a batch for the backward, in bytes: twice what their projections give out.
    (8B measured: 118 KB a token and layer, here 172.)"""
    _, layers = memory_layers.decoder_layers(model)
    widths = sum(linear.out_features for layer in layers for linear in _linears(layer))
    return 4 * tokens * widths


def loss_at_most(model: torch.nn.Module, tokens: int) -> int:
    """Bytes of full logits, in 16 bits, in fp32 and as a gradient: what a loss takes that is not computed in chunks."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    weight = getattr(head, "weight", None)
    return 0 if weight is None else 12 * tokens * weight.shape[0]


def _linears_of(model) -> list[torch.nn.Module]:
    """The linear modules with plain NF4 weights of all decoder layers. None of a model that FSDP2 has sharded, whose weights are plain
    and whole only while they are gathered."""
    if _is_sharded(model):
        return []
    _, layers = memory_layers.decoder_layers(model)
    return [linear for layer in layers for linear in _linears(layer) if _is_plain_nf4(linear)]


def _is_sharded(model) -> bool:
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules())


def _linears(layer) -> list[torch.nn.Module]:
    """The projections of a decoder layer, from under LoRA."""
    found = {}
    for path, module in layer.named_modules():
        if path.rpartition(".")[2].endswith("_proj"):
            found[path] = getattr(module, "base_layer", module)
    return [linear for linear in found.values() if hasattr(linear, "out_features")]


def _is_plain_nf4(linear) -> bool:
    """Whether the weight is bitsandbytes' own parameter with its state on it: not sharded, not a tensor of another kind."""
    from bitsandbytes.nn import Params4bit

    weight = getattr(linear, "weight", None)
    state = getattr(weight, "quant_state", None)
    return (
        type(weight) is Params4bit
        and type(state) is not list
        and quant_type(state) == "nf4"
        and len(state.shape) == 2
        and weight.shape[0] != 1
        and weight.device.type in ("cuda", "cpu")
    )
