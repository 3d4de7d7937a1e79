"""The fused losses take their gradients in forward. Backward scales them where they are: a second copy of dX and of the
head's dW would stand at the peak of the step."""

import unsloth  # noqa: F401 (before transformers and unsloth_zoo)
import pytest
import torch

fl = pytest.importorskip("unsloth_zoo.fused_losses.fused_linear")


def inputs(
    rows = 32,
    hidden = 16,
    vocab = 97,
    device = "cpu",
    dtype = torch.float32,
    trained = True,
):
    generator = torch.Generator(device = device).manual_seed(3407)
    draw = dict(generator = generator, device = device, dtype = dtype)
    states = torch.randn(rows, hidden, **draw).requires_grad_(True)
    head = (torch.randn(vocab, hidden, **draw) / hidden**0.5).requires_grad_(trained)
    labels = torch.randint(0, vocab, (rows,), generator = generator, device = device)
    return states, head, labels


def cross_entropy(states, head, labels):
    return fl.fused_linear_cross_entropy(states, head, None, labels, divisor = len(labels))


def stored(loss):
    """The addresses of the gradients that forward has left behind."""
    node = loss.grad_fn
    while not getattr(node, "saved_tensors", ()):
        node = node.next_functions[0][0]
    return [x.data_ptr() for x in node.saved_tensors if x.numel() > 1]


def exact(states, head, labels, factor):
    states, head = (x.detach().double().requires_grad_(True) for x in (states, head))
    loss = torch.nn.functional.cross_entropy(states @ head.T, labels)
    return torch.autograd.grad(factor * loss, (states, head))


def close(found, expected):
    for a, b in zip(found, expected):
        assert torch.allclose(a.double(), b, rtol = 1e-4, atol = 1e-7)


def test_backward_hands_on_the_stored_gradients():
    states, head, labels = inputs()
    loss = cross_entropy(states, head, labels)
    addresses = stored(loss)
    found = torch.autograd.grad(2.5 * loss, (states, head))
    assert all(x.data_ptr() in addresses for x in found)
    close(found, exact(states, head, labels, 2.5))


def test_log_probabilities_too():
    states, head, labels = inputs(trained = False)
    weights = torch.randn(len(labels))
    logps = fl.fused_linear_logprobs(states, head, labels)
    addresses = stored(logps)
    (found,) = torch.autograd.grad((logps * weights).sum(), states)
    assert found.data_ptr() in addresses
    states64 = states.detach().double().requires_grad_(True)
    reference = (states64 @ head.double().T).log_softmax(-1).gather(1, labels[:, None])[:, 0]
    close([found], torch.autograd.grad((reference * weights).sum(), states64))


def test_a_kept_graph_gives_the_same_again():
    states, head, labels = inputs()
    loss = cross_entropy(states, head, labels)
    addresses = stored(loss)
    first = torch.autograd.grad(2.0 * loss, (states, head), retain_graph = True)
    assert not any(x.data_ptr() in addresses for x in first)
    kept = [x.clone() for x in first]
    second = torch.autograd.grad(3.0 * loss, (states, head))
    close(kept, exact(states, head, labels, 2.0))
    assert all(torch.equal(a, b) for a, b in zip(first, kept))
    close(second, exact(states, head, labels, 3.0))


def test_gradients_accumulate():
    states, head, labels = inputs()
    for _ in range(3):
        cross_entropy(states, head, labels).backward()
    close((states.grad, head.grad), exact(states, head, labels, 3.0))


def test_compiled():
    states, head, labels = inputs()
    compiled = torch.compile(cross_entropy, backend = "aot_eager", fullgraph = True)
    found = torch.autograd.grad(2.0 * compiled(states, head, labels), (states, head))
    close(found, exact(states, head, labels, 2.0))


@pytest.mark.skipif(not torch.cuda.is_available(), reason = "needs a CUDA card")
def test_peak_of_the_backward():
    states, head, labels = inputs(4096, 1024, 65536, "cuda", torch.bfloat16)
    loss = cross_entropy(states, head, labels)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.autograd.grad(2.0 * loss, (states, head))
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 0.1 * head.numel() * head.element_size()
