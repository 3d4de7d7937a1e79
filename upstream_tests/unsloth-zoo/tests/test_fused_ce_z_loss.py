"""z_loss= adds z_loss * logsumexp(logits)^2 for each labelled row (PaLM, arXiv 2204.02311, section 5)."""

import unsloth  # noqa: F401 (before transformers and unsloth_zoo)
import pytest
import torch

ce = pytest.importorskip("unsloth_zoo.fused_losses.cross_entropy_loss")


def inputs(
    rows = 32,
    hidden = 16,
    vocab = 97,
    device = "cpu",
):
    generator = torch.Generator(device = device).manual_seed(3407)
    draw = dict(generator = generator, device = device)
    states = torch.randn(1, rows, hidden, **draw).requires_grad_(True)
    head = (torch.randn(vocab, hidden, **draw) / hidden**0.5).requires_grad_(True)
    labels = torch.randint(0, vocab, (1, rows), generator = generator, device = device)
    labels[0, ::7] = -100
    return states, head, labels


def full(
    states,
    head,
    labels,
    z_loss,
    divisor = None,
    softcap = None,
):
    logits, labels = (states @ head.T)[0, :-1], labels[0, 1:]
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    keep = labels != -100
    total = torch.nn.functional.cross_entropy(logits, labels, reduction = "sum")
    total = total + z_loss * (logits.logsumexp(-1) ** 2)[keep].sum()
    return total / (keep.sum() if divisor is None else divisor)


@pytest.mark.parametrize(
    "given, expected",
    [
        ({}, {}),
        ({"n_items": torch.tensor(50)}, {"divisor": 50}),
        ({"logit_softcapping": 5.0}, {"softcap": 5.0}),
        ({"output_attentions": False}, {}),
    ],
    ids = ["mean", "n_items", "softcap", "beside an unread keyword"],
)
def test_loss_and_gradients(given, expected):
    tensors = inputs()
    found = ce.unsloth_fused_ce_loss(None, *tensors[:2], None, tensors[2], z_loss = 0.01, **given)
    wanted = full(*tensors, 0.01, **expected)
    assert torch.allclose(found, wanted, rtol = 1e-5)
    for a, b in zip(
        torch.autograd.grad(found, tensors[:2]), torch.autograd.grad(wanted, tensors[:2])
    ):
        assert torch.allclose(a, b, rtol = 1e-4, atol = 1e-6)


@pytest.mark.parametrize("z_loss", [0, 0.0, None])
def test_none_asked_for_takes_the_fast_path(z_loss, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the slow path was taken")

    states, head, labels = inputs()
    plain = ce.unsloth_fused_ce_loss(None, states, head, None, labels)
    monkeypatch.setattr(ce, "compute_fused_ce_loss", refuse)
    assert torch.equal(
        ce.unsloth_fused_ce_loss(None, states, head, None, labels, z_loss = z_loss), plain
    )


def test_plain_losses_are_as_before():
    states, head, labels = inputs()
    found = ce.unsloth_fused_ce_loss(None, states, head, None, labels)
    assert torch.allclose(found, full(states, head, labels, 0.0), rtol = 1e-5)
