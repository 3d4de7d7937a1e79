"""NF4 weights kept dense beside their 4 bits, so that a compiled step has nothing to dequantise.

A step dequantises every weight twice and forgets it: for 8B 35 GB written and read that no product needed, and on a card that runs at
its power limit their energy is missing in the products. Where memory is left over, the dense weight can stay: `keep` makes it,
hangs it on the `quant_state`, and what is traced after that takes it as an input of the graph instead of a `dequantize_nf4` node.
Eager code, saving and merging go on reading the 4 bits; the dense copy is never written to, saved or copied along.
"""

from __future__ import annotations

import weakref

import torch

from .quant_state import read

__all__ = ["Copy", "copy_of", "drop", "keep", "size_of"]

_SEAT = "_unsloth_ext_dense"  # on a quant_state


class Copy:
    """What hangs on one quant_state: `weight`, dense. A copied or pickled state has none."""

    def __init__(self, packed: torch.Tensor, weight: torch.Tensor):
        # As a parameter, whose sizes tracing takes as they are, and which CUDA graphs know to stay where it is.
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        torch._dynamo.mark_static_address(self.weight, guard=False)
        self._source = weakref.ref(packed), packed._version, packed.data_ptr()

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes

    def is_current(self) -> bool:
        """False if the 4-bit weight has been written to, moved or freed since."""
        ref, version, address = self._source
        packed = ref()
        return packed is not None and packed._version == version and packed.data_ptr() == address

    def __deepcopy__(self, memo):
        return None

    def __reduce__(self):
        return type(None), ()


def size_of(quant_state) -> int:
    """Bytes that `keep` will take."""
    state = read(quant_state)
    return torch.Size(state.shape).numel() * state.dtype.itemsize


def keep(packed: torch.Tensor, quant_state) -> Copy:
    """Dequantise a weight to stay, in its state's dtype, and hang it on its state. `drop` undoes it.

    packed, quant_state: as `dequantize` takes them, not transposed; the state a `bitsandbytes.functional.QuantState` (TypeError for the
    nested list of old versions), of two dimensions (else ValueError).
    """
    from .dequantization import dequantize

    if type(quant_state) is list:
        raise TypeError("a quant_state must be a QuantState, got the nested list of old versions")
    if len(quant_state.shape) != 2 or packed.shape[0] == 1:
        raise ValueError(f"a weight must be a matrix and not transposed, got {list(quant_state.shape)}")
    with torch.inference_mode(False), torch.no_grad():  # an inference tensor could not be saved for a backward
        made = Copy(packed, dequantize(packed, quant_state))
    setattr(quant_state, _SEAT, made)
    return made


def drop(quant_states) -> None:
    """Take the dense copies off these states again; the memory is free when no graph's saved tensors hold it."""
    for state in quant_states:
        getattr(state, "__dict__", {}).pop(_SEAT, None)


def copy_of(quant_state, dtype: torch.dtype | None, device: torch.device) -> torch.Tensor | None:
    """The dense weight that is kept for this state, in this dtype (None: any) and on this device, or None. Not to be written to."""
    kept = getattr(quant_state, _SEAT, None)
    if kept is None or kept.weight.device != device or (dtype is not None and kept.weight.dtype != dtype):
        return None
    return kept.weight
