"""The planner against brute force, the amounts people write, and predicted against counted bytes of real steps."""

import itertools
import random
import re

import pytest
import torch
from memory_models import hold, model_of, tokens_of, trained
from torch.utils._python_dispatch import _disable_current_modes

from unsloth_ext.compiling import memory_amount, recompute
from unsloth_ext.compiling.memory_amount import Ram, parse
from unsloth_ext.compiling.memory_controller import memory_budget
from unsloth_ext.compiling.memory_layers import UnsupportedModel
from unsloth_ext.compiling.memory_plan import BudgetTooSmall, Costs, LevelCost, best, peak_of, smallest
from unsloth_ext.compiling.offload import HostMemory
from unsloth_ext.compiling.recompute import LEVELS

GIB = 2**30


def random_costs(levels=4):
    names = random.sample(list(LEVELS), levels)
    made = []
    for name in names:
        kept, host = random.randint(1, 900), random.choice([0, random.randint(1, 400)]) if made else 0
        made.append(
            LevelCost(
                name,
                kept,
                host,
                kept + random.randint(0, 300),
                kept + random.randint(0, 900),
                random.random(),
                random.choice([None, random.randint(0, host)]),
            )
        )
    return Costs(
        64, 64, random.random(), 2 * random.random(), tuple(made), random.uniform(100, 2000), random.uniform(100, 2000)
    )


def time_of(costs, levels):
    by_name = {c.name: c for c in costs.levels}
    time = 0
    for cost in (by_name[n] for n in levels):
        time += cost.extra
        if cost.host:
            late = 0 if cost.early is None else (cost.host - cost.early) / costs.from_host - cost.extra
            time += max(0, cost.host / costs.to_host - costs.forward)
            time += max(0, late, cost.host / costs.from_host - costs.backward - cost.extra)
    return time


def test_no_mixture_is_faster_within_the_budget():
    """Of all mixtures with the levels in the planner's order."""
    for _ in range(12):
        costs, layers = random_costs(3), random.randint(2, 6)
        static, loss, host = (
            random.randint(0, 500),
            random.randint(0, 500),
            random.choice([None, random.randint(0, 900)]),
        )
        lowest = smallest(costs, layers, static=static, loss=loss, host_memory=host)
        for budget in (lowest.peak, lowest.peak + random.randint(1, 1500), 10**9):
            plan = best(costs, layers, budget, static=static, loss=loss, host_memory=host)
            by_name = {c.name: c for c in costs.levels}
            assert plan.peak <= budget and len(plan.levels) == layers
            assert plan.peak == peak_of(costs, plan.levels, static, loss)
            assert plan.extra == pytest.approx(time_of(costs, plan.levels))
            order = sorted(costs.levels, key=lambda c: c.kept - max(c.backward_peak, c.forward_peak))
            for levels in itertools.combinations_with_replacement([c.name for c in order], layers):
                bytes_out = sum(by_name[n].host for n in levels)
                if host is not None and bytes_out > host or peak_of(costs, levels, static, loss) > budget:
                    continue
                assert plan.extra <= time_of(costs, levels) + 1e-9
        with pytest.raises(BudgetTooSmall, match=re.escape(f"least possible is {lowest.peak / GIB:.2f} GiB")) as caught:
            best(costs, layers, lowest.peak - 1, static=static, loss=loss, host_memory=host)
        assert caught.value.least == lowest.peak


def test_the_8b_step_as_it_was_measured():
    """The levels of an 8B layer at 8192 tokens on an H200: bytes as they were counted there (MiB), seconds from its kernels' times."""
    mib, ms = 2**20, 1e-3
    x, attention, product, everything = 64, 166, 224, 934
    work, forward_work = everything + 961, everything + 500
    norms, one, both, layer = 0.15 * ms, 1.7 * ms, 3.3 * ms, 5.6 * ms

    def cost(name, kept, extra, host=0, early=None):
        peaks = forward_work * mib, work * mib
        return LevelCost(name, kept * mib, host * mib, *peaks, extra, early if early is None else early * mib)

    bulk = 2 * x + attention
    costs = Costs(
        8192, 4096, 7.27 * ms, 8.82 * ms,
        (
            cost("keep", everything, 0.0),
            cost("norms", bulk + 2 * product, norms),
            cost("up", bulk + product, one),
            cost("gate_up", bulk, both),
            cost("layer", x, layer),
            cost("norms+offload", 2 * product, norms, bulk),
            cost("gate+offload", product + attention, norms, product + 2 * x),
            cost("up+offload", attention, one, product + 2 * x),
            cost("gate_up+offload", 0, both, bulk, 2 * x),
            cost("layer+offload", 0, layer, x),
            cost("offload", 0, norms, bulk + 2 * product),
        ),
        55e9, 55e9,  # PCIe 5, 16 lanes, pinned memory
    )  # fmt: skip
    # Weights, adapters and gradients in fp32, an 8-bit optimizer; the flag "unsloth" needs 7.8 GiB.
    static, loss, keep_all = int(5.83 * GIB), int(0.4 * GIB), 543.0
    took = {}
    for budget in (8.1, 12, 20, 132):
        plan = best(costs, 32, int(budget * 0.98 * GIB), static=static, loss=loss)
        assert plan.peak == peak_of(costs, plan.levels, static, loss)
        took[budget] = keep_all + plan.extra * 1e3, str(plan)
    assert took[132][0] == keep_all
    assert took[8.1][0] <= 690 and took[12][0] <= 640 and took[20][0] <= 580, took
    assert smallest(costs, 32, static=static, loss=loss).peak < 7.8 * GIB


