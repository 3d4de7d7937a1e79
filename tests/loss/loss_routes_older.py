"""The losses of an older Unsloth, pristine beside routed. Their files run here as modules beside today's unsloth_zoo, whose other
modules they import. Run by test_loss_patch.py: UNSLOTH_EXT_TEST_TREE is the older package's folder."""

import unsloth  # noqa: F401  isort: skip
import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

from unsloth_ext.loss import patch, routes, unsloth_losses

TREE = Path(os.environ["UNSLOTH_EXT_TEST_TREE"])
T, D, V = 24, 16, 131


def load(name):
    package, _, last = f"unsloth_zoo.{name}".rpartition(".")
    file = TREE.joinpath(*name.split(".")).with_suffix(".py")
    spec = importlib.util.spec_from_file_location(f"{package}.older_{last}", file)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def routed(monkeypatch):
    """routed(module, target): the patch's replacements of that module's functions, by name. The count of what they served."""
    monkeypatch.setitem(routes.BETTER, "cpu", routes.ROUTES)
    served = []
    for name in ("summed_cross_entropy", "masked_log_probs"):
        original = vars(unsloth_losses)[name]
        monkeypatch.setattr(unsloth_losses, name, lambda *a, _o=original, **k: served.append(1) or _o(*a, **k))

    def changes(module, make):
        # As it stands where Unsloth has not been imported yet
        monkeypatch.delitem(sys.modules, "unsloth.models.rl", raising=False)
        target = next(p for p in patch.PATCHES if p.changes is make).targets[1]
        return {change.name: change.value for change in make(module, target) if hasattr(change, "name")}

    changes.served = served
    return changes


def inputs(dtype, trained, ignored=3):
    hidden = torch.randn(2, T // 2, D, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, D, dtype=dtype, requires_grad=trained)
    labels = torch.randint(0, V, (2, T // 2))
    labels.view(-1)[torch.randperm(T)[:ignored]] = -100
    return hidden, weight, labels


def gradients(outputs, *tensors):
    tensors = [t for t in tensors if t.requires_grad]
    return [outputs.detach(), *torch.autograd.grad((outputs * 3).sum(), tensors)]


def close(a, b, dtype):
    # In half precision a logit of up to 16 is rounded by up to 16 half units, a third of that in the mean square; see loss_routes.py.
    # The worst that was seen was 0.0086.
    limit = {torch.float32: 1e-5, torch.float16: 0.0025, torch.bfloat16: 0.012}[dtype]
    for x, y in zip(a, b, strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        assert (x.double() - y.double()).norm() <= limit * y.double().norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(
    "case",
    [
        {},
        {"n_items": torch.tensor(40)},
        {"mask": torch.arange(T // 2).repeat(2, 1).ge(2).long()},
        {"shift_labels": False, "n_items": 30},
        {"logit_softcapping": 3.0, "logit_scale_multiply": 0.5, "n_items": 9},
        {"logit_softcapping": 0, "logit_scale_divide": 2.0},
        {"scaling": 512.0},
        {"ignore_index": 5, "n_items": 7},
    ],
    ids=str,
)
def test_cross_entropy(case, trained, dtype, routed):
    module = load("fused_losses.cross_entropy_loss")
    hidden, weight, labels = inputs(dtype, trained, ignored=0 if "ignore_index" in case else 3)
    ours = routed(module, patch._route_cross_entropy)["unsloth_fused_ce_loss"]
    arguments = (None, hidden, weight, None, labels)
    theirs = gradients(
        module.unsloth_fused_ce_loss(*arguments, torch_compile=False, **case).reshape(()), hidden, weight
    )
    close(gradients(ours(*arguments, **case), hidden, weight), theirs, dtype)
    assert routed.served == [1]
    for limit in ({"target_gb": 1.0}, {"n_chunks": 2}, {"surprise": 1}):
        loss = ours(*arguments, torch_compile=False, **case, **limit)
        assert torch.isclose(loss.detach().reshape(()), theirs[0], rtol=1e-3)
    assert routed.served == [1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("trained", [False, True])
def test_log_probabilities(trained, dtype, routed):
    module = load("rl_replacements")
    hidden, weight, labels = inputs(dtype, trained, ignored=0)
    changes = routed(module, patch._route_logprobs)
    assert set(changes) == {name for name in vars(module) if name.startswith("chunked_hidden_states_selective")}
    for name, ours in changes.items():
        original = vars(module)[name]
        plain = getattr(original, "__wrapped__", original)
        for case in ({}, {"temperature": 0.7}, {"logit_softcapping": 5.0, "logit_scale_divide": 2.0}):
            before = len(routed.served)
            found = gradients(ours(hidden, weight, labels, **case), hidden, weight)
            assert len(routed.served) == before + 1
            close(found, gradients(plain(hidden, weight, labels, **case), hidden, weight), dtype)
        ours(hidden, weight, labels, max_rows_per_chunk=5)
        assert len(routed.served) == before + 1


def test_too_late_for_the_trainers(routed):
    module = load("rl_replacements")
    sys.modules["unsloth.models.rl"] = module
    with pytest.raises(RuntimeError, match="import unsloth_ext before unsloth"):
        patch._route_logprobs(module, patch.PATCHES[-2].targets[1])
