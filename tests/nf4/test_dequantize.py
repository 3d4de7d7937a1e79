"""The public function on a CPU: every form of a state, bad input, the operator, and what a plan notices."""

import copy
import gc
import pickle
import weakref

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given, settings
from nf4_states import Spec, as_list, bits, expected, specs
from torch._subclasses.fake_tensor import FakeTensorMode

from unsloth_ext.nf4 import dequantization, dequantize, launch
from unsloth_ext.nf4.quant_state import read

USUAL = {"magnitude": "usual"}


@settings(max_examples=80, deadline=None)
@given(specs(**USUAL))
def test_random_states(spec):
    packed, state = spec.make()
    out = dequantize(packed, state)
    # One packed byte looks alike both ways; bitsandbytes takes a first dimension of 1 for a transposed weight.
    out = out.t() if len(packed) == 1 else out
    assert out.shape == state.shape and out.dtype == state.dtype and out.is_contiguous()
    assert torch.equal(bits(out), bits(expected(packed, state)))


def test_equals_bitsandbytes_on_quantised_weights():
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        packed, state = bnb.quantize_4bit(torch.randn(64, 128, dtype=dtype), compress_statistics=True, quant_type="nf4")
        assert torch.equal(dequantize(packed, state), bnb.dequantize_4bit(packed, state))


@pytest.mark.parametrize("nested", [False, True])
def test_list_states(nested):
    packed, state = Spec(nested=nested).make()
    assert torch.equal(dequantize(packed, as_list(state)), expected(packed, state))


def test_a_transposed_weight_gives_a_transposed_result():
    packed, state = Spec().make()
    out = dequantize(packed.t(), state)
    assert out.shape == state.shape[::-1] and torch.equal(out, expected(packed, state).t())


def test_out_is_written_and_returned():
    packed, state = Spec().make()
    out = torch.full(state.shape, float("nan"), dtype=state.dtype)
    assert dequantize(packed, state, out=out) is out and torch.equal(out, expected(packed, state))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_another_dtype(dtype):
    packed, state = Spec().make()
    assert torch.equal(dequantize(packed, state, dtype=dtype), expected(packed, state, dtype))


@pytest.mark.parametrize("offset", [0.25, torch.tensor(0.25, dtype=torch.float64), torch.tensor([0.25])])
def test_an_offset_of_any_form(offset):
    packed, state = Spec().make()
    state.offset = torch.tensor(0.25)
    right = expected(packed, state)
    state.offset = offset
    assert torch.equal(dequantize(packed, state), right)


@pytest.mark.parametrize("shape", [(0, 64), (64, 0)])
def test_zero_elements(shape):
    packed, state = Spec(rows=1, columns=64).make()
    state.shape, state.absmax = torch.Size(shape), state.absmax[:0]
    out = dequantize(packed[:0], state)
    assert out.shape == shape and out.dtype == state.dtype


def bad(what, **changes):
    return pytest.param(what, changes, id=what + "-" + "-".join(changes))


@pytest.mark.parametrize(
    ("what", "changes"),
    [
        bad("quant type 'nf4', got 'fp4'", quant_type="fp4"),
        bad("dtype must be", dtype=torch.float64),
        bad("blocksize must be a power of two", blocksize=96),
        bad("blocksize must be a power of two", blocksize=16),
        bad("absmax must have 12 entries", absmax=torch.zeros(5, dtype=torch.uint8)),
        bad("absmax must be torch.uint8", absmax=torch.zeros(12)),
        bad("absmax must be on cpu", absmax=torch.zeros(12, dtype=torch.uint8, device="meta")),
        bad("offset must be given", offset=None),
        bad("offset must be one number", offset=torch.zeros(2)),
        bad("packed must hold 386 bytes", shape=torch.Size([4, 193])),
    ],
)
def test_bad_states(what, changes):
    packed, state = Spec().make()
    for name, value in changes.items():
        setattr(state, name, value)
    with pytest.raises(ValueError, match=what):
        dequantize(packed, state)


