"""One kernel for all that is small at the start of a graph and one for all that is small at its end, instead of one each.

A LoRA layer casts, scales and sets side by side the matrices of its adapters before it can multiply, and makes fp32 gradients of them after:
in Llama's layer 11 kernels in the forward and 13 in the backward, of two microseconds and a gap of one or two each. They read nothing
but the graph's inputs, or nobody reads them but its outputs, so they can run together, whatever is between them.

Inductor has the means: its kernels for `torch._foreach_*` do several things side by side. Its option `combo_kernels` puts pointwise kernels
into one only where they are as far from the inputs as each other, eight at most, operators counted: 12 to 4 and 14 to 9 there. Here they are
chosen by where they are, in `_post_fusion_custom_pass`, which sees the kernels after fusion. What a kernel computes stays as it was, bit for bit.

On by itself on Hopper; UNSLOTH_EXT_SMALL_KERNELS=1 has it on other cards, =0 nowhere.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch._inductor import config, custom_graph_pass, scheduler
from torch._inductor.virtualized import V

from ..switches import OFF, said
from .measured_cards import are_measured

__all__ = ["ENTRY", "options", "together"]

ENTRY = "_post_fusion_custom_pass"
_SWITCH = "UNSLOTH_EXT_SMALL_KERNELS"
_BLOCKS = "per_subkernel_blocks"  # each keeps the blocks that it would have alone: torch 2.11 asks an option, 2.13 an argument
_OPTION = f"combo_kernel_{_BLOCKS}"
_MOST = 2**22  # elements of a kernel, and of what it reads
_MOST_TOGETHER = 2**24  # elements of all kernels that run together: what they make, or read, is held from first to last


class _Together(getattr(custom_graph_pass, "CustomSchedulerPass", object)):
    """Takes the kernels in their order and gives them back."""

    def __init__(self):
        self.version = custom_graph_pass.get_hash_for_files(
            (__file__,)
        )  # torch 2.11 pickles it for the key of the compile's cache

    def uuid(self):
        return self.version

    def __call__(self, nodes: list) -> list:
        small = [node for node in nodes if _is_small(node)]
        first = [node for node in small if not node.unmet_dependencies]
        last = [node for node in small if node.unmet_dependencies and _only_leaves_the_graph(node)]
        for chosen, place in ((first, min), (last, max)):
            for group in _groups(chosen):
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
    read = {dependency.name for dependency in node.read_writes.reads} - set(node.get_buffer_names())
    return all(_elements(_size_of(node, name)) <= _MOST for name in read)


def _size_of(node, name: str):
    """The size of what a kernel reads; None where it has none that is known, as something that was written to."""
    made = node.scheduler.name_to_buf
    held = made[name].node if name in made else V.graph.graph_inputs.get(name)
    ask = getattr(held, "maybe_get_size", None)
    return None if ask is None else ask()


def _elements(sizes) -> int:
    if sizes is None:
        return _MOST_TOGETHER + 1
    total = 1
    for size in map(V.graph.sizevars.simplify, sizes):
        if not size.is_number:
            return _MOST_TOGETHER + 1
        total *= int(size)
    return total


def _only_leaves_the_graph(node) -> bool:
    return all(isinstance(user.node, scheduler.OutputNode) for made in node.get_outputs() for user in made.users)


def _groups(nodes: list) -> list[list]:
    """Those of one card and stream, as many as may be held at a time."""
    groups: dict[Any, list] = {}
    held: dict[Any, int] = {}
    for node in nodes:
        key = node.get_device(), _streams(node).get(node)
        held[key] = held.get(key, 0) + _elements(node.group[1])
        if held[key] <= _MOST_TOGETHER:
            groups.setdefault(key, []).append(node)
    return list(groups.values())


def _streams(node) -> dict:
    return getattr(node.scheduler, "node_to_stream", {})


def _merged(nodes: list, group: list, at: int) -> list:
    """The kernels with those of `group` as one in place `at`. What is first depends on nothing, and on what is last nothing does: no
    circle can come of it."""
    kind, schedule = scheduler.ForeachKernelSchedulerNode, group[0].scheduler
    more = {_BLOCKS: True} if _BLOCKS in inspect.signature(kind).parameters else {}
    one = kind(schedule, group, use_custom_partition_algo=True, enable_autotune=True, **more)
    own, stream = set(group), _streams(group[0]).get(group[0])
    if stream is not None:
        schedule.node_to_stream[one] = stream
    nodes = [one if i == at else node for i, node in enumerate(nodes) if i == at or node not in own]
    schedule.name_to_fused_node.update({node.get_name(): one for node in one.get_nodes()})
    one.prune_redundant_deps(schedule.name_to_fused_node)
    return schedule.topological_sort_schedule(nodes)


together = _Together()


def options() -> dict[str, Any]:
    """Inductor's options for it; {} where it is switched off, the entry is somebody else's, or this torch has no such entry."""
    word = said(_SWITCH)
    if word in OFF or not (word or are_measured()):
        return {}
    # Both entries are private ones.
    if not hasattr(config, _OPTION) or getattr(config, ENTRY, together) is not None:
        return {}
    return {ENTRY: together, _OPTION: True}
