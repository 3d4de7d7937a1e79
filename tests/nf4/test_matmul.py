"""`linear` on the CPU, where it is dequantise and matmul: values, gradients, the operator, torch.compile, and wrong arguments."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nf4_states import Spec, as_list, expected, specs

from unsloth_ext.nf4 import matmul_plan
from unsloth_ext.nf4.matmul import linear
from unsloth_ext.nf4.quant_state import read


def right(x, packed, state, bias=None):
    """In float64, with the dense weight in x's dtype."""
    y = x.double() @ expected(packed, state, x.dtype).double().t()
    return y if bias is None else y + bias.double()


def close(y, reference, size=None):
    """`size`: the sum of the terms' magnitudes, where few numbers are compared: one may be all that is left of large terms."""
    if reference.norm() == 0:
        return bool((y == 0).all())
    size = reference.norm() if size is None else size.norm()
    return (y.double() - reference).norm() / size < {2: 2e-2, 4: 1e-5}[y.element_size()]


@settings(max_examples=30, deadline=None)
@given(specs(magnitude="usual", storage=torch.uint8))
def test_random_weights(spec):
    packed, state = spec.make()
    random = torch.Generator().manual_seed(spec.seed)
    magnitudes = expected(packed, state, spec.dtype).double().abs().t()
    for shape in ((spec.columns,), (1, spec.columns), (2, 3, spec.columns), (0, spec.columns)):
        x = torch.randn(shape, generator=random).to(spec.dtype)
        bias = torch.randn(spec.rows, generator=random).to(spec.dtype)
        for given_bias in (None, bias):
            y = linear(x, packed, state, given_bias)
            assert y.shape == (*shape[:-1], spec.rows) and y.dtype == spec.dtype
            size = x.double().abs() @ magnitudes + (0 if given_bias is None else bias.double().abs())
            assert close(y, right(x, packed, state, given_bias), size)


def test_every_form_of_a_weight():
    packed, state = Spec(rows=24, columns=128).make()
    x = torch.randn(3, 128, dtype=torch.bfloat16)
    y = linear(x, packed, state)
    assert torch.equal(linear(x, packed.t(), state), y)
    assert torch.equal(linear(x, packed, as_list(state)), y)
    assert torch.equal(linear(x, torch.nn.Parameter(packed, requires_grad=False), state), y)
    for dtype in (torch.float16, torch.float32):  # x decides, whatever dtype the state names
        assert close(linear(x.to(dtype), packed, state), right(x.to(dtype), packed, state))


def adapter(random, n, k, rank=8, dtype=torch.float32):
    return torch.randn(rank, k, generator=random).to(dtype), torch.randn(n, rank, generator=random).to(dtype), 0.5


def with_adapter(y, x, lora):
    a, b, scaling = (part.to(x.dtype).double() if isinstance(part, torch.Tensor) else part for part in lora)
    return y + scaling * (x.double() @ a.t()) @ b.t()


@settings(max_examples=20, deadline=None)
@given(specs(magnitude="usual", storage=torch.uint8), st.integers(1, 64))
def test_adapters(spec, rank):
    packed, state = spec.make()
    random = torch.Generator().manual_seed(spec.seed)
    lora = adapter(random, spec.rows, spec.columns, rank)
    bias = torch.randn(spec.rows, generator=random).to(spec.dtype)
    for shape in ((spec.columns,), (2, 3, spec.columns), (0, spec.columns)):
        x = torch.randn(shape, generator=random).to(spec.dtype)
        base = right(x, packed, state, bias)
        reference = with_adapter(base, x, lora)
        y = linear(x, packed, state, bias, lora)
        assert y.shape == (*shape[:-1], spec.rows) and y.dtype == spec.dtype and not y.requires_grad
        # The two parts may cancel: what is rounded is each of them.
        parts = base.norm() + (reference - base).norm()
        assert (y.double() - reference).norm() <= parts * {2: 3e-2, 4: 1e-5}[y.element_size()]
        assert torch.equal(linear(x, packed, state, bias, (*map(torch.nn.Parameter, lora[:2]), 0.5)), y)


