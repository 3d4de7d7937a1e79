"""On a card: `linear` against float64, through every way that leads to its kernels."""

import copy
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nf4_states import Spec, specs

from unsloth_ext.nf4 import dequantize, matmul_launch, matmul_plan, matmul_table
from unsloth_ext.nf4.matmul import linear
from unsloth_ext.nf4.matmul_table import Few, Many
from unsloth_ext.nf4.quant_state import read

pytestmark = pytest.mark.gpu

LARGE = Spec(rows=1024, columns=2048)


@pytest.fixture(autouse=True)
def no_warning():
    """Giving up on the kernels is a warning: no test may pass by falling back."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        yield
    assert matmul_plan._given_up == {}


def kernels_here():
    return matmul_table.enabled(torch.cuda.current_device())


def draw(*shape, dtype=torch.bfloat16, seed=0):
    return torch.randn(*shape, generator=torch.Generator("cuda").manual_seed(seed), dtype=dtype, device="cuda")


def error(y, x, packed, state, bias=None):
    """Relative to float64 with the weight in fp32, and the same of a dense weight and cuBLAS."""
    exact = dequantize(packed, state, dtype=torch.float32).double()
    right = x.double() @ exact.t() + (0 if bias is None else bias.double())
    dense = torch.nn.functional.linear(x, dequantize(packed, state, dtype=x.dtype), bias)
    norm = right.norm().clamp_min(1e-30)
    return ((y.double() - right).norm() / norm).item(), ((dense.double() - right).norm() / norm).item()


def as_good_as_dense(y, x, packed, state, bias=None):
    ours, theirs = error(y, x, packed, state, bias)
    return ours <= theirs * 1.1 + 1e-5


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    specs(
        rows=st.integers(1, 200),
        columns=st.sampled_from([64, 192, 2048]),
        blocksize=st.sampled_from([32, 64, 4096]),  # a variant is compiled for each of these
        blocksize2=256,
        dtype=st.sampled_from([torch.float16, torch.bfloat16]),
        magnitude="usual",
    ),
    st.sampled_from([1, 2, 4, 5, 8, 9, 16, 17, 40, 64]),
    st.booleans(),
)
def test_random_weights(spec, rows, with_bias):
    packed, state = spec.make("cuda")
    x = draw(rows, spec.columns, dtype=spec.dtype, seed=spec.seed)
    bias = draw(spec.rows, dtype=spec.dtype, seed=spec.seed + 1) if with_bias else None
    for _ in range(2):  # the second time by a plan, where there is one
        y = linear(x, packed, state, bias)
        assert y.isfinite().all() and as_good_as_dense(y, x, packed, state, bias), spec


SHAPES = [Few(), Few(fetch=False), Few(8), Few(16, registers=0), Many(64, 16), Many(64, 16, 128, split=4)]
SHAPES += [Many(128, 64, 128, warps=8), Many(128, 64, split=2, scale_sums=True, stages=5), Many(128, 256, 64, warps=8)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("nested", [False, True])
def test_every_launch_shape(shape, dtype, nested, monkeypatch):
    if not kernels_here():
        pytest.skip("no measured row for this card")
    monkeypatch.setattr(matmul_table, "processors", lambda index: 0)  # not in CUDA C++
    monkeypatch.setattr(matmul_table, "_few", lambda *_: shape)
    monkeypatch.setattr(matmul_table, "_many", lambda *_: shape)
    monkeypatch.setattr(matmul_table, "ROWS", 16 if isinstance(shape, Few) else 0)
    for rows in (1, 7, 16) if isinstance(shape, Few) else (3, 70):
        packed, state = Spec(rows=1000, columns=2048, dtype=dtype, nested=nested, seed=rows).make("cuda")
        x = draw(rows, 2048, dtype=dtype, seed=rows)
        y = torch.full((rows, 1000), float("nan"), dtype=dtype, device="cuda")
        assert matmul_plan.run(x, packed, read(state), None, y)
        assert as_good_as_dense(y, x, packed, state), (shape, rows)


def test_results_do_not_vary():
    packed, state = LARGE.make("cuda")
    for rows in (1, 8, 16, 64):
        x = draw(rows, 2048)
        first = linear(x, packed, state)
        assert all(torch.equal(linear(x, packed, state), first) for _ in range(20))


def test_planned_calls_follow_their_weight():
    packed, state = LARGE.make("cuda")
    x = draw(3, 2048)
    linear(x, packed, state)
    assert (id(state) in matmul_plan.plans) == kernels_here()
    for seed in range(1, 4):
        other, its_state = Spec(rows=1024, columns=2048, seed=seed).make("cuda")
        packed.data = other.data.clone()
        for name in ("absmax", "offset"):
            setattr(state, name, getattr(its_state, name).clone())
        state.state2 = copy.copy(its_state.state2)
        for _ in range(3):
            assert as_good_as_dense(linear(x, packed, state), x, packed, state)
        assert not kernels_here() or matmul_plan.plans[id(state)].is_of(state)  # the plan is of the new scales
    storage = packed.untyped_storage()
    size = storage.size()
    storage.resize_(0)  # as FSDP2 frees a gathered weight
    with pytest.raises(ValueError, match="packed has no storage"):
        linear(x, packed, state)
    storage.resize_(size)


def test_views_and_strides():
    packed, state = LARGE.make("cuda")
    whole = draw(2, 3, 4096)
    for x in (whole[..., :2048], whole[..., 1:2049], whole.transpose(0, 1)[..., 2048:], whole[0, 0, 2048:]):
        assert as_good_as_dense(linear(x, packed, state), x, packed, state)
    assert linear(whole[:0, :, :2048], packed, state).shape == (0, 3, 1024)


def test_in_a_cuda_graph():
    packed, state = LARGE.make("cuda")
    for rows in (1, 16, 64):
        x = draw(rows, 2048)
        linear(x, packed, state)  # compiled and verified outside
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = linear(x, packed, state)
            total = y.float().sum()
        for seed in (1, 2):
            packed.copy_(Spec(rows=1024, columns=2048, seed=seed).make("cuda")[0])
            x.copy_(draw(rows, 2048, seed=seed))
            graph.replay()
            assert as_good_as_dense(y, x, packed, state) and torch.equal(total, y.float().sum())


def test_first_used_while_a_graph_is_captured():
    packed, state = LARGE.make("cuda")
    x = draw(1, 2048)
    linear(x, packed, state)
    dequantize(packed, state)
    torch.mm(x, draw(2048, 8))
    matmul_plan.forget()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = linear(x, packed, state)
    graph.replay()
    assert as_good_as_dense(y, x, packed, state)


def test_it_waits_for_the_kernel_before_it():
    packed, state = Spec(rows=4096, columns=4096).make("cuda")
    xs = [draw(2, 4096, seed=i) for i in range(3)]
    rights = [linear(x, packed, state) for x in xs]
    x = torch.empty_like(xs[0])
    for i in range(60):
        torch.mul(xs[i % 3], 1.0, out=x)
        assert torch.equal(linear(x, packed, state) * 2, rights[i % 3] * 2)


def test_gradients():
    packed, state = LARGE.make("cuda")
    weight = dequantize(packed, state)
    for rows in (1, 16, 64, 700):
        x = draw(rows, 2048).requires_grad_()
        upstream = draw(rows, 1024, seed=1)
        linear(x, packed, state).backward(upstream)
        torch.testing.assert_close(x.grad, upstream @ weight)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(dynamic):
    packed, state = LARGE.make("cuda")

    @torch.compile(fullgraph=True, dynamic=dynamic)
    def layer(x, packed):
        return linear(x, packed, state) * 2

    for rows in (2, 5):
        x = draw(rows, 2048)
        assert as_good_as_dense(layer(x, packed) / 2, x, packed, state)


def test_opcheck():
    packed, state = LARGE.make("cuda")
    s = read(state)
    fields = (packed, s.absmax, s.code2, s.absmax2, s.offset, s.blocksize, s.blocksize2, list(s.shape))
    torch.library.opcheck(torch.ops.unsloth_ext.nf4_linear, (draw(3, 2048).requires_grad_(), *fields, None))


def test_kernels_that_are_wrong_are_not_used(monkeypatch):
    if not kernels_here():
        pytest.skip("no measured row for this card")
    matmul_plan.forget()
    launched = matmul_launch.launch

    def wrong(variant, x, packed, absmax, code2, absmax2, offset, bias, out):
        compiled = launched(variant, x, packed, absmax, code2, absmax2, offset, bias, out)
        out[0] += 1
        return compiled

    packed, state = LARGE.make("cuda")
    x = draw(3, 2048)
    with monkeypatch.context() as patched:
        patched.setattr(matmul_launch, "launch", wrong)
        with pytest.warns(RuntimeWarning, match="an NF4 matmul kernel .* is not used on .*: its result is off"):
            y = linear(x, packed, state)
    assert as_good_as_dense(y, x, packed, state) and matmul_plan._given_up
    matmul_plan.forget()
