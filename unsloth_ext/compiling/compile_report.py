"""What a compiled model's graphs cost: how many, why there is more than one, how long they took.

Graphs are counted where they are handed over, in a wrapper around the backend, so that no other compile of the process is in
the numbers. Dynamo keeps a record of each of its compiles (reason, seconds); ours are picked out by their compile id.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class CompileReport:
    """graphs: forward graphs compiled so far; each has one backward graph where gradients are asked for.
    breaks: graph breaks; always 0 with fullgraph=True, where a break is an error.
    recompiles: graphs beyond the first of each region. reasons: for each of them the guard that failed, as Dynamo words it.
    compile_seconds: forward and backward compiles together.
    compiled_calls: calls of a region that ran compiled. plain_calls: those that did not, by reason ("evaluation", "cache").
    graphs_by_region: of `graphs`, by the name of what was compiled.
    shared_layers: in step scope, how many layers are operators with graphs of their own, which layers that are alike share and which are
    among `graphs`. not_shared: why none is, where it was tried.
    recorded_forwards: forwards of the model that ran as CUDA graphs. unrecorded: with cuda_graphs, those that did not, by reason.
    """

    scope: str
    regions: int
    graphs: int
    breaks: int
    recompiles: int
    compile_seconds: float
    compiled_calls: int
    plain_calls: dict[str, int]
    reasons: tuple[str, ...]
    recorded_forwards: int = 0
    unrecorded: dict[str, int] = field(default_factory=dict)
    graphs_by_region: dict[str, int] = field(default_factory=dict)
    shared_layers: int = 0
    not_shared: str | None = None

    def __str__(self) -> str:
        plain = ", ".join(f"{count} plain ({why})" for why, count in self.plain_calls.items())
        lines = [
            f"{self.scope} scope, {self.regions} region{'s'[: self.regions != 1]}: {self.graphs} graphs, {self.breaks} breaks, "
            f"{self.recompiles} recompiles, {self.compile_seconds:.1f} s to compile; "
            f"{self.compiled_calls} calls compiled{', ' + plain if plain else ''}"
        ]
        if self.shared_layers:
            lines.append(f"  {self.shared_layers} layers compiled by kind, not one by one")
        if self.not_shared:
            lines.append(f"  each layer compiled by itself: {self.not_shared}")
        if self.recorded_forwards or self.unrecorded:
            others = "".join(f", {count} not ({why})" for why, count in self.unrecorded.items())
            lines.append(f"  CUDA graphs: {self.recorded_forwards} forwards{others}")
        return "\n".join([*lines, *(f"  recompiled: {reason}" for reason in self.reasons)])


@dataclass
class Ledger:
    """Collects what a `CompileReport` says. One for each compiled model."""

    graphs: Counter = field(default_factory=Counter)  # by region
    breaks: int = 0
    compiled_calls: int = 0
    plain_calls: Counter = field(default_factory=Counter)
    # (compile id, forward?, begin) -> seconds: kernels are tuned later, in records of their own
    seconds: dict = field(default_factory=dict)
    reasons: dict = field(default_factory=dict)  # compile id -> reason
    _ids: set = field(default_factory=set)

    def counted(self, backend, region: str):
        """`backend` (a function of a graph and its example inputs), with each graph noted for `region`."""

        def compile_graph(graph, example_inputs):
            self.graphs[region] += 1
            self._ids.add(str(torch._guards.CompileContext.current_compile_id()))
            return backend(graph, example_inputs)

        return compile_graph

    def collect(self) -> None:
        """Take over Dynamo's records of our compiles; it keeps only the latest, so this is done after each call that compiled."""
        for record in torch._dynamo.utils.get_compilation_metrics():
            id = str(record.compile_id)
            if id in self._ids:
                self.seconds[id, record.is_forward, record.start_time_us] = (record.duration_us or 0) / 1e6
                if record.recompile_reason:
                    self.reasons[id] = record.recompile_reason

    def report(self, scope: str, recording, shared=None) -> CompileReport:
        """recording: the model's `CudaGraphs`. shared: its `SharedLayers`, if any."""
        self.collect()
        graphs = sum(self.graphs.values())
        return CompileReport(
            scope=scope,
            regions=len(self.graphs),
            graphs=graphs,
            breaks=self.breaks,
            recompiles=graphs - len(self.graphs),
            compile_seconds=sum(self.seconds.values()),
            compiled_calls=self.compiled_calls,
            plain_calls=dict(self.plain_calls),
            reasons=tuple(self.reasons.values()),
            recorded_forwards=recording.used,
            unrecorded=dict(recording.plain),
            graphs_by_region=dict(self.graphs),
            shared_layers=shared.count if shared else 0,
            not_shared=shared.given_up if shared else None,
        )
