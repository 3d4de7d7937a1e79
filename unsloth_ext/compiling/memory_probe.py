"""What one decoder layer costs at each level, measured on the layer itself with the batch that is to be trained.

The layer is run forward and backward a few times under each level, on a copy of the real hidden states and with the real masks
and positions. `torch.autograd.grad` keeps the parameters' `.grad` and the hooks of DDP and FSDP out of it, and the random state
is put back. On a card the times are CUDA events' and the bytes the allocator's. About a second, once for a size of batch.
"""

from __future__ import annotations

import time

import torch

from .memory_layers import hidden_states, run_layer, settle
from .memory_plan import Costs, LevelCost
from .recompute import LEVELS

# What is run; the levels that offload differ from these by where bytes are, and by the link.
MEASURED = ("keep", "norms", "up", "gate_up", "layer")
OFFLOADING = {
    "norms+offload": "norms",
    "gate+offload": "norms",
    "up+offload": "up",
    "gate_up+offload": "gate_up",
    "layer+offload": "layer",
    "offload": "norms",
}


class _Source(torch.autograd.Function):
    """The layer's input as the output of something before it: its gradient is computed, and nobody keeps it alive for that."""

    @staticmethod
    def forward(ctx, anchor, data):
        return data.clone()

    @staticmethod
    def backward(ctx, gradient):
        return torch.zeros((), device=gradient.device), None


def measure(state, layer, inner, args, kwargs, scripts: dict, meter, offloader, repeat: int) -> Costs:
    """The costs of `layer` for this batch. Raises torch.OutOfMemoryError if not one level of one layer fits."""
    x = hidden_states(args, kwargs)
    devices = [x.device] if x.is_cuda else []
    costs, failure, forward, backward = {}, None, 0.0, 0.0
    with torch.random.fork_rng(devices), meter.counting(), torch.enable_grad():

        def once(level, send=lambda value, late: None, only_forward=False):
            return _once(state, layer, inner, args, kwargs, LEVELS[level], scripts, meter, send, only_forward)

        for name in MEASURED:
            if name in ("up", "gate_up") and state.mlp is None:
                continue
            try:
                runs = [once(name) for _ in range(1 + repeat)][1:]
            except torch.OutOfMemoryError as error:
                failure = error
                continue
            kept, forward_peak, backward_peak = (max(r[i] for r in runs) for i in range(3))
            times = [min(r[i] for r in runs) for i in (3, 4)]
            if not costs:
                forward, backward = times
            extra = max(0.0, sum(times) - forward - backward)
            costs[name] = LevelCost(name, kept, 0, forward_peak, backward_peak, extra)
        if not costs:
            raise failure
        for name, base in OFFLOADING.items() if offloader is not None else ():
            if base not in costs:
                continue
            sent: list[tuple[int, bool]] = []
            once(name, lambda value, late, sent=sent: sent.append((value.nbytes, late)), only_forward=True)
            base, host = costs[base], sum(nbytes for nbytes, _ in sent)
            early = sum(nbytes for nbytes, late in sent if not late)
            costs[name] = LevelCost(
                name, max(0, base.kept - host), host, base.forward_peak, base.backward_peak, base.extra, early
            )
    link = offloader.bandwidth() if offloader is not None else (1.0, 1.0)
    rows = x.numel() // x.shape[-1]
    sequence = x.shape[-2]
    return Costs(rows, sequence, forward, backward, tuple(costs.values()), *link)


def _once(state, layer, inner, args, kwargs, level, scripts, meter, send, only_forward):
    """(kept, forward peak, backward peak, seconds forward, seconds backward) of one run; bytes above what the layer found."""
    data = hidden_states(args, kwargs)
    anchor = torch.zeros((), device=data.device, requires_grad=True)
    parameters = [p for p in layer.parameters() if p.requires_grad]
    meter.synchronize()
    meter.reset_peak()
    before = meter.allocated()
    x = _Source.apply(anchor, data.detach())
    edge = torch.autograd.graph.get_gradient_edge(x)
    args, kwargs = ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})
    start = _now(x)
    out, frame = run_layer(state, layer, inner, args, kwargs, level, scripts)
    out = out[0] if isinstance(out, (tuple, list)) else out
    if frame is not None:
        settle(state, layer, frame, level, scripts, send)
    middle = _now(x)
    del x, args, kwargs, frame
    size = out.numel() * out.element_size()
    kept, forward_peak = meter.allocated() - before - size, meter.peak() - before
    if only_forward:
        return None
    gradient = torch.rand_like(out)
    meter.synchronize()
    meter.reset_peak()
    restart = _now(out)
    gradients = torch.autograd.grad(out, [*parameters, edge], gradient, allow_unused=True)
    end = _now(out)
    backward_peak = meter.peak() - before - size
    del gradients
    return kept, forward_peak, backward_peak, _between(start, middle), _between(restart, end)


def _now(tensor):
    if not tensor.is_cuda:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(start, end) -> float:
    if isinstance(start, float):
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1e3
