"""Dense copies of NF4 weights: what hangs where, who reads them, and the products with an adapter beside and below."""

import copy
import gc
import pickle
from importlib.util import find_spec

import pytest
import torch

if find_spec("bitsandbytes") is None:
    pytest.skip("bitsandbytes is not installed: make setup", allow_module_level=True)

from unsloth_ext.nf4 import dense_copies, dequantize

K = 128


def quantised(*rows, dtype=torch.bfloat16, nested=True):
    from bitsandbytes.functional import quantize_4bit

    return [quantize_4bit(torch.randn(n, K).to(dtype), quant_type="nf4", compress_statistics=nested) for n in rows]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("nested", [True, False])
def test_the_copy_is_the_dequantised_weight(dtype, nested):
    weights = quantised(64, 32, dtype=dtype, nested=nested)
    group = dense_copies.keep(weights, beside=8, below=5)
    assert group.nbytes == dense_copies.size_of(weights, beside=8, below=5) == 101 * (K + 16) * dtype.itemsize
    exact = [dequantize(*weight) for weight in weights]
    for (packed, state), wanted in zip(weights, exact, strict=True):
        found = dense_copies.copy_of(state, dtype, packed.device)
        assert torch.equal(found, wanted) and not found.requires_grad
        assert dense_copies.copy_of(state, torch.float64, packed.device) is None
        assert dense_copies.copy_of(state, None, torch.device("meta")) is None
    states = [state for _, state in weights]
    assert torch.equal(dense_copies.group_of(states, dtype, weights[0][0].device), torch.cat(exact))
    for not_the_group in (states[:1], states[::-1], states * 2):
        assert dense_copies.group_of(not_the_group, dtype, weights[0][0].device) is None
    dense_copies.drop(states)
    assert dense_copies.copy_of(states[0], dtype, weights[0][0].device) is None


