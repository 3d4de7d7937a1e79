"""What use_gradient_checkpointing may be in Unsloth, and the budget on Unsloth's own fast path (its kernels, interpreted)."""

from importlib.util import find_spec

import pytest

from unsloth_ext.compiling.memory_patch import PATCHES, budget_of, with_budget

needs_unsloth = pytest.mark.skipif(find_spec("unsloth") is None, reason="Unsloth is not installed: make setup")


@pytest.mark.parametrize("value", ["unsloth", True, False, "True", None, 0, 1, 1.0, "unslot", ""])
def test_unsloths_own_values_are_no_budget(value):
    assert budget_of(value) is None


@pytest.mark.parametrize("value", ["auto", "Auto", "12GiB", 0.8, "50%", 12])
def test_budgets(value):
    assert budget_of(value) == value


def test_a_misspelt_value_is_refused():
    with pytest.raises(ValueError, match="'12 gigs' needs a unit"):
        budget_of("12 gigs")


def test_the_original_keeps_its_own_values_and_errors():
    seen = []

    def original(model, r=16, use_gradient_checkpointing="unsloth", **kwargs):
        seen.append((model, r, use_gradient_checkpointing, kwargs))
        return model

    wrapped = with_budget(original)
    wrapped("m", 8, True, other=1)
    wrapped("m")
    assert seen == [("m", 8, True, {"other": 1}), ("m", 16, "unsloth", {})]
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'model'"):
        wrapped()


ON_UNSLOTH = """
import types, torch
import unsloth_ext, unsloth
from unsloth.models import llama as fast
import sys; sys.path.insert(0, TESTS)
from importlib import import_module
from unsloth_ext.compiling.memory_patch import PATCHES, with_budget
from unsloth_ext.patching.fingerprint import of_object
for patch in PATCHES:
    (target,) = patch.targets
    module, (owner, name) = import_module(target.module), target.attribute.split(".")
    stood = vars(getattr(module, owner))[name]
    assert of_object(stood) in target.fingerprints, (target, of_object(stood))
    for change in patch.changes(module, target):
        change.make()
        assert callable(getattr(change.owner, change.name)) and isinstance(change.current(), staticmethod)
        change.undo()
    assert vars(getattr(module, owner))[name] is stood
from memory_models import model_of, hold, assert_equal
from unsloth.kernels.fast_lora import apply_lora_mlp_swiglu, apply_lora_o, apply_lora_qkv
from unsloth_ext.compiling import recompute
from unsloth_ext.compiling.memory_controller import budget_on, memory_budget
recompute.SMALL = 256
model = model_of(layers=2, hidden=32, wide=48)
inner = model.base_model.model.model
for layer in inner.layers:
    attention = layer.self_attn
    layer.forward = types.MethodType(fast.LlamaDecoderLayer_fast_forward, layer)
    layer.mlp.forward = types.MethodType(apply_lora_mlp_swiglu, layer.mlp)
    attention.apply_qkv, attention.apply_o = apply_lora_qkv, apply_lora_o
    attention.forward = types.MethodType(fast.LlamaAttention_fast_forward, attention)
class Stack(torch.nn.Module):
    def __init__(self): super().__init__(); self.layers, self.rotary = inner.layers, inner.rotary_emb
    def forward(self, x):
        cos, sin = self.rotary(x, torch.arange(x.shape[1])[None])
        for layer in self.layers: x = layer(x, position_embeddings=(cos[0], sin[0]))[0]
        return x.pow(2).mean()
stack, x = Stack().train(), torch.randn(1, 8, 32)
def step():
    stack.zero_grad(); loss = stack(x); loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in stack.named_parameters() if p.grad is not None}
expected = step()
budget = memory_budget(stack, "64GiB")
assert_equal(step(), expected)
for level in ("norms+offload", "gate_up", "layer"):
    hold(budget, level); assert_equal(step(), expected)
found = [s for s in budget.scripts.values() if s.products]
assert found and all(s.fused and set(s.products.values()) == {"gate", "up"} for s in found), found
assert all(s.norm and "fast" in s.norm[0] for s in found), found
kept = {c.name: c.kept for c in budget.costs.levels}
# The interpreter holds the arguments of a kernel's last launch, gate and up among them, so "gate_up" shows no less here.
assert kept["layer"] < kept["norms"] < kept["keep"], kept
budget.remove()
given = []
prepared = with_budget(lambda model, use_gradient_checkpointing="unsloth": given.append(use_gradient_checkpointing) or model)
for amount in ("auto", "3GiB"):
    assert prepared(stack, use_gradient_checkpointing=amount) is stack and budget_on(stack).given == amount
assert given == [False, False]
assert_equal(step(), expected)
print("as without a budget")
"""


@pytest.mark.slow
@needs_unsloth
def test_on_unsloths_fast_path(python):
    from pathlib import Path

    done = python(
        f"TESTS = {str(Path(__file__).parent)!r}\n" + ON_UNSLOTH,
        UNSLOTH_ALLOW_CPU="1",
        TRITON_INTERPRET="1",
        OMP_NUM_THREADS="1",
    )
    assert "as without a budget" in done.stdout


def test_the_patches_say_what_they_change():
    assert {p.id for p in PATCHES} == {"compiling.memory_budget", "compiling.memory_budget_fast_model"}
    assert all(p.run_time_only for p in PATCHES)
