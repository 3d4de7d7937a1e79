"""Which layers keep, compute again or offload what: the fastest arrangement whose peak fits.

The model of the peak. A step allocates, on top of what is there before the forward (`static`): what each layer keeps for its
backward, the loss's own peak, and in the backward the working set of the layer that is being differentiated. What a layer sends
to the host leaves while the next one computes. It comes back while the layer after it is differentiated (`early`), or, where
gate and up are computed again first, while they are (the rest of `host`; offload.py). So with layers 0..L-1

    forward of layer i   static + kept of layers 0..i-1 + sent by layer i-1 + forward_peak of layer i
    after the forward    static + sum of kept + sent by layer L-1 + loss
    backward of layer i  static + kept of layers 0..i-1 + early of layer i-1 + backward_peak of layer i

since the backward frees layer L-1 first. So levels with a large working set (a whole layer computed again) belong to the first
layers, whose backward runs when the others' memory is free again, and levels that keep all belong to the last.

The model of time: the measured extra time of each layer's level, plus what its copies take beyond the one layer's compute that
they hide behind. The levels offload about what the link can carry while one layer computes, so no copy waits for an earlier
layer's. With memory and host memory to be bounded and one choice a layer, an optimum mixes at most three levels; all mixtures of
three are tried, in that order, in one numpy evaluation. Layers are taken as equal: the probe measures the costliest kind of layer.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace


class BudgetTooSmall(ValueError):
    """No plan fits. `least` is the smallest budget, in bytes, for which there is one."""

    def __init__(self, message: str, least: int):
        super().__init__(message)
        self.least = least


@dataclass(frozen=True)
class LevelCost:
    """One layer at one level. Bytes; seconds beyond a layer that keeps all.

    kept: on the device from the layer's forward to its backward. host: in host memory meanwhile; early: what of that is back
    before the layer's own backward begins. forward_peak, backward_peak: above what was allocated before the layer's forward; the
    first without, the second with what the layer keeps.
    """

    name: str
    kept: int
    host: int
    forward_peak: int
    backward_peak: int
    extra: float
    early: int | None = None  # all of host

    @property
    def ahead(self) -> int:
        return self.host if self.early is None else self.early


@dataclass(frozen=True)
class Costs:
    """The probe's result for a batch of `tokens` in rows of `sequence`."""

    tokens: int
    sequence: int
    forward: float  # seconds of one layer that keeps all
    backward: float
    levels: tuple[LevelCost, ...]
    to_host: float = 1.0  # bytes a second
    from_host: float = 1.0

    def seconds(self, cost: LevelCost) -> float:
        """What a layer at this level adds to the step: its own extra, and waiting for its copies."""
        if not cost.host:
            return cost.extra
        out = cost.host / self.to_host - self.forward
        late = max(
            0.0, (cost.host - cost.ahead) / self.from_host - cost.extra
        )  # beyond what is computed again meanwhile
        back = cost.host / self.from_host - self.backward - cost.extra
        return cost.extra + max(0.0, out) + max(0.0, late, back)

    def scaled(self, tokens: int, sequence: int) -> Costs:
        """The costs of another batch: linear in tokens; rows longer than the probed ones count as quadratic (masks, softmax)."""
        ratio = tokens / self.tokens * max(1.0, sequence / self.sequence)

        def grow(cost):
            sizes = {n: round(getattr(cost, n) * ratio) for n in ("kept", "host", "forward_peak", "backward_peak")}
            early = None if cost.early is None else round(cost.early * ratio)
            return replace(cost, **sizes, extra=cost.extra * ratio, early=early)

        return replace(
            self, tokens=tokens, sequence=sequence, forward=self.forward * ratio, backward=self.backward * ratio,
            levels=tuple(map(grow, self.levels)),
        )  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """levels: the name of each layer's level. peak: predicted, in bytes, static included. extra: predicted seconds a step beyond
    keeping everything. kept: bytes that all layers keep on the device. host: bytes of host memory."""

    levels: tuple[str, ...]
    peak: int
    extra: float
    kept: int
    host: int
    static: int

    def counts(self) -> dict[str, int]:
        return {name: self.levels.count(name) for name in dict.fromkeys(self.levels)}

    def __str__(self):
        levels = ", ".join(f"{n} x {name}" for name, n in self.counts().items())
        return f"{levels}; peak {self.peak / 2**30:.2f} GiB, + {self.extra * 1e3:.0f} ms a step, {self.host / 2**30:.2f} GiB on the host"


