"""What chunked_loss says about input that cannot be right, and what it does with input that is odd but has an answer."""

import math

import pytest
import torch
import torch.nn.functional as F

from unsloth_ext.loss import chunked_loss, functions
from unsloth_ext.loss.chunk_size import LOGITS_BYTES, rows_per_chunk

D, V = 6, 11


@pytest.fixture
def case():
    hidden = torch.randn(3, 5, D, requires_grad=True)
    return hidden, torch.nn.Linear(D, V), torch.randint(0, V, (3, 5))


def run(case, function=None, **options):
    hidden, head, labels = case
    return chunked_loss(function or functions.cross_entropy(), hidden, head, labels, **{"chunk_size": 4, **options})


@pytest.mark.parametrize("label", [V, -1, 10**9])
def test_a_label_out_of_range(case, label):
    case[2][1, 2] = label
    with pytest.raises(IndexError, match=f"label {label} is out of range: the head has {V} classes"):
        run(case)
    with pytest.raises(IndexError, match="out of range"):
        run(case, functions.token_logprobs())


def test_all_ignored(case):
    hidden, head, labels = case
    labels.fill_(-100)
    for function in (functions.cross_entropy(), functions.focal()):
        loss = run(case, function)
        assert loss.item() == 0.0
        for grad in torch.autograd.grad(loss, [hidden, *head.parameters()]):
            assert (grad == 0).all()
    loss = run(case, num_items_in_batch=torch.tensor(0))
    assert loss.item() == 0.0
    assert (run(case, functions.token_logprobs()) == 0).all()


@pytest.mark.parametrize("shape", [(0, D), (2, 0, D), (0, 7, D)])
def test_no_tokens(shape):
    """A rank without tokens still has a loss and gradients, as DDP needs them."""
    hidden, head = torch.randn(shape, requires_grad=True), torch.nn.Linear(D, V)
    labels = torch.zeros(shape[:-1], dtype=torch.long)
    ways = (
        (functions.cross_entropy(), {}),
        (lambda z, y: F.cross_entropy(z.float(), y), {"reduction": "mean"}),
        (functions.token_logprobs(), {}),
        (functions.token_logprobs(), {"reduction": "sum"}),
    )
    for function, options in ways:
        loss = chunked_loss(function, hidden, head, labels, **options)
        assert loss.shape == (labels.shape if loss.dim() else ())
        assert loss.sum().item() == 0.0
        grads = torch.autograd.grad(loss.sum(), [hidden, *head.parameters()])
        assert grads[0].shape == shape and all((grad == 0).all() for grad in grads)


def test_targets_that_do_not_fit(case):
    hidden, head, labels = case
    with pytest.raises(ValueError, match=r"targets\[0\] has shape \[3, 4\], which does not start with \[3, 5\]"):
        chunked_loss(functions.cross_entropy(), hidden, head, labels[:, 1:])
    with pytest.raises(ValueError, match=r"targets\[1\] has shape \[11\].*closure"):
        chunked_loss(functions.cross_entropy(), hidden, head, labels, torch.ones(V))
    with pytest.raises(ValueError, match=r"targets\[0\] is on meta, but hidden is on cpu"):
        chunked_loss(functions.cross_entropy(), hidden, head, labels.to("meta"))


@pytest.mark.parametrize(
    "hidden, error, message",
    [
        (torch.randn(D), ValueError, "hidden must be floating point"),
        (torch.ones(2, D, dtype=torch.long), ValueError, "hidden must be floating point"),
        ([[1.0]], TypeError, "hidden must be a tensor, got list"),
        (torch.randn(2, D + 1), ValueError, r"hidden has 7 features, but the head's weight is \[11, 6\]"),
    ],
)
def test_hidden(case, hidden, error, message):
    with pytest.raises(error, match=message):
        chunked_loss(functions.cross_entropy(), hidden, case[1], torch.zeros(2, dtype=torch.long))


