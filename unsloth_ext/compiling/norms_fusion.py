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

import torch
from torch.fx import Graph, Node, map_arg
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .norms_operators import add_rms_norm, rms_norm, rms_norm_backward, rms_norm_backward_add

__all__ = ["VIEWS", "call", "erase_unused", "fuse", "in_memory", "is_addition", "is_same_shape"]

_aten = torch.ops.aten
VIEWS = {_aten.view.default, _aten.reshape.default, _aten._unsafe_view.default}
_PRODUCTS = {_aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.baddbmm.default}


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
    views, add = [], backward
    while True:
        if len(add.users) != 1:
            return False  # somebody else reads dx
        (add,) = add.users
        if add.target not in VIEWS:
            break
        views.append(add)
    last = views[-1] if views else backward
    if not is_addition(add) or add.args.count(last) != 1:
        return False
    (other,) = (one for one in add.args if one is not last)
    if not in_memory(other) or not _is_read_from_memory(add):
        return False
    with graph.inserting_before(add):
        both = call(graph, rms_norm_backward_add, (*backward.args, other), add)
    add.replace_all_uses_with(both)
    erase_unused(graph, [add, *reversed(views), backward])
    return True


def is_addition(node: Node) -> bool:
    """Of two tensors of one shape and one 16-bit dtype, contiguous, nothing scaled."""
    if node.op != "call_function" or node.target is not _aten.add.Tensor or node.kwargs.get("alpha", 1) != 1:
        return False
    if len(node.args) != 2 or not all(isinstance(one, Node) for one in node.args):
        return False
    tensors = [one.meta.get("val") for one in (node, *node.args)]
    if not all(isinstance(one, torch.Tensor) and _is_contiguous(one) for one in tensors):
        return False
    result = tensors[0]
    return result.dtype in (torch.float16, torch.bfloat16) and all(
        one.dtype == result.dtype and one.device == result.device and is_same_shape(one.shape, result.shape)
        for one in tensors
    )


def _is_contiguous(tensor: torch.Tensor) -> bool:
    """Known without a guard."""
    stride = 1
    for size, step in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        if not statically_known_true(step == stride):
            return False
        stride = stride * size
    return True


def is_same_shape(shape, other) -> bool:
    return len(shape) == len(other) and all(statically_known_true(a == b) for a, b in zip(shape, other, strict=True))


def in_memory(node: Node) -> bool:
    """Whether Inductor would read this, instead of computing it in the kernel that does the addition."""
    while node.target in VIEWS:
        node = node.args[0]
    return _is_made_in_memory(node) or _is_read_from_memory(node)


def _is_made_in_memory(node: Node) -> bool:
    if node.op != "call_function":
        return True
    if node.target is operator.getitem or node.target in _PRODUCTS:
        return True
    return not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace not in ("aten", "prims")


def _is_read_from_memory(node: Node) -> bool:
    """Whether one of its readers is no kernel of Inductor's, so that what it reads has been rounded."""
    users = list(node.users)
    while users:
        user = users.pop()
        if user.target in VIEWS:
            users += user.users
        elif _is_made_in_memory(user) and user.target is not operator.getitem:
            return True
    return False


def call(graph: Graph, target, args, like: Node) -> Node:
    node = graph.call_function(target, args)
    node.meta = {key: like.meta[key] for key in ("stack_trace", "nn_module_stack") if key in like.meta}
    node.meta["val"] = target(*map_arg(args, lambda one: one.meta["val"]))
    return node


def erase_unused(graph: Graph, nodes: list[Node]) -> None:
    for node in nodes:
        if not node.users:
            graph.erase_node(node)
