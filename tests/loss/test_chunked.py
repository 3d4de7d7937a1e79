"""chunked_loss against plain autograd on full logits."""

import gc
import random

import loss_heads
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from unsloth_ext.loss import chunked_loss, functions
from unsloth_ext.loss.reference import full_loss

D, V = 12, 37


def sum_and_weight(logits, labels):
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, labels, reduction="sum"), (labels != -100).sum()


def mean(logits, labels):
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels)


def per_token(logits, labels):
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, reduction="none")


def two_values(logits, labels):
    """The second mixes rows, so nothing may take it for rowwise."""
    logps = logits.log_softmax(-1)
    return logps.gather(-1, labels.clamp(min=0)[:, None])[:, 0], (logps.exp() * logps).sum(-1)


WAYS = {
    "pair": (sum_and_weight, {}),
    "pair sum": (sum_and_weight, {"reduction": "sum"}),
    "pair items": (sum_and_weight, {"num_items_in_batch": 91}),
    "scalar mean": (lambda z, y: mean(z, y.clamp(min=0)), {"reduction": "mean"}),
    "scalar sum": (lambda z, y: sum_and_weight(z, y)[0], {"reduction": "sum"}),
    "values": (per_token, {}),
    "values sum": (per_token, {"reduction": "sum"}),
    "values mean": (per_token, {"reduction": "mean"}),
    "values rowwise": (per_token, {"rowwise": True}),
}


def inputs(lead=(2, 11), dtype=torch.float64, d=D, v=V, ignored=0.3):
    hidden = torch.randn(*lead, d, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, v, lead)
    labels[torch.rand(lead) < ignored] = -100
    return hidden, labels


def reference_of(function, options, hidden, head, labels):
    default = "none" if function is per_token else "mean"
    return full_loss(
        function,
        hidden,
        head,
        labels,
        reduction=options.get("reduction", default),
        num_items_in_batch=options.get("num_items_in_batch"),
    )


def gradients(result, tensors):
    cotangent = torch.linspace(0.5, 2, result.numel(), dtype=result.dtype).reshape(result.shape)
    return torch.autograd.grad(result, tensors, cotangent, retain_graph=True)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("head_name", loss_heads.EXACT)
def test_values_and_gradients(way, head_name):
    function, options = WAYS[way]
    hidden, labels = inputs()
    head = loss_heads.EXACT[head_name](D, V, torch.float64)
    tensors = [hidden, *loss_heads.trainable(head)]
    expected = reference_of(function, options, hidden, head, labels)
    for size in (5, random.choice([1, 3, 22, 100, "auto"])):
        result = chunked_loss(function, hidden, head, labels, chunk_size=size, **options)
        torch.testing.assert_close(result, expected)
        torch.testing.assert_close(gradients(result, tensors), gradients(expected, tensors))


@pytest.mark.parametrize("way", WAYS)
def test_gradcheck(way):
    function, options = WAYS[way]
    hidden, labels = inputs((7,), d=3, v=6)
    weight = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    frozen = "rowwise" in way
    torch.autograd.gradcheck(
        lambda x, w: chunked_loss(function, x, w.detach() if frozen else w, labels, chunk_size=3, **options),
        (hidden, weight.detach() if frozen else weight),
    )


def test_four_bit_head():
    pytest.importorskip("bitsandbytes")
    hidden, labels = inputs((3, 9), torch.float32, d=64, v=96)
    head = loss_heads.four_bit(64, 96, torch.float32)
    for function, options in WAYS.values():
        result = chunked_loss(function, hidden, head, labels, chunk_size=4, **options)
        expected = reference_of(function, options, hidden, head, labels)
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(gradients(result, [hidden]), gradients(expected, [hidden]), rtol=1e-4, atol=1e-4)