@pytest.mark.parametrize(
    "head, error, message",
    [
        (torch.nn.Embedding(V, D), TypeError, "pass its weight"),
        (torch.randn(V), ValueError, r"weight \[vocabulary, hidden\], got \[11\]"),
        (torch.ones(V, D, dtype=torch.int8), ValueError, "floating-point weight"),
        (lambda x: x, TypeError, "head must be a module or a weight"),
    ],
)
def test_head(case, head, error, message):
    with pytest.raises(error, match=message):
        chunked_loss(functions.cross_entropy(), case[0], head, case[2])


def test_a_head_of_unknown_size_needs_a_chunk_size(case):
    class Head(torch.nn.Module):
        def forward(self, x):
            return x.repeat(1, 2)

    with pytest.raises(ValueError, match="chunk_size must be a number of rows for a head without out_features"):
        run((case[0], Head(), case[2]), chunk_size="auto")
    assert run((case[0], Head(), case[2])).requires_grad


@pytest.mark.parametrize(
    "size, error", [(0, ValueError), (-3, ValueError), (True, TypeError), (2.0, TypeError), ("big", ValueError)]
)
def test_chunk_size(case, size, error):
    with pytest.raises(error, match="chunk_size must be"):
        run(case, chunk_size=size)
    assert torch.equal(run(case, chunk_size=10**9), run(case, chunk_size=15))


@pytest.mark.parametrize(
    "result, message",
    [
        (lambda z: z, "as large as the logits"),
        (lambda z: z.sum(0), r"it returned a tensor of shape \[11\]"),
        (lambda z: None, "it returned None"),
        (lambda z: 1.0, "it returned float"),
        (lambda z: (), "it returned tuple"),
        (lambda z: (z.sum(), z.sum(-1)), "it returned tuple"),
        (lambda z: (z.sum(), 1, 2), "it returned tuple"),
        (lambda z: (z.sum(-1), 3), "it returned tuple"),
        (lambda z: {"loss": z.sum()}, "it returned dict"),
        (lambda z: (z.sum(), z.sum()), "weight wants a gradient"),
    ],
)
def test_what_a_function_must_return(case, result, message):
    with pytest.raises((TypeError, ValueError), match=message):
        run(case, lambda z, y: result(z))


def test_reductions_that_have_no_meaning(case):
    with pytest.raises(ValueError, match='pass reduction="sum" if it is a sum'):
        run(case, lambda z, y: z.sum())
    with pytest.raises(ValueError, match='reduction="none" needs values of each row'):
        run(case, reduction="none")
    with pytest.raises(ValueError, match='reduction="mean" needs one tensor, but function returns 2'):
        run(case, lambda z, y: (z.sum(-1), z.sum(-1)), reduction="mean")
    with pytest.raises(ValueError, match="reduction must be"):
        run(case, reduction="avg")
    with pytest.raises(ValueError, match="let it return the sum over its rows"):
        run(case, lambda z, y: z.mean(), reduction="mean", num_items_in_batch=3)
    with pytest.raises(ValueError, match="num_items_in_batch must be one number"):
        run(case, num_items_in_batch=torch.tensor([3, 4]))


def test_results_that_change_from_chunk_to_chunk(case):
    for second in (lambda z: z.sum(), lambda z: z.sum(-1).double(), lambda z: z[:, :2]):
        calls = []

        def function(z, y, calls=calls, second=second):
            calls.append(1)
            return z.sum(-1) if len(calls) == 1 else second(z)

        with pytest.raises(ValueError, match="the same kind, shapes and dtypes for each chunk"):
            run(case, function)


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_a_graph_kept_from_chunk_to_chunk(case, reduction):
    kept = []

    def function(z, y):
        kept.append(z.sum(-1).mean())
        return z.sum(-1) + sum(kept)

    with pytest.raises(ValueError, match="function uses a tensor of an earlier chunk"):
        run(case, function, reduction=reduction)


def test_a_graph_kept_late(case):
    calls, kept = [], []

    def function(z, y):
        calls.append(1)
        if len(calls) > 2:
            kept.append(z.square().mean())
        return z.sum() + sum(kept)

    with pytest.raises(RuntimeError, match="it keeps tensors from chunk to chunk"):
        run(case, function, reduction="sum")