def test_gradients_of_an_adapter():
    packed, state = Spec(rows=24, columns=128, dtype=torch.float32).make()
    weight = expected(packed, state, torch.float32)
    random = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
    for x_learns in (True, False):
        a, b, scaling = adapter(random, 24, 128)
        x = torch.randn(2, 5, 128, generator=random)
        found = [tensor.clone().requires_grad_(learns) for tensor, learns in ((x, x_learns), (a, True), (b, True))]
        wanted = [tensor.clone().requires_grad_(learns) for tensor, learns in ((x, x_learns), (a, True), (b, True))]
        upstream = torch.randn(2, 5, 24, generator=random)
        linear(found[0], packed, state, lora=(found[1], found[2], scaling)).backward(upstream)
        (wanted[0] @ weight.t() + scaling * (wanted[0] @ wanted[1].t()) @ wanted[2].t()).backward(upstream)
        for one, other in zip(found, wanted, strict=True):
            if other.grad is None:
                assert one.grad is None
            else:
                torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-4)


def test_out():
    packed, state = Spec(rows=24, columns=128).make()
    x = torch.randn(2, 3, 128, dtype=torch.bfloat16)
    lora = adapter(torch.Generator().manual_seed(0), 24, 128)
    for given_lora in (None, lora):
        y = linear(x, packed, state, lora=given_lora)
        whole = torch.full((2, 3, 48), float("nan"), dtype=torch.bfloat16)
        for out in (torch.empty_like(y), whole[..., :24], torch.empty(3, 2, 24, dtype=torch.bfloat16).transpose(0, 1)):
            assert linear(x, packed, state, lora=given_lora, out=out) is out
            torch.testing.assert_close(out, y, rtol=2e-2, atol=2e-2)
        assert whole[..., 24:].isnan().all()
    with pytest.raises(ValueError, match="out cannot be given where a gradient is wanted"):
        linear(x.float().requires_grad_(), packed, state, out=torch.empty(2, 3, 24))
    with pytest.raises(ValueError, match="out cannot be given where a gradient is wanted"):
        learning = (lora[0].requires_grad_(), *lora[1:])
        linear(x, packed, state, lora=learning, out=torch.empty(2, 3, 24, dtype=torch.bfloat16))


def test_autocast_changes_nothing():
    packed, state = Spec(rows=24, columns=128).make()
    lora = adapter(torch.Generator().manual_seed(0), 24, 128)
    for x in (torch.randn(3, 128), torch.randn(3, 128, requires_grad=True)):
        y = linear(x, packed, state, lora=lora)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(linear(x, packed, state, lora=lora), y)


def test_gradients():
    packed, state = Spec(rows=24, columns=128, dtype=torch.float32).make()
    x = torch.randn(2, 5, 128, requires_grad=True)
    bias = torch.randn(24, requires_grad=True)
    weight = expected(packed, state, torch.float32)
    upstream = torch.randn(2, 5, 24)
    linear(x, packed, state, bias).backward(upstream)
    torch.testing.assert_close(x.grad, upstream @ weight)
    torch.testing.assert_close(bias.grad, upstream.sum((0, 1)))
    with torch.no_grad():
        assert not linear(x, packed, state, bias).requires_grad
    assert not linear(x.detach(), packed, state).requires_grad


def test_operator():
    for nested in (False, True):
        packed, state = Spec(rows=24, columns=128, nested=nested, dtype=torch.float32).make()
        s = read(state)
        fields = (packed, s.absmax, s.code2, s.absmax2, s.offset, s.blocksize, s.blocksize2, list(s.shape))
        x = torch.randn(3, 128, requires_grad=True)
        bias = torch.randn(24, requires_grad=True)
        for given_bias in (None, bias):
            torch.library.opcheck(torch.ops.unsloth_ext.nf4_linear, (x, *fields, given_bias))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(dynamic):
    packed, state = Spec(rows=24, columns=128, dtype=torch.float32).make()

    @torch.compile(fullgraph=True, dynamic=dynamic, backend="aot_eager")
    def layer(x, packed):
        return linear(x, packed, state).relu()

    lora = adapter(torch.Generator().manual_seed(0), 24, 128)

    @torch.compile(fullgraph=True, dynamic=dynamic, backend="aot_eager")
    def adapted(x, packed, a, b):
        return linear(x, packed, state, lora=(a, b, 0.5))

    for rows in (2, 5):
        x = torch.randn(rows, 128, requires_grad=True)
        y = adapted(x, packed, *lora[:2])
        assert close(y, with_adapter(right(x, packed, state), x, lora))
        y = layer(x, packed)
        assert close(y, right(x, packed, state).relu())
        (of_x,) = torch.autograd.grad(y.sum(), x)
        torch.testing.assert_close(of_x, (y > 0).float() @ expected(packed, state, torch.float32))


