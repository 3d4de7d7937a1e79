"""Every level computes the same loss and the same gradients as the model without a budget, in every bit."""

import copy
import random

import pytest
import torch
from memory_models import FAMILIES, assert_equal, hold, model_of, tokens_of, trained

from unsloth_ext.compiling import recompute, recompute_recipes
from unsloth_ext.compiling.memory_controller import budget_on, memory_budget
from unsloth_ext.compiling.memory_plan import BudgetTooSmall
from unsloth_ext.compiling.recompute import LEVELS


@pytest.fixture(autouse=True)
def everything_counts(monkeypatch):
    monkeypatch.setattr(recompute, "SMALL", 1024)


def check(model, **arguments):
    tokens = tokens_of()
    expected = trained(model, tokens, **arguments)
    budget = memory_budget(model, "64GiB")
    for level in LEVELS:
        hold(budget, level)
        assert_equal(trained(model, tokens, **arguments), expected)
    budget.remove()
    assert_equal(trained(model, tokens, **arguments), expected)
    return budget


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family):
    budget = check(model_of(family))
    found = [script for script in budget.scripts.values() if script.products]
    assert found, "gate and up were not recognised: the MLP was replayed with its down projection"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    check(model_of(dtype=dtype))


def test_dropout_draws_the_same_masks():
    budget = check(model_of(dropout=0.3))
    assert not any(script.products for script in budget.scripts.values())


def test_attention_dropout_and_bias():
    check(model_of(lora="bias", attention_dropout=0.2, attention_bias=True, mlp_bias=True))


def test_all_weights_trained():
    check(model_of(lora=False))


def test_autocast():
    model, tokens = model_of(), tokens_of()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = trained(model, tokens)
    budget = memory_budget(model, "64GiB")
    for level in LEVELS:
        hold(budget, level)
        model.zero_grad()
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()  # outside, as Trainer does it
        assert_equal((loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}), expected)


def test_padded_rows_and_mixed_levels():
    model, tokens = model_of(layers=4), tokens_of(3, 50)
    mask = torch.ones_like(tokens)
    mask[0, :20] = mask[2, :5] = 0
    expected = trained(model, tokens, attention_mask=mask)
    budget = memory_budget(model, "64GiB")
    for _ in range(6):
        hold(budget, random.choices(list(LEVELS), k=4))
        assert_equal(trained(model, tokens, attention_mask=mask), expected)


def test_adapters_that_are_still_zero_and_then_are_not():
    """A fresh B of zeros hides in which order a projection is summed; it is looked at again when B has been trained."""
    from peft import LoraConfig, get_peft_model

    plain = model_of(lora=False, dtype=torch.bfloat16)
    model = get_peft_model(plain, LoraConfig(r=4, target_modules=["gate_proj", "up_proj", "down_proj"])).train()
    reference, tokens = copy.deepcopy(model), tokens_of()
    budget = memory_budget(model, "64GiB")
    hold(budget, "gate_up")
    optimizers = [
        torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=0.05) for m in (model, reference)
    ]
    for _ in range(4):
        assert_equal(trained(model, tokens), trained(reference, tokens))
        for optimizer in optimizers:
            optimizer.step()


def test_gradient_accumulation_two_forwards_and_a_kept_graph():
    model, batches = model_of(), [tokens_of() for _ in range(3)]

    def accumulated():
        model.zero_grad()
        first = model(input_ids=batches[0], labels=batches[0]).loss
        second = model(input_ids=batches[1], labels=batches[1]).loss
        (first + second).backward()
        third = model(input_ids=batches[2], labels=batches[2]).loss
        third.backward(retain_graph=True)
        third.backward()
        return third.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    expected = accumulated()
    budget = memory_budget(model, "64GiB")
    for level in LEVELS:
        hold(budget, level)
        assert_equal(accumulated(), expected)


def test_evaluation_and_generation_are_untouched():
    model, tokens = model_of(), tokens_of()
    expected = model.eval()(input_ids=tokens).logits
    said = model.generate(input_ids=tokens[:, :8], max_new_tokens=6, do_sample=False)
    budget = memory_budget(model.train(), "64GiB")
    hold(budget, "layer+offload")
    trained(model, tokens)
    model.eval()
    assert torch.equal(model(input_ids=tokens).logits, expected)
    assert torch.equal(model.generate(input_ids=tokens[:, :8], max_new_tokens=6, do_sample=False), said)
    with torch.no_grad():
        assert torch.equal(model.train()(input_ids=tokens).logits, expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_it_replaces_the_models_own_checkpointing(reentrant):
    model, tokens = model_of(), tokens_of()
    expected = trained(model, tokens)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    budget = memory_budget(model, "64GiB")
    hold(budget, "gate_up")
    calls = []
    model.base_model.model.model.layers[0].self_attn.register_forward_hook(lambda *a: calls.append(1))
    trained(model, tokens)
    calls.clear()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})  # as Trainer does when it starts
    assert_equal(trained(model, tokens), expected)
    assert len(calls) == 1, "the attention ran again: somebody's checkpointing is still on"
    budget.remove()
    assert all(layer.gradient_checkpointing for layer in model.base_model.model.model.layers)


