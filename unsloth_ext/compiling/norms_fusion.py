"""Finds the additions beside RMS norms in a graph that Inductor is about to lower, and has the norms do them.

    add -> rms_norm                     becomes   add_rms_norm, whose sum everyone else reads too
    rms_norm_backward -> add            becomes   rms_norm_backward_add

It runs on the graphs of the forward and of the backward once autograd is through with them (graph_passes.py). Graphs without our
operators are left as they are.

The results keep their bits. So an addition is only taken where Inductor, too, would have read and written memory: two contiguous tensors
of one shape and one 16-bit dtype, neither of them the result of pointwise operations, which Inductor would fuse with the addition
and not round in between. Views between the norm and the addition are looked through.
"""

from __future__ import annotations

import operator

from torch.fx import Graph, Node

from .additions import VIEWS, addition_after, call, erase_unused, in_memory, is_addition, is_read_from_memory
from .norms_operators import add_rms_norm, rms_norm, rms_norm_backward, rms_norm_backward_add

__all__ = ["fuse"]


def fuse(graph: Graph) -> int:
    """Fuse what can be in `graph`, in place. Returns how many additions have gone into norms."""
    place = {node: index for index, node in enumerate(graph.nodes)}
    taken = 0
    for norm in list(graph.find_nodes(op="call_function", target=rms_norm)):
        taken += _take_addition_before(graph, norm, place)
    for backward in list(graph.find_nodes(op="call_function", target=rms_norm_backward)):
        taken += _take_addition_after(graph, backward)
    return taken


def _take_addition_before(graph: Graph, norm: Node, place: dict[Node, int]) -> bool:
    x, weight, eps = norm.args
    views, add = [], x
    while add.target in VIEWS:
        views.append(add)
        add = add.args[0]
    if not is_addition(add) or not all(map(in_memory, add.args)):
        return False
    if add not in place or place.get(weight, place[add]) >= place[add]:
        return False  # nothing is moved: the weight must be there when the sum is made
    if any(user.target is not operator.getitem for user in norm.users):
        return False
    with graph.inserting_before(add):
        both = call(graph, add_rms_norm, (*add.args, weight, eps), norm)
        total, y, rstd = (call(graph, operator.getitem, (both, index), norm) for index in range(3))
    with graph.inserting_before(norm):
        for view in reversed(views):
            y = call(graph, view.target, (y, *view.args[1:]), norm)
    for part in list(norm.users):
        part.replace_all_uses_with((y, rstd)[part.args[1]])
        graph.erase_node(part)
    graph.erase_node(norm)
    add.replace_all_uses_with(total)
    erase_unused(graph, [*views, add])
    return True


def _take_addition_after(graph: Graph, backward: Node) -> bool:
    if (found := addition_after(backward)) is None:
        return False
    add, other, views = found
    if not in_memory(other) or not is_read_from_memory(add):
        return False
    with graph.inserting_before(add):
        both = call(graph, rms_norm_backward_add, (*backward.args, other), add)
    add.replace_all_uses_with(both)
    erase_unused(graph, [add, *reversed(views), backward])
    return True
