"""A trained lm_head's gradient, summed over many chunks: each rounding to bfloat16 on the way adds to its error."""

import unsloth  # noqa: F401 (before transformers and unsloth_zoo)
import pytest
import torch

ce = pytest.importorskip("unsloth_zoo.fused_losses.cross_entropy_loss")
fl = pytest.importorskip("unsloth_zoo.fused_losses.fused_linear")


def inputs(
    rows = 256,
    hidden = 32,
    vocab = 61,
    device = "cpu",
):
    generator = torch.Generator(device = device).manual_seed(3407)
    draw = dict(generator = generator, device = device)
    states = torch.randn(1, rows, hidden, **draw).bfloat16().requires_grad_(True)
    head = (torch.randn(vocab, hidden, **draw) / hidden**0.5).bfloat16().requires_grad_(True)
    labels = torch.randint(0, vocab, (1, rows), generator = generator, device = device)
    return states, head, labels


def error(
    chunk,
    monkeypatch,
    device = "cpu",
):
    """Of the head's gradient in chunks of so many rows, relative to float64 on full logits."""
    monkeypatch.setattr(fl, "_chunk_rows", lambda *args: chunk)
    states, head, labels = inputs(device = device)
    loss = ce.unsloth_fused_ce_loss(None, states, head, None, labels)
    (found,) = torch.autograd.grad(loss, head)
    assert found.dtype == torch.bfloat16
    exact = head.detach().double().requires_grad_(True)
    logits = (states.detach().double() @ exact.T)[0, :-1]
    reference = torch.nn.functional.cross_entropy(logits, labels[0, 1:])
    (expected,) = torch.autograd.grad(reference, exact)
    return float((found.double() - expected).norm() / expected.norm())


def test_many_chunks_are_as_exact_as_one(monkeypatch):
    assert error(4, monkeypatch) < 1.25 * error(256, monkeypatch)


def test_a_frozen_head_stays_on_the_fast_path(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the slow path was taken")

    monkeypatch.setattr(ce, "compute_fused_ce_loss", refuse)
    states, head, labels = inputs()
    head.requires_grad_(False)
    for fused in (True, False):  # UNSLOTH_FUSED_LINEAR=1 and 0
        monkeypatch.setattr(ce._chunked_logprob, "_FUSED_LINEAR", fused)
        ce.unsloth_fused_ce_loss(None, states, head, None, labels).backward()


@pytest.mark.skipif(not torch.cuda.is_available(), reason = "needs a CUDA card")
def test_many_chunks_on_a_card(monkeypatch):
    assert error(4, monkeypatch, "cuda") < 1.25 * error(256, monkeypatch, "cuda")
