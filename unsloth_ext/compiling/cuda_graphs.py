"""Compiled regions replayed as CUDA graphs, where shapes repeat.

A small model's step is bound by the host: Python, guards and launches of some thirty kernels a layer and direction take longer
than the kernels. Inductor can record what a region launches and replay it in one call (torch/_inductor/cudagraph_trees.py). That
is safe and fast only for some batches, so each region exists twice, plain and recorded, and every forward of the model takes one
of the two for all of its layers:

- recorded, once a shape has come `SEEN` times; a recording costs a step, and holds the step's memory in a pool of its own. At
  most `SHAPES` shapes are recorded, the first that come often enough.
- plain, for all other batches, packed ones (whose boundaries differ each time), forwards without gradients, with checkpointing
  or under a memory budget, and those that hand out what is in the pool.

What leaves a recorded region lies in its pool until the next recorded forward begins, then its memory is used again. Two things
live longer. Gradients: autograd keeps the region's own output as `.grad` where there was none, and with accumulation the next
forward comes before the optimizer reads it; they are copied out before that forward. And the loss, where it is made in the region:
it is handed out as a copy.
"""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

import torch

SEEN = 3  # times a shape must come before it is recorded
SHAPES = 4  # recorded at most
MODES = (False, True, "auto")
# A region of which a part cannot be recorded is an error, not a region that is quietly not recorded.
OPTIONS = {"triton.cudagraphs": True, "triton.cudagraph_or_error": True}
_PACKED = ("cu_seq_lens_q", "packed_seq_lengths", "cu_seqlens")


class CudaGraphs:
    """Which variant of the regions a model's forward takes. `active` says it for the forward that is running."""

    def __init__(self, model: torch.nn.Module, stack: torch.nn.Module, mode: bool | str):
        self.mode = mode
        self.active = False
        self.used = 0  # forwards that took the recorded variant
        self.plain: Counter = Counter()  # why others did not
        self._stack = stack
        self._trained = [p for p in model.parameters() if p.requires_grad]
        self._seen: Counter = Counter()
        self._recorded: set = set()
        self._copied: dict[int, weakref.ref] = {}  # id of a parameter -> the gradient that was copied out for it
        # Parameters are known to stay where they are; said of a 4-bit weight's scales too, they need not be copied in each time.
        self._marked = _scales(model) if mode else []
        for tensor in self._marked:
            torch._dynamo.mark_static_address(tensor, guard=False)

    def unmark(self) -> None:
        """Take the marks off the model's tensors again."""
        for tensor in self._marked:
            tensor.__dict__.pop("_dynamo_static_input_type", None)
        self._marked = []

    def begin(self, kwargs: dict[str, Any]) -> bool:
        """Decide for a forward with these arguments, and copy gradients out of the pool where it will be used again."""
        if self.mode is False:
            return False
        why = self._why_plain(kwargs)
        if why is not None:
            self.plain[why] += 1
            return False
        self.used += 1
        self._keep_gradients()
        return True

    def _why_plain(self, kwargs: dict[str, Any]) -> str | None:
        tensors = {name: value for name, value in kwargs.items() if isinstance(value, torch.Tensor)}
        if not tensors or any(value.device.type != "cuda" for value in tensors.values()):
            return "inputs not on a CUDA card"
        if not torch.is_grad_enabled():
            return "no gradients"
        if any(kwargs.get(name) is not None for name in _PACKED):
            return "packed"
        if kwargs.get("output_hidden_states") or kwargs.get("output_attentions"):
            return "hidden states handed out"
        if _checkpoints(self._stack):
            return "checkpointing"
        if "_unsloth_ext_memory" in self._stack.__dict__:
            return (
                "memory budget"  # what it computes again lies elsewhere each time, and each time would be a recording
            )
        if torch.cuda.is_current_stream_capturing():
            return "inside another recording"
        if self.mode == "auto":
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                return "auto: distributed"  # sharded parameters have no fixed address
            total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
            if not self._recorded and 2 * torch.cuda.max_memory_reserved() > total:
                return "auto: the step needs more than half of the card"  # evaluation could not use the pool
        # A number may be an input of the region, and each value of it a recording of its own: num_items_in_batch is one.
        key = tuple(
            (name, tuple(value.shape), value.dtype) if name in tensors else (name, value)
            for name, value in sorted(kwargs.items())
            if name in tensors or isinstance(value, (int, float))
        )
        if key in self._recorded:
            return None
        self._seen[key] += 1
        if len(self._seen) > 4096:  # lengths that never repeat
            self._seen.clear()
        if self._seen[key] < SEEN:
            return f"shape seen fewer than {SEEN} times"
        if len(self._recorded) >= SHAPES:
            return f"more than {SHAPES} shapes"
        self._recorded.add(key)
        return None

    def _keep_gradients(self) -> None:
        inside = [
            p
            for p in self._trained
            if p.grad is not None and p.grad.is_cuda and self._copied.get(id(p), _nothing)() is not p.grad
        ]
        if not inside:
            return
        copies = [torch.empty_like(p.grad) for p in inside]
        torch._foreach_copy_(copies, [p.grad for p in inside])
        for p, copy in zip(inside, copies, strict=True):
            p.grad = copy
            self._copied[id(p)] = weakref.ref(copy)  # an address may come back, in the pool


def _nothing() -> None:
    return None


def copied_out(output: Any) -> Any:
    """A recorded forward's output with each tensor in it copied, autograd's graph kept."""
    return torch.utils._pytree.tree_map_only(torch.Tensor, torch.clone, output)


def _checkpoints(stack: torch.nn.Module) -> bool:
    layers = getattr(stack, "layers", ())
    return any(module.__dict__.get("gradient_checkpointing") for module in (stack, *layers))


def _scales(model: torch.nn.Module) -> list[torch.Tensor]:
    found = []
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        while state is not None:  # nested where the scales are quantised too
            found += [
                value for name in ("absmax", "code", "offset") if (value := getattr(state, name, None)) is not None
            ]
            state = getattr(state, "state2", None)
    return [value for value in {id(v): v for v in found}.values() if isinstance(value, torch.Tensor)]
