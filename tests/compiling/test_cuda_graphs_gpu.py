"""CUDA graphs on a card: the numbers of the same regions not recorded, through accumulation, changing shapes and evaluation."""

import functools

import pytest
from on_card import NEEDS, on_card

pytestmark = NEEDS
run = functools.partial(on_card, "graphs_on_card.py")


@pytest.mark.parametrize(
    "kind, scope, more",
    [("unsloth", "block", ()), ("unsloth", "step", ()), ("plain", "block", ()), ("unsloth", "block", ("--dense",))],
)
def test_the_numbers_of_the_plain_regions(tmp_path, kind, scope, more):
    found = run(tmp_path, kind, scope, *more)
    assert found["forwards"] >= 20 and found["nodes"] >= 1 and found["skips"] == 0, found
    assert found["breaks"] == 0, found
    # The same kernels: only atomics and the choice of a matmul may differ. A stale or doubled gradient is of the order of 1.
    assert found["recorded"]["gradients"] <= max(0.02, 4 * found["again"]["gradients"]), found
    assert found["recorded"]["loss"] <= max(0.005, 4 * found["again"]["loss"]), found


def test_dropout_draws_anew(tmp_path):
    assert run(tmp_path, "unsloth", "block", "--dropout")["dropout_differs"]
