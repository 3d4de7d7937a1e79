"""Weights that are gathered by copies: every bit, as often as asked for, and a clear word where it cannot be."""

import os

import fsdp2_models as models
import pytest
import torch


def _gathered_bits(rank, world, folder, gather, cuda=False):
    """Bytes and quant state of every 4-bit weight as the layers see them, in two rounds with other memory in between."""
    from unsloth_ext.fsdp2 import bytes_held, gathered, load, shard
    from unsloth_ext.fsdp2.sharding import units_of

    model = load(folder, dtype=torch.float32)
    before = bytes_held(model)
    model = shard(model, gather=gather)
    assert all(bytes_held(model)[kind] == before[kind] for kind in ("packed", "quant_state"))
    rounds = []
    for _ in range(2):
        found = {}
        for index, layer in enumerate(units_of(model)[0]):
            with gathered(layer):
                for name, parameter in layer.named_parameters():
                    if (state := getattr(parameter, "quant_state", None)) is not None:
                        tensors = [parameter.data, state.absmax, state.offset]
                        tensors += [] if state.state2 is None else [state.state2.absmax]
                        found[index, name] = [t.cpu().clone() for t in tensors if t is not None]
            assert not any(hasattr(p, "quant_state") for p in layer.parameters())  # freed again
        rounds.append(found)
        _ = [torch.full((50_000,), 7, dtype=torch.uint8, device="cuda" if cuda else "cpu") for _ in range(20)]
    return rounds


def _check(answers):
    first = answers[0][0]
    assert len(first) == 21
    for answer in answers:
        for found in answer:
            assert found.keys() == first.keys()
            for name, tensors in found.items():
                for one, other in zip(tensors, first[name], strict=True):
                    assert torch.equal(one, other)
    return first


@pytest.mark.parametrize("kind", ["nf4", "flat-nf4"])
def test_copies_bring_what_the_collective_brings(ranks, checkpoints, kind):
    found = {
        gather: _check(ranks(2, _gathered_bits, folder=str(checkpoints[kind]), gather=gather))
        for gather in ("collective", "copies")
    }
    for name, tensors in found["collective"].items():
        for one, other in zip(tensors, found["copies"][name], strict=True):
            assert torch.equal(one, other)
    if os.path.isdir("/dev/shm"):
        assert not [name for name in os.listdir("/dev/shm") if name.startswith("unsloth_ext-")]


@pytest.mark.gpu
@pytest.mark.parametrize("expandable", [False, True])
def test_copies_between_cards(cuda_ranks, checkpoints, expandable):
    found = {}
    for gather in ("collective", "copies"):
        answers = cuda_ranks(2, _with_segments, folder=str(checkpoints["nf4"]), gather=gather, expandable=expandable)
        found[gather] = _check(answers)
    for name, tensors in found["collective"].items():
        for one, other in zip(tensors, found["copies"][name], strict=True):
            assert torch.equal(one, other)


def _with_segments(rank, world, folder, gather, expandable):
    wish = f"expandable_segments:{expandable}"
    before, os.environ["PYTORCH_ALLOC_CONF"] = os.environ.get("PYTORCH_ALLOC_CONF", ""), wish
    torch._C._accelerator_setAllocatorSettings(wish)
    try:
        return _gathered_bits(rank, world, folder, gather, cuda=True)
    finally:
        os.environ["PYTORCH_ALLOC_CONF"] = before


def _moved(rank, world, folder):
    """Bytes that 4-bit weights put into FSDP2's collectives in a step."""
    from unsloth_ext.fsdp2 import load, shard
    from unsloth_ext.fsdp2.nf4_parameter import NF4Shard

    sizes, original = {}, NF4Shard.fsdp_pre_all_gather

    def counted(self, mesh, outer_size, outer_stride, module, mp_policy):
        inputs, metadata = original(self, mesh, outer_size, outer_stride, module, mp_policy)
        sizes[gather].append(sum(t.numel() * t.itemsize for t in inputs))
        return inputs, metadata

    for gather in ("collective", "copies"):
        model = shard(models.with_lora(load(folder, dtype=torch.float32)), gather=gather)
        sizes[gather] = []
        NF4Shard.fsdp_pre_all_gather = counted
        try:
            batch = models.batches(1, 2)[0]
            model(input_ids=batch, labels=batch).loss.backward()
        finally:
            NF4Shard.fsdp_pre_all_gather = original
    return sizes


def test_only_tokens_go_through_the_collective(ranks, checkpoints):
    for sizes in ranks(2, _moved, folder=str(checkpoints["nf4"])):
        assert len(sizes["copies"]) == len(sizes["collective"]) == 2 * 21  # forward and backward
        assert set(sizes["copies"]) == {16} and min(sizes["collective"]) > 8000


def _impossible(rank, world, folder, why):
    from unsloth_ext.errors import UsageError
    from unsloth_ext.fsdp2 import load, peer_gather, shard
    from unsloth_ext.fsdp2.peer_memory import HostMemory

    original = peer_gather._host, HostMemory.open
    model, said = models.with_lora(load(folder, dtype=torch.float32)), None
    if why == "hosts":
        peer_gather._host = lambda: f"host {rank}"
    elif rank == 1:
        HostMemory.open = lambda self, offered: (_ for _ in ()).throw(RuntimeError("no such memory"))
    try:
        shard(model, gather="copies")
    except UsageError as error:
        said = str(error)
    finally:
        peer_gather._host, HostMemory.open = original
    batch = models.batches(1, 2)[0]
    return said, model(input_ids=batch, labels=batch).loss.item()


@pytest.mark.parametrize(("why", "words"), [("hosts", "several hosts"), ("open", "no such memory")])
def test_where_copies_cannot_be_all_ranks_say_why_and_gather_otherwise(ranks, checkpoints, why, words):
    one = models.with_lora(models.whole(checkpoints["nf4"]))
    batch = models.batches(1, 2)[0]
    expected = one(input_ids=batch, labels=batch).loss.item()
    for said, loss in ranks(2, _impossible, folder=str(checkpoints["nf4"]), why=why):
        assert words in said
        assert abs(loss - expected) < 1e-5
