"""RMS norms with the addition beside them: values against float64, bits against the passes one by one, and what the pass takes.

Unsloth's own norms are in norms_on_unsloth.py, in processes of their own.
"""

import json
import os
import subprocess
import sys
import types
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from unsloth_ext.compiling import graph_passes, norms_fusion, small_kernels
from unsloth_ext.compiling import norms_operators as operators
from unsloth_ext.compiling.norms_patch import PATCHES, _in_graphs, _in_layers
from unsloth_ext.patching import NotHere

needs_unsloth = pytest.mark.skipif(find_spec("unsloth") is None, reason="Unsloth is not installed: make setup")
EPS = 1e-5
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def weight_of(width, dtype):
    return torch.nn.Parameter(torch.empty(width).uniform_(0.5, 1.5).to(dtype), requires_grad=False)


def exact(x, weight, dy):
    x = x.detach().double().requires_grad_()
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight.double()
    y.backward(dy.double())
    return y.detach(), x.grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 19, 256), (7, 1001), (1, 3, 2, 130), (384,), (0, 256)])
@pytest.mark.parametrize("wide_weight", [False, True])
def test_values_and_gradients(dtype, shape, wide_weight):
    x, other, dy = (torch.randn(shape).to(dtype) for _ in range(3))
    weight = weight_of(shape[-1], torch.float32 if wide_weight else dtype)
    near = 4 * torch.finfo(dtype).eps
    total, y, rstd = operators.add_rms_norm(x, other, weight, EPS)
    alone = operators.rms_norm(total, weight, EPS)
    dx = operators.rms_norm_backward(dy, total, weight, rstd)
    wanted_y, wanted_dx = exact(total, weight, dy)
    torch.testing.assert_close(y.double(), wanted_y, rtol=near, atol=near)
    torch.testing.assert_close(dx.double(), wanted_dx, rtol=near, atol=near)
    assert torch.equal(total, x + other) and torch.equal(y, alone[0]) and torch.equal(rstd, alone[1])
    assert rstd.shape == (x.numel() // shape[-1],) and rstd.dtype == torch.float32 and y.dtype == dx.dtype == dtype
    added = operators.rms_norm_backward_add(dy, total, weight, rstd, other.flatten())
    assert torch.equal(added, (dx + other).flatten())


@pytest.mark.parametrize("dtype", DTYPES)
def test_operators(dtype):
    x, other, dy = (torch.randn(3, 5, 160).to(dtype) for _ in range(3))
    weight, rstd = weight_of(160, dtype), torch.rand(15)
    check = torch.library.opcheck
    check(operators.rms_norm, (x.clone().requires_grad_(), weight, EPS))
    check(operators.rms_norm, (x.transpose(0, 1), weight, EPS))
    check(operators.rms_norm_backward, (dy, x, weight, rstd))
    check(operators.add_rms_norm, (x, other, weight, EPS))
    check(operators.rms_norm_backward_add, (dy, x, weight, rstd, other.flatten(0, 1)))
    leaf = x.clone().requires_grad_()
    y, kept = operators.rms_norm(leaf, weight, EPS)
    y.backward(dy)
    assert torch.equal(leaf.grad, operators.rms_norm_backward(dy, x, weight, kept))
    with pytest.raises(ValueError, match="a and b must be alike"):
        operators.add_rms_norm(x, other[:1], weight, EPS)
    with pytest.raises(ValueError, match="other must be like dy"):
        operators.rms_norm_backward_add(dy, x, weight, rstd, other.double())
    with pytest.raises(ValueError, match="weight must be frozen"):
        operators.rms_norm(leaf, weight.detach().clone().requires_grad_(), EPS)


def test_refusals():
    x, weight = torch.randn(2, 256).bfloat16(), weight_of(256, torch.bfloat16)
    why = operators.refusal
    assert why(x, weight) == why(x, weight.float()) == ""
    assert why(x.to("meta"), weight) == "it is no NVIDIA card"
    assert why(x.double(), weight) == "the input is torch.float64"
    assert why(x.half(), weight) == "the weight is of another dtype"
    assert why(x, weight.detach().clone().requires_grad_()) == "the weight is trained"
    assert why(x[:, :128], weight) == why(x, weight[None]) == "the weight is not the input's"
    assert why(x[:, :128], weight[:128]) == "rows are too short or too long"


H = 256


class Net(torch.nn.Module):
    """A decoder layer's residual stream: norm, product, sum, norm, product, sum."""

    def __init__(self, layers=1, dtype=torch.bfloat16, flat=False):
        super().__init__()
        self.flat, self.layers = flat, layers
        self.norms = torch.nn.ParameterList([weight_of(H, dtype) for _ in range(2 * layers)])
        self.weights = torch.nn.ParameterList([(torch.randn(H, H) / 16).to(dtype) for _ in range(2 * layers)])

    def forward(self, x):
        for norm, weight in zip(self.norms, self.weights, strict=True):
            given = x.view(-1, H) if self.flat else x  # views between the sums and the norms
            y = operators.rms_norm(given, norm, EPS)[0].view(-1, H)
            x = x + (y @ weight).view(x.shape)
        return x


def run(net, function, x, outer):
    net.zero_grad()
    x = x.clone().requires_grad_()
    y = function(x)
    y.backward(outer)
    return [y.detach(), x.grad, *(weight.grad for weight in net.weights)]


@pytest.fixture
def taken(monkeypatch):
    """How many additions the pass takes, graph by graph."""
    counts, plain = [], norms_fusion.fuse
    monkeypatch.setattr(norms_fusion, "fuse", lambda graph: counts.append(plain(graph)) or counts[-1])
    torch._dynamo.reset()
    with torch.compiler.config.patch(force_disable_caches=True):
        yield counts
    torch._dynamo.reset()


def compiled(function, **options):
    return torch.compile(
        function, fullgraph=True, dynamic=True, options=options | {graph_passes.ENTRY: graph_passes.pass_over_graphs}
    )


@pytest.mark.extended
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
def test_the_pass(taken, layers, flat):
    """Every sum before a norm and every norm's gradient before a sum; the bits of the same graph without the pass."""
    net = Net(layers, flat=flat)
    fused, separate = compiled(net), torch.compile(net, fullgraph=True, dynamic=True)
    for length in (19, 33, 7):
        x, outer = (torch.randn(2, length, H).bfloat16() for _ in range(2))
        ours = run(net, fused, x, outer)
        assert taken == [2 * layers - 1, 2 * layers]  # the last sum is the result
        assert all(map(torch.equal, ours, run(net, separate, x, outer)))
        assert len(taken) == 2


@pytest.mark.extended
def test_the_pass_with_checkpointing(taken):
    from torch.utils.checkpoint import checkpoint

    net, (x, outer) = Net(), (torch.randn(2, 19, H).bfloat16() for _ in range(2))
    ours = run(net, compiled(lambda x: checkpoint(net, x, use_reentrant=False)), x, outer)
    assert all(map(torch.equal, ours, run(net, net, x, outer))) and sum(taken) >= 4


def graph_of(function, *tensors):
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(function, tracing_mode="fake")(*tensors)


def additions(function, *tensors):
    """(how many the pass took, whether the results are the same)."""
    graph = graph_of(function, *tensors)
    before = graph(*tensors)
    count = norms_fusion.fuse(graph.graph)
    graph.graph.lint()
    graph.recompile()
    return count, all(map(torch.equal, before, graph(*tensors)))


def test_what_the_pass_takes():
    a, b = (torch.randn(3, 5, H).bfloat16() for _ in range(2))
    weight, rstd = weight_of(H, torch.bfloat16).data, torch.rand(15)
    norm, back = operators.rms_norm, operators.rms_norm_backward

    def count(function, a=a, b=b, w=weight):
        taken, same = additions(function, a, b, w, rstd)
        assert same
        return taken

    def before(change=lambda x: x, add=torch.add):
        return lambda a, b, w, r: (lambda x: (x, *norm(change(x), w, EPS), x.view(-1)))(add(a, b))

    assert count(before()) == 1
    assert count(before(lambda x: x.view(15, H))) == count(before(lambda x: x.view(5, 3, H).view(-1, H))) == 1
    assert count(before(lambda x: x * 2)) == 0
    assert count(before(add=lambda a, b: torch.add(a, b, alpha=2))) == count(before(add=lambda a, b: a + 1.0)) == 0
    assert count(before(), b=b[:1]) == count(before(), b=b[..., :1]) == 0  # broadcast
    assert count(before(add=lambda a, b: a + b * 2)) == 0  # Inductor would not round b * 2
    assert count(before(add=lambda a, b: a + (b.view(15, H) @ b.view(15, H).t() @ a.view(15, H)).view(a.shape))) == 1
    swapped = lambda a, b, w, r: norm(a + b, w, EPS)  # noqa: E731
    assert count(swapped, a.transpose(0, 1), b.transpose(0, 1)) == 0
    assert count(swapped, a.float(), b.float(), weight.float()) == 0
    assert count(swapped, a.float(), b) == 0

    def late(a, b, w, r):
        x = a + b
        return norm(x, x.view(-1, H)[0] * 0 + w, EPS)  # the weight is there after the sum only

    def twice(a, b, w, r):
        x = a + b
        return *norm(x, w, EPS), *norm(x, w, 2 * EPS)

    assert count(late) == 0 and count(twice) == 1

    def after(use):
        return lambda a, b, w, r: use(back(a, b, w, r), a, b)

    def read(x):
        return x, x.float()

    assert count(after(lambda dx, a, b: (a + dx,))) == count(after(lambda dx, a, b: (dx + a, b))) == 1
    assert count(after(lambda dx, a, b: (dx.view(15, H) + b.view(15, H),))) == 1
    assert count(after(lambda dx, a, b: (dx + a, dx))) == 0  # somebody else reads dx
    assert count(after(lambda dx, a, b: (dx + dx,))) == count(after(lambda dx, a, b: (dx + a * 2,))) == 0
    assert count(after(lambda dx, a, b: ((dx + a).float(),))) == 0  # nor would it round the sum before float()
    assert count(after(lambda dx, a, b: read(dx + a))) == 1
    assert count(after(lambda dx, a, b: (dx.float() + a.float(),))) == 0
    assert count(lambda a, b, w, r: (a + b, a * b)) == 0  # no norm at all


def test_the_pass_names_itself_for_the_cache():
    from torch._inductor.custom_graph_pass import CustomGraphPass

    assert isinstance(graph_passes.pass_over_graphs, CustomGraphPass)
    assert graph_passes.pass_over_graphs.uuid() == type(graph_passes.pass_over_graphs)().uuid() is not None


def test_compile_model_has_it_unless_somebody_else_has_set_it(monkeypatch):
    monkeypatch.setenv("UNSLOTH_EXT_SMALL_KERNELS", "1")
    ours = graph_passes.options()
    assert ours[graph_passes.ENTRY] is graph_passes.pass_over_graphs
    assert ours[small_kernels.ENTRY] is small_kernels.together and len(ours) == 3
    for entry in (graph_passes.ENTRY, small_kernels.ENTRY):
        with torch._inductor.config.patch({entry: lambda given: None}):
            assert entry not in graph_passes.options() and graph_passes.options().items() <= ours.items()


INTERPRETED = """
import torch
from unsloth_ext.compiling import norms_kernel as kernel
from unsloth_ext.compiling import norms_operators as operators
for dtype, weight_dtype, rows, width in (
    (torch.float16, torch.float16, 3, 256), (torch.float16, torch.float16, 5, 1001), (torch.float16, torch.float32, 1, 4096),
    (torch.bfloat16, torch.float32, 2, 384), (torch.float32, torch.float32, 2, 130), (torch.float16, torch.float16, 0, 256),
):
    a, b, dy = (torch.randn(rows, width).to(dtype) for _ in range(3))
    weight = torch.empty(width).uniform_(0.5, 1.5).to(weight_dtype)
    near = dict(rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)
    exactly = dict(rtol=0, atol=0)
    if dtype == torch.bfloat16:  # the interpreter rounds to it otherwise, and takes its bits for integers in a product
        near = exactly = dict(rtol=2**-6, atol=2**-6)
    wanted = operators.add_rms_norm(a, b, weight, 1e-5)
    total, y, rstd = torch.full_like(a, 7), torch.full_like(a, 7), torch.full((rows,), 7.0)
    kernel.rms_norm(a, b, weight, 1e-5, total, y, rstd)
    torch.testing.assert_close(total, wanted[0], **exactly)
    torch.testing.assert_close(y, wanted[1], **near)
    torch.testing.assert_close(rstd, wanted[2], rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=0)
    alone, again = torch.full_like(a, 7), torch.full((rows,), 7.0)
    kernel.rms_norm(total, None, weight, 1e-5, None, alone, again)
    assert torch.equal(alone, y) and torch.equal(again, rstd)
    dx, added = torch.full_like(a, 7), torch.full_like(a, 7)
    kernel.rms_norm_backward(dy, total, weight, rstd, None, dx)
    kernel.rms_norm_backward(dy, total, weight, rstd, b, added)
    torch.testing.assert_close(dx, operators.rms_norm_backward(dy, total, weight, rstd), **near)
    torch.testing.assert_close(added, dx + b, **exactly)
"""


def python(arguments, cwd=None, **variables):
    env = {name: value for name, value in os.environ.items() if not name.startswith("UNSLOTH")}
    env |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | variables
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), env.get("PYTHONPATH", ""))))
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-6000:]
    return done.stdout


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_kernel_interpreted():
    python(["-c", INTERPRETED], TRITON_INTERPRET="1")


