"""linear_cross_entropy on a CPU: against full logits in fp64, its tiles against each other, and the Triton kernels by interpreter."""

import math
import random

import pytest
import torch
import torch.nn.functional as F
from linear_oracle import error, in_fp64, inputs, values
from torch.library import opcheck

from unsloth_ext.loss import cross_entropy_op as op
from unsloth_ext.loss import linear_softmax
from unsloth_ext.loss.cross_entropy import linear_cross_entropy
from unsloth_ext.loss.labelled_rows import LabelledRows
from unsloth_ext.loss.softmax import Options
from unsloth_ext.loss.workspace import MIN_COLUMNS, row_chunks

SETTINGS = [
    {},
    {"z_loss": 1e-2},
    {"label_smoothing": 0.1},
    {"softcap": 3.0, "logit_scale": 0.7},
    {"softcap": 3.0, "label_smoothing": 0.1, "z_loss": 1e-2, "logit_scale": -1.3},
]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Chunks of 16 and tiles of 256, several of each, in a workspace that does not hold them all."""
    monkeypatch.setattr(linear_softmax, "FAST", (30000, 256))
    monkeypatch.setattr(linear_softmax, "LEAN", (9000, 256))
    monkeypatch.setattr(op, "FAST", (30000, 256))
    monkeypatch.setattr(op, "LEAN", (9000, 256))
    monkeypatch.setattr(op, "LEAN_COLUMNS", 64)
    monkeypatch.setattr(linear_softmax, "BLOCK_COLUMNS", 40)
    monkeypatch.setattr(linear_softmax, "rows_of_chunk", lambda hidden_size: 16)


def oracle(
    hidden, weight, labels, bias, reduction="mean", divisor=None, *, label_smoothing=0.0, logit_scale=1.0, **settings
):
    value, _, _ = values(hidden, weight, labels, bias, smoothing=label_smoothing, scale=logit_scale, **settings)
    if reduction == "none":
        return value
    return value.sum() / (divisor or (1 if reduction == "sum" else max(1, (labels != -100).sum().item())))


@pytest.mark.parametrize("memory", ["fast", "lean", "auto"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize(
    "trained", [(True, True, True), (True, False, False), (False, True, False), (True, False, True)], ids=str
)
def test_value_and_gradients(settings, memory, trained):
    made = inputs(rows=random.choice([1, 17, 37, 64]), vocab_size=random.choice([3, 256, 301, 700]))
    hidden, weight, labels, bias = made
    for x, needed in zip((hidden, weight, bias), trained, strict=True):
        x.requires_grad_(needed)
    for reduction, extra in (("mean", {}), ("sum", {}), ("none", {}), ("mean", {"num_items_in_batch": 7})):
        loss = linear_cross_entropy(
            hidden, weight, labels, bias, reduction=reduction, memory=memory, **extra, **settings
        )
        expected = oracle(hidden, weight, labels, bias, reduction, extra.get("num_items_in_batch"), **settings)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
        wanted = [x for x in (hidden, weight, bias) if x.requires_grad]
        incoming = torch.randn_like(expected)
        found = torch.autograd.grad(loss, wanted, incoming)
        for a, b in zip(found, torch.autograd.grad(expected, wanted, incoming), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_no_gradient_wanted():
    hidden, weight, labels, bias = inputs()
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, labels, bias)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, oracle(hidden, weight, labels, bias))


def test_shift_is_the_causal_shift():
    hidden, weight, labels, bias = inputs(rows=36)
    hidden, labels = hidden.view(3, 12, -1), labels.view(3, 12)
    found = linear_cross_entropy(hidden, weight, labels, bias, shift=True)
    logits = hidden[:, :-1] @ weight.t() + bias
    torch.testing.assert_close(found, F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory", ["fast", "lean"])
def test_half_precision_rounds_once(dtype, memory):
    """A mean over 889 rows: 1 / 889 is no power of two, and must not be rounded before the gradients are.

    Measured against what one rounding of the exact gradients costs. In bf16 dz is rounded too, which makes it 1.15 times as
    much (1.12 to 1.18 in 500 draws); a rounded 1 / 889 might make it 2.1 times. fp16 gradients are stored before they are
    scaled, so the square root of three roundings is to be expected.
    """
    hidden, weight, labels, _ = inputs(rows=1111, hidden_size=64, vocab_size=900, dtype=dtype, bias=False)
    reference = in_fp64(hidden, weight)
    expected = torch.autograd.grad(oracle(*reference, labels, None), reference)
    times, limit = (1.35, 0.0020) if dtype == torch.bfloat16 else (2.0, 0.0006)
    for logits_dtype in (None, torch.float32):
        loss = linear_cross_entropy(hidden, weight, labels, memory=memory, logits_dtype=logits_dtype)
        for found, true in zip(torch.autograd.grad(loss, (hidden, weight)), expected, strict=True):
            assert found.dtype == dtype and error(found, true) < min(limit, times * error(true.to(dtype), true))


def test_fp16_gradients_survive_a_small_mean():
    """Elements of 1e-9 / N are below fp16: the loss scale must reach them before they are rounded."""
    hidden, weight, labels, _ = inputs(rows=64, hidden_size=32, vocab_size=500, dtype=torch.float16, bias=False)
    reference = in_fp64(hidden, weight)
    true = torch.autograd.grad(oracle(*reference, labels, None, divisor=4e6) * 65536, reference[0])[0]
    loss = linear_cross_entropy(hidden, weight.detach(), labels, num_items_in_batch=4e6) * 65536
    assert error(torch.autograd.grad(loss, hidden)[0], true) < 0.002


@pytest.mark.parametrize("trained", [True, False])
def test_fp16_gradients_survive_the_usual_loss_scale(trained):
    """65536 is where GradScaler begins: times a mean's coefficient it may be more than fp16 holds, the gradients are not."""
    hidden, weight, labels, _ = inputs(rows=100, hidden_size=32, vocab_size=500, dtype=torch.float16, bias=False)
    wanted = (hidden, weight.requires_grad_(trained)) if trained else (hidden,)
    reference = in_fp64(hidden, weight)
    true = torch.autograd.grad(oracle(*reference, labels, None) * 65536, reference[: len(wanted)])
    loss = linear_cross_entropy(hidden, weight if trained else weight.detach(), labels) * 65536
    for found, expected in zip(torch.autograd.grad(loss, wanted), true, strict=True):
        assert error(found, expected) < 0.001


