"""transformers hands every keyword of model(...) on to the loss. One that the loss does not read
must not send it to the old path, which is slower and holds more logits at a time."""

import unsloth  # noqa: F401 (before transformers and unsloth_zoo)
import pytest
import torch

ce = pytest.importorskip("unsloth_zoo.fused_losses.cross_entropy_loss")
if not hasattr(ce, "_use_chunked_ce"):
    pytest.skip("this release has one path only", allow_module_level = True)

UNREAD = {
    "output_attentions": {"output_attentions": False},
    "packed_seq_lengths": {"packed_seq_lengths": torch.tensor([16, 16])},
    "several": {"cache_position": None, "use_cache": False, "return_dict": True},
}


def inputs(
    rows = 32,
    hidden = 16,
    vocab = 97,
    device = "cpu",
    dtype = torch.float32,
):
    generator = torch.Generator(device = device).manual_seed(3407)
    draw = dict(generator = generator, device = device, dtype = dtype)
    states = torch.randn(1, rows, hidden, **draw).requires_grad_(True)
    head = (torch.randn(vocab, hidden, **draw) / hidden**0.5).requires_grad_(True)
    labels = torch.randint(0, vocab, (1, rows), generator = generator, device = device)
    labels[0, ::7] = -100
    return states, head, labels


def loss_and_grads(states, head, labels, **kwargs):
    loss = ce.unsloth_fused_ce_loss(None, states, head, None, labels, **kwargs)
    return loss.detach(), *torch.autograd.grad(loss, (states, head))


@pytest.fixture
def slow_path_raises(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the slow path was taken")

    monkeypatch.setattr(ce, "compute_fused_ce_loss", refuse)


@pytest.mark.parametrize("name", UNREAD)
def test_unread_keywords_change_nothing(name, slow_path_raises):
    states, head, labels = inputs()
    expected = loss_and_grads(states, head, labels)
    for a, b in zip(expected, loss_and_grads(states, head, labels, **UNREAD[name])):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"logit_softcapping": 5.0},
        {"logit_scale_multiply": 0.5},
        {"logit_scale_divide": 2.0},
        {"ignore_index": 3},
        {"label_smoothing": 0.1},
    ],
    ids = lambda kwargs: next(iter(kwargs)),
)
def test_read_keywords_still_count(kwargs):
    states, head, labels = inputs()
    labels[labels == -100] = 3
    plain = loss_and_grads(states, head, labels)[0]
    alone = loss_and_grads(states, head, labels, **kwargs)
    beside = loss_and_grads(states, head, labels, output_attentions = False, **kwargs)
    assert not torch.equal(alone[0], plain)
    for a, b in zip(alone, beside):
        assert torch.equal(a, b)


def test_a_chunk_count_still_takes_the_slow_path(monkeypatch):
    seen = []
    slow = ce.compute_fused_ce_loss
    monkeypatch.setattr(
        ce, "compute_fused_ce_loss", lambda *a, **k: seen.append(1) or slow(*a, **k)
    )
    states, head, labels = inputs()
    loss_and_grads(states, head, labels, n_chunks = 2, torch_compile = False)
    assert len(seen) == 2


def test_the_callers_keywords_are_left_alone():
    states, head, labels = inputs()
    kwargs = {"output_attentions": False, "logit_softcapping": 5.0}
    loss_and_grads(states, head, labels, **kwargs)
    assert kwargs == {"output_attentions": False, "logit_softcapping": 5.0}


@pytest.mark.skipif(not torch.cuda.is_available(), reason = "needs a CUDA card")
def test_peak_memory_is_that_of_the_fast_path():
    def peak(**kwargs):
        states, head, labels = inputs(4096, 1024, 32768, "cuda", torch.bfloat16)
        head.requires_grad_(False)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        ce.unsloth_fused_ce_loss(None, states, head, None, labels, **kwargs).backward()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    peak()  # compiles and fills the caches
    assert peak(packed_seq_lengths = torch.tensor([4096])) <= 1.05 * peak()