def test_the_down_projection_and_the_attention_do_not_run_again():
    model, tokens = model_of(), tokens_of()
    budget = memory_budget(model, "64GiB")
    counts = {}
    for layer in model.base_model.model.model.layers:
        for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
            layer.get_submodule(name).register_forward_hook(
                lambda *a, name=name: counts.__setitem__(name, counts.get(name, 0) + 1)
            )
    for level, (attention, gate, down) in {"gate_up": (1, 2, 1), "layer": (2, 2, 1), "offload": (1, 1, 1)}.items():
        hold(budget, level)
        trained(model, tokens)  # finds the recipes
        counts.clear()
        trained(model, tokens)
        assert counts["self_attn.q_proj"] == 2 * attention and counts["mlp.down_proj"] == 2 * down, (level, counts)
        assert counts["mlp.gate_proj"] == 2 * gate, (level, counts)


def test_a_copy_and_a_saved_model_are_under_no_budget(tmp_path):
    model, tokens = model_of(), tokens_of()
    expected = trained(model, tokens)
    budget = memory_budget(model, "64GiB")
    hold(budget, "layer")
    trained(model, tokens)
    copied = copy.deepcopy(model)
    assert budget_on(copied) is None and budget_on(model) is budget
    assert_equal(trained(copied, tokens), expected)
    torch.save(model, tmp_path / "model.pt")
    assert_equal(trained(torch.load(tmp_path / "model.pt", weights_only=False), tokens), expected)
    assert not any("unsloth_ext" in name for name in model.state_dict())
    of_copy = memory_budget(copied, "64GiB")
    hold(of_copy, "layer")
    assert_equal(trained(copied, tokens), expected)
    assert budget_on(copied) is of_copy and budget_on(model) is budget
    of_copy.remove()
    assert not any("forward" in module.__dict__ for module in copied.modules())
    assert_equal(trained(copied, tokens), expected)


def test_a_forward_that_somebody_wrapped_outlives_the_budget():
    model, tokens = model_of(), tokens_of()
    expected = trained(model, tokens)
    budget = memory_budget(model, "64GiB")
    layer = model.base_model.model.model.layers[1]
    below = layer.forward
    layer.forward = lambda *args, **kwargs: below(*args, **kwargs)  # as accelerate's hooks do
    budget.remove()
    assert_equal(trained(model, tokens), expected)
    with pytest.raises(ValueError, match=r"the forward of base_model\.model\.model\.layers\.1 was replaced"):
        memory_budget(model, "64GiB")
    layer.forward = below
    check(model)


