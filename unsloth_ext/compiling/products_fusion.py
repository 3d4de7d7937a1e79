"""Has a product take the addition after it along, in a graph that Inductor is about to lower.

    sum_of_products -> add                  becomes   sum_of_products(..., onto=the other summand)
    product_with_low -> add                 becomes   product_with_low(..., onto=the other summand)

That is the residual stream's addition at the end of a decoder layer: 67 us of an 8B layer at 8192 tokens on an H200, where in the product's
accumulator it is a 57th part of the product's work. (The addition before a norm goes into the norm, which reads and writes it anyway:
norms_fusion.py, which goes first.) Where the kernel does it the sum is rounded once instead of twice, so its bits are not those of an addition;
where products are added one by one they are.
"""

from __future__ import annotations

import operator

import torch
from torch.fx import Graph, Node

from ..nf4 import products  # noqa: F401  the operator
from ..nf4.products_hopper import SEGMENTS
from .additions import addition_after, call, erase_unused, in_memory, is_same_shape

__all__ = ["fuse"]

_aten = torch.ops.aten


def fuse(graph: Graph) -> int:
    """Fuse what can be in `graph`, in place. Returns how many additions have gone into products."""
    place = {node: index for index, node in enumerate(graph.nodes)}
    operators = torch.ops.unsloth_ext.sum_of_products.default, torch.ops.unsloth_ext.product_with_low.default
    return sum(
        _take_addition(graph, node, place, low)
        for low, target in enumerate(operators)
        for node in graph.find_nodes(op="call_function", target=target)
    )


def _take_addition(graph: Graph, product: Node, place: dict[Node, int], low: int) -> bool:
    """low: 1 for an operator with a second result, that of a narrow product, which is one more segment of the first."""
    if len(product.args) > (5 if low else 3) or product.kwargs or len(product.args[0]) + low >= SEGMENTS:
        return False  # it has something to go onto already, or the kernel takes no more
    results = [product]
    if low:
        results = sorted(product.users, key=lambda user: user.args[1])
        if [user.args[1:] for user in results] != [(0,), (1,)][: len(results)]:
            return False
    if not results or (found := addition_after(results[0])) is None:
        return False
    add, other, views = found
    if place.get(other, place[product]) >= place[product] or not in_memory(other):
        return False  # nothing is moved: the other summand must be there when the product is made
    shape = results[0].meta["val"].shape
    if not isinstance(shape[1], int):
        return False
    with graph.inserting_before(product):
        flat = other
        if not is_same_shape(other.meta["val"].shape, shape):
            flat = call(graph, _aten.reshape.default, (other, [-1, shape[1]]), other)
        found = [call(graph, product.target, (*product.args, flat), add)]
        if low:
            found = [call(graph, operator.getitem, (found[0], index), add) for index in range(len(results))]
    for before, after in zip(results, found, strict=True):
        before.replace_all_uses_with(after)
    add.replace_all_uses_with(views[-1] if views else found[0])
    erase_unused(graph, dict.fromkeys((add, *results, product)))  # a product of one result is among the results
    return True
