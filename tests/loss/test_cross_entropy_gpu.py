"""On a card: the kernels against fp64, no waiting for the card, CUDA graphs, compile, and the memory that is promised."""

import random

import pytest
import torch
from linear_oracle import error, in_fp64, inputs, values

from unsloth_ext import card_memory
from unsloth_ext.loss import cross_entropy_op as op
from unsloth_ext.loss.chunk_size import rows_per_chunk
from unsloth_ext.loss.cross_entropy import linear_cross_entropy
from unsloth_ext.loss.labelled_rows import LabelledRows
from unsloth_ext.loss.logprobs import linear_logprobs

pytestmark = pytest.mark.gpu

LIMITS = {torch.bfloat16: 0.0026, torch.float16: 0.0005, torch.float32: 2e-6}


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("memory", ["fast", "lean"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"z_loss": 1e-3}, {"label_smoothing": 0.1}, {"softcap": 5.0}, {"softcap": 5.0, "label_smoothing": 0.1}],
    ids=str,
)
def test_against_fp64(dtype, memory, settings):
    rows, size, vocab = (
        random.choice([1, 77, 1024, 1300]),
        random.choice([64, 200, 256]),
        random.choice([5, 1000, 5003, 40000]),
    )
    hidden, weight, labels, bias = inputs(rows, size, vocab, dtype=dtype, device="cuda", spread=2.0, ignored=7)
    renamed = {k if k != "label_smoothing" else "smoothing": v for k, v in settings.items()}
    reference = in_fp64(hidden, weight, bias)
    value, _, _ = values(reference[0], reference[1], labels, reference[2], **renamed)
    count = max(1, int((labels != -100).sum()))
    true = torch.autograd.grad(value.sum() / count, reference)
    for logits_dtype in (None, torch.float32):
        loss = linear_cross_entropy(hidden, weight, labels, bias, memory=memory, logits_dtype=logits_dtype, **settings)
        assert abs(loss.item() - value.sum().item() / count) <= 3e-3 * abs(value.sum().item() / count) + 1e-6
        limit = LIMITS[dtype] * (1 if logits_dtype else 2)  # rounded logits add their own
        for found, expected in zip(torch.autograd.grad(loss, (hidden, weight, bias)), true, strict=True):
            assert error(found, expected) < limit or expected.norm() < 1e-9
        frozen = linear_cross_entropy(
            hidden, weight.detach(), labels, bias.detach(), memory=memory, logits_dtype=logits_dtype, **settings
        )
        assert error(torch.autograd.grad(frozen, hidden)[0], true[0]) < limit or true[0].norm() < 1e-9


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("dtype", LIMITS)
def test_logprobs_against_fp64(dtype, trained):
    hidden, weight, labels, _ = inputs(1100, 256, 5003, dtype=dtype, device="cuda", spread=2.0, ignored=7)
    weight.requires_grad_(trained)
    reference = in_fp64(hidden, weight)
    _, logp, entropy = values(*reference, labels, temperature=0.8)
    g, ge = torch.randn(2, 1100, device="cuda")
    wanted = (hidden, weight) if trained else (hidden,)
    for use in (lambda x, y: (x * g).sum(), lambda x, y: (x * g + y * ge).sum()):
        found = linear_logprobs(hidden, weight, labels, temperature=0.8, entropy=True)
        assert error(found[0], logp) < 1e-6 and error(found[1], entropy) < 1e-5
        true = torch.autograd.grad(use(logp, entropy), reference[: len(wanted)], retain_graph=True)
        for a, b in zip(torch.autograd.grad(use(*found), wanted), true, strict=True):
            assert error(a, b) < max(LIMITS[dtype], 5e-6)


@pytest.mark.parametrize("memory", ["auto", "fast", "lean"])
@pytest.mark.parametrize("trained", [False, True])
def test_nothing_waits_for_the_card(memory, trained):
    hidden, weight, labels, _ = inputs(2500, 256, 5003, dtype=torch.bfloat16, device="cuda")
    weight.requires_grad_(trained)

    def step():
        logp, entropy = linear_logprobs(hidden, weight, labels, entropy=True, mask=labels != 3, memory=memory)
        loss = linear_cross_entropy(hidden, weight, labels, memory=memory, shift=True) + (logp + 0.1 * entropy).mean()
        loss.backward()
        return loss.detach()

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("memory", ["fast", "lean"])
def test_replays_in_a_cuda_graph(trained, memory):
    hidden, weight, labels, _ = inputs(1300, 256, 5003, dtype=torch.bfloat16, device="cuda")
    weight.requires_grad_(trained)
    wanted = (hidden, weight) if trained else (hidden,)

    def step():
        loss = linear_cross_entropy(hidden, weight, labels, memory=memory)
        return loss.detach(), *torch.autograd.grad(loss, wanted)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        hidden.copy_(torch.randn_like(hidden))
        labels.copy_(torch.randint_like(labels, 5003))
    graph.replay()
    for a, b in zip(captured, step(), strict=True):
        assert torch.equal(a, b)  # the same kernels in the same order


def test_compiles_to_one_graph():
    hidden, weight, labels, _ = inputs(1024, 256, 5003, dtype=torch.bfloat16, device="cuda")

    def step(hidden, labels):
        return (
            linear_cross_entropy(hidden * 2, weight, labels) + linear_logprobs(hidden, weight.detach(), labels).mean()
        )

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for rows in (1024, 700):
        found, expected = compiled(hidden[:rows], labels[:rows]), step(hidden[:rows], labels[:rows])
        torch.testing.assert_close(found, expected)
        for a, b in zip(
            torch.autograd.grad(found, (hidden, weight)), torch.autograd.grad(expected, (hidden, weight)), strict=True
        ):
            assert error(a, b) < 0.004


