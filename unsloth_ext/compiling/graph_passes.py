"""What Inductor is told to do beside its own with the graphs of a training step: `options()`.

Additions go into the norms and products beside them (norms_fusion.py, products_fusion.py; Inductor's entry `post_grad_custom_pre_pass`, the
graph before it is lowered), and small kernels run together (small_kernels.py; `_post_fusion_custom_pass`, the kernels after fusion).
"""

from __future__ import annotations

from typing import Any

from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph

from . import additions, norms_fusion, products_fusion, small_kernels

__all__ = ["ENTRY", "options", "pass_over_graphs"]

ENTRY = "post_grad_custom_pre_pass"


class _Pass(CustomGraphPass):
    def __call__(self, graph: Graph) -> None:
        norms_fusion.fuse(graph)
        products_fusion.fuse(graph)

    def uuid(self):
        return get_hash_for_files((__file__, *(one.__file__ for one in (additions, norms_fusion, products_fusion))))


pass_over_graphs = _Pass()


def options() -> dict[str, Any]:
    """Inductor's options for a compile of ours. An entry that somebody else has taken stays theirs."""
    found = {}
    if getattr(config, ENTRY) is None:
        found[ENTRY] = pass_over_graphs
    return found | small_kernels.options()