@pytest.mark.parametrize(
    "given, meant",
    [
        ("auto", ("share", 1.0)),
        (0.8, ("share", 0.8)),
        ("80%", ("share", 0.8)),
        ("12GiB", ("bytes", 12 * GIB)),
        ("12 gib", ("bytes", 12 * GIB)),
        (" 1.5 GB", ("bytes", 1.5e9)),
        ("700MB", ("bytes", 7e8)),
        (12, ("bytes", 12 * GIB)),
        (8.1, ("bytes", 8.1 * GIB)),
        (1, ("share", 1.0)),
    ],
)
def test_amounts(given, meant):
    assert parse(given) == (meant[0], pytest.approx(meant[1]))


@pytest.mark.parametrize("given", ["12", "", "unsloth", "12 parsecs", "-3GiB", "0GiB", "0%", "120%", 0, -1, float("nan"), float("inf")])  # fmt: skip
def test_amounts_that_are_refused(given):
    with pytest.raises(ValueError, match="budget") as caught:
        parse(given)
    assert str(given).strip() in str(caught.value)


@pytest.mark.parametrize("given", [True, False, None, [1]])
def test_no_amounts(given):
    with pytest.raises(TypeError, match="budget must be"):
        parse(given)


def test_refusals_change_nothing():
    model = model_of()
    with pytest.raises(ValueError, match="margin must be at least 0"):
        memory_budget(model, "1GiB", margin=1.5)
    with pytest.raises(UnsupportedModel, match="Linear has no list of decoder layers"):
        memory_budget(torch.nn.Linear(3, 3))
    budget = memory_budget(model, "1GiB")
    with pytest.raises(ValueError, match="under a memory budget already"):
        memory_budget(model, "2GiB")
    budget.remove()
    assert not any(
        "forward" in module.__dict__ or "_unsloth_ext_memory" in module.__dict__ for module in model.modules()
    )


class _Stack(torch.nn.Module):
    """Decoder layers of a real model with a loss that takes almost no memory, so that the peak is the layers'."""

    def __init__(self, model):
        super().__init__()
        self.inner = model.base_model.model.model

    def forward(self, x):
        places = torch.arange(x.shape[1])[None]
        embeddings = self.inner.rotary_emb(x, places)
        for layer in self.inner.layers:
            x = layer(x, position_embeddings=embeddings, position_ids=places)
        return x.mean()


def without_copies_out(costs, levels):
    """`peak_of` for a CPU, where a copy to the host is made at once: nothing is on its way out while the next layer computes."""
    by_name = {c.name: c for c in costs.levels}
    below, ahead, peak = 0, 0, 0
    for cost in (by_name[name] for name in levels):
        peak = max(peak, below + cost.forward_peak, below + ahead + cost.backward_peak)
        below, ahead = below + cost.kept, cost.ahead
    return peak


@pytest.fixture
def everything_counts(monkeypatch):
    monkeypatch.setattr(recompute, "SMALL", 512)


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_predicted_peak_is_the_counted_one(everything_counts, monkeypatch, dtype, offload):
    """Every storage of a whole step is counted as it lives and dies; those that stand for host memory are not."""
    take = HostMemory.take

    def uncounted(self, nbytes):
        with _disable_current_modes():
            return take(self, nbytes)

    monkeypatch.setattr(HostMemory, "take", uncounted)
    stack = _Stack(model_of(layers=6, dtype=dtype))
    x = torch.randn(2, 64, 64, dtype=dtype)
    budget = memory_budget(stack, "64GiB", offload=offload)
    stack(x).backward()
    costs = budget.costs
    names = [c.name for c in costs.levels]
    assert set(names) == (set(LEVELS) if offload else {"keep", "norms", "up", "gate_up", "layer"})
    kept = {c.name: c.kept for c in costs.levels}
    # In bf16 peft saves copies in fp32, so that gate and up are not told apart: then the whole MLP is computed again.
    assert kept["layer"] < kept["gate_up"] <= kept["up"] < kept["norms"] < kept["keep"]
    assert (kept["gate_up"] < kept["up"]) == (dtype == torch.float32)
    order = sorted(costs.levels, key=lambda c: c.kept - max(c.backward_peak, c.forward_peak))
    for levels in [[n] * 6 for n in names] + [
        sorted(random.choices(names, k=6), key=[c.name for c in order].index) for _ in range(4)
    ]:
        hold(budget, levels)
        stack.zero_grad(set_to_none=False)
        stack(x).backward()  # recipes are found
        counted = Ram(torch.device("cpu"))
        with counted:
            stack(x).backward()
        predicted = without_copies_out(costs, levels)
        assert counted.most == pytest.approx(predicted, rel=0.08), levels
        assert predicted <= peak_of(costs, levels, 0, 0), levels