def peak_of(costs: Costs, levels, static: int, loss: int) -> int:
    """The predicted peak of an arrangement, layer by layer (the definition; `best` uses its closed form)."""
    by_name = {cost.name: cost for cost in costs.levels}
    below, peak, sent, ahead = 0, 0, 0, 0
    for name in levels:
        cost = by_name[name]
        peak = max(peak, below + ahead + cost.backward_peak, below + sent + cost.forward_peak)
        below, sent, ahead = below + cost.kept, cost.host, cost.ahead
    return static + max(peak, below + sent + loss)


def best(
    costs: Costs, layers: int, budget: int, *, static: int = 0, loss: int = 0, host_memory: int | None = None
) -> Plan:
    """The fastest plan whose predicted peak is at most `budget` bytes; of equally fast ones the one that keeps most: a probe that finds
    recomputing free has only not measured what it costs.

    layers: how many there are. static: bytes allocated before the forward. loss: bytes that head and loss take beyond what the
    layers keep. host_memory: bytes of host memory to use at most; None for no bound. Raises BudgetTooSmall with the least one.
    """
    found, least = _mixtures(costs, layers, budget, static, loss, host_memory)
    if found is None:
        raise BudgetTooSmall(
            f"a budget of {budget / 2**30:.2f} GiB is too small for a batch of {costs.tokens} tokens: the least possible is "
            f"{least.peak / 2**30:.2f} GiB, of which {static / 2**30:.2f} GiB are there before the forward (weights, optimizer). "
            "Give a larger budget, a shorter max_seq_length or a smaller batch",
            least.peak,
        )
    return found


def smallest(costs: Costs, layers: int, *, static: int = 0, loss: int = 0, host_memory: int | None = None) -> Plan:
    """The plan with the lowest peak, whatever it costs; of equally low ones the fastest."""
    return _mixtures(costs, layers, 0, static, loss, host_memory)[1]


def _mixtures(costs, layers, budget, static, loss, host_memory) -> tuple[Plan | None, Plan]:
    """Of all mixtures of up to three levels the fastest within the budget, if there is one, and the one with the lowest peak."""
    import numpy as np

    # First the levels whose backward needs the most beyond what they keep.
    order = sorted(costs.levels, key=lambda c: c.kept - max(c.backward_peak, c.forward_peak))
    choose = itertools.combinations_with_replacement if len(order) < 3 else itertools.combinations
    triples = np.array(list(choose(range(len(order)), 3))).T[:, :, None]  # (3, triples, 1)
    first, second = np.meshgrid(np.arange(layers + 1), np.arange(layers + 1), indexing="ij")
    inside = first + second <= layers
    first, second = first[inside], second[inside]
    counts = np.stack([first, second, layers - first - second])[:, None, :]  # (3, 1, mixtures)
    kept, host, ahead, forward, backward = (
        np.array([getattr(c, name) for c in order], np.float64)[triples]
        for name in ("kept", "host", "ahead", "forward_peak", "backward_peak")
    )
    extra = np.array([costs.seconds(c) for c in order])[triples]
    below = sent = early = peak = np.zeros((triples.shape[1], counts.shape[2]))
    for i in range(3):  # the first layer of a level comes after another level, its last one after its own
        at_first = below + np.maximum(early + backward[i], sent + forward[i])
        at_last = below + (counts[i] - 1) * kept[i] + np.maximum(ahead[i] + backward[i], host[i] + forward[i])
        level_peak = np.maximum(at_first, np.where(counts[i] > 1, at_last, 0))
        used = counts[i] > 0
        peak = np.where(used, np.maximum(peak, level_peak), peak)
        sent, early = np.where(used, host[i], sent), np.where(used, ahead[i], early)
        below = below + counts[i] * kept[i]
    peak = static + np.maximum(peak, below + sent + loss)
    bytes_out, time = (counts * host).sum(0), (counts * extra).sum(0)
    allowed = np.ones_like(peak, bool) if host_memory is None else bytes_out <= host_memory

    def first_by(mask, *keys):
        where = np.flatnonzero(mask)
        for key in keys:
            values = key.reshape(-1)[where]
            where = where[values == values.min()]
        triple, mixture = divmod(int(where[0]), peak.shape[1])
        used = [order[i] for i in triples[:, triple, 0]]
        levels = tuple(c.name for c, n in zip(used, counts[:, 0, mixture], strict=True) for _ in range(n))
        at = triple, mixture
        return Plan(levels, int(peak[at]), float(time[at]), int(below[at]), int(bytes_out[at]), static)

    fits = allowed & (peak <= budget)
    return (first_by(fits, time, -below) if fits.any() else None), first_by(allowed, peak, time)
