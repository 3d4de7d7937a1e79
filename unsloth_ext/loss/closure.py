"""What a user's function must not do unseen: train a tensor that nobody declared, or carry a graph from chunk to chunk.

Either would give a wrong gradient and no error. Both leave the same trace, a leaf in the chunk's graph that is none of
ours.
"""

from __future__ import annotations

import contextlib

from torch.autograd.graph import get_gradient_edge

_LOOKS = 2  # chunks: the first shows what the function closes over, the second what it kept from the first


class Watch:
    def __init__(self, known):
        self.looks = 0
        self.known = [get_gradient_edge(tensor).node for tensor in known if tensor.requires_grad]
        self.earlier: set[int] = set()

    def __call__(self, values, chunk) -> None:
        """Raises ValueError where the values of this chunk lead to a leaf that is neither of the chunk nor declared."""
        if self.looks == _LOOKS:
            return
        self.looks += 1
        own = [get_gradient_edge(tensor).node for tensor in chunk if tensor.requires_grad]
        seen = {*self.known, *own}
        stack = [value.grad_fn for value in values if value.grad_fn is not None]
        while stack:
            node = stack.pop()
            if node in seen:
                continue
            seen.add(node)
            leaf = getattr(node, "variable", None)
            if leaf is not None:
                raise ValueError(self._message(leaf))
            stack.extend(following for following, _ in node.next_functions if following is not None)
        self.earlier = {id(tensor) for tensor in chunk}

    def _message(self, leaf) -> str:
        if id(leaf) in self.earlier:
            return (
                "function uses a tensor of an earlier chunk: it must not keep state from chunk to chunk. Return a pair "
                "(sum, weight) or values of each row, which are put together exactly"
            )
        return (
            f"function or head uses a trainable tensor of shape {list(leaf.shape)} that is not an input of chunked_loss, so it "
            "would get no gradient: pass it in parameters=[...], or detach it"
        )


@contextlib.contextmanager
def explained():
    try:
        yield
    except RuntimeError as error:
        if "backward through the graph a second time" in str(error):
            raise RuntimeError(
                "function uses a graph that is gone: it keeps tensors from chunk to chunk, or closes over a tensor that was "
                "computed with gradients. Detach them, or pass the tensor in parameters=[...]"
            ) from error
        raise
