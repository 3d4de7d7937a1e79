"""One kernel for all that is small at the start of a graph and one for all that is small at its end, instead of one each.

A LoRA layer casts, scales and sets side by side the matrices of its adapters before it can multiply, and makes fp32 gradients of them after:
in Llama's layer 11 kernels in the forward and 13 in the backward, of two microseconds and a gap of one or two each. They read nothing
but the graph's inputs, or nobody reads them but its outputs, so they can run together, whatever is between them.

Inductor has the means: its kernels for `torch._foreach_*` do several things side by side. Its option `combo_kernels` puts pointwise kernels
into one only where they are as far from the inputs as each other, eight at most, operators counted: 12 to 4 and 14 to 9 there. Here they are
chosen by where they are, in `_post_fusion_custom_pass`, which sees the kernels after fusion. What a kernel computes stays as it was, bit for bit.
"""

from __future__ import annotations

from torch._inductor import scheduler
from torch._inductor.custom_graph_pass import get_hash_for_files
from torch._inductor.virtualized import V

__all__ = ["ENTRY", "together"]

ENTRY = "_post_fusion_custom_pass"
_MOST = 2**22  # elements of a kernel, and of what it reads


class _Together:
    """Takes the kernels in their order and gives them back. An object, not a function: it is pickled for the key of the compile's cache."""

    def __init__(self):
        self.version = get_hash_for_files((__file__,))

    def __call__(self, nodes: list) -> list:
        small = [node for node in nodes if _is_small(node)]
        first = [node for node in small if not node.unmet_dependencies]
        last = [node for node in small if node.unmet_dependencies and _only_leaves_the_graph(node)]
        for group, place in ((first, min), (last, max)):
            if len(group) > 1:
                nodes = _merged(nodes, group, place(map(nodes.index, group)))
        return nodes


def _is_small(node) -> bool:
    """A pointwise kernel of constant size on a card, that reads nothing large."""
    if type(node) not in (scheduler.SchedulerNode, scheduler.FusedSchedulerNode):
        return False  # an operator, or kernels that are together already
    if node.is_template() or node.is_reduction() or node.has_aliasing_or_mutation():
        return False
    device = node.get_device()
    if device is None or device.type != "cuda" or _elements(node.group[1]) > _MOST:
        return False
    made = node.scheduler.name_to_buf
    read = {dependency.name for dependency in node.read_writes.reads} - set(node.get_buffer_names())
    return all(_elements(made[name].node.get_size()) <= _MOST for name in read if name in made)


def _elements(sizes) -> int:
    total = 1
    for size in map(V.graph.sizevars.simplify, sizes):
        if not size.is_number:
            return _MOST + 1
        total *= int(size)
    return total


def _only_leaves_the_graph(node) -> bool:
    return all(isinstance(user.node, scheduler.OutputNode) for made in node.get_outputs() for user in made.users)


def _merged(nodes: list, group: list, at: int) -> list:
    """The kernels with those of `group` as one in place `at`. What is first depends on nothing, and on what is last nothing does: no
    circle can come of it."""
    schedule = group[0].scheduler
    one = scheduler.ForeachKernelSchedulerNode(schedule, group, use_custom_partition_algo=True, enable_autotune=True)
    own = set(group)
    nodes = [one if i == at else node for i, node in enumerate(nodes) if i == at or node not in own]
    schedule.name_to_fused_node.update({node.get_name(): one for node in one.get_nodes()})
    one.prune_redundant_deps(schedule.name_to_fused_node)
    return schedule.topological_sort_schedule(nodes)


together = _Together()
