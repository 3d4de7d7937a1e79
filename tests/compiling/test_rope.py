"""Rotary embedding as an operator: values, gradients, the kernel's bits, and when it is taken."""

import os
import subprocess
import sys
import types
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from unsloth_ext.compiling.as_traced import as_traced, like_compiled
from unsloth_ext.compiling.rope import refusal, rotate
from unsloth_ext.compiling.rope_patch import PATCHES, _routed, _traced
from unsloth_ext.patching import NotHere

needs_unsloth = pytest.mark.skipif(find_spec("unsloth") is None, reason="Unsloth is not installed: make setup")


def case(dtype, batch=2, length=19, heads=4, width=32, positions=False):
    x = torch.randn(batch, length, heads, width).to(dtype)
    angle = torch.randn(length + 7, width // 2).repeat(1, 2)
    at = torch.randint(length + 7, (batch * length,), dtype=torch.int32) if positions else None
    return x, angle.cos().to(dtype), angle.sin().to(dtype), at


def exact(x, cos, sin, positions):
    half = x.shape[-1] // 2
    rows = torch.arange(x.shape[1]).repeat(x.shape[0]) if positions is None else positions
    cos, sin = (table.double()[rows, :half].view(*x.shape[:2], 1, half) for table in (cos, sin))
    left, right = x.double().split(half, -1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)


@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "memory", [(0, 1, 2, 3), (0, 2, 1, 3), (0, 2, 3, 1)]
)  # the last: what makes K^T gives its gradient so
def test_values_and_gradients(dtype, positions, memory):
    x, cos, sin, at = case(dtype, positions=positions)
    x = x.permute(memory).contiguous().permute([memory.index(i) for i in range(4)])
    x.requires_grad_()
    out, wanted = rotate(x, cos, sin, at), exact(x, cos, sin, at)
    assert out.dtype == dtype and out.is_contiguous()
    torch.testing.assert_close(out.double(), wanted, rtol=torch.finfo(dtype).eps, atol=1e-6)
    outer = torch.randn_like(out)
    out.backward(outer)
    wide = x.detach().double().requires_grad_()
    exact(wide, cos, sin, at).backward(outer.double())
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=torch.finfo(dtype).eps, atol=1e-6)
    torch.library.opcheck(torch.ops.unsloth_ext.rotate.default, (x, cos, sin, at, False))


INTERPRETED = """
import torch
from unsloth_ext.compiling import rope, rope_kernel
for dtype in (torch.float16, torch.bfloat16):
    for shape, positions in (((2, 5, 3, 32), False), ((1, 9, 20, 12), True), ((2, 3, 1, 128), True), ((1, 0, 2, 8), False)):
        x = torch.randn(shape[0], shape[2], shape[1], shape[3]).to(dtype).transpose(1, 2)
        tables = [torch.randn(16, shape[3]).to(dtype) for _ in range(2)]
        at = torch.randint(16, (shape[0] * shape[1],)) if positions else None
        for back in (False, True):
            found, wanted = rope_kernel.rotate(x, *tables, at, back), rope._rotate(x, *tables, at, back)
            if dtype == torch.bfloat16:  # the interpreter cuts where a card rounds
                torch.testing.assert_close(found, wanted, rtol=2**-7, atol=1e-6)
            else:
                assert torch.equal(found, wanted)
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_kernel_interpreted():
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), env.get("PYTHONPATH", ""))))
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_refusals():
    q, cos, sin, _ = case(torch.bfloat16)
    q = q.transpose(1, 2)
    assert refusal(q, q, cos, sin) == ""
    assert refusal(q, q, cos.float(), sin) == refusal(q.float(), q.float(), cos, sin) == "not all of one 16-bit dtype"
    assert refusal(*(one.to("meta") for one in (q, q, cos, sin))) == "on another kind of device, or on several"
    assert refusal(q, q, cos.to("meta"), sin) == "on another kind of device, or on several"
    assert refusal(q[..., 1:], q, cos, sin) == refusal(q, q, cos[None], sin) == "of other shapes"


def test_a_compiled_backward_of_attention_that_makes_k_transposed():
    x, cos, sin, _ = case(torch.bfloat16)
    k, q = x.transpose(1, 2).contiguous().requires_grad_(), torch.randn(2, 4, 19, 32).bfloat16()

    def scores(k):
        return q @ rotate(k.transpose(1, 2), cos, sin).transpose(1, 2).transpose(-1, -2)

    torch._dynamo.reset()
    grads = [torch.autograd.grad(f(k).sum(), k)[0] for f in (torch.compile(scores, fullgraph=True), scores)]
    torch.testing.assert_close(*grads, rtol=2**-6, atol=2**-6)


def test_the_route():
    """Unsloth's own outside of a graph, ours in one, and in a run that must have a graph's bits."""
    seen = []

    def original(Q, K, cos, sin, rope_embedding_indices=None):
        seen.append(1)
        return Q, K

    route = _routed(original)
    q, cos, sin, at = case(torch.bfloat16, positions=True)
    q = q.transpose(1, 2)
    given = q, q[:, :2], cos[None], sin[None]
    assert route(*given)[0] is q and seen == [1] and not as_traced()
    torch._dynamo.reset()
    traced = torch.compile(route, backend="aot_eager", fullgraph=True)
    with like_compiled():
        again = route(*given), route(*given, at.view(2, -1))
    assert seen == [1]
    for found, wanted in zip((traced(*given), traced(*given, at.view(2, -1))), again, strict=True):
        assert all(
            torch.equal(a, b) and a.shape == b.shape and a.stride() == b.stride()
            for a, b in zip(found, wanted, strict=True)
        )
    torch.testing.assert_close(
        again[1][1].double(), exact(q.transpose(1, 2)[:, :, :2], cos, sin, at).transpose(1, 2), rtol=2**-7, atol=1e-6
    )
    traced(*(one.float() for one in given))
    assert seen == [1, 1]  # wider tables: Unsloth's


def test_the_switch(monkeypatch):
    (patch,) = PATCHES
    module = types.SimpleNamespace(fast_rope_embedding=lambda *args: None)
    monkeypatch.setenv(patch.switch, "1")
    (change,) = _traced(module, patch.targets[0])
    assert change.name == "fast_rope_embedding"
    monkeypatch.delenv(patch.switch)
    if not torch.cuda.is_available():
        with pytest.raises(NotHere, match="not measured on this card"):
            _traced(module, patch.targets[0])


@needs_unsloth
def test_on_the_installed_unsloth():
    from unsloth_ext.patching.release import folder_of
    from unsloth_ext.patching.survey import survey

    (row,) = survey(PATCHES, {"unsloth": folder_of("unsloth")})
    assert (row.id, row.state) == ("compiling.rope", "applied"), row
