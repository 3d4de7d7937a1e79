"""Additions in a graph that Inductor is about to lower: finding those that an operator beside them can do, and editing the graph.

What norms_fusion.py and products_fusion.py have in common. An addition is only worth taking, and keeps its bits, where Inductor too would have
read and written memory: of two contiguous tensors of one shape and one 16-bit dtype that are no results of pointwise operations, which Inductor
would fuse with it. Views between an operator and its addition are looked through.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable

import torch
from torch.fx import Graph, Node, map_arg
from torch.fx.experimental.symbolic_shapes import statically_known_true

__all__ = [
    "VIEWS",
    "addition_after",
    "call",
    "erase_unused",
    "in_memory",
    "is_addition",
    "is_read_from_memory",
    "is_same_shape",
]

_aten = torch.ops.aten
VIEWS = {_aten.view.default, _aten.reshape.default, _aten._unsafe_view.default}
_PRODUCTS = {_aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.baddbmm.default}


def addition_after(node: Node) -> tuple[Node, Node, list[Node]] | None:
    """(the addition, its other summand, the views in between) where an addition is all that reads `node`; else None."""
    views, add = [], node
    while True:
        if len(add.users) != 1:
            return None
        (add,) = add.users
        if add.target not in VIEWS:
            break
        views.append(add)
    last = views[-1] if views else node
    if not is_addition(add) or add.args.count(last) != 1:
        return None
    (other,) = (one for one in add.args if one is not last)
    return add, other, views


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
    return _is_made_in_memory(node) or is_read_from_memory(node)


def _is_made_in_memory(node: Node) -> bool:
    if node.op != "call_function":
        return True
    if node.target is operator.getitem or node.target in _PRODUCTS:
        return True
    return not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace not in ("aten", "prims")


def is_read_from_memory(node: Node) -> bool:
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


def erase_unused(graph: Graph, nodes: Iterable[Node]) -> None:
    for node in nodes:
        if not node.users:
            graph.erase_node(node)
