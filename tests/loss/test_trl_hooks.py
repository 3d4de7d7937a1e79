"""TRL's fused head by `linear_logprobs`: against full logits, and whole GRPO and DPO runs against TRL's own."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from unsloth_ext.loss import routes
from unsloth_ext.loss.trl_hooks import log_probs, served_by, statistics

RUNS = Path(__file__).with_name("trl_runs.py")
EVERY = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def inputs(n=19, d=8, v=151, dtype=torch.float64, bias=True, trained=True):
    hidden = torch.randn(n, d, dtype=dtype, requires_grad=True)
    weight = torch.randn(v, d, dtype=dtype, requires_grad=trained)
    return hidden, weight, torch.randn(v, dtype=dtype, requires_grad=trained) if bias else None, torch.randint(v, (n,))


def full(hidden, weight, bias, targets, temperature, softcap, scale):
    z = torch.nn.functional.linear(hidden, weight, bias) * scale
    z = (softcap * torch.tanh(z / softcap) if softcap else z) / temperature
    logp = z.log_softmax(-1)
    return (
        logp.gather(1, targets[:, None])[:, 0],
        -(logp.exp() * logp).sum(-1),
        (2 * logp).logsumexp(-1),
        z.mean(-1),
        z.argmax(-1) == targets,
    )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("settings", [(1.0, None, 1.0), (0.7, None, 2.5), (1.3, 4.0, 0.5), (1.0, None, -1.0)], ids=str)
def test_five_results_and_their_gradients(settings, bias, monkeypatch):
    monkeypatch.setattr("unsloth_ext.loss.trl_hooks._ROWS", 8)
    monkeypatch.setattr("unsloth_ext.loss.trl_hooks._COLUMNS", 64)
    hidden, weight, b, targets = inputs(bias=bias)
    with torch.no_grad():  # some labels are the most likely ones
        targets[::3] = full(hidden, weight, b, targets, *settings)[0].new_tensor(
            (torch.nn.functional.linear(hidden, weight, b) * settings[2]).argmax(-1)[::3].tolist(), dtype=torch.long
        )
    found = log_probs(hidden, weight, b, targets, *settings, EVERY)
    expected = full(hidden, weight, b, targets, *settings)
    # The sum of squares is the difference of two log-sum-exps in fp32, each as large as the logits: what they are rounded by
    # stays in it, however small it is. Three roundings of z, one of each log-sum-exp, twice.
    logits = abs(settings[2]) * torch.nn.functional.linear(hidden, weight, b).abs().max().item() / settings[0]
    atol = 10 * torch.finfo(torch.float32).eps * max(logits, 1)
    for a, e in zip(found[:4], expected[:4], strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=atol)
    assert torch.equal(found[4], expected[4]) and 0 < found[4].sum() < len(targets)
    tensors, g = [t for t in (hidden, weight, b) if t is not None], torch.randn(2, len(targets)).double()
    ours = torch.autograd.grad((found[0] * g[0] + found[1] * g[1]).sum(), tensors)
    exact = torch.autograd.grad((expected[0] * g[0] + expected[1] * g[1]).sum(), tensors)
    for a, e in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)
    assert not any(x.requires_grad for x in found[2:])


def test_only_what_is_asked_for():
    found = log_probs(*inputs(), 1.0, None, 1.0, ("log_probs", "mean_logits"))
    assert [x is None for x in found] == [False, True, True, False, True]


def test_the_first_of_equal_logits_is_the_top():
    hidden, weight = torch.ones(3, 2), torch.ones(40, 2)
    found = statistics(hidden, weight, None, torch.tensor([0, 1, 39]), {"is_top1"})
    assert found["is_top1"].tolist() == [True, False, False]


def test_no_rows():
    hidden, weight, bias, targets = inputs(n=0)
    found = log_probs(hidden, weight, bias, targets, 1.0, None, 1.0, EVERY)
    assert [tuple(x.shape) for x in found] == [(0,)] * 5
    found[0].sum().backward()
    assert hidden.grad.shape == hidden.shape and not weight.grad.any()


def test_autocast_is_the_products_dtype():
    hidden, weight, bias, targets = inputs(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = log_probs(hidden, weight, bias, targets, 1.0, None, 1.0, ("log_probs",))[0]
    expected = full(hidden, weight, bias, targets, 1.0, None, 1.0)[0]
    assert found.dtype == torch.float32 and 0 < (found - expected).abs().max() < 0.2
    assert torch.autograd.grad(found.sum(), weight)[0].dtype == torch.float32


class Theirs:
    @staticmethod
    def apply(*arguments):
        return arguments


@pytest.mark.parametrize("reason", ["packed", "zero-3", "not listed"])
def test_what_is_not_ours_goes_to_trl_as_it_came(reason, monkeypatch):
    hidden, weight, bias, targets = inputs()
    if reason == "packed":
        weight = weight.to(torch.uint8)
    elif reason == "zero-3":
        weight.ds_id = 1
    else:
        monkeypatch.setitem(routes.BETTER, "cpu", frozenset())
    arguments = (hidden, weight, bias, targets, 0.9, 32768, None, 1.0, ("log_probs",))
    got = served_by(Theirs).apply(*arguments)
    assert all(a is b for a, b in zip(got, arguments, strict=True))
    with pytest.raises(RuntimeError, match="needs Triton, which is not installed"):
        served_by(None).apply(*arguments)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("trl") is None, reason="TRL is not installed: make setup")
def test_ten_steps_of_grpo_and_dpo_log_what_trls_own_log(tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("UNSLOTH", "TRITON"))}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    runs = {
        "ours": ([], {}),
        "theirs": (["--alone"], {"TRITON_INTERPRET": "1"}),
    }  # TRL's kernel has no other way on a CPU
    started = {
        name: subprocess.Popen(
            [sys.executable, RUNS, tmp_path / name, *options],
            env=environment | more,
            cwd=tmp_path,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name, (options, more) in runs.items()
    }
    try:
        for name, process in started.items():
            said = process.communicate(timeout=900)[1]
            assert process.returncode == 0, f"{name}: {said[-4000:]}"
    finally:
        for process in started.values():
            process.kill()
    ours, theirs = (json.loads((tmp_path / name).read_text()) for name in runs)
    assert ours.pop("state") == "applied" and set(ours) == {"grpo", "dpo"}
    for name in ours:
        assert len(ours[name]) == len(theirs[name]) == 10
        for a, b in zip(ours[name], theirs[name], strict=True):
            assert a.keys() == b.keys()
            for key in a:
                if "time" not in key and "per_second" not in key:
                    assert a[key] == pytest.approx(b[key], abs=1e-3), f"{name} step {a['step']} {key}"
    assert len({row["loss"] for row in ours["grpo"]}) == len({row["loss"] for row in ours["dpo"]}) == 10