def on_unsloth(tmp_path, *parts, **variables):
    script = str(Path(__file__).with_name("norms_on_unsloth.py"))
    said = python([script, *parts], cwd=tmp_path, UNSLOTH_COMPILE_LOCATION=str(tmp_path / "cache"), **variables)
    found = json.loads(said.splitlines()[-1])
    assert found.pop("restored")
    assert found.pop("states") == {"compiling.norms": "applied", "compiling.fused_norms": "applied"}
    return found


@needs_unsloth
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton's interpreter compiles nothing")
def test_beside_unsloths_norms(tmp_path):
    found = on_unsloth(tmp_path, "launches", "arithmetic", "routes")
    assert found["launches"] == []
    assert not any(found["arithmetic"].values()), found["arithmetic"]
    taken = {name for name, ours in found["routes"].items() if ours}
    assert taken == {"plain", "eps", "options", "fp32 weight", "everywhere"}


@needs_unsloth
@pytest.mark.extended
def test_unsloths_kernel_interpreted(tmp_path):
    assert on_unsloth(tmp_path, "interpreted", TRITON_INTERPRET="1") == {"interpreted": []}


@needs_unsloth
@pytest.mark.extended
def test_in_unsloths_compiled_layers(tmp_path):
    found = on_unsloth(tmp_path, "layers")["layers"]
    assert found == {"separate counts": [], "fused counts": [1, 2]}  # the layer's last sum meets no norm in its graph


