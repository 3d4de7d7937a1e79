"""The simulator against the closed forms of the papers, on torch's own tables; the cut against all cuts that there are."""

import itertools
import random

import pytest
import torch

from unsloth_ext.errors import UsageError
from unsloth_ext.fsdp2.pipeline_cut import cut_layers, head_in_layers, rank_of_stage, spans
from unsloth_ext.fsdp2.pipeline_schedules import actions, check, costs, simulate, slots_needed


def _over(schedule, ranks, stages, microbatches, forward, backward_input, backward_weight):
    """What a step takes over the work of a rank; times are of a rank, its stages have equal parts of them."""
    table = actions(schedule, ranks, stages, microbatches)
    each = [[x / stages] * (ranks * stages) for x in (forward, backward_input, backward_weight)]
    found = simulate(table, *each)
    work = microbatches * (forward + backward_input + backward_weight)
    assert found.busy == pytest.approx([work] * ranks)
    assert found.bubble == pytest.approx(1 - work / found.time)
    return found.time - work, found


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_bubbles_are_those_of_the_papers(ranks):
    """GPipe and 1F1B: (p - 1)(F + I + W); interleaved: a v-th of it (2104.04473); ZB-H1: (p - 1)(F + I - W) (2401.10241)."""
    forward, backward_input = random.uniform(0.5, 2), random.uniform(0.5, 2)
    weight = random.uniform(0, min(forward, backward_input))
    times, whole = (forward, backward_input, weight), forward + backward_input + weight
    for microbatches in (ranks, 2 * ranks, 3 * ranks):
        for schedule in ("gpipe", "1f1b"):
            over, found = _over(schedule, ranks, 1, microbatches, *times)
            assert over == pytest.approx((ranks - 1) * whole)
            if schedule == "1f1b":
                assert found.in_flight == list(range(ranks, 0, -1))
            else:
                assert found.in_flight == [microbatches] * ranks
        for stages in (2, 3):
            over, _ = _over("interleaved-1f1b", ranks, stages, microbatches, *times)
            assert over == pytest.approx((ranks - 1) * whole / stages)
    for stages in (1, 2):
        over, _ = _over("interleaved-zero-bubble", ranks, stages, 2 * ranks, *times)
        assert over == pytest.approx((ranks - 1) * (forward + backward_input - weight) / stages)


def test_zero_bubble_gains_what_the_weight_pass_has():
    """With W = F = I it beats interleaving; without W, as nearly so under LoRA, it is the same schedule."""
    full = [_over(name, 4, 2, 8, 1, 1, 1)[0] for name in ("interleaved-1f1b", "interleaved-zero-bubble", "zbv")]
    none = [_over(name, 4, 2, 8, 1, 1, 0)[0] for name in ("interleaved-1f1b", "interleaved-zero-bubble", "zbv")]
    assert full[1] <= full[0] / 2 and full[2] <= full[0] / 2
    assert none[0] == pytest.approx(none[1]) == pytest.approx(none[2])


def test_latency_and_the_slowest_stage_count():
    table = actions("1f1b", 2, 1, 4)
    even, late = (simulate(table, [1, 1], [1, 1], [0, 0], latency=x).time for x in (0.0, 0.25))
    assert late > even
    slow = simulate(table, [1, 2], [1, 2], [0, 0])
    assert slow.time >= 4 * 4 and slow.busy == [8, 16]
    with pytest.raises(ValueError, match="waits for itself"):
        simulate([[(0, "F", 0), (0, "B", 0)], [(1, "B", 0), (1, "F", 0)]], [1, 1], [1, 1], [0, 0])


