"""The hook that notes a forward before trainer.train() traces under torch.compile, still notes it, and still goes."""

import os

os.environ.setdefault("UNSLOTH_ALLOW_CPU", "1")

import unsloth  # noqa: F401, E402 (before transformers)
import types  # noqa: E402
import warnings  # noqa: E402

import torch  # noqa: E402
from unsloth.models import _utils  # noqa: E402


def test_one_graph_that_notes_the_forward():
    model = _utils._unsloth_install_pretrain_detector(torch.nn.Linear(4, 4))
    x = torch.randn(2, 4)
    out = torch.compile(model, fullgraph = True, backend = "eager")(x)
    assert torch.equal(out, torch.nn.functional.linear(x, model.weight, model.bias))
    assert model._unsloth_pretrain_marker["seen"] is True


def test_noted_eagerly_and_taken_out_by_the_reset():
    model = _utils._unsloth_install_pretrain_detector(torch.nn.Linear(4, 4))
    with torch.no_grad():
        model(torch.randn(2, 4))
    assert model._unsloth_pretrain_marker["seen"] is False
    assert (
        _utils._unsloth_install_pretrain_detector(model) is model
        and len(model._forward_pre_hooks) == 1
    )
    model(torch.randn(2, 4))
    assert model._unsloth_pretrain_marker["seen"] is True
    with warnings.catch_warnings(record = True) as caught:
        warnings.simplefilter("always")
        _utils._unsloth_reset_stray_compile_cache(types.SimpleNamespace(model = model))
    assert any("manual forward" in str(w.message) for w in caught)
    assert not model._forward_pre_hooks and model._unsloth_pretrain_marker["seen"] is False
