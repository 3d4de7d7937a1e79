"""The lengths of a packed batch go to the card through pinned memory when labels are masked: the host does not wait for the layers."""

import os

os.environ.setdefault("UNSLOTH_ALLOW_CPU", "1")

import unsloth  # noqa: F401, E402 (before transformers)
import pytest  # noqa: E402
import torch  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from unsloth.utils import packing  # noqa: E402


def masked(labels, lengths):
    """Raw labels whose first token of each document but the first is ignored."""
    wanted = labels.clone()
    starts = torch.cumsum(lengths, 0)
    wanted.view(-1)[starts[starts < labels.numel()]] = -100
    wanted.view(-1)[0] = -100
    return wanted


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_values(dtype):
    labels, lengths = torch.arange(40)[None], torch.tensor([7, 20, 13], dtype = dtype)
    found = packing.mask_packed_boundary_labels(labels, lengths)
    assert torch.equal(found, masked(labels, lengths))
    as_list = packing.mask_packed_boundary_labels(labels, lengths.tolist())
    assert torch.equal(found, as_list)
    assert packing.mask_packed_boundary_labels(labels, None) is labels


def test_host_lengths_are_copied_from_pinned_memory(monkeypatch):
    copied = []

    def pinned(tensor, device):
        copied.append((tuple(tensor.shape), torch.device(device).type))
        return tensor.to(device)

    monkeypatch.setattr(packing, "_pinned_to_device", pinned)
    with FakeTensorMode(allow_non_fake_inputs = True):
        labels = torch.zeros(1, 40, dtype = torch.int64, device = "cuda")
        lengths = torch.tensor([7, 20, 13], dtype = torch.int32)
        found = packing.mask_packed_boundary_labels(labels, lengths)
        assert copied == [((3,), "cuda")]
        assert found.device.type == "cuda" and found.shape == labels.shape
        packing.mask_packed_boundary_labels(
            labels, torch.zeros(3, dtype = torch.int32, device = "cuda")
        )  # there already
        packing.mask_packed_boundary_labels(
            torch.zeros(1, 40, dtype = torch.int64), lengths
        )  # needed here
    assert len(copied) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason = "needs a CUDA card")
def test_nothing_waits_on_a_card():
    labels, lengths = torch.arange(40)[None], torch.tensor([7, 20, 13], dtype = torch.int32)
    moved = labels.cuda()
    packing.mask_packed_boundary_labels(moved, lengths)  # the pinned allocator's first block
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = packing.mask_packed_boundary_labels(moved, lengths)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found.cpu(), masked(labels, lengths))