def test_grad_scaler_and_fp16():
    hidden, weight, labels, _ = inputs(2000, 128, 5003, dtype=torch.float16, device="cuda")
    reference = in_fp64(hidden, weight)
    true = torch.autograd.grad(values(*reference, labels)[0].sum() / (labels != -100).sum() * 65536, reference[0])[0]
    scaler = torch.amp.GradScaler("cuda", init_scale=65536.0)
    found = torch.autograd.grad(scaler.scale(linear_cross_entropy(hidden, weight.detach(), labels)), hidden)[0]
    assert error(found, true) < 0.001


@pytest.mark.parametrize("trained", [False, True])
def test_labelled_rows_wait_for_their_count_alone(trained):
    hidden, weight, labels, _ = inputs(3000, 256, 5003, dtype=torch.bfloat16, device="cuda", ignored=3)
    weight.requires_grad_(trained)
    wanted = (hidden, weight) if trained else (hidden,)
    chosen = (labels != -100).nonzero()[:, 0]
    expected = linear_cross_entropy(hidden[chosen], weight, labels[chosen])
    expected = [expected, *torch.autograd.grad(expected, wanted)]
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            for _ in range(2):
                torch.cuda._sleep(10**8)  # the host is ahead
                torch.cuda.set_sync_debug_mode("error")
                try:  # waiting for an event is none of what this mode sees
                    loss = linear_cross_entropy(hidden, weight, labels, labelled=LabelledRows.of(labels != -100))
                    found = [loss, *torch.autograd.grad(loss, wanted)]
                finally:
                    torch.cuda.set_sync_debug_mode("default")
                for a, b in zip(found, expected, strict=True):  # on another stream cuBLAS may choose otherwise
                    assert torch.equal(a, b) if stream == torch.cuda.default_stream() else error(a, b) < 1e-3


def test_free_memory_decides_what_it_would_decide_if_it_were_always_asked(monkeypatch):
    hidden = torch.empty(4096, 512, device="cuda", dtype=torch.bfloat16)
    weight = torch.empty(32000, 512, device="cuda", dtype=torch.bfloat16)
    torch.empty(1 << 30, dtype=torch.uint8, device="cuda")  # the allocator holds it unused
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    assert card_memory.free_bytes(hidden.device) == free
    asked = []
    driver = torch.cuda.mem_get_info
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *a: asked.append(a) or driver(*a))
    assert 1 << 30 <= card_memory.free_bytes(hidden.device, 1 << 29) <= free and not asked
    assert not op._is_lean("auto", hidden, weight, False) and op.memory_ahead(hidden, weight, False) == "fast"
    assert rows_per_chunk("auto", 4096, 1000, 512, False, hidden.device) == 512 and not asked
    torch.cuda.empty_cache()
    assert not op._is_lean("auto", hidden, weight, False) and len(asked) == 1


@pytest.mark.parametrize(
    ("trained", "memory", "mib"), [(False, "fast", 250), (False, "lean", 140), (True, "lean", 1280)]
)
def test_peak_memory_at_the_main_shape(trained, memory, mib):
    if torch.cuda.get_device_properties(0).total_memory < 16 << 30:
        pytest.skip("needs 16 GiB")
    hidden = torch.randn(16384, 4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.empty(128256, 4096, device="cuda", dtype=torch.bfloat16).normal_(std=0.02).requires_grad_(trained)
    labels = torch.randint(0, 128256, (16384,), device="cuda")
    for _ in range(2):
        hidden.grad = weight.grad = None
        base = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        linear_cross_entropy(hidden, weight, labels, memory=memory).backward()
        peak = (torch.cuda.max_memory_allocated() - base) / 2**20
    assert peak <= mib


def test_bad_rows():
    hidden, weight, labels, _ = inputs(1300, 256, 5003, dtype=torch.bfloat16, device="cuda", ignored=0)
    labels[5], labels[6], labels[7] = 5003, -1, -100
    with torch.no_grad():
        hidden[1200] = torch.nan
    for memory in ("fast", "lean"):
        value = linear_cross_entropy(hidden, weight, labels, reduction="none", memory=memory)
        assert value.isnan().nonzero()[:, 0].tolist() == [5, 6, 1200] and value[7] == 0
        grad = torch.autograd.grad(value.sum(), hidden)[0]
        assert grad.isnan().any(1).nonzero()[:, 0].tolist() == [5, 6, 1200] and (grad[7] == 0).all()
        loss = linear_cross_entropy(hidden[:5], weight, torch.full_like(labels[:5], -100), memory=memory)
        assert loss == 0 and all((g == 0).all() for g in torch.autograd.grad(loss, (hidden, weight)))


def test_logits_that_climb_by_hundreds():
    hidden = torch.ones(40, 16, device="cuda", requires_grad=True)
    weight = (torch.arange(30000, device="cuda")[:, None] // 3000 * 20.0).repeat(1, 16).requires_grad_()
    labels = torch.randint(0, 30000, (40,), device="cuda")
    reference = in_fp64(hidden, weight)
    true = values(*reference, labels)[0].mean()
    for memory in ("fast", "lean"):
        loss = linear_cross_entropy(hidden, weight, labels, memory=memory)
        assert loss.item() == pytest.approx(true.item(), rel=1e-6)
        for a, b in zip(
            torch.autograd.grad(loss, (hidden, weight)),
            torch.autograd.grad(true, reference, retain_graph=True),
            strict=True,
        ):
            assert error(a, b) < 1e-3  # fp32 holds a logit of 2880 to 1e-4