@pytest.mark.parametrize(
    ("what", "field", "value"),
    [
        (r"state2.absmax must be torch.float32", "absmax", torch.zeros(1, dtype=torch.float16)),
        (r"state2.absmax must have 1 entries", "absmax", torch.zeros(0)),
        (r"state2.code must have 256 entries", "code", torch.zeros(16)),
        (r"state2.code must be contiguous", "code", torch.zeros(512)[::2]),
        (r"state2.blocksize must be a power of two, got 100", "blocksize", 100),
    ],
)
def test_bad_nested_states(what, field, value):
    packed, state = Spec().make()
    setattr(state.state2, field, value)
    with pytest.raises(ValueError, match=what):
        dequantize(packed, state)


@pytest.mark.parametrize(
    ("what", "out"),
    [
        ("out must be torch.bfloat16, got torch.float16", torch.empty(8, 96, dtype=torch.float16)),
        (r"out must have shape \(8, 96\), got \(96, 8\)", torch.empty(96, 8, dtype=torch.bfloat16)),
        ("out must be contiguous", torch.empty(96, 8, dtype=torch.bfloat16).t()),
        ("out must be on cpu, got meta", torch.empty(8, 96, dtype=torch.bfloat16, device="meta")),
    ],
)
def test_bad_out(what, out):
    packed, state = Spec().make()
    with pytest.raises(ValueError, match=what):
        dequantize(packed, state, out=out)


def test_bad_packed():
    packed, state = Spec().make()
    with pytest.raises(ValueError, match="packed must hold 384 bytes"):
        dequantize(packed[1:], state)
    with pytest.raises(ValueError, match="packed must be contiguous"):
        dequantize(packed.repeat(1, 2)[:, :1], state)
    with pytest.raises(TypeError, match="packed must be a tensor, got list"):
        dequantize([1, 2], state)
    with pytest.raises(ValueError, match="quant type 'nf4', got 'NoneType'"):
        dequantize(packed, None)


def fields(packed, state):
    s = read(state)
    return packed, s.absmax, s.code2, s.absmax2, s.offset, s.blocksize, s.blocksize2


@pytest.mark.parametrize("nested", [False, True])
def test_opcheck(nested):
    packed, state = Spec(nested=nested).make()
    torch.library.opcheck(
        torch.ops.unsloth_ext.dequantize_nf4, (*fields(packed, state), list(state.shape), state.dtype)
    )
    out = torch.empty(state.shape, dtype=state.dtype)
    torch.library.opcheck(torch.ops.unsloth_ext.dequantize_nf4_out, (*fields(packed, state), out))


@pytest.mark.parametrize("form", ["state", "list", "transposed", "out"])
def test_compiles_without_a_graph_break(form):
    packed, state = Spec().make()
    if form == "list":
        state = as_list(state)
    elif form == "transposed":
        packed = packed.t()
    out = torch.empty(8, 96, dtype=torch.bfloat16) if form == "out" else None

    def layer(x, packed):
        weight = dequantize(packed, state, out=out)
        return x @ (weight if form == "transposed" else weight.t())

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (3, 5):
        x = torch.randn(rows, 96, dtype=torch.bfloat16)
        assert torch.equal(compiled(x, packed), layer(x, packed))


def test_fake_tensors():
    packed, state = Spec().make()
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = dequantize(torch.empty(packed.shape, dtype=torch.uint8), state)
    assert fake.shape == state.shape and fake.dtype == state.dtype


