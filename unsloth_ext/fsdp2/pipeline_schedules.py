"""Schedules by name, and what they cost: a simulator that walks torch's own tables.

A schedule is a table of actions a rank: F (forward), B (backward), or its two halves I (gradient of the input) and W (gradient of
the weights), each of one stage and one microbatch. `actions` reads the table that torch runs. `simulate` gives it times: a rank
does its actions in order, an action waits for what it needs from the neighbouring stage. What is left over is the bubble.

Zero bubble (Qi et al., arXiv 2401.10241) delays W, on which nobody waits, into the bubble. With full fine-tuning W is a third of
the work. Under LoRA it is 2 T r (in + out) operations for a matrix that costs 2 T in out forward: below 1 % at rank 16 (`costs`).
There is nothing to fill the bubble with. Interleaving (Narayanan et al., arXiv 2104.04473) cuts the bubble itself: a rank with v
stages waits for a v-th of the time. So interleaved 1F1B is what `pipeline` does unless told otherwise. On two H200 (8B) it is 1.72
times as fast as zero bubble. With torch's messages it is no faster than 1F1B, with those of pipeline_messages.py 1.06 times as fast
as torch's 1F1B (benchmarks/NOTES.md).
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Sequence
from types import SimpleNamespace

from ..errors import UsageError
from .pipeline_cut import rank_of_stage

__all__ = ["SCHEDULES", "Simulated", "actions", "check", "costs", "simulate", "slots_needed"]


@dataclasses.dataclass(frozen=True)
class _Kind:
    torch_name: str  # in torch.distributed.pipelining
    stages: int  # a rank, if not told
    several: bool  # whether a rank may have more than one stage
    splits: bool = False  # the backward into I and W
    v_shaped: bool = False

    def make(self, stages, microbatches: int, loss_fn=None):
        """torch's schedule over the stages of one rank. Losses are sums: gradients are not divided by their number."""
        from torch.distributed import pipelining

        made = getattr(pipelining, self.torch_name)
        return made(stages if self.several else stages[0], microbatches, loss_fn=loss_fn, scale_grads=False)


SCHEDULES = {
    "gpipe": _Kind("ScheduleGPipe", 1, False),
    "1f1b": _Kind("Schedule1F1B", 1, False),
    "interleaved-1f1b": _Kind("ScheduleInterleaved1F1B", 2, True),
    "interleaved-zero-bubble": _Kind("ScheduleInterleavedZeroBubble", 2, True, splits=True),
    "zbv": _Kind("ScheduleZBVZeroBubble", 2, True, splits=True, v_shaped=True),
}


