"""The routes to `linear`: what each hands to our kernels and what goes on as it came. The kernels' part is done by `linear` itself
here, which runs on a CPU; with the kernels, and with the real Unsloth, it is test_linear_gpu.py."""

import types

import bitsandbytes
import pytest
import torch
from nf4_states import Spec, expected

from unsloth_ext.nf4 import matmul_table, patch
from unsloth_ext.nf4.matmul import linear

N, K = 24, 128


class Layer:
    def __init__(self, seed=0, rank=4, lora_dtype=torch.float32, bias=True):
        random = torch.Generator().manual_seed(seed)
        self.packed, self.state = Spec(rows=N, columns=K, seed=seed).make()
        self.a = torch.randn(rank, K, generator=random).to(lora_dtype)
        self.b = torch.randn(N, rank, generator=random).to(lora_dtype)
        self.bias = torch.randn(N, generator=random).to(torch.bfloat16) if bias else None

    def right(self, x):
        y = x.double() @ expected(self.packed, self.state, x.dtype).double().t()
        y = y + 0.5 * (x.double() @ self.a.to(x.dtype).double().t()) @ self.b.to(x.dtype).double().t()
        return y if self.bias is None else y + self.bias.double()


def close(y, reference):
    return y.shape == reference.shape and (y.double() - reference).norm() / reference.norm() < 3e-2


@pytest.fixture
def routes(monkeypatch):
    """(module, calls of the originals, the x that reached our kernels): a stand-in for unsloth.kernels.utils with the routes in."""
    monkeypatch.setattr(matmul_table, "may_take", lambda x: True)
    originals, ours = [], []

    def few(x, packed, quant_state, out=None, bias=None):
        if getattr(quant_state, "quant_type", "") != "nf4":
            return None
        ours.append(x)
        return linear(x, packed, quant_state, bias)

    def original(name):
        return lambda *arguments, **keywords: originals.append((name, arguments, keywords)) or name

    module = types.ModuleType("utils")
    module._has_multiple_active_adapters = lambda proj: proj == "two adapters"
    module.get_lora_parameters_bias = lambda layer: (layer.packed, layer.state, layer.a, layer.b, 0.5, layer.bias)
    for name, make in (
        ("_fast_gemv_bnb", patch._gemv),
        ("fast_linear_forward", patch._decoding),
        ("matmul_lora", patch._matmul_lora),
    ):
        setattr(module, name, make(module, original(name), few))
    return module, originals, ours


@pytest.mark.parametrize("lora_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_a_decoding_step_of_a_batch(routes, lora_dtype, bias):
    module, originals, ours = routes
    layer = Layer(seed=int(torch.randint(2**31, ())), lora_dtype=lora_dtype, bias=bias)
    for rows in (2, 5, 33):
        x = torch.randn(rows, 1, K, dtype=torch.bfloat16)
        assert close(module.fast_linear_forward(layer, x), layer.right(x))
    assert len(ours) == 3 and originals == []
    layer.a = layer.b = None
    x = torch.randn(3, 1, K, dtype=torch.bfloat16)
    assert torch.equal(
        module.fast_linear_forward(layer, x, temp_lora=None, out=torch.empty(1)),
        linear(x, layer.packed, layer.state) + (layer.bias if bias else 0),
    )


def test_what_is_no_decoding_step_goes_on_as_it_came(routes):
    module, originals, ours = routes
    layer, out = Layer(), torch.empty(1)
    x = torch.randn(1, 1, K, dtype=torch.bfloat16)  # one row: fast_gemv's
    prefill = torch.randn(2, 7, K, dtype=torch.bfloat16)
    two = torch.randn(2, 1, K, dtype=torch.bfloat16)
    plain = Layer()
    plain.state = None  # a weight that is not quantised
    for proj, given in ((layer, x), (layer, prefill), ("two adapters", two), (plain, two)):
        assert module.fast_linear_forward(proj, given, temp_lora=3, out=out) == "fast_linear_forward"
        name, arguments, keywords = originals.pop()
        assert arguments[0] is proj and arguments[1] is given and keywords["temp_lora"] == 3 and keywords["out"] is out
    assert ours == []


def test_matmul_lora(routes):
    module, originals, ours = routes
    layer = Layer(bias=False)
    for shape in ((3, K), (2, 3, K), (1, K)):
        x = torch.randn(shape, dtype=torch.bfloat16)
        assert close(module.matmul_lora(x, layer.packed, layer.state, layer.a, layer.b, 0.5), layer.right(x))
        without = module.matmul_lora(x, layer.packed, layer.state, None, None, None, use_global_buffer=False)
        assert torch.equal(without, linear(x, layer.packed, layer.state))
    assert len(ours) == 6 and originals == []
    x = torch.randn(2, N, dtype=torch.bfloat16)  # a backward: x W with the transposed weight
    out = torch.empty(1)
    for arguments, keywords in (
        ((x, layer.packed.t(), layer.state, None, None, None), {}),
        ((x, layer.packed, None, None, None, None), {}),
        ((x, layer.packed, layer.state, None, None, None), {"out": out}),
    ):
        assert module.matmul_lora(*arguments, **keywords) == "matmul_lora"
        _, passed, kept = originals.pop()
        assert all(a is b for a, b in zip(passed, arguments, strict=True)) and kept == {"out": None, **keywords}
    assert len(ours) == 6


def test_gemv(routes):
    module, originals, ours = routes
    layer = Layer()
    x = torch.randn(1, 1, K, dtype=torch.bfloat16)
    assert torch.equal(module._fast_gemv_bnb(x, layer.packed, layer.state), linear(x, layer.packed, layer.state))
    fp4 = Layer().state
    fp4.quant_type = "fp4"
    for state in (None, fp4):
        assert module._fast_gemv_bnb(x, layer.packed, state, out=3) == "_fast_gemv_bnb"
        _, arguments, keywords = originals.pop()
        assert arguments == (x, layer.packed, state) and keywords == {"out": 3}
    assert len(ours) == 1


def test_on_a_cpu_nothing_is_taken():
    few = patch._few_rows(same_dtype=False)
    layer = Layer()
    x = torch.randn(2, K, dtype=torch.bfloat16)
    assert few(x, layer.packed, layer.state) is None
    calls = []
    matmul_4bit = patch._matmul_4bit(lambda *arguments, **keywords: calls.append((arguments, keywords)) or "original")
    assert matmul_4bit(x, layer.packed, quant_state=layer.state, bias=layer.bias) == "original"
    assert calls == [((x, layer.packed, layer.state), {"out": None, "bias": layer.bias})]


@pytest.mark.parametrize("compiled", [False, True])
def test_linear4bit_is_what_it_was_on_a_cpu(monkeypatch, compiled):
    """bitsandbytes' own layer with the route in, eagerly and traced, forward and backward."""
    layer = bitsandbytes.nn.Linear4bit(K, N, compute_dtype=torch.float32, quant_type="nf4")
    layer.weight = bitsandbytes.nn.Params4bit(torch.randn(N, K), requires_grad=False, quant_type="nf4")
    layer.to("cpu")
    x = torch.randn(3, K, requires_grad=True)
    y = layer(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    routed = patch._matmul_4bit(bitsandbytes.matmul_4bit)
    monkeypatch.setattr(bitsandbytes, "matmul_4bit", routed)
    call = torch.compile(layer, backend="aot_eager") if compiled else layer
    result = call(x)
    torch.testing.assert_close(result, y)
    torch.testing.assert_close(torch.autograd.grad(result.sum(), x)[0], gradient)
    with torch.no_grad():
        torch.testing.assert_close(call(x), y)
