"""Has a product take the addition after it along, in a graph that Inductor is about to lower.

    sum_of_products -> add                  becomes   sum_of_products(..., onto=the other summand)

That is the residual stream's addition at the end of a decoder layer: 67 us of an 8B layer at 8192 tokens on an H200, where in the product's
accumulator it is a 57th part of the product's work. (The addition before a norm goes into the norm, which reads and writes it anyway:
norms_fusion.py, which goes first.) Where the kernel does it the sum is rounded once instead of twice, so its bits are not those of an addition;
where products are added one by one they are.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from ..nf4 import products  # noqa: F401  the operator
from ..nf4.products_hopper import SEGMENTS
from .additions import addition_after, call, erase_unused, in_memory, is_same_shape

__all__ = ["fuse"]

_aten = torch.ops.aten


def fuse(graph: Graph) -> int:
    """Fuse what can be in `graph`, in place. Returns how many additions have gone into products."""
    product = torch.ops.unsloth_ext.sum_of_products.default
    place = {node: index for index, node in enumerate(graph.nodes)}
    return sum(_take_addition(graph, node, place) for node in graph.find_nodes(op="call_function", target=product))


def _take_addition(graph: Graph, product: Node, place: dict[Node, int]) -> bool:
    if len(product.args) > 3 or product.kwargs or len(product.args[0]) >= SEGMENTS:
        return False  # it has something to go onto already, or the kernel takes no more
    if (found := addition_after(product)) is None:
        return False
    add, other, views = found
    if place.get(other, place[product]) >= place[product] or not in_memory(other):
        return False  # nothing is moved: the other summand must be there when the product is made
    columns = product.meta["val"].shape[1]
    if not isinstance(columns, int):
        return False
    with graph.inserting_before(product):
        flat = other
        if not is_same_shape(other.meta["val"].shape, product.meta["val"].shape):
            flat = call(graph, _aten.reshape.default, (other, [-1, columns]), other)
        whole = call(graph, product.target, (*product.args, flat), add)
    product.replace_all_uses_with(whole)
    add.replace_all_uses_with(views[-1] if views else whole)
    erase_unused(graph, [add, product])
    return True
