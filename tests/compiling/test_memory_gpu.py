"""On a card: budgets hold, predictions agree with the allocator's count, and every level gives the same bits."""

import pytest
import torch
from memory_models import assert_equal, hold, model_of, tokens_of, trained

from unsloth_ext.compiling.memory_controller import memory_budget
from unsloth_ext.compiling.recompute import LEVELS

pytestmark = pytest.mark.gpu


def card_model(**options):
    settings = dict(layers=8, hidden=1024, wide=4096, dtype=torch.bfloat16) | options
    return model_of(**settings).cuda(), tokens_of(4, 1024).cuda()


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_every_level_has_the_same_bits(dropout):
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        model, tokens = card_model(dropout=dropout)
        expected = trained(model, tokens)
        assert_equal(trained(model, tokens), expected)  # the step itself is deterministic
        budget = memory_budget(model, "auto")
        for level in LEVELS:
            hold(budget, level)
            for _ in range(2):
                assert_equal(trained(model, tokens), expected)
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
    for share in (0.35, 0.5, 0.7, 0.9):
        amount = int(static + share * (everything - static))
        budget = memory_budget(model, f"{amount}B")
        peak = peak_of_steps()
        assert peak <= amount, (share, str(budget))
        assert peak == pytest.approx(budget.plan.peak, rel=0.1), (share, str(budget))
        budget.remove()


def test_offloaded_bytes_leave_the_card():
    model, tokens = card_model()
    budget = memory_budget(model, "auto")
    peaks = {}
    for level in ("gate_up", "gate_up+offload", "layer", "layer+offload"):
        hold(budget, level)
        trained(model, tokens)
        torch.cuda.reset_peak_memory_stats()
        trained(model, tokens)
        peaks[level] = torch.cuda.max_memory_allocated()
    assert peaks["gate_up+offload"] < peaks["gate_up"]
