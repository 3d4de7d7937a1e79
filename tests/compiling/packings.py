"""Random packed rows for the tests of attention, and the comparison that they share."""

import random

import torch

from unsloth_ext.compiling.attention_reference import reference_attention


def random_lengths(documents=None, longest=60):
    return [random.randint(1, longest) for _ in range(documents or random.randint(2, 9))]


def boundaries(lengths, device="cpu"):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=device)


def random_row(lengths, *, heads=4, kv_heads=2, width=16, dtype=torch.float64, device="cpu", grad=True):
    """query, key, value and a gradient of the output."""
    total = sum(lengths)
    tensors = [torch.randn(total, n, width, dtype=torch.float64) for n in (heads, kv_heads, kv_heads, heads)]
    query, key, value, upstream = (t.to(device, dtype) for t in tensors)
    return *(t.requires_grad_(grad) for t in (query, key, value)), upstream


def result_and_gradients(function, query, key, value, upstream, *args, **kwargs):
    out = function(query, key, value, *args, **kwargs)
    return out, *torch.autograd.grad(out, (query, key, value), upstream)


def exact(query, key, value, upstream, cu_seqlens, **kwargs):
    """The oracle in fp64, of the very numbers that the tested function got."""
    wide = [t.detach().double().requires_grad_() for t in (query, key, value)]
    return result_and_gradients(reference_attention, *wide, upstream.double(), cu_seqlens, **kwargs)


def worst(found, wanted):
    """The largest difference, measured against the largest value of all: a gradient may be zero (a window of one token)."""
    largest = max(b.abs().max() for b in wanted)
    return max((a.double() - b).abs().max().item() for a, b in zip(found, wanted, strict=True)) / largest.item()