def test_fp32_logits_are_more_exact_than_full_bf16_logits():
    hidden, weight, labels, _ = inputs(
        rows=64, hidden_size=64, vocab_size=900, dtype=torch.bfloat16, spread=6.0, bias=False
    )
    reference = in_fp64(hidden, weight)
    true = values(*reference, labels)[0]
    rounded = linear_cross_entropy(hidden, weight, labels, reduction="none")
    exact = linear_cross_entropy(hidden, weight, labels, reduction="none", logits_dtype=torch.float32)
    assert error(exact, true) < 1e-6
    assert error(rounded, true) > 1000 * error(exact, true)


def test_confident_rows_keep_their_gradient():
    """p of the label rounds to 1 in fp32: 1 - p must not be 0."""
    weight = torch.eye(8, 8) * 25
    hidden = torch.eye(8, 8).requires_grad_()
    labels = torch.arange(8)
    reference = in_fp64(hidden, weight)
    for memory in ("fast", "lean"):
        loss = linear_cross_entropy(hidden, weight, labels, reduction="sum", memory=memory)
        true = oracle(*reference, labels, None, "sum")
        assert loss.item() == pytest.approx(7 * 8 * math.exp(-25), rel=1e-4)
        assert error(torch.autograd.grad(loss, hidden)[0], torch.autograd.grad(true, reference[0])[0]) < 1e-4