def check(schedule: str, ranks: int, stages_per_rank: int | None, microbatches: int) -> tuple[_Kind, int]:
    """(the schedule, stages a rank). Raises `UsageError` for what it cannot run."""
    if schedule not in SCHEDULES:
        raise UsageError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
    kind = SCHEDULES[schedule]
    stages_per_rank = kind.stages if stages_per_rank is None else stages_per_rank
    if not isinstance(stages_per_rank, int) or stages_per_rank < 1:
        raise UsageError(f"stages_per_rank must be a positive number, got {stages_per_rank!r}")
    if stages_per_rank > 1 and not kind.several or kind.v_shaped and stages_per_rank != 2:
        raise UsageError(f"stages_per_rank must be {kind.stages} for schedule {schedule!r}, got {stages_per_rank}")
    if not isinstance(microbatches, int) or microbatches < 1:
        raise UsageError(f"microbatches must be a positive number, got {microbatches!r}")
    if schedule == "1f1b" and microbatches < ranks:
        raise UsageError(f"microbatches must be at least the {ranks} ranks for schedule '1f1b', got {microbatches}")
    rounds = max(1, microbatches // ranks)
    if kind.several and not kind.v_shaped and microbatches % rounds:
        raise UsageError(
            f"microbatches must be a multiple of {rounds} (their number over that of the {ranks} ranks, rounded down) for "
            f"schedule {schedule!r}, got {microbatches}",
            f"Use {microbatches - microbatches % ranks}, a multiple of the number of ranks.",
        )
    return kind, stages_per_rank


def actions(
    schedule: str, ranks: int, stages_per_rank: int | None, microbatches: int
) -> list[list[tuple[int, str, int]]]:
    """[rank][i] = (stage, "F", "B", "I" or "W", microbatch), in torch's order. Needs no processes."""
    kind, stages_per_rank = check(schedule, ranks, stages_per_rank, microbatches)
    stages = ranks * stages_per_rank
    rank_of = rank_of_stage(stages, ranks, kind.v_shaped)

    def stand_in(stage):
        return SimpleNamespace(
            stage_index=stage, num_stages=stages, group_size=ranks, group_rank=rank_of[stage], submod=None,
            is_first=stage == 0, is_last=stage == stages - 1, has_backward=True,
        )  # fmt: skip

    made = kind.make([stand_in(s) for s in range(stages) if rank_of[s] == 0], microbatches)
    table = []
    for rank in range(ranks):
        found = [
            re.fullmatch(r"(\d+)([FBIW])\d+", str(a)) for a in made.pipeline_order[rank]
        ]  # others: idle, communication
        row, seen = [], collections.Counter()
        for stage, what in ((int(m[1]), m[2]) for m in found if m):
            # Microbatches go in order. Schedule1F1B's table (not what it runs) counts the last rank's forwards from 1.
            row.append((stage, what, seen[stage, what]))
            seen[stage, what] += 1
        table.append(row)
    return table


def slots_needed(table: Sequence[Sequence[tuple[int, str, int]]]) -> int:
    """How many messages an edge must hold for ranks that go on only once what they send has a place, in a step and in an evaluation.

    table: from `actions`. With fewer, two ranks could wait for each other, each with a message that the other does not take yet. Raises
    ValueError for a table that waits for itself.
    """
    forwards = [[action for action in row if action[1] == "F"] for row in table]
    for slots in range(1, sum(map(len, table)) + 1):
        if all(_ends(rows, slots) for rows in (table, forwards)):
            return slots
    raise ValueError("the schedule waits for itself: no rank can go on")


def _ends(table, slots: int) -> bool:
    """Whether all ranks come to the end of their rows."""
    rank_of = {stage: rank for rank, row in enumerate(table) for stage, _, _ in row}
    waiting = [
        [step for action in row for step in _messages_of(action, rank_of)][::-1] for row in table
    ]  # the next one last
    on_the_way: collections.Counter = collections.Counter()
    moved = True
    while moved:
        moved = False
        for steps in waiting:
            while steps:
                edge, change = steps[-1]
                if not 0 <= on_the_way[edge] + change <= slots:
                    break
                on_the_way[edge] += change
                steps.pop()
                moved = True
    return not any(waiting)


def _messages_of(action, rank_of):
    """[(edge, -1 taken or 1 sent)] of an action, in order; an edge is named by the stages that it goes from and to."""
    stage, what, _ = action
    forth = {"F": 1, "B": -1, "I": -1}.get(what)
    if forth is None:
        return []
    found = [((stage - forth, stage), -1), ((stage, stage + forth), 1)]
    return [(edge, change) for edge, change in found if rank_of.get(edge[0], -1) != rank_of.get(edge[1], -1)
            and edge[0] in rank_of and edge[1] in rank_of]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Simulated:
    """time: of a step. busy: of each rank. in_flight: the most forwards that each rank holds for their backwards."""

    time: float
    busy: list[float]
    in_flight: list[int]

    @property
    def bubble(self) -> float:
        """The share of the ranks' time in which they wait."""
        return 1 - sum(self.busy) / (self.time * len(self.busy))


def simulate(
    table: Sequence[Sequence[tuple[int, str, int]]],
    forward: Sequence[float],
    backward_input: Sequence[float],
    backward_weight: Sequence[float],
    latency: float = 0.0,
) -> Simulated:
    """table: from `actions`; then the times of each stage for one microbatch, in one unit; latency: of a message between ranks.

    Raises ValueError for a table that waits for itself.
    """
    rank_of = {stage: rank for rank, row in enumerate(table) for stage, _, _ in row}
    last = max(rank_of)
    duration = {
        "F": forward, "I": backward_input, "W": backward_weight,
        "B": [i + w for i, w in zip(backward_input, backward_weight, strict=True)],
    }  # fmt: skip
    done: dict[tuple[int, str, int], float] = {}
    clock, busy = [0.0] * len(table), [0.0] * len(table)
    held, most = [0] * len(table), [0] * len(table)
    at = [0] * len(table)

    def ready(stage, what, microbatch, rank):
        """When an action can begin, or None if what it needs is not done."""
        if what == "W":
            needs = [(stage, "I", microbatch, stage)]
        elif what == "F":
            needs = [(stage - 1, "F", microbatch, stage - 1)] if stage else []
        else:
            needs = [(stage, "F", microbatch, stage)]
            if stage < last:
                needs.append((stage + 1, "BI", microbatch, stage + 1))
        start = 0.0
        for source, kinds, m, owner in needs:
            found = [done[source, k, m] for k in kinds if (source, k, m) in done]
            if not found:
                return None
            start = max(start, found[0] + (latency if rank_of[owner] != rank else 0.0))
        return start

    remaining = sum(len(row) for row in table)
    while remaining:
        before = remaining
        for rank, row in enumerate(table):
            while at[rank] < len(row):
                stage, what, microbatch = row[at[rank]]
                if (start := ready(stage, what, microbatch, rank)) is None:
                    break
                spent = duration[what][stage]
                clock[rank] = done[stage, what, microbatch] = max(clock[rank], start) + spent
                busy[rank] += spent
                held[rank] += {"F": 1, "B": -1, "W": -1}.get(what, 0)
                most[rank] = max(most[rank], held[rank])
                at[rank] += 1
                remaining -= 1
        if remaining == before:
            raise ValueError("the schedule waits for itself: no rank can go on")
    return Simulated(max(clock), busy, most)


def costs(config, rank: int, length: int, checkpointing: bool = False) -> tuple[float, float, float, float]:
    """(F, I, W of a decoder layer, F of the head) in operations a token, for LoRA of `rank` on all seven linears.

    length: of the sequences; half of their attention is computed. A frozen linear of n parameters costs 2 n forward and 2 n for
    the gradient of its input, and has no weight gradient; its adapter r (in + out) parameters' worth of each, W included. With
    checkpointing the forward is repeated in I. The head has no adapter: its I is its F.
    """
    hidden, heads = config.hidden_size, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    key_value = getattr(config, "num_key_value_heads", None) or heads
    query, small, inner = heads * head_dim, key_value * head_dim, config.intermediate_size
    linears = [
        (hidden, query),
        (hidden, small),
        (hidden, small),
        (query, hidden),
        (hidden, inner),
        (hidden, inner),
        (inner, hidden),
    ]
    base = sum(2 * a * b for a, b in linears)
    adapters = sum(2 * rank * (a + b) for a, b in linears)
    attention = 2 * query * length  # two products of [length, head_dim], half of each
    forward = base + adapters + attention
    backward_input = base + adapters + 2.5 * attention  # five products instead of two
    if checkpointing:
        backward_input += forward
    return forward, backward_input, adapters, 2 * config.vocab_size * hidden