def test_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    packed, state = Spec(rows=24, columns=128).make()
    lora = adapter(torch.Generator().manual_seed(0), 24, 128)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for given_lora in (None, lora):
            y = linear(mode.from_tensor(torch.randn(2, 128, dtype=torch.bfloat16)), packed, state, lora=given_lora)
            assert y.shape == (2, 24) and y.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda a: a.update(x=3), TypeError, "x must be a tensor, got int"),
        (
            lambda a: a.update(x=a["x"][:, :64]),
            ValueError,
            r"x must have 128 columns for a weight of \(24, 128\), got \(3, 64\)",
        ),
        (lambda a: a.update(x=a["x"].double()), ValueError, "dtype must be float16, bfloat16 or float32"),
        (lambda a: a.update(packed=a["packed"][:-1]), ValueError, "packed must hold 1536 bytes"),
        (lambda a: a.update(bias=torch.zeros(23)), ValueError, r"bias must have shape \(24,\), got \(23,\)"),
        (
            lambda a: a.update(bias=torch.zeros(24)),
            ValueError,
            "bias must be torch.bfloat16 on cpu like x, got torch.float32",
        ),
        (lambda a: a.update(bias=0.0), TypeError, "bias must be a tensor, got float"),
        (lambda a: a.update(out=torch.empty(3, 24)), ValueError, "out must be torch.bfloat16 on cpu like x"),
        (
            lambda a: a.update(out=torch.empty(2, 24, dtype=torch.bfloat16)),
            ValueError,
            r"out must have shape \(3, 24\), got \(2, 24\)",
        ),
        (lambda a: a.update(lora=torch.zeros(3)), TypeError, r"lora must be \(A, B, scaling\), got Tensor"),
        (lambda a: a.update(lora=(1, 2, 3.0)), TypeError, "lora's A must be a tensor, got int"),
        (
            lambda a: a.update(lora=(torch.zeros(4, 128), torch.zeros(24, 4), torch.ones(()))),
            TypeError,
            "lora's scaling must be a number, got Tensor",
        ),
        (
            lambda a: a.update(lora=(torch.zeros(4, 128), torch.zeros(4, 24), 1.0)),
            ValueError,
            r"lora must be A \[r, 128\] and B \[24, r\], got \(4, 128\) and \(4, 24\)",
        ),
        (
            lambda a: a.update(lora=(torch.zeros(4, 128, dtype=torch.int8), torch.zeros(24, 4), 1.0)),
            ValueError,
            "lora's A must be a matrix of floats on cpu like x, got torch.int8",
        ),
    ],
)
def test_wrong_arguments(change, error, message):
    packed, state = Spec(rows=24, columns=128).make()
    arguments = {"x": torch.randn(3, 128, dtype=torch.bfloat16), "packed": packed}
    change(arguments)
    with pytest.raises(error, match=message):
        linear(quant_state=state, **arguments)


def test_a_weight_of_other_dimensions():
    packed, state = Spec(rows=24, columns=128).make()
    state.shape = torch.Size([24 * 128])
    with pytest.raises(ValueError, match=r"quant_state.shape must be \[N, K\]"):
        linear(torch.randn(3, 128, dtype=torch.bfloat16), packed, state)


def test_nothing_is_remembered_on_the_cpu():
    packed, state = Spec(rows=24, columns=128).make()
    linear(torch.randn(3, 128, dtype=torch.bfloat16), packed, state)
    assert id(state) not in matmul_plan.plans
