"""On a card: the bits of Unsloth's own norms, alone and with the additions beside them, and of its compiled layers with and without."""

import pytest
import torch
from on_card import NEEDS, on_card

from unsloth_ext.compiling import norms_operators as ours

pytestmark = NEEDS
CARD, EPS = "cuda", 1e-5
WIDTHS = [2048, 4096, 5120, 8192, 14336, 256, 1001, 3001, 6147]


@pytest.fixture(scope="module")
def theirs():
    import unsloth  # noqa: F401
    from unsloth.kernels.rms_layernorm import Fast_RMS_Layernorm

    return Fast_RMS_Layernorm


def given(shape, dtype, weight_dtype):
    # Rows of very different sizes, one of zeros.
    scale = torch.exp2(torch.randint(-8, 9, (*shape[:-1], 1), device=CARD).float())
    x, other, dy = ((torch.randn(shape, device=CARD) * scale).to(dtype) for _ in range(3))
    x[..., :1, :], other[..., :1, :] = 0, 0
    return x, other, dy, torch.empty(shape[-1], device=CARD).uniform_(-1.5, 1.5).to(weight_dtype)


def same(a, b):
    kind = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return a.shape == b.shape and torch.equal(a.view(kind), b.view(kind))  # zeros with their signs


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("wide_weight", [False, True])
def test_the_bits_of_unsloths_kernels(theirs, width, dtype, wide_weight):
    for shape in ((2, 515, width), (1, 1, width)):
        x, other, dy, weight = given(shape, dtype, torch.float32 if wide_weight else dtype)
        total, y, rstd = ours.add_rms_norm(x, other, weight, EPS)
        leaf = (x + other).requires_grad_()
        wanted = theirs.apply(leaf, weight, EPS)
        (wanted_dx,) = torch.autograd.grad(wanted, leaf, dy.clone())
        assert same(total, leaf.detach()) and same(y, wanted.detach())
        alone, again = ours.rms_norm(total, weight, EPS)
        assert same(alone, y) and same(again, rstd)
        dx = ours.rms_norm_backward(dy, total, weight, rstd)
        assert same(dx, wanted_dx)
        assert same(ours.rms_norm_backward_add(dy, total, weight, rstd, other), wanted_dx + other)


def test_long_indices():
    rows, width = 2**31 // 8192 + 3, 8192
    a, b = (torch.ones(rows, width, device=CARD, dtype=torch.bfloat16) for _ in range(2))
    weight = torch.ones(width, device=CARD, dtype=torch.bfloat16)
    a[-1] = 3
    total, y, rstd = ours.add_rms_norm(a, b, weight, 0.0)
    assert (total[-1] == 4).all() and (y[-1] == 1).all() and rstd[-1].item() == 0.25 and (total[0] == 2).all()
    del y
    dx = ours.rms_norm_backward_add(b, total, weight, rstd, a)
    assert (dx[-1] == 3).all() and (dx[0] == 1).all()


def test_less_time_than_one_by_one(theirs):
    import triton

    x, other, dy, weight = given((8192, 4096), torch.bfloat16, torch.bfloat16)
    _, rstd = ours.rms_norm(x, weight, EPS)
    time = triton.testing.do_bench

    def separate():
        return ours.rms_norm(x + other, weight, EPS)

    assert time(lambda: ours.add_rms_norm(x, other, weight, EPS)) < 0.95 * time(separate)
    fused = time(lambda: ours.rms_norm_backward_add(dy, x, weight, rstd, other))
    assert fused < 0.85 * time(lambda: ours.rms_norm_backward(dy, x, weight, rstd) + other)


def test_unsloths_compiled_layers(tmp_path):
    found = on_card("norms_on_card.py", tmp_path)
    assert found["equal"] == [True, True], found
    assert {1, 2} <= set(found["fused counts"]) and found["separate counts"] == found["unsloth counts"] == [], found
    # The whole step in one graph: two layers, and the norm after them.
    assert found["breaks"] == 0 and max(found["step counts"]) >= 4, found
    assert max(found["step difference"]) < 0.05, found


def test_a_memory_budget_around_them(tmp_path):
    found = on_card("norms_on_card.py", tmp_path, "64GiB")
    assert found["budget equal"] and found["outlines"], found
