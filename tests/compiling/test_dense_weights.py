"""NF4 weights that stay dense, by hand and under a memory budget: the same step, and the memory back when something else needs it."""

import copy
import gc
import weakref
from importlib.util import find_spec

import pytest
import torch

if any(find_spec(name) is None for name in ("bitsandbytes", "peft")):
    pytest.skip("bitsandbytes or peft is not installed: make setup", allow_module_level=True)

import compile_models

from unsloth_ext.compiling import compile_model, keep_dense_weights, memory_budget
from unsloth_ext.compiling.dense_weights import bytes_wanted
from unsloth_ext.compiling.memory_plan import BudgetTooSmall
from unsloth_ext.nf4 import dense_copies


def tokens(rows=2, length=12):
    return torch.randint(1, compile_models.VOCABULARY, (rows, length))


def step(model, ids):
    model.zero_grad(set_to_none=True)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(found, wanted):
    assert found[0] == pytest.approx(wanted[0], abs=1e-6) and found[1].keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6)


def states_of(model):
    return [p.quant_state for p in model.parameters() if getattr(p, "quant_state", None) is not None]


def held(model):
    return sum(dense_copies.copy_of(state, None, torch.device("cpu")) is not None for state in states_of(model))


@pytest.fixture
def matmul(monkeypatch):
    """The patch that hands bitsandbytes' products in a graph their dense weight, as `import unsloth_ext` installs it."""
    import bitsandbytes.nn.modules as modules

    from unsloth_ext.nf4.patch import _matmul_4bit

    monkeypatch.setattr(modules.bnb, "matmul_4bit", _matmul_4bit(modules.bnb.matmul_4bit))


def test_by_hand(matmul):
    model, ids = compile_models.make(), tokens()
    wanted, before = step(model, ids), {n: p.detach().clone() for n, p in model.named_parameters()}
    bytes_before = bytes_wanted(model)
    kept = keep_dense_weights(model)
    assert held(model) == 14 and kept.nbytes == bytes_before and kept.is_current()
    compiled = compile_model(model, backend="aot_eager")
    assert_same(step(model, ids), wanted)
    assert held(copy.deepcopy(model.base_model)) == 0 and all(
        torch.equal(p, before[n]) for n, p in model.named_parameters()
    )
    saved = model.state_dict()
    assert not any("dense" in name for name in saved)
    graphs = compiled.report().graphs
    kept.remove()
    assert held(model) == 0 and kept.nbytes == 0
    assert_same(step(model, ids), wanted)
    assert compiled.report().graphs > graphs


def test_weights_that_are_written_to_are_noticed():
    model = compile_models.make(layers=1)
    kept = keep_dense_weights(model)
    assert kept.is_current()
    next(p for p in model.parameters() if getattr(p, "quant_state", None) is not None).zero_()
    assert not kept.is_current()


def test_a_model_without_nf4():
    model = compile_models.make(four_bit=False)
    with pytest.raises(ValueError, match="no NF4 weights"):
        keep_dense_weights(model)
    assert bytes_wanted(model) == 0
    compile_model(model, backend="aot_eager")
    budget = memory_budget(model, "auto")
    step(model, tokens())
    assert budget.dense is None


@pytest.mark.extended
def test_under_a_budget(matmul):
    model, ids = compile_models.make(), tokens()
    wanted = step(model, ids)
    budget = memory_budget(model, "auto")
    step(model, ids)
    assert budget.dense is None  # nothing is compiled: nobody would read it
    budget.remove()
    compiled = compile_model(model, backend="aot_eager")
    budget = memory_budget(model, "auto", dense_weights=False)
    step(model, ids)
    assert budget.dense is None
    budget.remove()
    budget = memory_budget(model, "auto")
    for _ in range(2):
        assert_same(step(model, ids), wanted)
    assert budget.dense is not None and held(model) == 14 and set(budget.plan.counts()) == {"keep"}
    memory = weakref.ref(budget.dense._copies[0])
    budget.remove()
    compiled.restore()
    torch._dynamo.reset()
    gc.collect()
    assert held(model) == 0 and memory() is None


@pytest.mark.extended
def test_who_needs_the_memory_gets_it_back(matmul):
    model, ids = compile_models.make(), tokens(2, 8)
    wanted = step(model, ids)
    compile_model(model, backend="aot_eager")
    budget = memory_budget(model, "auto")
    step(model, ids)
    assert budget.dense is not None
    budget._failures -= 1  # as after a step that ran out of memory
    for _ in range(2):
        assert_same(step(model, ids), wanted)
        assert budget.dense is None and held(model) == 0 and budget.correction == 0  # and it does not come back
    budget.remove()
    budget = memory_budget(model, "auto")
    step(model, ids)
    assert budget.dense is not None
    budget.budget, budget.margin = ("bytes", budget._static() + 4096), 0.0  # no plan fits, whatever is given back
    with pytest.raises(BudgetTooSmall):
        step(model, ids)
    assert budget.dense is None and held(model) == 0
    budget.remove()


def test_where_little_is_left_nothing_is_kept(matmul):
    model, ids = compile_models.make(), tokens()
    compile_model(model, backend="aot_eager")
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    budget = memory_budget(model, f"{(size + bytes_wanted(model)) / 1e6:.3f}MB", margin=0.0)
    step(model, ids)
    assert budget.dense is None and held(model) == 0
    budget.remove()