def test_rows_whose_maximum_climbs_from_tile_to_tile():
    """Each tile exceeds the last by hundreds: the reference moves, and what was summed is rescaled."""
    hidden, weight, labels, bias = inputs(rows=20, vocab_size=900)
    steps = torch.arange(900, dtype=torch.float64) // 128 * 300
    bias = (steps - torch.where(torch.arange(900) < 128, math.inf, 0.0)).requires_grad_()
    for settings in ({}, {"z_loss": 1e-6}):
        loss = linear_cross_entropy(hidden, weight, labels.clamp(min=200), bias, **settings)
        expected = oracle(hidden, weight, labels.clamp(min=200), bias, **settings)
        torch.testing.assert_close(loss, expected)
        for a, b in zip(
            torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(expected, (hidden, weight)), strict=True
        ):
            torch.testing.assert_close(a, b)


def test_all_ignored_and_empty():
    for rows in (0, 9):
        hidden, weight, labels, bias = inputs(rows=rows)
        for memory in ("fast", "lean"):
            for trained in (True, False):
                loss = linear_cross_entropy(
                    hidden, weight.requires_grad_(trained), torch.full_like(labels, -100), bias, memory=memory
                )
                assert loss.item() == 0
                wanted = (hidden, weight, bias) if trained else (hidden, bias)
                assert all((g == 0).all() for g in torch.autograd.grad(loss, wanted))
        assert linear_cross_entropy(hidden, weight, labels, bias, reduction="none").shape == (rows,)


@pytest.mark.parametrize("label", [301, -1, 2**40])
def test_labels_out_of_range_make_their_row_nan(label):
    hidden, weight, labels, bias = inputs()
    labels[7] = label
    value = linear_cross_entropy(hidden, weight.detach(), labels, bias.detach(), reduction="none")
    assert value[7].isnan() and not value[8:].isnan().any()
    grad = torch.autograd.grad(value.sum(), hidden)[0]
    assert grad[7].isnan().all() and not grad[8:].isnan().any() and not grad[:7].isnan().any()
    assert linear_cross_entropy(hidden, weight, labels, bias).isnan()


def test_nan_logits_are_not_hidden():
    for at, ignored in ((7, False), (5, True)):  # row 5 is ignored
        hidden, weight, labels, bias = inputs()
        with torch.no_grad():
            hidden[at] = math.nan
        value = linear_cross_entropy(hidden, weight, labels, bias, reduction="none")
        assert value.isnan().sum() == (0 if ignored else 1)
    hidden, weight, labels, bias = inputs()
    with torch.no_grad():
        weight[int(labels[7])] = math.nan  # the label's own logit
    assert linear_cross_entropy(hidden, weight, labels, bias).isnan()


def test_backward_twice_and_two_uses():
    hidden, weight, labels, bias = inputs()
    for wanted in ((hidden, weight, bias), (hidden,)):
        w, b = (weight, bias) if len(wanted) == 3 else (weight.detach(), bias.detach())
        loss = linear_cross_entropy(hidden, w, labels, b)
        first = torch.autograd.grad(loss * 3, wanted, retain_graph=True)
        kept = [x.clone() for x in first]
        second = torch.autograd.grad(loss, wanted)
        for a, b_, c in zip(first, kept, second, strict=True):
            assert torch.equal(a, b_)  # what was handed out stays
            torch.testing.assert_close(a, 3 * c)
        both = linear_cross_entropy(hidden, w, labels, b)
        torch.testing.assert_close(
            torch.autograd.grad(both + both * both.detach(), hidden)[0], kept[0] / 3 * (1 + both.detach())
        )


def test_checkpoint_and_accumulation():
    hidden, weight, labels, bias = inputs(rows=40)
    run = lambda h: linear_cross_entropy(h * 2, weight, labels, bias)  # noqa: E731
    plain = torch.autograd.grad(run(hidden), (hidden, weight))
    for reentrant in (False, True):
        again = torch.utils.checkpoint.checkpoint(run, hidden, use_reentrant=reentrant)
        again.backward()
        torch.testing.assert_close((hidden.grad, weight.grad), plain)
        hidden.grad = weight.grad = bias.grad = None
    items = (labels != -100).sum()
    for part in (slice(0, 13), slice(13, 40)):
        (linear_cross_entropy(hidden[part] * 2, weight, labels[part], bias, num_items_in_batch=items)).backward()
    torch.testing.assert_close((hidden.grad, weight.grad), plain)


