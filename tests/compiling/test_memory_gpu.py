"""On a card: budgets hold, predictions agree with the allocator's count, and every level gives the same bits."""

import pytest
import torch
from memory_models import hold, model_of, tokens_of, trained

from unsloth_ext.compiling.memory_controller import memory_budget
from unsloth_ext.compiling.recompute import LEVELS

pytestmark = pytest.mark.gpu


def card_model(**options):
    settings = dict(layers=8, hidden=1024, wide=4096, dtype=torch.bfloat16) | options
    return model_of(**settings).cuda(), tokens_of(4, 1024).cuda()


def differences(found, expected):
    """What is not equal in every bit, in words."""
    pairs = [("loss", found[0], expected[0]), *((name, found[1][name], g) for name, g in expected[1].items())]
    return [
        f"{name}: off by {(a.double() - b.double()).abs().max():.3g} of {b.abs().max():.3g}"
        for name, a, b in pairs
        if not torch.equal(a, b)
    ]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_every_level_has_the_same_bits(dropout):
    torch.use_deterministic_algorithms(
        True
    )  # not warn_only: with that flash attention sums dQ with atomics all the same
    try:
        model, tokens = card_model(dropout=dropout)
        expected = trained(model, tokens)
        assert not differences(trained(model, tokens), expected)  # the step itself is deterministic
        budget, wrong = memory_budget(model, "auto"), {}
        for level in LEVELS:
            hold(budget, level)
            for again in range(2):
                if found := differences(trained(model, tokens), expected):
                    wrong[level, again] = (len(found), found[:3])
        assert not wrong
    finally:
        torch.use_deterministic_algorithms(False)


def test_compiled_layers_have_the_same_bits(monkeypatch):
    """Inductor's graphs around which the levels work; nothing that the uncompiled forward does is other than they do."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    original = LlamaDecoderLayer.forward
    compiled = torch.compile(original, fullgraph=True, dynamic=False)
    calls = []

    def forward(self, *args, **kwargs):
        calls.append(1)
        return compiled(self, *args, **kwargs)

    forward._unsloth_block_original = original
    monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)
    torch.use_deterministic_algorithms(True)
    try:
        model, tokens = card_model(layers=2)
        expected = trained(model, tokens, use_cache=False)
        assert not differences(trained(model, tokens, use_cache=False), expected)
        budget, wrong, counts = memory_budget(model, "auto"), {}, {}
        trained(model, tokens, use_cache=False)
        for level in LEVELS:
            hold(budget, level)
            for again in range(2):
                calls.clear()
                if found := differences(trained(model, tokens, use_cache=False), expected):
                    wrong[level, again] = (len(found), found[:3])
            counts[level] = len(calls)
        for script in budget.scripts.values():
            print(script)
        print(counts, {c.name: (c.kept, c.host, c.extra) for c in budget.costs.levels})
        assert not wrong
    finally:
        torch.use_deterministic_algorithms(False)


def test_budgets_hold_and_predictions_agree():
    model, tokens = card_model()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])

    def peak_of_steps():
        for _ in range(3):
            trained(model, tokens)
            optimizer.step()
        torch.cuda.reset_peak_memory_stats()
        trained(model, tokens)
        return torch.cuda.max_memory_allocated()

    everything = peak_of_steps()
    static = torch.cuda.memory_allocated()
    rows = []
    for share in (0.35, 0.5, 0.7, 0.9):
        amount = int(static + share * (everything - static))
        budget = memory_budget(model, f"{amount}B")
        rows.append((share, amount, peak_of_steps(), budget.plan.peak, budget.correction, str(budget)))
        print(rows[-1], {c.name: (c.kept, c.host, c.forward_peak, c.backward_peak) for c in budget.costs.levels})
        budget.remove()
    for share, amount, peak, predicted, *_ in rows:
        assert peak <= amount, (share, rows)
        assert peak == pytest.approx(predicted, rel=0.1), (share, rows)


def test_what_is_there_is_asked_for_without_the_driver(monkeypatch):
    """At the start of a step; it is asked in the step before."""
    model, tokens = card_model(layers=2)
    budget = memory_budget(model, "auto")
    for _ in range(3):
        trained(model, tokens)
    counts = budget.meter.counts()
    assert counts.allocated == torch.cuda.memory_allocated() and counts.reserved == torch.cuda.memory_reserved()
    assert counts.peak == torch.cuda.max_memory_allocated()
    limit, asked, driver = budget.limit(), [], torch.cuda.mem_get_info
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *a: asked.append(a) or driver(*a))
    loss = model(input_ids=tokens, labels=tokens).loss
    assert not asked
    loss.backward()
    assert len(asked) == 1
    budget.meter.look()
    assert abs(budget.limit() - limit) < 2**28


def test_offloaded_bytes_leave_the_card():
    model, tokens = card_model()
    budget = memory_budget(model, "auto")
    peaks = {}
    for level in ("gate_up", "gate_up+offload", "up", "up+offload", "layer", "layer+offload"):
        hold(budget, level)
        trained(model, tokens)
        torch.cuda.reset_peak_memory_stats()
        trained(model, tokens)
        peaks[level] = torch.cuda.max_memory_allocated()
    assert peaks["gate_up+offload"] < peaks["gate_up"] and peaks["up+offload"] < peaks["up"]