def test_a_trainable_tensor_that_nobody_declared(case):
    temperature = torch.tensor(2.0, requires_grad=True)
    computed = torch.nn.Linear(V, V)(torch.ones(V))
    for tensor in (temperature, computed):
        with pytest.raises(ValueError, match=r"pass it in parameters=\[...\]"):
            run(case, lambda z, y, tensor=tensor: (z / tensor).sum(-1))
    with pytest.raises(TypeError, match="parameters must be a list of tensors, got Tensor"):
        run(case, lambda z, y: (z / temperature).sum(-1), parameters=temperature)
    run(case, lambda z, y: (z / temperature).sum(-1), parameters=[temperature]).sum().backward()
    assert temperature.grad is not None


def test_a_target_changed_in_place(case):
    def function(z, y):
        y[y == 3] = -100
        return F.cross_entropy(z, y, reduction="sum"), (y != -100).sum()

    case[2][0, 0] = 3
    with pytest.raises(RuntimeError, match="changed its target tensor number 0 in place"):
        run(case, function)


def test_logits_changed_in_place_are_the_functions_own(case):
    hidden, head, _ = case
    mine = run(case, lambda z, y: (z.mul_(2).log_softmax(-1)[:, 0].sum(), len(z)))
    expected = (head(hidden) * 2).log_softmax(-1)[..., 0].mean()
    torch.testing.assert_close(mine, expected)
    torch.testing.assert_close(torch.autograd.grad(mine, hidden), torch.autograd.grad(expected, hidden))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_infinity_are_passed_on(case, bad):
    hidden, head, labels = case
    hidden = hidden.detach().clone()
    hidden[1, 2, 0] = bad
    hidden.requires_grad_()
    loss = chunked_loss(functions.cross_entropy(), hidden, head, labels, chunk_size=4)
    expected = F.cross_entropy(head(hidden).view(-1, V), labels.view(-1))
    assert loss.isnan() and expected.isnan()
    mine, theirs = (torch.autograd.grad(x, [hidden, head.weight]) for x in (loss, expected))
    torch.testing.assert_close(mine, theirs, equal_nan=True)
    values = chunked_loss(functions.token_logprobs(), hidden, head, labels, chunk_size=4)
    assert values.isnan().sum() == 1


def test_fp16_overflow_is_passed_on(case):
    hidden = torch.full((4, D), 200.0, dtype=torch.float16, requires_grad=True)
    weight = torch.full((V, D), 200.0, dtype=torch.float16)
    loss = chunked_loss(functions.cross_entropy(), hidden, weight, torch.zeros(4, dtype=torch.long))
    assert not torch.isfinite(loss)


def test_errors_of_the_function_are_its_own(case):
    def function(z, y):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        run(case, function)
    assert isinstance(case[1].weight, torch.nn.Parameter)


def test_automatic_sizes():
    cpu = torch.device("cpu")
    for vocab_size in (32000, 128256, 151936, 262144):
        for trained in (False, True):
            size = rows_per_chunk("auto", 1 << 20, vocab_size, 4096, trained, cpu)
            assert size % 128 == 0
            assert size * vocab_size * 4 <= max(LOGITS_BYTES, 2 * vocab_size * 4096 if trained else 0)
    assert rows_per_chunk("auto", 1 << 20, 10**7, 64, False, cpu) == 128
    assert rows_per_chunk("auto", 5, 128256, 64, False, cpu) == 5
    assert rows_per_chunk("auto", 0, 128256, 64, False, cpu) == 1
    assert rows_per_chunk("auto", 8192, 32000, 64, False, cpu) == 1024  # an eighth
    assert rows_per_chunk("auto", 4096, 32000, 64, False, cpu) == 512
    # even: 600 rows at most 512 a chunk are two of 384, not 512 and 88
    assert rows_per_chunk("auto", 600, 128256, 64, False, cpu) == 384
