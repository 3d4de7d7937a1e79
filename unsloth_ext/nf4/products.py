"""Several products of dense matrices in one sum: y = x_1 W_1^T + x_2 W_2^T + ..., for what LoRA adds to a product and for gradients that are
sums over projections.

One product after the other reads and writes y again for each; matrices set side by side first have to be copied there. On Hopper a
kernel of our own goes from one pair of matrices to the next inside the sum (products_hopper.py); elsewhere, and for results too small for
that kernel, the products are added one by one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["low_of", "product_with_low", "sum_of_products"]

_library = torch.library.Library("unsloth_ext", "FRAGMENT")
_library.define(
    "sum_of_products(Tensor[] xs, Tensor[] weights, bool transposed, Tensor? onto=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "product_with_low(Tensor[] xs, Tensor[] downs, Tensor[] weights, Tensor up, bool transposed, Tensor? onto=None) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "low_of(Tensor[] xs, Tensor[] downs, bool transposed, SymInt columns) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def sum_of_products(
    xs: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    transposed: bool = True,
    onto: torch.Tensor | None = None,
) -> torch.Tensor:
    """The sum over i of x_i W_i^T, or of x_i W_i where not `transposed`, and of `onto`.

    xs: [T, K_i] of one dtype and device. weights: [N, K_i], where not `transposed` [K_i, N], of the same. onto: [T, N] of the same, or
    None. Returns [T, N], contiguous, in that dtype. Not differentiable. The kernel rounds the whole sum once, one product after the
    other rounds each; which it is depends on shapes, layouts and the card, not on the values. An infinity in `onto` makes NaNs of up to
    256 columns of its row in the kernel. Raises ValueError for shapes, dtypes or devices that do not fit.
    """
    if not xs or len(xs) != len(weights):
        raise ValueError(f"as many weights as inputs are needed, at least one, got {len(xs)} and {len(weights)}")
    return torch.ops.unsloth_ext.sum_of_products(list(xs), list(weights), transposed, onto)


def product_with_low(
    xs: Sequence[torch.Tensor],
    downs: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    up: torch.Tensor,
    transposed: bool = True,
    onto: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, low): low the sum over i of x_i D_i^T, and y the sum of x_i W_i^T and of low's first columns times U^T; D_i, W_i and U as they
    are where not `transposed`. What LoRA's forward is, with D for A and U for s B, and its input's gradient, with D for s B and U for A.

    xs, weights, onto: as for `sum_of_products`. downs: [R, K_i], where not `transposed` [K_i, R]. up: [N, r], where not `transposed` [r, N],
    r at most R. low: [T, R], rounded to the dtype of xs before it goes on. Not differentiable. On Hopper x is read once for both where R is
    a multiple of 8 up to 64 and low finds room beside y. Raises ValueError for shapes, dtypes or devices that do not fit.
    """
    if not xs or not len(xs) == len(weights) == len(downs):
        raise ValueError(f"as many weights as inputs are needed, got {len(xs)}, {len(downs)} and {len(weights)}")
    return torch.ops.unsloth_ext.product_with_low(list(xs), list(downs), list(weights), up, transposed, onto)


def low_of(
    xs: Sequence[torch.Tensor], downs: Sequence[torch.Tensor], columns: int, transposed: bool = True
) -> torch.Tensor:
    """The low of `product_with_low`, bit for bit, whose y has `columns` columns and whose weights are contiguous."""
    return torch.ops.unsloth_ext.low_of(list(xs), list(downs), transposed, columns)


def _check(xs, weights, transposed, onto) -> int:
    """N."""
    first, dimension = xs[0], 0 if transposed else 1
    for x, weight in zip(xs, weights, strict=True):
        if (
            x.dim() != 2
            or weight.dim() != 2
            or x.shape[0] != first.shape[0]
            or x.shape[1] != weight.shape[1 - dimension]
        ):
            raise ValueError(f"an input {list(x.shape)} and its weight {list(weight.shape)} do not fit")
        if weight.shape[dimension] != weights[0].shape[dimension]:
            raise ValueError(f"the weights give {weights[0].shape[dimension]} and {weight.shape[dimension]} columns")
        if not x.dtype == weight.dtype == first.dtype or not x.device == weight.device == first.device:
            raise ValueError("inputs and weights must be of one dtype and on one device")
    columns = weights[0].shape[dimension]
    if onto is not None and (
        onto.shape != (first.shape[0], columns) or onto.dtype != first.dtype or onto.device != first.device
    ):
        raise ValueError(
            f"what the sum goes onto must be {[first.shape[0], columns]} as the inputs are, got {list(onto.shape)} "
            f"{onto.dtype} on {onto.device}"
        )
    return columns


