"""`linear` on the CPU, where it is dequantise and matmul: values, gradients, the operator, torch.compile, and wrong arguments."""

import pytest
import torch
from hypothesis import given, settings
from nf4_states import Spec, as_list, expected, specs

from unsloth_ext.nf4 import matmul
from unsloth_ext.nf4.matmul import linear
from unsloth_ext.nf4.quant_state import read


def right(x, packed, state, bias=None):
    """In float64, with the dense weight in x's dtype."""
    y = x.double() @ expected(packed, state, x.dtype).double().t()
    return y if bias is None else y + bias.double()


def close(y, reference):
    if reference.norm() == 0:
        return bool((y == 0).all())
    return (y.double() - reference).norm() / reference.norm() < {2: 2e-2, 4: 1e-5}[y.element_size()]


@settings(max_examples=60, deadline=None)
@given(specs(magnitude="usual", storage=torch.uint8))
def test_random_weights(spec):
    packed, state = spec.make()
    random = torch.Generator().manual_seed(spec.seed)
    for shape in ((spec.columns,), (1, spec.columns), (2, 3, spec.columns), (0, spec.columns)):
        x = torch.randn(shape, generator=random).to(spec.dtype)
        bias = torch.randn(spec.rows, generator=random).to(spec.dtype)
        for given_bias in (None, bias):
            y = linear(x, packed, state, given_bias)
            assert y.shape == (*shape[:-1], spec.rows) and y.dtype == spec.dtype
            assert close(y, right(x, packed, state, given_bias))


def test_every_form_of_a_weight():
    packed, state = Spec(rows=24, columns=128).make()
    x = torch.randn(3, 128, dtype=torch.bfloat16)
    y = linear(x, packed, state)
    assert torch.equal(linear(x, packed.t(), state), y)
    assert torch.equal(linear(x, packed, as_list(state)), y)
    assert torch.equal(linear(x, torch.nn.Parameter(packed, requires_grad=False), state), y)
    for dtype in (torch.float16, torch.float32):  # x decides, whatever dtype the state names
        assert close(linear(x.to(dtype), packed, state), right(x.to(dtype), packed, state))


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

    for rows in (2, 5):
        x = torch.randn(rows, 128, requires_grad=True)
        y = layer(x, packed)
        assert close(y, right(x, packed, state).relu())
        (of_x,) = torch.autograd.grad(y.sum(), x)
        torch.testing.assert_close(of_x, (y > 0).float() @ expected(packed, state, torch.float32))


def test_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    packed, state = Spec(rows=24, columns=128).make()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y = linear(mode.from_tensor(torch.randn(2, 128, dtype=torch.bfloat16)), packed, state)
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
    ],
)
def test_wrong_arguments(change, error, message):
    packed, state = Spec(rows=24, columns=128).make()
    arguments = {"x": torch.randn(3, 128, dtype=torch.bfloat16), "packed": packed, "bias": None}
    change(arguments)
    with pytest.raises(error, match=message):
        linear(arguments["x"], arguments["packed"], state, arguments["bias"])


def test_a_weight_of_other_dimensions():
    packed, state = Spec(rows=24, columns=128).make()
    state.shape = torch.Size([24 * 128])
    with pytest.raises(ValueError, match=r"quant_state.shape must be \[N, K\]"):
        linear(torch.randn(3, 128, dtype=torch.bfloat16), packed, state)


def test_nothing_is_remembered_on_the_cpu():
    packed, state = Spec(rows=24, columns=128).make()
    linear(torch.randn(3, 128, dtype=torch.bfloat16), packed, state)
    assert id(state) not in matmul.plans
