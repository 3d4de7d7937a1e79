"""Several products of dense matrices in one sum: y = x_1 W_1^T + x_2 W_2^T + ..., for what LoRA adds to a product and for gradients that are
sums over projections.

One product after the other reads and writes y again for each; matrices set side by side first have to be copied there. On Hopper a
kernel of our own goes from one pair of matrices to the next inside the sum (products_hopper.py); elsewhere, and for results too small for
that kernel, the products are added one by one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["sum_of_products"]

_library = torch.library.Library("unsloth_ext", "FRAGMENT")
_library.define(
    "sum_of_products(Tensor[] xs, Tensor[] weights, bool transposed, Tensor? onto=None) -> Tensor",
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
    weights = [weight.t() if transposed else weight for weight in weights]
    y = xs[0] @ weights[0]
    for x, weight in zip(xs[1:], weights[1:], strict=True):
        y.addmm_(x, weight)
    return y if onto is None else y.add_(onto)  # last: a small product would be rounded away on something large


@torch.no_grad()
def _on_card(xs, weights, transposed, onto=None):
    from . import products_hopper

    columns = _check(xs, weights, transposed, onto)
    kernel = products_hopper.kernel_for(xs, weights, transposed, columns, onto)
    if kernel is None:
        return _one_by_one(xs, weights, transposed, onto)
    y = xs[0].new_empty(xs[0].shape[0], columns)
    kernel(xs, weights, y, onto)
    return y


_library.impl("sum_of_products", _one_by_one, "CPU")
_library.impl("sum_of_products", _on_card, "CUDA")
torch.library.register_fake(
    "unsloth_ext::sum_of_products",
    lambda xs, weights, transposed, onto=None: xs[0].new_empty(
        xs[0].shape[0], weights[0].shape[0 if transposed else 1]
    ),
    lib=_library,
)
