"""Dense copies of NF4 weights: what hangs where, and who reads them."""

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
    ((packed, state),) = quantised(64, dtype=dtype, nested=nested)
    kept = dense_copies.keep(packed, state)
    assert kept.nbytes == dense_copies.size_of(state) == 64 * K * dtype.itemsize
    found = dense_copies.copy_of(state, dtype, packed.device)
    dense_copies.drop([state])
    assert dense_copies.copy_of(state, dtype, packed.device) is None
    assert torch.equal(found, dequantize(packed, state)) and not found.requires_grad
    dense_copies.keep(packed, state)
    assert dense_copies.copy_of(state, torch.float64, packed.device) is None
    assert dense_copies.copy_of(state, None, torch.device("meta")) is None


def test_a_copied_or_saved_state_has_none():
    ((packed, state),) = quantised(64)
    dense_copies.keep(packed, state)
    for other in (copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
        assert dense_copies.copy_of(other, None, packed.device) is None
        assert torch.equal(dequantize(packed, other), dequantize(packed, state))
    assert not any("dense" in name for name in state.as_dict(packed=True))


def test_what_is_written_to_is_noticed():
    weights = quantised(64, 32)
    kept = [dense_copies.keep(*weight) for weight in weights]
    weights[1][0].zero_()
    assert kept[0].is_current() and not kept[1].is_current()
    del weights
    gc.collect()
    assert not kept[0].is_current()


def test_bad_weights():
    packed, state = quantised(64)[0]
    with pytest.raises(ValueError, match="not transposed"):
        dense_copies.keep(packed.t(), state)
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
        dense_copies.keep(packed, nested)


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
    dense_copies.keep(packed, state)
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
    dense_copies.keep(packed, state)
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
