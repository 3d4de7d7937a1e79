"""A size that a traced autograd function worked out symbolically and that comes to a constant.

With dynamic shapes, the last size of `out.view(batch, length, -1)` is a quotient of symbols that cancel. Inside the body of an
autograd function or a checkpoint, torch 2.11 hands it out as a symbol; run once more for its outputs, the body gives a plain
number, and Dynamo asserts that it is a symbol. A number needs no node of the outer graph, so there is nothing to assert.
"""

from __future__ import annotations

import types
from contextlib import contextmanager


@contextmanager
def constants_among_outputs():
    """While it lasts, Dynamo takes constants among the outputs of a traced body. Versions without the assertion are left alone."""
    from torch._dynamo.variables import ConstantVariable, higher_order_ops

    original = getattr(higher_order_ops, "overwrite_tensor_vt_proxy", None)
    if original is None:
        yield
        return

    def overwrite_tensor_vt_proxy(inside, outside):
        pairs = zip(inside, outside.items, strict=False)  # the outside may be longer
        kept = [pair for pair in pairs if not isinstance(pair[1], ConstantVariable)]
        return original([a for a, _ in kept], types.SimpleNamespace(items=[b for _, b in kept]))

    higher_order_ops.overwrite_tensor_vt_proxy = overwrite_tensor_vt_proxy
    try:
        yield
    finally:
        higher_order_ops.overwrite_tensor_vt_proxy = original