def test_a_state_copies_and_pickles_as_before():
    packed, state = Spec().make()
    before = set(vars(state))
    dequantize(packed, state)
    assert set(vars(state)) == before
    for other in (copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
        assert torch.equal(dequantize(packed, other), dequantize(packed, state))


# -- plans, with a launcher that only records ---------------------------------------------------------------------------------


@pytest.fixture
def planned(monkeypatch):
    """planned(spec) -> (packed, state, plan, launches). The "card" has index -1, which is what a CPU tensor answers."""
    monkeypatch.setattr(launch, "codes", lambda index: torch.tensor([1.0]))
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 77, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: -1, raising=False)
    device = torch.device

    def make(spec):
        packed, state = spec.make()
        launches = []
        variant = launch.Variant(-1, state.dtype, state.blocksize, 256, True, False, launch.Shape(1, 4))
        with monkeypatch.context() as patched:
            patched.setattr(torch, "device", lambda *where: device("cpu"))
            dequantization._remember(state, read(state), packed, variant, lambda *call: launches.append(call))
        return packed, state, dequantization.plans[id(state)], launches

    yield make
    dequantization.forget()


def test_a_plan_reads_addresses_afresh(planned):
    packed, state, plan, launches = planned(Spec())
    out = plan(packed, state, None)
    assert out.shape == state.shape and out.dtype == state.dtype
    grid, stream, *addresses, n = launches[-1]
    tensors = (packed, state.absmax, state.state2.code, state.state2.absmax, state.offset)
    assert (grid, stream, n) == (1, 77, 768) and addresses[:5] == [t.data_ptr() for t in tensors]
    assert addresses[6] == out.data_ptr()
    moved = packed.clone()  # another tensor, or the same one with new storage: as FSDP2 gathers a weight again
    packed.data = moved.clone()
    for weight in (moved, packed):
        plan(weight, state, None)
        assert launches[-1][2] == weight.data_ptr()
    assert plan(packed.t(), state, None).shape == state.shape[::-1]
    assert plan(packed, state, out) is out


@pytest.mark.parametrize(
    "change",
    [
        lambda p, s: setattr(s, "absmax", s.absmax.clone()),
        lambda p, s: setattr(s, "dtype", torch.float16),
        lambda p, s: setattr(s, "shape", torch.Size([16, 48])),
        lambda p, s: setattr(s, "blocksize", 128),
        lambda p, s: setattr(s, "offset", s.offset.clone()),
        lambda p, s: setattr(s, "state2", copy.copy(s.state2)),
        lambda p, s: setattr(s, "state2", None),
        lambda p, s: setattr(s.state2, "code", s.state2.code.clone()),
        lambda p, s: setattr(s.state2, "absmax", s.state2.absmax.clone()),
        lambda p, s: setattr(s.state2, "blocksize", 128),
        lambda p, s: setattr(p, "data", p.data[:100]),
        lambda p, s: setattr(p, "data", p.data.repeat(1, 2)[:, :1]),
        lambda p, s: p.untyped_storage().resize_(0),
        lambda p, s: s.absmax.untyped_storage().resize_(0),
        lambda p, s: s.absmax.set_(s.absmax.clone()),
        lambda p, s: s.state2.absmax.set_(s.state2.absmax.clone()),
        lambda p, s: setattr(p, "data", torch.empty(385, 1, dtype=torch.uint8)[1:]),
    ],
)
def test_a_plan_steps_aside_when_something_changed(planned, change):
    packed, state, plan, launches = planned(Spec())
    change(packed, state)
    assert plan(packed, state, None) is None and launches == []


def test_a_plan_steps_aside_on_another_device_and_for_a_profiler(planned, monkeypatch):
    packed, state, plan, launches = planned(Spec())
    enter, _ = launch.hooks()
    enter.add(print)
    try:
        assert plan(packed, state, None) is None
    finally:
        enter.remove(print)
    assert plan(packed.to("meta"), state, None) is None or packed.to("meta").get_device() == -1
    assert plan(packed, state, torch.empty(8 * 96 + 1, dtype=torch.bfloat16)[1:].view(8, 96)) is None


def test_plans_keep_nothing_alive(planned):
    packed, state, _, _ = planned(Spec())
    key, watch = id(state), weakref.ref(state.absmax)
    state.absmax = state.absmax.clone()
    gc.collect()
    assert watch() is None
    del state
    gc.collect()
    assert key not in dequantization.plans