def test_what_is_offloaded_leaves(everything_counts):
    """The bytes that a level sends to the host are those that it keeps less."""
    stack = _Stack(model_of(layers=3))
    budget = memory_budget(stack, "64GiB")
    x = torch.randn(2, 64, 64)
    stack(x).backward()
    by_name = {c.name: c for c in budget.costs.levels}
    for name in ("norms", "gate_up", "layer"):
        less = by_name[f"{name}+offload"]
        assert less.host > 0 and less.kept + less.host == by_name[name].kept
        hold(budget, f"{name}+offload")
        loss = stack(x)
        held = budget.offloader.memory
        out = held.total - sum(size * len(buffers) for size, buffers in held.free.items())
        assert out >= 3 * less.host
        loss.backward()
        del loss
        assert held.total == sum(
            size * len(buffers) for size, buffers in held.free.items()
        ), "buffers were not given back"


def test_too_small_a_budget_names_the_least_and_that_one_works():
    model, tokens = model_of(), tokens_of()
    budget = memory_budget(model, "100KiB", margin=0)
    with pytest.raises(BudgetTooSmall, match=r"least possible is .* GiB, of which .*weights, optimizer") as caught:
        trained(model, tokens)
    budget.remove()
    least = caught.value.least
    budget = memory_budget(model, f"{least}B", margin=0)
    trained(model, tokens)
    assert budget.plan.peak <= least
    assert "layer" in str(budget) or "gate_up" in str(budget)


def test_a_margin_makes_no_budget_impossible(monkeypatch):
    """What the margin and an optimizer that has not stepped would take is room to choose in, not a reason to refuse."""
    model, tokens = model_of(), tokens_of()
    budget = memory_budget(model, "100KiB", margin=0)
    with pytest.raises(BudgetTooSmall) as caught:
        trained(model, tokens)
    budget.remove()
    budget = memory_budget(model, f"{int(caught.value.least * 1.1)}B", margin=0.5)
    assert budget.limit() < caught.value.least
    trained(model, tokens)
    assert budget.plan.peak <= caught.value.least * 1.1


def test_a_longer_batch_is_planned_anew(monkeypatch):
    monkeypatch.setattr(recompute, "SMALL", 512)
    model = model_of(layers=4)
    budget = memory_budget(model, "64GiB", margin=0, offload=False)
    trained(model, tokens_of(2, 32))
    assert budget.plan.counts() == {"keep": 4}
    short = budget.plan.peak
    budget.budget = ("bytes", 1.2 * short)
    trained(model, tokens_of(2, 32))
    assert budget.plan.counts() == {"keep": 4}
    trained(model, tokens_of(2, 40))  # a quarter more or less: scaled, not measured again
    assert budget.costs.tokens == 64
    trained(model, tokens_of(2, 64))
    assert budget.costs.tokens == 128 and budget.plan.counts() != {"keep": 4} and budget.plan.peak <= 1.2 * short
    with pytest.raises(BudgetTooSmall):
        trained(model, tokens_of(8, 400))


def test_a_step_is_planned_with_the_gradients_that_are_still_to_come():
    model, tokens = model_of(), tokens_of()
    budget = memory_budget(model, "64GiB")
    sizes = {p: p.numel() * p.element_size() for p in model.parameters() if p.requires_grad}

    def static():
        model(input_ids=tokens, labels=tokens).loss.backward()
        return budget.plan.static

    none_there, all_there = static(), static()
    assert none_there - all_there == sum(sizes.values())
    for missing in (list(sizes)[:1], list(sizes)[3:], list(sizes)):
        for p in missing:
            p.grad = None
        assert static() - all_there == sum(sizes[p] for p in missing)


def test_what_is_as_quick_is_kept():
    """On a busy machine a probe may find that recomputing takes no time."""
    costs = Costs(
        64,
        64,
        1.0,
        1.0,
        (LevelCost("keep", 1000, 0, 1000, 1000, 0.0), LevelCost("layer", 10, 0, 1000, 1000, 0.0)),
        1e9,
        1e9,
    )
    assert best(costs, 4, 10**6).counts() == {"keep": 4}
    assert best(costs, 4, 3500).counts()["layer"] >= 1


def test_host_memory_is_bounded():
    costs = random_costs(3)
    costs = Costs(64, 64, 1.0, 1.0, (*costs.levels, LevelCost("keep", 1000, 0, 1000, 1000, 0.0)), 1e9, 1e9)
    plan = smallest(costs, 8, host_memory=0)
    assert plan.host == 0
    assert memory_amount.host_memory_free() > 0


def test_norms_of_each_other_are_no_recipes():
    from unsloth_ext.compiling.recompute_recipes import without_cycles

    norms = {1: ("a", None), 2: ("a", 1), 3: ("b", 4), 4: ("b", 3), 5: ("b", 3), 6: ("a", 9), 7: ("a", 7)}
    assert without_cycles(norms) == {1: ("a", None), 2: ("a", 1), 6: ("a", 9)}