@needs_unsloth
@pytest.mark.extended
def test_memory_levels_find_norms_in_fused_layers(tmp_path):
    found = on_unsloth(tmp_path, "levels")["levels"]
    assert found["taken"][:2] == [1, 2] and found["norms"] == ["post_attention_layernorm"], found
    assert {count for level, count in found["counts"].items() if not level.startswith("layer")} == {2}


@needs_unsloth
def test_on_the_installed_unsloth():
    from unsloth_ext.patching.release import folder_of
    from unsloth_ext.patching.survey import survey

    rows = survey(PATCHES, {"unsloth": folder_of("unsloth")})
    assert {row.id: row.state for row in rows} == dict.fromkeys(
        ("compiling.norms", "compiling.fused_norms"), "applied"
    ), rows


def test_the_switch(monkeypatch):
    norms = types.SimpleNamespace(
        _TRACEABLE=True, fast_rms_layernorm=lambda layernorm, X: X, _NUM_WARPS={}, _settings=_settings_of_ours
    )
    blocks = types.SimpleNamespace(_COMPILE_OPTIONS={})
    monkeypatch.delenv("UNSLOTH_EXT_FUSED_NORMS", raising=False)
    cards = torch.cuda.device_count()
    measured = cards and {torch.cuda.get_device_capability(i) for i in range(cards)} == {(9, 0)}
    for patch, module in zip(PATCHES, (norms, blocks), strict=True):
        assert not patch.is_switched_off
        if not measured:
            with pytest.raises(NotHere, match="FUSED_NORMS=1"):
                patch.changes(module, None)
    monkeypatch.setenv("UNSLOTH_EXT_FUSED_NORMS", "1")
    assert len(_in_graphs(norms, None)) == 1 and len(_in_layers(blocks, None)) == len(graph_passes.options())
    with pytest.raises(NotHere, match="does not trace"):
        _in_graphs(types.SimpleNamespace(_TRACEABLE=False), None)
    with pytest.raises(NotHere, match="somebody else"):
        _in_layers(types.SimpleNamespace(_COMPILE_OPTIONS={graph_passes.ENTRY: print}), None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda card=None: (9, 0))
    norms._settings = lambda width, card: (0, 0) if width == 512 else _settings_of_ours(width, card)
    with pytest.raises(NotHere, match="otherwise, rows of 512:"):
        _in_graphs(norms, None)
    monkeypatch.setenv("UNSLOTH_EXT_FUSED_NORMS", "0")
    assert all(patch.is_switched_off for patch in PATCHES)


def _settings_of_ours(width, card):
    from unsloth_ext.compiling.norms_kernel import settings

    return settings(width, tuple(torch.cuda.get_device_capability(card)))