def test_a_copied_or_saved_state_has_none():
    ((packed, state),) = quantised(64)
    dense_copies.keep([(packed, state)])
    for other in (copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
        assert dense_copies.copy_of(other, None, packed.device) is None
        assert torch.equal(dequantize(packed, other), dequantize(packed, state))
    assert not any("dense" in name for name in state.as_dict(packed=True))


def test_what_is_written_to_is_noticed():
    weights = quantised(64, 32)
    group = dense_copies.keep(weights)
    assert group.is_current()
    weights[1][0].zero_()
    assert not group.is_current()
    group = dense_copies.keep(weights)
    assert group.is_current()
    del weights[0]
    gc.collect()
    assert not group.is_current()


def test_bad_weights():
    with pytest.raises(ValueError, match="equal width"):
        dense_copies.keep([*quantised(64), *quantised(64, dtype=torch.float16)])
    packed, state = quantised(64)[0]
    with pytest.raises(ValueError, match="not transposed"):
        dense_copies.keep([(packed.t(), state)])
    nested = [
        state.absmax,
        state.shape,
        state.dtype,
        state.blocksize,
        [state.offset, [state.state2.absmax, state.state2.code, 256]],
        "nf4",
        state.code,
    ]
    with pytest.raises(TypeError, match="nested list of old versions"):
        dense_copies.keep([(packed, nested)])


@pytest.mark.parametrize("room", [True, False])
def test_products(room):
    weights = quantised(64, 32)
    group = dense_copies.keep(weights, **({"beside": 16, "below": 24} if room else {}))
    first, second = (dense_copies.copy_of(state, None, packed.device) for packed, state in weights)
    rows = [torch.randn(16, K), torch.zeros(8, K)]
    for number in range(2):  # what the first has left in the room is not in the second
        rows[0] = torch.randn(16, K)
        x = torch.randn(7, 96 + 24).to(torch.bfloat16)
        wanted = x.double() @ torch.cat([group.weight.double(), *(part.to(x.dtype).double() for part in rows)])
        found = dense_copies.product_below(x, group.weight, rows)
        assert ((found.double() - wanted).norm() / wanted.norm()) < 2**-8
        for weight, left in ((first, True), (second, False)):
            columns, x = (
                torch.randn(weight.shape[0], 8 + 8 * number),
                torch.randn(7, K + 8 + 8 * number).to(torch.bfloat16),
            )
            both = [columns.to(x.dtype).double(), weight.double()]
            wanted = x.double() @ torch.cat(both if left else both[::-1], 1).t()
            found = dense_copies.product_beside(x, weight, columns, left)
            assert ((found.double() - wanted).norm() / wanted.norm()) < 2**-8
            torch.library.opcheck(torch.ops.unsloth_ext.product_beside.default, (x, weight, columns, left))
    torch.library.opcheck(
        torch.ops.unsloth_ext.product_below.default, (torch.randn(7, 120).to(x.dtype), group.weight, rows)
    )
    for (packed, state), weight in zip(weights, (first, second), strict=True):
        assert torch.equal(weight, dequantize(packed, state))


def test_a_stranger_at_the_same_address_has_no_room():
    """A buffer that is gone, and a matrix of somebody else with its shape: nothing outside of it is touched."""
    weights = quantised(64)
    group = dense_copies.keep(weights, below=8)
    buffer = group.buffer
    dense_copies.drop([weights[0][1]])
    del group
    gc.collect()
    buffer[64:] = 7.0
    x = torch.randn(3, 72).to(torch.bfloat16)
    dense_copies.product_below(x, buffer[:64], [torch.randn(8, K)])
    assert (buffer[64:] == 7).all()


def test_what_is_written_beside_a_weight_is_no_change_of_it():
    """A product that autograd has saved the weight for, another with an adapter, and then the backward."""
    weights = quantised(64, 32, dtype=torch.float32)
    group = dense_copies.keep(weights, beside=8, below=8)
    weight = dense_copies.copy_of(weights[0][1], None, torch.device("cpu"))
    x = torch.randn(3, K, requires_grad=True)
    y = torch.nn.functional.linear(x, weight)
    dense_copies.product_beside(torch.randn(3, K + 8), weight, torch.randn(64, 8), True)
    dense_copies.product_below(torch.randn(3, 96 + 8), group.weight, [torch.randn(8, K)])
    y.sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(3, K))


def test_a_graph_takes_it_as_an_input():
    ((packed, state),) = quantised(64)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    run = torch.compile(lambda x: x @ dequantize(packed, state).t(), backend=counter, fullgraph=True, dynamic=True)

    def nodes():
        return any("dequantize_nf4" in str(node.target) for node in counter.graphs[-1].graph.nodes)

    x = torch.randn(3, K).to(torch.bfloat16)
    wanted = run(x)
    assert nodes() and counter.frame_count == 1
    dense_copies.keep([(packed, state)])
    for rows in (3, 5, 9):
        found = run(torch.cat([x, torch.zeros(rows - 3, K, dtype=x.dtype)]))
        torch.testing.assert_close(found[:3], wanted)
    assert not nodes() and counter.frame_count == 2
    dense_copies.drop([state])
    assert torch.equal(run(x), wanted) and counter.frame_count == 2


def test_bitsandbytes_linear_in_a_graph():
    """What plain transformers and peft compile: the gradient too."""
    import bitsandbytes

    import unsloth_ext.nf4.patch as patch

    packed, state = quantised(64, dtype=torch.float32)[0]
    matmul = patch._matmul_4bit(bitsandbytes.matmul_4bit)
    dense_copies.keep([(packed, state)])
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    bias = torch.randn(64)
    x = torch.randn(2, 3, K, requires_grad=True)
    run = torch.compile(lambda x: matmul(x, packed.t(), state, bias=bias), backend=counter, fullgraph=True)
    run(x).sum().backward()
    dense = dequantize(packed, state)
    torch.testing.assert_close(run(x), torch.nn.functional.linear(x, dense, bias))
    torch.testing.assert_close(x.grad, dense.sum(0).expand(2, 3, K))
    assert not any("4bit" in str(node.target) for node in counter.graphs[-1].graph.nodes)