def test_a_norm_gets_its_keyword_arguments():
    model, tokens = model_of(), tokens_of()

    class Gated(torch.nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.norm = norm

        def forward(self, x, gate=1.0):
            return self.norm(x) * gate

    class Mlp(torch.nn.Module):  # what calls the norm in a hybrid layer, with its gate
        def __init__(self, norm):
            super().__init__()
            self.inner = [norm]

        def forward(self, x):
            return self.inner[0](x, gate=0.5)

    for layer in model.base_model.model.model.layers:
        layer.post_attention_layernorm = Gated(layer.post_attention_layernorm)
        layer.mlp = Mlp(layer.post_attention_layernorm)
    expected = trained(model, tokens)
    budget = memory_budget(model, "64GiB")
    for level in LEVELS:
        hold(budget, level)
        assert_equal(trained(model, tokens), expected)


@pytest.mark.parametrize("read", [True, False])
def test_a_copy_that_comes_back_is_waited_for_once(read):
    value, waits = recompute.Value(None, torch.empty(8).untyped_storage()), []
    value.storage, value.restored, value.ready = None, torch.empty(8).untyped_storage(), lambda: waits.append(1)
    if read:
        value.get()
    del value
    assert waits == [1]


def test_what_steps_took_beyond_the_prediction_does_not_end_a_run(caplog):
    model, tokens = model_of(), tokens_of()
    expected = trained(model, tokens)
    budget = memory_budget(model, "64GiB")
    trained(model, tokens)
    budget.correction = 2**40
    assert_equal(trained(model, tokens), expected)
    assert "the smallest one is used" in caplog.text
    budget.remove()
    with pytest.raises(BudgetTooSmall):
        memory_budget(model, "1KiB")
        trained(model, tokens)


def test_a_forward_that_does_other_work_the_second_time_is_an_error():
    model, tokens = model_of(), tokens_of()
    budget = memory_budget(model, "64GiB")
    hold(budget, "layer")
    trained(model, tokens)
    in_forward = []
    model.base_model.model.model.layers[1].input_layernorm.register_forward_hook(
        lambda module, args, out: out + out.sin() if in_forward else out
    )
    in_forward.append(1)
    loss = model(input_ids=tokens, labels=tokens).loss
    in_forward.clear()
    with pytest.raises(RuntimeError, match=r"layers\.1 saved .* when it was run again"):
        loss.backward()


def probed(model, monkeypatch):
    """A budget over layers whose norms are not seen when they are called, as in a fast path, after its first step."""
    from unsloth_ext.compiling import memory_layers

    monkeypatch.setattr(
        memory_layers, "norm_forward", lambda self, *args, **kw: self._unsloth_ext_memory.call(self, *args, **kw)
    )
    budget = memory_budget(model, "64GiB")
    trained(model, tokens_of())
    return budget


def test_inputs_and_norms_that_are_equal_only_at_first_are_not_taken_for_each_other(monkeypatch):
    """An output projection that starts as zeros, as in an inserted block: both norms read the same bits, until it is trained."""
    model, tokens = model_of(lora=False), tokens_of()
    layers = model.model.layers
    for layer in layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.normal_(layer.post_attention_layernorm.weight)
    budget = probed(model, monkeypatch)
    hold(budget, "gate_up")
    trained(model, tokens)
    for layer in layers:
        torch.nn.init.normal_(layer.self_attn.o_proj.weight)
    ours = trained(model, tokens)
    budget.remove()
    assert_equal(ours, trained(model, tokens))


def test_a_layer_that_cannot_be_examined_is_trained_all_the_same(monkeypatch):
    """A child called a norm that takes no hidden states."""
    model, tokens = model_of(), tokens_of()
    for layer in model.base_model.model.model.layers:
        layer.norm_of_heads = torch.nn.LayerNorm(5)
    expected = trained(model, tokens)
    budget = probed(model, monkeypatch)
    for level in LEVELS:
        hold(budget, level)
        assert_equal(trained(model, tokens), expected)
    assert any("not examined: RuntimeError" in script.why for script in budget.scripts.values())


def test_out_of_memory_while_the_mlp_is_examined_is_no_answer(monkeypatch):
    model, tokens = model_of(), tokens_of()
    expected, failures, make = trained(model, tokens), [], recompute_recipes.Products.make

    def full(self, name):
        if len(failures) < 3:
            failures.append(name)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return make(self, name)

    monkeypatch.setattr(recompute_recipes.Products, "make", full)
    budget = memory_budget(model, "64GiB")
    for level in LEVELS:
        hold(budget, level) if budget.costs else None
        assert_equal(trained(model, tokens), expected)
    assert len(failures) == 3 and not any("OutOfMemoryError" in script.why for script in budget.scripts.values())


def test_a_batch_of_few_rows_is_examined_for_itself():
    """Another kernel may multiply it, which sums in another order."""
    from unsloth_ext.compiling.memory_layers import FEW_ROWS
    from unsloth_ext.nf4.matmul_table import MOST_ROWS

    model = model_of(layers=1)
    budget = memory_budget(model, "64GiB")
    trained(model, tokens_of(2, FEW_ROWS))
    hold(budget, "gate_up")
    counts = []
    for length in (FEW_ROWS, FEW_ROWS - 1, FEW_ROWS // 2, FEW_ROWS // 2 - 1):
        trained(model, tokens_of(2, length))
        counts.append(len(budget.scripts))
    assert counts[0] == counts[1] < counts[2] < counts[3] and FEW_ROWS >= MOST_ROWS


@pytest.mark.parametrize("trains", [True, False])
def test_a_compiled_layers_norms_that_start_alike_are_told_apart_or_left(trains):
    from unsloth_ext.compiling.retrace import _norm_of

    layer = model_of(layers=1, lora=False).requires_grad_(trains).model.layers[0]  # both norms' weights are ones
    x = torch.randn(2, 48, 64)
    frame = recompute.Frame("layer", x, None)
    found = _norm_of(layer, frame, layer.post_attention_layernorm(x).detach())
    assert found == (None if trains else ("input_layernorm", None))
    torch.nn.init.normal_(layer.post_attention_layernorm.weight)
    assert _norm_of(layer, frame, layer.post_attention_layernorm(x).detach()) == ("post_attention_layernorm", None)
