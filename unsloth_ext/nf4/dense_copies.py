"""NF4 weights kept dense beside their 4 bits, so that a compiled step has nothing to dequantise.

A step dequantises every weight twice and forgets it: for 8B 35 GB written and read that no product needed, and on a card that runs at
its power limit their energy is missing in the products. Where memory is left over, the dense weight can stay: `keep` makes it,
hangs it on the `quant_state`, and what is traced after that takes it as an input of the graph instead of a `dequantize_nf4` node.
Eager code, saving and merging go on reading the 4 bits; the dense copy is never written to, saved or copied along.

LoRA's products go through the same matrices. [x A^T | x] [s B | W]^T and [dY | p] [W; A] need the adapter beside and below the
weight, so a group of weights of one input has room for both in its buffer: `product_beside` and `product_below` put the adapter
there, each time anew, and multiply. To a graph they are functions of x, W and the adapter: W itself is not changed, and what is in
the room between two calls is nobody's. That holds for one stream and one thread at a time: two that multiply by one group at once
would overwrite each other's adapter.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch

from .quant_state import read

__all__ = ["Group", "copy_of", "drop", "group_of", "keep", "product_below", "product_beside", "size_of"]

_SEAT = "_unsloth_ext_dense"  # on a quant_state
_buffers: dict[int, weakref.ref] = {}  # address of a buffer's storage -> its Group


class Group:
    """Dense weights of one input, one under the other, in a buffer with room around them.

    weight: [sum of rows, K]. members: what hangs on each state. sources: (weak reference to the packed weight, its version, its
    address) of each, to tell whether one was written to since.
    """

    def __init__(self, weights, buffer: torch.Tensor, rows: Sequence[int], columns: slice):
        self.buffer, self.rows, at = buffer, sum(rows), 0
        self.weight = _input(buffer[: self.rows, columns])
        members = []
        for n in rows:
            members.append(_Copy(self, _input(buffer[at : at + n, columns])))
            at += n
        self.members = tuple(members)
        self.sources = [(weakref.ref(packed), packed._version, packed.data_ptr()) for packed, _ in weights]

    @property
    def nbytes(self) -> int:
        return self.buffer.numel() * self.buffer.element_size()

    def is_current(self) -> bool:
        """False if a 4-bit weight has been written to, moved or freed since."""
        for ref, version, address in self.sources:
            packed = ref()
            if packed is None or packed._version != version or packed.data_ptr() != address:
                return False
        return True


class _Copy:
    """What hangs on one quant_state. A copied or pickled state has none. (Objects are compared, not numbers: those would be symbols in a
    graph with dynamic shapes.)"""

    def __init__(self, group: Group, weight: torch.Tensor):
        self.group, self.weight = group, weight

    def __deepcopy__(self, memo):
        return None

    def __reduce__(self):
        return type(None), ()


def _input(view: torch.Tensor) -> torch.nn.Parameter:
    """As a parameter, whose sizes tracing takes as they are, and which CUDA graphs know to stay where it is."""
    weight = torch.nn.Parameter(
        view.data, requires_grad=False
    )  # .data: what is written into the room is no new version of it
    torch._dynamo.mark_static_address(weight, guard=False)
    return weight


def _nothing():
    return None


def size_of(weights: Sequence[tuple[torch.Tensor, object]], beside: int = 0, below: int = 0) -> int:
    """Bytes that `keep` will take for these weights."""
    states = [read(state) for _, state in weights]
    rows, columns = sum(state.shape[0] for state in states), states[0].shape[1]
    return (rows + below) * (columns + 2 * beside) * states[0].dtype.itemsize


def keep(weights: Sequence[tuple[torch.Tensor, object]], beside: int = 0, below: int = 0) -> Group:
    """Dequantise weights of one input to stay, in their states' dtype, and hang them on their states.

    weights: (packed, `bitsandbytes.functional.QuantState`) of each, as `dequantize` takes them and not transposed, the states' shapes
    [N_i, K] and dtypes equal. beside, below: room for so many columns on each side, and for so many rows.

    Raises TypeError for a state that is no QuantState, ValueError for weights that differ in K, dtype or device. `drop` undoes it.
    """
    from .dequantization import dequantize

    states = [read(state) for _, state in weights]
    kinds = {(*state.shape[1:], state.dtype, packed.device) for (packed, _), state in zip(weights, states, strict=True)}
    if (
        len(kinds) != 1
        or any(len(state.shape) != 2 for state in states)
        or any(packed.shape[0] == 1 for packed, _ in weights)
    ):
        raise ValueError(
            f"weights must be of equal width, dtype and device, and not transposed, got {sorted(map(str, kinds))}"
        )
    if any(type(state) is list for _, state in weights):
        raise TypeError("a quant_state must be a QuantState, got the nested list of old versions")
    rows, (columns, dtype, device), at = [state.shape[0] for state in states], kinds.pop(), 0
    with torch.inference_mode(False), torch.no_grad():  # an inference tensor could not be saved for a backward
        buffer = torch.zeros(sum(rows) + below, columns + 2 * beside, dtype=dtype, device=device)
        for n, (packed, state) in zip(rows, weights, strict=True):
            buffer[at : at + n, beside : beside + columns].copy_(dequantize(packed, state))
            at += n
        group = Group(weights, buffer, rows, slice(beside, beside + columns))
    for member, (_, state) in zip(group.members, weights, strict=True):
        setattr(state, _SEAT, member)
    address = buffer.untyped_storage().data_ptr()
    _buffers[address] = weakref.ref(group)
    weakref.finalize(group, _forget, address)
    return group


def _forget(address: int) -> None:
    if _buffers.get(address, _nothing)() is None:  # else another has its memory by now
        _buffers.pop(address, None)


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


def group_of(quant_states, dtype: torch.dtype, device: torch.device) -> torch.Tensor | None:
    """The dense weights of all of these states, in this order and one under the other, where they are a whole group; else None."""
    kept = [getattr(state, _SEAT, None) for state in quant_states]
    if kept[0] is None or len(kept[0].group.members) != len(kept):
        return None
    group = kept[0].group
    if any(one is not member for one, member in zip(kept, group.members, strict=True)):
        return None
    return group.weight if group.weight.dtype == dtype and group.weight.device == device else None


# -- products with an adapter beside or below a kept weight -----------------------------------------------------------------

_library = torch.library.Library("unsloth_ext", "FRAGMENT")
_library.define("product_below(Tensor x, Tensor weight, Tensor[] rows) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_library.define(
    "product_beside(Tensor x, Tensor weight, Tensor columns, bool left) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
)


def product_below(x: torch.Tensor, weight: torch.Tensor, rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """x [weight; rows...].  x: [T, N + R]; weight: [N, K], kept; rows: [R_i, K], R in sum, converted to x's dtype. Returns [T, K].

    Not differentiable. Without a copy of the weight where it has room for the rows.
    """
    return torch.ops.unsloth_ext.product_below(x, weight, list(rows))


def product_beside(x: torch.Tensor, weight: torch.Tensor, columns: torch.Tensor, left: bool) -> torch.Tensor:
    """x [columns | weight]^T, or x [weight | columns]^T where not `left`.  x: [T, R + K]; weight: [N, K], kept; columns: [N, R].

    Not differentiable. Without a copy of the weight where it has room for the columns.
    """
    return torch.ops.unsloth_ext.product_beside(x, weight, columns, left)


def _with_room(weight: torch.Tensor, left: int, right: int, below: int) -> torch.Tensor | None:
    """The weight with that much of its buffer around it, or None where there is not as much room."""
    group = _buffers.get(weight.untyped_storage().data_ptr(), _nothing)()
    if group is None or weight.stride() != group.buffer.stride():
        return None
    pitch, (rows, columns) = weight.stride(0), weight.shape
    row, column = divmod(weight.storage_offset(), pitch)
    inside = group.weight.storage_offset()  # of the first row
    if column != inside or columns != group.weight.shape[1] or column < left or column + columns + right > pitch:
        return None
    if below and (row + rows != group.rows or row + rows + below > group.buffer.shape[0]):
        return None
    return group.buffer[row : row + rows + below, column - left : column + columns + right]


def _product_below(x, weight, rows):
    below, at = sum(part.shape[0] for part in rows), weight.shape[0]
    whole = _with_room(weight, 0, 0, below)
    if whole is None:
        return x @ torch.cat([weight, *(part.to(weight.dtype) for part in rows)])
    for part in rows:
        whole[at : at + part.shape[0]].copy_(part)
        at += part.shape[0]
    return x @ whole


def _product_beside(x, weight, columns, left):
    more = columns.shape[1]
    whole = _with_room(weight, more if left else 0, 0 if left else more, 0)
    if whole is None:
        both = [columns.to(weight.dtype), weight]
        return x @ torch.cat(both if left else both[::-1], 1).t()
    (whole[:, :more] if left else whole[:, weight.shape[1] :]).copy_(columns)
    return x @ whole.t()


for _key in ("CPU", "CUDA", "XPU"):
    _library.impl("product_below", _product_below, _key)
    _library.impl("product_beside", _product_beside, _key)
torch.library.register_fake(
    "unsloth_ext::product_below", lambda x, weight, rows: x.new_empty(x.shape[0], weight.shape[1]), lib=_library
)
torch.library.register_fake(
    "unsloth_ext::product_beside",
    lambda x, weight, columns, left: x.new_empty(x.shape[0], weight.shape[0]),
    lib=_library,
)