@torch.no_grad()
def _one_by_one(xs, weights, transposed, onto=None):
    _check(xs, weights, transposed, onto)
    return _added(xs, weights, transposed, onto)


def _added(xs, weights, transposed, onto=None):
    weights = [weight.t() if transposed else weight for weight in weights]
    y = xs[0] @ weights[0]
    for x, weight in zip(xs[1:], weights[1:], strict=True):
        y.addmm_(x, weight)
    return y if onto is None else y.add_(onto)  # last: a small product would be rounded away on something large


@torch.no_grad()
def _on_card(xs, weights, transposed, onto=None):
    return _added_on_card(xs, weights, transposed, onto, _check(xs, weights, transposed, onto))


def _added_on_card(xs, weights, transposed, onto, columns):
    from . import products_hopper

    kernel = products_hopper.kernel_for(xs, weights, transposed, columns, onto)
    if kernel is None:
        return _added(xs, weights, transposed, onto)
    y = xs[0].new_empty(xs[0].shape[0], columns)
    kernel(xs, weights, y, onto)
    return y


def _check_low(xs, downs, weights, up, transposed, onto) -> int:
    """N."""
    rank, columns = _check(xs, downs, transposed, None), _check(xs, weights, transposed, onto)
    wanted = (columns, "up to", rank) if transposed else ("up to", rank, columns)
    if up.dim() != 2 or up.shape[0 if transposed else 1] != columns or up.shape[1 if transposed else 0] > rank:
        raise ValueError(f"up must be {' '.join(map(str, wanted))}, got {list(up.shape)}")
    if up.dtype != xs[0].dtype or up.device != xs[0].device:
        raise ValueError("inputs and weights must be of one dtype and on one device")
    return columns


@torch.no_grad()
def _one_after_the_other(xs, downs, weights, up, transposed, onto=None, checked: int | None = None):
    columns = checked or _check_low(xs, downs, weights, up, transposed, onto)
    low = _added(xs, downs, transposed)
    summands = [*xs, low[:, : up.shape[1 if transposed else 0]]], [*weights, up], transposed, onto
    return _added_on_card(*summands, columns) if low.is_cuda else _added(*summands), low


@torch.no_grad()
def _together(xs, downs, weights, up, transposed, onto=None):
    from . import products_hopper

    columns = _check_low(xs, downs, weights, up, transposed, onto)
    kernel = products_hopper.kernel_with_low(xs, downs, weights, up, transposed, columns)
    if kernel is None:
        return _one_after_the_other(xs, downs, weights, up, transposed, onto, columns)
    y, low = (xs[0].new_empty(xs[0].shape[0], n) for n in (columns, downs[0].shape[0 if transposed else 1]))
    inside = onto is None or products_hopper.is_room_for(onto, xs)  # if not, low's bits must be the same
    kernel(xs, downs, low, weights, up, y, onto if inside else None)
    return y if inside else y.add_(onto), low


@torch.no_grad()
def _low_alone(xs, downs, transposed, columns):
    from . import products_hopper

    rank = _check(xs, downs, transposed, None)
    kernel = products_hopper.kernel_with_low(xs, downs, None, None, transposed, columns)
    if kernel is None:
        return _added(xs, downs, transposed)
    low = xs[0].new_empty(xs[0].shape[0], rank)
    kernel(xs, downs, low)
    return low


_library.impl("product_with_low", _one_after_the_other, "CPU")
_library.impl("product_with_low", _together, "CUDA")
_library.impl("low_of", lambda xs, downs, transposed, columns: _one_by_one(xs, downs, transposed), "CPU")
_library.impl("low_of", _low_alone, "CUDA")
_library.impl("sum_of_products", _one_by_one, "CPU")
_library.impl("sum_of_products", _on_card, "CUDA")


def _like(xs, weights, transposed):
    return xs[0].new_empty(xs[0].shape[0], weights[0].shape[0 if transposed else 1])


torch.library.register_fake(
    "unsloth_ext::sum_of_products",
    lambda xs, weights, transposed, onto=None: _like(xs, weights, transposed),
    lib=_library,
)
torch.library.register_fake(
    "unsloth_ext::product_with_low",
    lambda xs, downs, weights, up, transposed, onto=None: (
        _like(xs, weights, transposed),
        _like(xs, downs, transposed),
    ),
    lib=_library,
)
torch.library.register_fake(
    "unsloth_ext::low_of", lambda xs, downs, transposed, columns: _like(xs, downs, transposed), lib=_library
)