def test_autocast_and_mixed_dtypes():
    hidden, weight, labels, bias = (
        x if x is None or not x.is_floating_point() else x.detach().float().requires_grad_() for x in inputs()
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, labels, bias)
    assert loss.dtype == torch.float32
    assert {g.dtype for g in torch.autograd.grad(loss, (hidden, weight, bias))} == {torch.float32}
    found = linear_cross_entropy(hidden.bfloat16(), weight, labels, bias)  # fp32 weights, bf16 activations
    torch.testing.assert_close(found, loss)


def test_strided_inputs():
    hidden, weight, labels, bias = inputs(rows=38)
    wide = torch.randn(38, 100, dtype=torch.float64, requires_grad=True)
    tall = torch.randn(24, 301, dtype=torch.float64, requires_grad=True)
    found = linear_cross_entropy(wide[:, 3:27], tall.t(), labels.view(2, 19).t().reshape(38), bias)
    expected = oracle(wide[:, 3:27], tall.t(), labels.view(2, 19).t().reshape(38), bias)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, (wide, tall)), torch.autograd.grad(expected, (wide, tall)))


@pytest.mark.parametrize("need", [(True, True, True), (True, False, False), (False, True, True), (False, False, False)])
def test_operators_pass_opcheck(need):
    hidden, weight, labels, bias = inputs(rows=18, vocab_size=50)
    settings = (-100, 1.0, 2.0, 1.0, 0.1, 0.0)
    given = [x.requires_grad_(n) for x, n in zip((hidden, weight, bias), need, strict=True)]
    one = torch.tensor(0.3, dtype=torch.float64)
    for memory in ("fast", "lean"):
        opcheck(op.summed_loss, (*given, labels, one, *settings, *need, torch.float64, memory))
        opcheck(op.token_losses, (*given, labels, *settings[:3], 0.7, 0.1, 0.0, True, need[0], torch.float64, memory))


def test_whole_graph_compile():
    hidden, weight, labels, bias = inputs(rows=40)

    def step(hidden, labels):
        return linear_cross_entropy(hidden * 2, weight, labels, bias) + linear_cross_entropy(
            hidden, weight.detach(), labels
        )

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (40, 23, 31):
        found, expected = compiled(hidden[:rows], labels[:rows]), step(hidden[:rows], labels[:rows])
        torch.testing.assert_close(found, expected)
        wanted = (hidden, weight, bias)
        torch.testing.assert_close(torch.autograd.grad(found, wanted), torch.autograd.grad(expected, wanted))


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.89, 0.95, 1.0])
def test_labelled_rows_are_those_that_nonzero_finds(share):
    for rows in (0, 1, random.randint(2, 300), 5000):
        keep = torch.rand(rows) < share
        expected = keep.nonzero()[:, 0]
        found = LabelledRows.of(keep).indices()
        if 0 < len(expected) < 0.9 * rows:
            assert torch.equal(found, expected) and found.dtype == torch.int64
        else:
            assert found is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("trained", [(True, True, True), (True, False, False), (False, True, False)], ids=str)
def test_the_loss_of_labelled_rows_is_that_of_the_rows_taken_out(trained, dtype):
    """To the bit, for a gradient that comes in and for a second backward through a graph that was kept."""
    rows = random.choice([40, 41, 97])
    hidden, weight, labels, bias = inputs(rows=rows, dtype=dtype, ignored=random.choice([2, 3]))
    wanted = [
        x for x, needed in zip((hidden, weight, bias), trained, strict=True) if x.requires_grad_(needed).requires_grad
    ]
    chosen = (labels != -100).nonzero()[:, 0]
    factor = torch.tensor(3.0)
    for extra in (
        {},
        {"reduction": "sum"},
        {"num_items_in_batch": torch.tensor(11)},
        {"z_loss": 0.01, "memory": "lean"},
    ):

        def run(hidden, labels, extra=extra, **keywords):
            loss = linear_cross_entropy(hidden, weight, labels, bias, **extra, **keywords)
            first, second = (torch.autograd.grad(loss * factor, wanted, retain_graph=again) for again in (True, False))
            with torch.no_grad():
                return (
                    loss.detach(),
                    *first,
                    *second,
                    linear_cross_entropy(hidden, weight, labels, bias, **extra, **keywords),
                )

        found = run(hidden, labels, labelled=LabelledRows.of(labels != -100))
        expected = run(hidden.index_select(0, chosen), labels[chosen])
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b) and a.dtype == b.dtype, extra


