"""linear_logprobs: log-probabilities and entropies with any later arithmetic, against full logits in fp64."""

import pytest
import torch
from linear_oracle import inputs, values

from unsloth_ext.loss import cross_entropy_op as op
from unsloth_ext.loss import linear_softmax
from unsloth_ext.loss.logprobs import linear_logprobs


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    for module in (linear_softmax, op):
        monkeypatch.setattr(module, "FAST", (30000, 256))
        monkeypatch.setattr(module, "LEAN", (9000, 256))
    monkeypatch.setattr(op, "LEAN_COLUMNS", 64)
    monkeypatch.setattr(linear_softmax, "rows_of_chunk", lambda hidden_size: 16)


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("memory", ["fast", "lean"])
@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.7}, {"softcap": 2.0, "temperature": 1.4, "logit_scale": -0.6}], ids=str
)
def test_logprobs_entropies_and_their_gradients(settings, memory, trained):
    hidden, weight, labels, bias = inputs()
    weight.requires_grad_(trained)
    bias.requires_grad_(trained)
    wanted = (hidden, weight, bias) if trained else (hidden,)
    renamed = {k if k != "logit_scale" else "scale": v for k, v in settings.items()}
    _, logp, entropy = values(hidden, weight, labels, bias, **renamed)
    g, ge = torch.randn_like(logp), torch.randn_like(logp)

    found = linear_logprobs(hidden, weight, labels, bias, memory=memory, **settings)
    torch.testing.assert_close(found, logp, rtol=1e-12, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(found, wanted, g), torch.autograd.grad(logp, wanted, g, retain_graph=True), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)

    for use in (
        lambda x, y: (x * g).sum(),
        lambda x, y: (y * ge).sum(),
        lambda x, y: ((x * g).sin() + y.square() * ge).sum(),  # not exp: exp(-20 g) leaves no digits to compare
    ):
        found = linear_logprobs(hidden, weight, labels, bias, entropy=True, memory=memory, **settings)
        torch.testing.assert_close(found, (logp, entropy), rtol=1e-11, atol=1e-11)
        expected = torch.autograd.grad(use(logp, entropy), wanted, retain_graph=True)
        for a, b in zip(torch.autograd.grad(use(*found), wanted), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_policy_step():
    """A clipped policy loss with an entropy bonus, as GRPO writes it, on a batch with a mask."""
    hidden, weight, labels, _ = inputs(rows=36, ignored=0)
    hidden3, labels2, mask = hidden.view(3, 12, -1), labels.view(3, 12), torch.rand(3, 12) < 0.6
    _, logp, entropy = values(hidden3, weight, labels2)
    old, advantages = (logp + 0.3 * torch.randn_like(logp)).detach(), torch.randn(3, 1, dtype=torch.float64)

    def loss(logp, entropy):
        ratio = (logp - old).exp()
        gain = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
        return -((gain + 0.01 * entropy) * mask).sum() / mask.sum()

    for trained in (True, False):
        wanted = (hidden, weight) if trained else (hidden,)
        found = linear_logprobs(hidden3, weight if trained else weight.detach(), labels2, entropy=True, mask=mask)
        assert found[0].shape == (3, 12) and (found[0][~mask] == 0).all() and (found[1][~mask] == 0).all()
        a, b = loss(*found), loss(logp, entropy)
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(torch.autograd.grad(a, wanted), torch.autograd.grad(b, wanted, retain_graph=True))


def test_detached_entropy_costs_no_second_pass(monkeypatch):
    hidden, weight, labels, _ = inputs()
    calls = []
    again = linear_softmax.hidden_gradient
    monkeypatch.setattr(linear_softmax, "hidden_gradient", lambda *a, **k: calls.append(1) or again(*a, **k))
    logp, entropy = linear_logprobs(hidden, weight.detach(), labels, entropy=True)
    (logp * entropy.detach()).sum().backward()
    assert not calls
    logp, entropy = linear_logprobs(hidden, weight.detach(), labels, entropy=True)
    (logp * entropy).sum().backward()
    assert calls


def test_nan_and_labels_out_of_range():
    hidden, weight, labels, _ = inputs(ignored=0)
    labels[3] = 301
    logp, entropy = linear_logprobs(hidden, weight, labels, entropy=True)
    assert logp.isnan().nonzero().tolist() == [[3]] == entropy.isnan().nonzero().tolist()
    mask = torch.ones(37, dtype=torch.bool)
    mask[3] = False
    assert linear_logprobs(hidden, weight, labels, mask=mask)[3] == 0
    with torch.no_grad():
        hidden[5] = torch.nan
    assert linear_logprobs(hidden, weight, labels.clamp(max=300)).isnan().nonzero().tolist() == [[5]]


def test_empty_and_no_grad():
    hidden, weight, labels, bias = inputs(rows=0)
    logp, entropy = linear_logprobs(hidden, weight, labels, bias, entropy=True)
    assert logp.shape == entropy.shape == (0,)
    for grad, x in zip(
        torch.autograd.grad((logp + entropy).sum(), (hidden, weight, bias)), (hidden, weight, bias), strict=True
    ):
        assert grad.shape == x.shape and (grad == 0).all()
    with torch.no_grad():
        assert not linear_logprobs(*inputs()[:3]).requires_grad


def test_backward_twice():
    hidden, weight, labels, _ = inputs()
    for w in (weight, weight.detach()):
        logp = linear_logprobs(hidden, w, labels)
        first = torch.autograd.grad(logp.sum(), hidden, retain_graph=True)[0]
        kept = first.clone()
        torch.testing.assert_close(torch.autograd.grad((2 * logp).sum(), hidden)[0], 2 * kept)
        assert torch.equal(first, kept)


def test_whole_graph_compile():
    hidden, weight, labels, bias = inputs(rows=40)

    def step(hidden, labels):
        logp, entropy = linear_logprobs(hidden * 2, weight, labels, bias, entropy=True)
        return (logp.exp() + 0.1 * entropy).sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (40, 23):
        found, expected = compiled(hidden[:rows], labels[:rows]), step(hidden[:rows], labels[:rows])
        torch.testing.assert_close(found, expected)
        wanted = (hidden, weight, bias)
        torch.testing.assert_close(torch.autograd.grad(found, wanted), torch.autograd.grad(expected, wanted))


def test_wrong_arguments_say_so():
    hidden, weight, labels, _ = inputs()
    with pytest.raises(ValueError, match="temperature must be positive"):
        linear_logprobs(hidden, weight, labels, temperature=0)
    with pytest.raises(ValueError, match="mask has shape"):
        linear_logprobs(hidden, weight, labels, mask=torch.ones(36))
