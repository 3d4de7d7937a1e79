"""8-bit steps of many parameters at once, on a card: the bits of bitsandbytes alone, resumed, and on another stream."""

import pytest
import torch
from eight_bit_pairs import (
    KINDS,
    SHAPES,
    TOGETHER,
    Counted,
    adamw,
    assert_same,
    every,
    give_gradients,
    pair,
    run,
    saved,
)

from unsloth_ext.compiling import step_together

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk_bytes", [64 << 20, 4 * 16384])
def test_the_same_bits(kind, first, chunk_bytes):
    if first == torch.bfloat16 and kind in ("Adagrad8bit", "RMSprop8bit", "SGD8bit"):
        pytest.skip("bitsandbytes has no 32-bit kernel of this kind for bfloat16, which its small parameters need")
    both = pair(KINDS[kind], "cuda", (first, torch.float32), chunk_bytes=chunk_bytes)
    for step in range(5):
        run(both, [step])
        for optimizer in both:
            optimizer.param_groups[0]["lr"] *= 0.7
        assert_same(*both)


def test_skip_zeros_overflows_and_missing_gradients():
    both = pair(adamw, "cuda")
    for optimizer in both:
        optimizer.args.skip_zeros = True
    for step, without in enumerate([(1,), (), (3, 12), (), ()]):
        give_gradients(both, step, without)
        for optimizer in both:
            every(optimizer)[0].grad[:5] = float("nan") if step == 3 else 0.0
            optimizer.step()
        assert_same(*both)


def test_one_call_for_many(monkeypatch):
    both = pair(adamw, "cuda")
    run(both, range(2))
    counted = Counted(monkeypatch)
    give_gradients(both, 2)
    found = counted.of(both[1].step)
    assert len(found) == 5 and found[0] == sum(torch.Size(SHAPES[n]).numel() for n in TOGETHER)


@pytest.mark.parametrize("where", ["cpu", "cuda"])
@pytest.mark.parametrize("first, second", [(0, 1), (1, 0), (1, 1)])
def test_a_checkpoint_goes_both_ways(monkeypatch, first, second, where):
    both = pair(adamw, "cuda")
    run(both, range(3))
    file = saved(both[first])
    assert len(file.getvalue()) <= len(saved(both[0]).getvalue())
    file.seek(0)
    resumed = pair(adamw, "cuda")[second]
    with torch.no_grad():
        for p, q in zip(every(resumed), every(both[0]), strict=True):
            p.copy_(q)
    resumed.load_state_dict(torch.load(file, map_location=where, weights_only=True))
    for step in range(3, 6):
        run([*both, resumed], [step])
        assert_same(both[0], resumed)
    if second:  # together again, though a checkpoint brings a quantisation map for each parameter
        counted = Counted(monkeypatch)
        give_gradients([resumed], 6)
        assert len(counted.of(resumed.step)) == 5


def test_another_stream_goes_one_by_one(monkeypatch):
    """bitsandbytes' kernels run on the default stream, whichever is current."""
    both = pair(adamw, "cuda")
    run(both, range(2))
    counted = Counted(monkeypatch)
    give_gradients(both, 2)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        assert len(counted.of(both[1].step)) == 14
    torch.cuda.synchronize()
    both[0].step()
    assert_same(*both)
    run(both, [3])
    assert_same(*both)


def test_memory_of_a_step_is_bounded():
    def peak(chunk_bytes):
        whole = [torch.nn.Parameter(torch.zeros(1 << 20, device="cuda")) for _ in range(32)]  # 128 MiB
        optimizer = step_together(adamw(whole), chunk_bytes=chunk_bytes)
        for p in whole:
            p.grad = torch.ones_like(p)
        optimizer.step()
        optimizer.step()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        optimizer.step()
        return torch.cuda.max_memory_allocated() - before

    assert peak(16 << 20) <= 33 << 20 < peak(64 << 20) <= 129 << 20