def test_labelled_rows_that_do_not_fit_say_so():
    hidden, weight, labels, _ = inputs()
    with pytest.raises(ValueError, match="labelled was made for 36 rows, hidden has 37"):
        linear_cross_entropy(hidden, weight, labels, labelled=LabelledRows.of(labels[1:] != -100))
    with pytest.raises(ValueError, match="labelled rows are summed"):
        linear_cross_entropy(hidden, weight, labels, reduction="none", labelled=LabelledRows.of(labels != -100))
    loss = linear_cross_entropy(hidden, weight, labels, labelled=LabelledRows.of(labels != -100))
    (gradient,) = torch.autograd.grad(loss * loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


BAD = [
    ({"reduction": "avg"}, ValueError, "reduction must be one of"),
    ({"memory": "small"}, ValueError, "memory must be one of"),
    ({"softcap": 0.0}, ValueError, "softcap must be positive"),
    ({"label_smoothing": 1.5}, ValueError, "label_smoothing"),
    ({"logits_dtype": torch.float16}, ValueError, "logits_dtype"),
    ({"reduction": "none", "num_items_in_batch": 3}, ValueError, "num_items_in_batch"),
    ({"weight": torch.zeros(301, 23)}, ValueError, "do not fit"),
    ({"weight": torch.zeros(301, 24, dtype=torch.uint8)}, TypeError, "dequantize"),
    ({"labels": torch.zeros(36, dtype=torch.long)}, ValueError, "labels has shape"),
    ({"labels": torch.zeros(37)}, TypeError, "integer"),
    ({"bias": torch.zeros(300)}, ValueError, "bias has shape"),
]


@pytest.mark.parametrize(("change", "kind", "words"), BAD, ids=[words for _, _, words in BAD])
def test_wrong_arguments_say_so(change, kind, words):
    hidden, weight, labels, bias = inputs(dtype=torch.float32)
    if "logits_dtype" in change:
        hidden, weight, bias = hidden.bfloat16(), weight.bfloat16(), bias.bfloat16()
    with pytest.raises(kind, match=words):
        linear_cross_entropy(**{"hidden": hidden, "weight": weight, "labels": labels, "bias": bias} | change)


def test_chunks_cover_all_rows_and_fit_their_memory():
    for _ in range(300):
        rows, hidden_size, vocab_size = (
            random.randint(1, 70000),
            random.choice([64, 2048, 4096, 8192]),
            random.randint(10, 270000),
        )
        extra = random.choice([1 << 20, 12 << 20, 118 << 20])
        logit_bytes, most_rows = random.choice([2, 4]), random.choice([1024, 2048])
        start = 0
        for chunk in row_chunks(
            rows, hidden_size, vocab_size, logit_bytes=logit_bytes, acc_bytes=4, row_bytes=2 * hidden_size, extra=extra,
            most_rows=most_rows, most_columns=26112,
        ):  # fmt: skip
            assert chunk.start == start and 1 <= chunk.rows <= most_rows
            tail = (rows - start - chunk.rows) * 2 * hidden_size
            logits, product = chunk.rows * chunk.columns * logit_bytes, chunk.rows * hidden_size * 4
            used = {True: 0, False: 0}
            used[chunk.logits_in_tail] += logits
            used[chunk.product_in_tail] += product
            assert used[True] <= tail and used[False] <= extra
            assert chunk.columns >= min(vocab_size, 256) and chunk.columns % 256 in (0, vocab_size % 256)
            if extra > 4 << 20:
                assert chunk.columns >= min(MIN_COLUMNS, vocab_size) // 2  # even tiles may be narrower
            start += chunk.rows
        assert start == rows


KERNELS = """
import sys; sys.path[:0] = {path!r}
import torch
from linear_oracle import values, inputs, in_fp64, error
from unsloth_ext.loss import softmax, linear_softmax
from unsloth_ext.loss.softmax import Options
assert softmax.INTERPRETED
torch.manual_seed({seed})
linear_softmax.rows_of_chunk = lambda d: 16
for dtype, spread, settings in [(torch.float32, 1.0, dict()), (torch.float32, 90.0, dict(z_loss=1e-3)), (torch.float32, 2.0, dict(softcap=3.0, scale=1.7, temperature=0.6)),
                                (torch.float32, 2.0, dict(smoothing=0.1, softcap=2.0)), (torch.bfloat16, 1.0, dict(smoothing=0.2)), (torch.float16, 1.0, dict())]:
    hidden, weight, labels, bias = inputs(rows=11, vocab_size=1300, dtype=dtype, ignored=4)
    hidden.data *= spread
    ref = in_fp64(hidden, weight, bias)
    value, logp, entropy = values(ref[0], ref[1], labels, ref[2], **settings)
    truth = torch.autograd.grad(value.sum(), ref)
    options = Options(**({{"softcap": 0.0}} | settings), entropy=True)
    exact = dtype == torch.float32
    # The interpreter cuts the low half off where it converts to bfloat16: by up to 2**-7 of the value, always towards 0.
    close = {{torch.float32: 3e-6 * max(1, spread), torch.bfloat16: 2**-7, torch.float16: 1e-3}}[dtype]
    with torch.no_grad():
        for wide in ({{None, torch.float32}} if not exact else {{None}}):
            out = torch.full_like(hidden, float("nan"))
            found = linear_softmax.token_losses(hidden, weight, bias, labels, options, out=out, sizes=(100000, 1024), logits_dtype=wide)
            bare = linear_softmax.token_losses(hidden, weight, bias, labels, options, sizes=(100000, 1024), logits_dtype=wide)
            for a, b in ((found.value, value), (bare.value, value), (found.entropy, entropy), (bare.entropy, entropy), (out, truth[0])):
                off = (a - b).abs().max() / 4 if b is entropy else error(a, b)  # an entropy near 0 is the difference of large numbers
                assert off < close, (dtype, spread, settings, wide, off)
            dw, db = torch.full_like(weight, float("nan")), torch.full_like(bias, float("nan"))
            linear_softmax.weight_gradient(hidden, weight, bias, labels, found, None, None, options, dw, db, 512, logits_dtype=wide)
            assert error(dw, truth[1]) < close * 2 and error(db, truth[2]) < close * 2, (dtype, spread, settings, wide)
            dx, dw, db = (torch.full_like(x, float("nan")) for x in (hidden, weight, bias))
            whole = linear_softmax.chunked_gradients(hidden, weight, bias, labels, Options(**({{"softcap": 0.0}} | settings)), dx, dw, db, rows_per_chunk=6, logits_dtype=wide)
            for a, b in ((whole.value, value), (dx, truth[0]), (dw, truth[1]), (db, truth[2])):
                assert error(a, b) < close * 2, (dtype, spread, settings, wide, error(a, b))
g = torch.randn(11, 24); x = g.clone(); k = torch.randn(11)
softmax.scale_(x, k); assert torch.equal(x, g * k[:, None])
softmax.scale_(x, torch.tensor(2.0)); assert torch.equal(x, g * k[:, None] * 2)
print("same")
"""


def test_kernels_by_interpreter(python):
    import pathlib

    path = [str(pathlib.Path(__file__).parent), str(pathlib.Path(__file__).parents[2])]
    code = KERNELS.format(path=path, seed=random.randrange(10**6))
    assert "same" in python(code, TRITON_INTERPRET="1", OMP_NUM_THREADS="1").stdout


def test_operators_do_not_hide_the_options_they_take():
    """Options fields and the operators' arguments go by position."""
    assert list(Options.__dataclass_fields__) == [
        "ignore_index",
        "scale",
        "softcap",
        "temperature",
        "smoothing",
        "z_loss",
        "entropy",
    ]