def test_costs_are_products_of_the_shapes():
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=64, intermediate_size=160, num_attention_heads=4, num_key_value_heads=2, head_dim=16, vocab_size=999,
        num_hidden_layers=1,
    )  # fmt: skip
    with torch.device("meta"):
        from transformers import LlamaForCausalLM

        model = LlamaForCausalLM(config)
    linears = [m for m in model.model.layers[0].modules() if isinstance(m, torch.nn.Linear)]
    base = sum(2 * m.weight.numel() for m in linears)
    adapters = sum(2 * 8 * (m.in_features + m.out_features) for m in linears)
    forward, backward_input, weight, head = costs(config, 8, 100)
    assert forward == base + adapters + 2 * 64 * 100 and weight == adapters and head == 2 * model.lm_head.weight.numel()
    assert backward_input > forward
    assert costs(config, 8, 100, checkpointing=True)[1] == backward_input + forward
    assert head_in_layers(config) == pytest.approx(head / base)


@pytest.mark.parametrize("v_shaped", [False, True])
@pytest.mark.parametrize(("ranks", "each"), [(2, 1), (2, 2), (3, 2)])
def test_no_cut_has_a_less_loaded_busiest_rank(ranks, each, v_shaped):
    stages = ranks * each
    rank_of = rank_of_stage(stages, ranks, v_shaped)
    for layers in range(stages, stages + 4):
        head = random.choice([0.0, 0.4, random.uniform(0, 6)])

        def busiest(counts, head=head):
            load = [0.0] * ranks
            for stage, n in enumerate(counts):
                load[rank_of[stage]] += n + (head if stage == stages - 1 else 0)
            return max(load)

        counts = cut_layers(layers, ranks, each, head, v_shaped)
        assert sum(counts) == layers and min(counts[:-1]) >= 1 and counts[-1] >= 0
        every = itertools.product(range(1, layers + 1), repeat=stages - 1)
        best = min(busiest([*c, layers - sum(c)]) for c in every if sum(c) <= layers)
        assert busiest(counts) == pytest.approx(best)


def test_a_head_of_128k_takes_layers_from_its_rank():
    """Llama 3 8B on 4 ranks with 2 stages: the head weighs 2.4 of 32 layers."""
    counts = cut_layers(32, 4, 2, 2.4)
    assert counts[-1] <= 3 and counts[-1] + counts[3] < 7
    assert rank_of_stage(8, 4) == [0, 1, 2, 3, 0, 1, 2, 3] and rank_of_stage(8, 4, True) == [0, 1, 2, 3, 3, 2, 1, 0]
    assert [list(s) for s in spans([1, 2, 0], 3, 3, 1)] == [[0], [1, 2], []]
    for counts, message in (
        ([1, 0, 2], "must be positive"),
        ([1, 2], "each of the 3 stages"),
        ([1, 1, 2], "add up to the 3"),
    ):
        with pytest.raises(UsageError, match=message):
            spans(counts, 3, 3, 1)
    with pytest.raises(UsageError, match="3 layers, fewer than the 4 stages of 2 ranks"):
        cut_layers(3, 2, 2)


def test_stages_a_rank_that_are_not_told():
    assert check("interleaved-1f1b", 2, None, 8)[1] == 2 and check("1f1b", 2, None, 8)[1] == 1
    with pytest.raises(UsageError, match="stages_per_rank must be 2 for schedule 'zbv', got 3"):
        check("zbv", 2, 3, 8)
    with pytest.raises(UsageError, match="multiple of 2 .*got 11"):
        check("interleaved-1f1b", 4, 2, 11)


def test_how_many_messages_an_edge_must_hold():
    chain = [[(0, "F", m) for m in range(5)], [(1, "F", m) for m in range(5)]]
    assert slots_needed(chain) == 1
    expected = {
        ("1f1b", 8, 1, 32): 1, ("gpipe", 4, 1, 16): 1, ("interleaved-1f1b", 2, 2, 8): 1, ("interleaved-1f1b", 8, 4, 64): 1,
        ("interleaved-1f1b", 5, 2, 14): 3, ("interleaved-1f1b", 8, 2, 22): 4, ("interleaved-zero-bubble", 4, 2, 7): 3,
    }  # fmt: skip
    assert {case: slots_needed(actions(*case)) for case in expected} == expected
    with pytest.raises(ValueError, match="waits for itself"):
        slots_needed([[(0, "B", 0), (0, "F", 0)], [(1, "F", 0), (1, "B", 0)]])