def test_lora_on_a_four_bit_head():
    pytest.importorskip("bitsandbytes")
    from peft import LoraConfig
    from peft.tuners.lora.bnb import Linear4bit

    head = Linear4bit(
        loss_heads.four_bit(64, 96, None),
        "default",
        config=LoraConfig(r=2, lora_alpha=4),
        r=2,
        lora_alpha=4,
        init_lora_weights=False,
    )
    hidden, labels = inputs((3, 9), torch.float32, d=64, v=96)
    tensors = [hidden, *loss_heads.trainable(head)]
    assert len(tensors) == 3
    result, expected = (
        chunked_loss(sum_and_weight, hidden, head, labels, chunk_size=4),
        full_loss(sum_and_weight, hidden, head, labels),
    )
    torch.testing.assert_close(gradients(result, tensors), gradients(expected, tensors), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("trained", [False, True])
def test_several_values_with_later_arithmetic(trained):
    hidden, labels = inputs(ignored=0)
    head = loss_heads.linear(D, V, torch.float64).requires_grad_(trained)
    tensors = [hidden, *loss_heads.trainable(head)]

    def later(logps, entropies):
        return (logps.exp() * entropies.flip(0)).sum(-1).square().mean() + logps[0].logsumexp(-1)

    mine = later(*chunked_loss(two_values, hidden, head, labels, chunk_size=7))
    theirs = later(*full_loss(two_values, hidden, head, labels, reduction="none"))
    torch.testing.assert_close(torch.autograd.grad(mine, tensors), torch.autograd.grad(theirs, tensors))
    only_first = chunked_loss(two_values, hidden, head, labels, chunk_size=7)[0].sum()
    theirs = full_loss(two_values, hidden, head, labels, reduction="none")[0].sum()
    torch.testing.assert_close(torch.autograd.grad(only_first, tensors), torch.autograd.grad(theirs, tensors))


@pytest.mark.parametrize("hidden_grad", [False, True])
@pytest.mark.parametrize("head_grad", [False, True])
@pytest.mark.parametrize("target_grad", [False, True])
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_each_input_that_wants_a_gradient_gets_it(hidden_grad, head_grad, target_grad, reduction):
    def function(logits, labels, factor, temperature):
        return per_token(logits / temperature, labels) * factor

    hidden, labels = inputs()
    hidden = hidden.detach().requires_grad_(hidden_grad)
    weight = torch.randn(V, D, dtype=torch.float64, requires_grad=head_grad)
    factor = torch.rand(2, 11, dtype=torch.float64, requires_grad=target_grad)
    arguments = (function, hidden, weight, labels, factor, 0.7)
    result = chunked_loss(*arguments, reduction=reduction, chunk_size=4)
    expected = full_loss(*arguments, reduction=reduction)
    tensors = [tensor for tensor in (hidden, weight, factor) if tensor.requires_grad]
    torch.testing.assert_close(result, expected)
    assert result.requires_grad == bool(tensors)
    if tensors:
        torch.testing.assert_close(gradients(result, tensors), gradients(expected, tensors))
        for tensor in tensors:  # and each alone
            torch.testing.assert_close(gradients(result, [tensor]), gradients(expected, [tensor]))


@pytest.mark.parametrize("way", ["pair", "values", "values rowwise"])
def test_closed_over_parameters(way):
    function, options = WAYS[way]
    temperature = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    shift = torch.randn(V, dtype=torch.float64, requires_grad=True) * 2  # not a leaf
    hidden, labels = inputs()
    weight = torch.randn(V, D, dtype=torch.float64)

    def warm(logits, labels):
        return function(logits / temperature + shift, labels)

    result = chunked_loss(warm, hidden, weight, labels, parameters=[temperature, shift], chunk_size=5, **options)
    expected = full_loss(warm, hidden, weight, labels, reduction="mean" if way == "pair" else "none")
    tensors = [hidden, temperature, shift]
    torch.testing.assert_close(gradients(result, tensors), gradients(expected, tensors))


@pytest.mark.parametrize("way", ["pair", "values"])
def test_incoming_gradient_retained_graph_and_two_uses(way):
    function, options = WAYS[way]
    hidden, labels = inputs()
    head = loss_heads.bias(D, V, torch.float64)
    tensors = [hidden, *head.parameters()]
    result = chunked_loss(function, hidden, head, labels, chunk_size=5, **options).sum()
    other = chunked_loss(function, hidden * 2, head, labels, chunk_size=9, **options).sum()
    expected = full_loss(function, hidden, head, labels, reduction="mean" if way == "pair" else "none").sum()
    expected_other = full_loss(function, hidden * 2, head, labels, reduction="mean" if way == "pair" else "none").sum()
    for factor in (1.0, 0.0, -3.5, 65536.0):
        mine = torch.autograd.grad(result * factor, tensors, retain_graph=True)
        torch.testing.assert_close(mine, torch.autograd.grad(expected * factor, tensors, retain_graph=True))
    mine = torch.autograd.grad(result * other, tensors)
    torch.testing.assert_close(mine, torch.autograd.grad(expected * expected_other, tensors))
    with pytest.raises(RuntimeError, match="a second time"):
        result.backward()


def test_gradient_accumulation_equals_the_whole_batch():
    hidden, labels = inputs((4, 9))
    head = loss_heads.linear(D, V, torch.float64)
    items = (labels != -100).sum()
    for i in range(4):
        chunked_loss(
            sum_and_weight, hidden[i : i + 1], head, labels[i : i + 1], num_items_in_batch=items, chunk_size=4
        ).backward()
    expected = torch.autograd.grad(full_loss(sum_and_weight, hidden, head, labels), [hidden, head.weight])
    torch.testing.assert_close([hidden.grad, head.weight.grad], list(expected))


def test_strided_and_expanded_hidden():
    hidden, _ = inputs((4, 7))
    head = loss_heads.bias(D, V, torch.float64)
    views = (hidden[:, :-1], hidden.transpose(0, 1)[:6], hidden[:1, :6].expand(4, 6, D), hidden[:, ::2].flip(1))
    for view in views:
        y = torch.randint(0, V, view.shape[:-1])
        for function in (sum_and_weight, per_token):
            mine = chunked_loss(function, view, head, y, chunk_size=5).sum()
            expected = full_loss(function, view, head, y, reduction="sum" if function is per_token else "mean")
            torch.testing.assert_close(
                torch.autograd.grad(mine, hidden), torch.autograd.grad(expected, hidden, retain_graph=True)
            )


def test_no_gradients_where_none_are_wanted():
    hidden, labels = inputs()
    head = loss_heads.bias(D, V, torch.float64)
    expected = full_loss(sum_and_weight, hidden, head, labels)
    with torch.no_grad():
        result = chunked_loss(sum_and_weight, hidden, head, labels, chunk_size=5)
    assert not result.requires_grad
    torch.testing.assert_close(result, expected.detach())
    with torch.inference_mode():
        result = chunked_loss(per_token, hidden * 1, head, labels, chunk_size=5)
    assert not result.requires_grad and result.shape == (2, 11)


def test_values_without_a_path_want_no_gradient():
    hidden, labels = inputs(ignored=0)
    weight = torch.randn(V, D, dtype=torch.float64)
    logps, entropies, best = chunked_loss(
        lambda z, y: (-per_token(z, y), z.detach().softmax(-1).amax(-1), z.argmax(-1)),
        hidden,
        weight,
        labels,
        chunk_size=4,
    )
    assert logps.requires_grad and not entropies.requires_grad and best.dtype == torch.int64
    with pytest.raises(RuntimeError, match="does not require grad"):
        chunked_loss(lambda z, y: (z.detach().sum(), 1), hidden, weight, labels).backward()


def test_a_second_derivative_is_refused():
    hidden, labels = inputs()
    for way in ("pair", "values", "values rowwise"):
        function, options = WAYS[way]
        result = chunked_loss(function, hidden, torch.randn(V, D, dtype=torch.float64), labels, chunk_size=5, **options)
        (grad,) = torch.autograd.grad(result.sum(), hidden, create_graph=True)
        expected = full_loss(function, hidden, torch.zeros(V, D, dtype=torch.float64), labels, reduction="sum")
        assert expected.requires_grad and grad.requires_grad
        with pytest.raises(RuntimeError, match="no second derivative"):
            grad.sum().backward()


def test_hooks_of_the_head_run_once():
    hidden, labels = inputs()
    head = loss_heads.bias(D, V, torch.float64)
    calls = []
    head.weight.register_hook(lambda grad: calls.append("tensor") or grad * 10)
    head.weight.register_post_accumulate_grad_hook(lambda tensor: calls.append("accumulated"))
    expected = torch.autograd.grad(full_loss(sum_and_weight, hidden, head, labels), head.weight)[0]
    calls.clear()
    chunked_loss(sum_and_weight, hidden, head, labels, chunk_size=3).backward()
    assert calls == ["tensor", "accumulated"]
    torch.testing.assert_close(head.weight.grad, expected)
    assert head.weight.grad_fn is None and isinstance(head.weight, torch.nn.Parameter)


@pytest.mark.parametrize("way", ["pair", "values", "values rowwise"])
def test_dropout_is_reproducible_and_differentiated_as_drawn(way):
    function, options = WAYS[way]
    hidden, labels = inputs((6,), d=4, v=9)
    weight = torch.randn(9, 4, dtype=torch.float64)
    state = torch.get_rng_state()

    def loss(x):
        torch.set_rng_state(state)
        return chunked_loss(lambda z, y: function(F.dropout(z, 0.4), y), x, weight, labels, chunk_size=4, **options)

    torch.testing.assert_close(loss(hidden), loss(hidden))
    torch.autograd.gradcheck(loss, (hidden,))
    after = torch.get_rng_state()
    loss(hidden).sum().backward()
    torch.testing.assert_close(torch.get_rng_state(), after)


def test_lora_dropout_draws_alike_in_backward():
    head = loss_heads.lora(D, V, torch.float64, lora_dropout=0.5)
    hidden, labels = inputs((6,), ignored=0)
    torch.manual_seed(7)
    one_chunk = chunked_loss(per_token, hidden, head, labels, chunk_size=6)
    torch.manual_seed(7)
    expected = full_loss(per_token, hidden, head, labels, reduction="none")
    tensors = [hidden, *loss_heads.trainable(head)]
    torch.rand(5)
    torch.testing.assert_close(gradients(one_chunk, tensors), gradients(expected, tensors))


@pytest.mark.parametrize("way", ["pair", "values", "values rowwise"])
@pytest.mark.parametrize("trained", [False, True])
def test_autocast(way, trained):
    function, options = WAYS[way]
    hidden, labels = inputs((40,), torch.float32)
    head = loss_heads.bias(D, V, torch.float32).requires_grad_(trained)
    tensors = [hidden, *loss_heads.trainable(head)]
    seen = set()

    def watched(logits, labels):
        seen.add(logits.dtype)
        return function(logits, labels)

    with torch.autocast("cpu", torch.bfloat16):
        result = chunked_loss(watched, hidden, head, labels, chunk_size=16, **options)
        expected = full_loss(function, hidden, head, labels, reduction="mean" if way == "pair" else "none")
    torch.testing.assert_close(result, expected)
    # backward outside of autocast, as users write it
    for mine, theirs in zip(gradients(result, tensors), gradients(expected, tensors), strict=True):
        assert mine.dtype == torch.float32 and distance(mine, theirs.double()) < 1e-2
    assert seen == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_to_fp64_as_full_logits_are(dtype):
    hidden, labels = inputs((256,), torch.float64, d=64, v=100)
    hidden = hidden.detach().to(dtype).requires_grad_()
    weight = (torch.randn(100, 64) / 8).to(dtype).requires_grad_()
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    truth = torch.autograd.grad(full_loss(sum_and_weight, *exact, labels), exact)
    plain = torch.autograd.grad(full_loss(sum_and_weight, hidden, weight, labels), [hidden, weight])
    allowed = [distance(a, b) for a, b in zip(plain, truth, strict=True)]
    for size in (256, 64, 8):
        mine = torch.autograd.grad(
            chunked_loss(sum_and_weight, hidden, weight, labels, chunk_size=size), [hidden, weight]
        )
        errors = [distance(a, b) for a, b in zip(mine, truth, strict=True)]
        # Ours are rounded once more, by the division behind the sum: 1.14 times as much (at most 1.225 in 16 draws), as many
        # chunks as there may be. A sum over chunks that was rounded after each of them would be several times as much.
        assert all(error <= 1.25 * most + 1e-4 for error, most in zip(errors, allowed, strict=True)), (
            size,
            errors,
            allowed,
        )


def distance(a, b):
    return ((a.double() - b).norm() / b.norm()).item()


@pytest.mark.parametrize("way", ["pair", "scalar sum", "values", "values rowwise"])
def test_fp16_gradients_survive_under_a_loss_scale(way):
    """1 / number of tokens alone would push most fp16 gradients below the smallest number; with the scale they are all there."""
    function, options = WAYS[way]
    hidden, labels = inputs((64,), torch.float32, ignored=0)
    hidden = hidden.detach().half().requires_grad_()
    weight = (torch.randn(V, D) / 4).half()
    items = 1e7
    if way == "pair":
        loss = chunked_loss(function, hidden, weight, labels, num_items_in_batch=items, chunk_size=16)
    elif way == "scalar sum":  # divided inside, where only backward knows the scale
        loss = chunked_loss(lambda z, y: function(z, y) / items, hidden, weight, labels, chunk_size=16, **options)
    else:
        loss = chunked_loss(function, hidden, weight, labels, chunk_size=16, **options).sum() / items
    (loss * 2.0**20).backward()
    exact = hidden.detach().double().requires_grad_()
    (full_loss(per_token, exact, weight.double(), labels, reduction="sum") / items * 2.0**20).backward()
    assert distance(hidden.grad, exact.grad) < 5e-3


def test_grad_scaler_skips_an_overflow_and_recovers():
    hidden, labels = inputs((32,), torch.float32, ignored=0)
    layer = torch.nn.Linear(D, D)
    head = loss_heads.linear(D, V, torch.float32)
    optimizer = torch.optim.SGD([*layer.parameters(), *head.parameters()], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before, scales = layer.weight.detach().clone(), []
    for _ in range(30):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = chunked_loss(sum_and_weight, layer(hidden.detach()), head, labels, chunk_size=8)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    assert scales[0] < 2.0**40 and scales[-1] == scales[-2] and not torch.equal(before, layer.weight)
    assert torch.isfinite(layer.weight).all()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("way", ["pair", "values"])
def test_under_activation_checkpointing(way, reentrant):
    function, options = WAYS[way]
    hidden, labels = inputs()
    head = loss_heads.linear(D, V, torch.float64)

    def run(x):
        return chunked_loss(function, torch.tanh(x), head, labels, chunk_size=5, **options)

    mine = checkpoint(run, hidden, use_reentrant=reentrant).sum()
    mine.backward()
    grads = [hidden.grad, head.weight.grad]
    expected = torch.autograd.grad(run(hidden).sum(), [hidden, head.weight])
    torch.testing.assert_close(grads, list(expected))


def test_saved_tensors_can_be_moved_by_hooks():
    hidden, labels = inputs()
    head = loss_heads.linear(D, V, torch.float64)
    for function in (sum_and_weight, per_token):
        expected = torch.autograd.grad(chunked_loss(function, hidden, head, labels, chunk_size=5).sum(), hidden)
        with torch.autograd.graph.save_on_cpu():
            result = chunked_loss(function, hidden, head, labels, chunk_size=5).sum()
        torch.testing.assert_close(torch.autograd.grad(result, hidden), expected)


class Largest(TorchDispatchMode):
    """The largest tensor that any operation gives, and how much is alive at most."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.largest = max(self.largest, leaf.numel())
        return result


@pytest.mark.parametrize("way", WAYS)
def test_full_logits_are_never_there(way):
    function, options = WAYS[way]
    hidden, labels = inputs((8, 32), torch.float32, v=500)
    head = loss_heads.bias(D, 500, torch.float32)
    rows = 32
    with Largest() as seen:
        chunked_loss(function, hidden, head, labels, chunk_size=rows, **options).sum().backward()
    assert seen.largest == max(rows * 500, 500 * D), seen.largest
    with Largest() as seen, torch.no_grad():
        chunked_loss(function, hidden, head, labels, chunk_size=rows, **options)
    assert seen.largest == rows * 500


def test_one_chunk_is_alive_at_a_time_and_nothing_after():
    import weakref

    hidden, labels = inputs((64,))
    head = loss_heads.linear(D, V, torch.float64)
    alive, most = [], 0

    def function(logits, labels):
        nonlocal most
        alive.append(weakref.ref(logits))
        most = max(most, sum(ref() is not None for ref in alive))
        return sum_and_weight(logits, labels)

    loss = chunked_loss(function, hidden, head, labels, chunk_size=8)
    assert most == 1 and not any(ref() is not None for ref in alive)
    node = weakref.ref(loss.grad_fn)
    loss.backward()
    del loss
    gc.collect()
    assert node() is None


def test_backward_scales_in_place_and_frees():
    hidden, labels = inputs((64,), torch.float32)
    head = loss_heads.linear(D, V, torch.float32)
    loss = chunked_loss(sum_and_weight, hidden, head, labels, chunk_size=8)
    saved = loss.grad_fn.saved_tensors[1]
    loss.backward()
    assert hidden.grad.data_ptr() == saved.data_ptr()


def test_a_loss_that_projects_itself():
    """The adapter in the module's opening text, used as an autograd.Function is."""

    class MemoryEfficientLinear:
        @staticmethod
        def apply(X, linear, labels, forward_function):
            def function(logits, y):
                return forward_function(logits, torch.nn.Identity(), y)

            return chunked_loss(function, X, linear, labels, reduction="mean", chunk_size=8)

    def transformation_function(batch, linear, labels):
        x = linear(batch).float()
        return torch.nn.CrossEntropyLoss(reduction="mean")(x.view(-1, x.shape[-1]), labels.view(-1))

    hidden, labels = inputs((2, 13), torch.float32, ignored=0)
    linear = torch.nn.Linear(D, V, bias=False)
    tensors = [hidden, linear.weight]
    loss = MemoryEfficientLinear.apply(hidden, linear, labels, transformation_function)
    expected = transformation_function(hidden, linear, labels)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss * 3, tensors), torch.autograd.grad(expected * 3, tensors))


def test_ready_made_function_has_its_mean_of_torch():
    hidden, labels = inputs()
    head = loss_heads.bias(D, V, torch.float64)
    result = chunked_loss(functions.cross_entropy(), hidden, head, labels, chunk_size=5)
    torch.testing.assert_close(result, F.cross_entropy(head(hidden).view(-1, V), labels.view(-1)))
