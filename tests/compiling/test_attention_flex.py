"""flex attention's block masks against torch's own, its values on a CPU, and that lengths make no graphs."""

import random

import pytest
import torch
from packings import boundaries, exact, random_lengths, random_row, worst
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.flex_attention import create_block_mask

from unsloth_ext.compiling import attention_flex
from unsloth_ext.compiling.attention import packed_attention
from unsloth_ext.compiling.attention_flex import FlexMask, block_masks, flex_packed_attention
from unsloth_ext.compiling.attention_reference import allowed, documents_of


@pytest.fixture
def uncompiled(monkeypatch):
    """flex's own unfused code: its compiled form takes a C++ compiler half a minute on a CPU."""
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(attention_flex, "_compiled", flex_attention)
    monkeypatch.setattr(
        "torch.nn.attention.flex_attention._WARNINGS_SHOWN", {"flex_attention_performance"}, raising=False
    )


@pytest.mark.parametrize("window", [None, 1, 40, 128, 300])
def test_block_masks_are_torch_s(window):
    """Which blocks are empty, partial and whole, by evaluating the mask at every position."""
    for longest in (90, 700):
        lengths = random_lengths(random.randint(1, 6), longest)
        total = sum(lengths)
        mask = block_masks(boundaries(lengths), total, (window,))[window]
        visible = allowed(documents_of(boundaries(lengths), total), window)
        wanted = create_block_mask(lambda b, h, q, k, visible=visible: visible[q, k], 1, 1, total, total, device="cpu")
        for kind in ("", "full_"):
            for side in ("kv", "q"):
                counts, indices = (getattr(mask, f"{kind}{side}_{what}") for what in ("num_blocks", "indices"))
                found = _dense(counts, indices)
                expected = _dense(getattr(wanted, f"{kind}{side}_num_blocks"), getattr(wanted, f"{kind}{side}_indices"))
                if window is None or kind == "full_":
                    assert torch.equal(found, expected), (lengths, kind, side)
                else:  # a block that only a window and a boundary together leave empty may be called partial
                    assert (found | ~expected).all(), (lengths, kind, side)
        assert mask.documents.dtype == torch.int32


def _dense(counts, indices):
    dense = torch.zeros(indices.shape[-2:], dtype=torch.bool)
    for row, count in enumerate(counts.flatten().tolist()):
        dense[row, indices[0, 0, row, :count].long()] = True
    return dense


@pytest.mark.parametrize("window", [None, 60])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_values(window, softcap, uncompiled):
    lengths = random_lengths(5, 90)
    query, key, value, upstream = random_row(lengths, dtype=torch.float32, grad=False)
    options = {"window": window, "softcap": softcap}
    found = packed_attention(query, key, value, boundaries(lengths), max(lengths), backend="flex", **options)
    ready = block_masks(boundaries(lengths), sum(lengths), (None, 60))
    again = packed_attention(query, key, value, boundaries(lengths), 90, backend="flex", masks=ready, **options)
    wanted = exact(query, key, value, upstream, boundaries(lengths), **options)[0]
    assert worst([found], [wanted]) < 1e-4
    assert torch.equal(found, again)


@torch.fx.experimental._config.patch(
    use_duck_shape=False
)  # as compile_model: sizes that happen to be equal are not one
def test_lengths_make_no_graphs():
    """Block masks are made outside; inside, lengths and numbers of blocks are symbols."""

    class Layer(torch.nn.Module):
        softcap, window, scaling = 30.0, 200, 0.125

        def forward(self, query, key, value, masks):
            return flex_packed_attention(
                query, key, value, masks[self.window], scale=self.scaling, window=self.window, softcap=self.softcap
            )

    counter, after_first = CompileCounterWithBackend("eager"), 0
    compiled = torch.compile(Layer(), backend=counter, fullgraph=True, dynamic=True)
    for _ in range(12):
        lengths = [130, *random_lengths(random.randint(1, 6), 150)]
        query, key, value, _ = random_row(lengths, dtype=torch.float32, grad=False)
        compiled(query, key, value, block_masks(boundaries(lengths), sum(lengths), (200,)))
        after_first = after_first or counter.frame_count
    assert counter.frame_count == after_first <= 2


def test_no_backward_on_a_cpu():
    query, key, value, _ = random_row([5, 3], dtype=torch.float32)
    with pytest.raises(NotImplementedError, match="backend='flex'.*no backward on a CPU.*backend='exact'"):
        packed_attention(query, key, value, boundaries([5, 3]), 5, backend="flex")


def test_a_mask_of_another_row():
    query, key, value, _ = random_row([5, 3], dtype=torch.float32, grad=False)
    mask = block_masks(boundaries([5, 4]), 9)[None]
    assert isinstance(mask, FlexMask)
    with pytest.raises(ValueError, match="that of 9 tokens, the row has 8"):
        flex_packed_attention(query, key, value, mask)
