"""Weights that are gathered by copies: every bit, as often as asked for, and a clear word where it cannot be."""

import gc
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


def _files(ranks):
    """Those that the ranks have left; other tests may run beside these."""
    there = os.listdir("/dev/shm") if os.path.isdir("/dev/shm") else []
    mine = tuple(f"unsloth_ext-{process.pid}-" for process, _ in ranks.workers)
    return [name for name in there if name.startswith(mine)]


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
    assert ranks.workers and not _files(ranks)


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
        torch._C._accelerator_setAllocatorSettings("expandable_segments:False")  # the next test has the same process


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


def _one_failure(rank, world, folder, what):
    from unsloth_ext.errors import UsageError
    from unsloth_ext.fsdp2 import load, peer_memory, shard

    mine = {"identity": rank == 1, "out_of_reach": rank == 0, "offer": rank == 1}[what]
    original, said = getattr(peer_memory.HostMemory, what), None
    if mine:
        setattr(peer_memory.HostMemory, what, lambda *_: (_ for _ in ()).throw(AttributeError("no such thing")))
    model = models.with_lora(load(folder, dtype=torch.float32))
    try:
        shard(model, gather="copies")
    except UsageError as error:
        said = str(error)
    finally:
        setattr(peer_memory.HostMemory, what, original)
    batch = models.batches(1, 2)[0]
    with torch.no_grad():
        return said, model(input_ids=batch, labels=batch).loss.item()


@pytest.mark.parametrize("what", ["identity", "out_of_reach", "offer"])
def test_what_fails_on_one_rank_fails_on_none_of_the_others_later(ranks, checkpoints, what):
    answers = ranks(2, _one_failure, folder=str(checkpoints["nf4"]), what=what)
    assert all("no such thing" in said for said, _ in answers) and answers[0][1] == answers[1][1]
    assert ranks.workers and not _files(ranks)


def _failing_copy(rank, world, folder):
    """Losses before, and after, a gather whose copies break off; the error; whether the buffer was given back."""
    from unsloth_ext.fsdp2 import gathered, load, shard
    from unsloth_ext.fsdp2.sharding import units_of

    model = shard(models.with_lora(load(folder, dtype=torch.float32)), gather="copies")
    batch = models.batches(1, 2)[0]
    with torch.no_grad():
        before = model(input_ids=batch, labels=batch).loss.item()
    layer, said = units_of(model)[0][0], None
    unit = next(u for p in layer.parameters() if (u := getattr(getattr(p.to_local(), "_holder", None), "unit", None)))
    copies, unit.copies = unit.copies, (*unit.copies[:1], ("not", "a", "place"))
    try:
        with gathered(layer):
            pass
    except Exception as error:
        said = type(error).__name__
    unit.copies, empty = copies, unit.buffer.untyped_storage().size() == 0
    with torch.no_grad():
        return before, model(input_ids=batch, labels=batch).loss.item(), said, empty


def test_a_gather_that_broke_off_is_not_taken_for_a_whole_one(ranks, checkpoints):
    for before, after, said, empty in ranks(2, _failing_copy, folder=str(checkpoints["nf4"])):
        assert said == "TypeError" and empty and before == after


def _models_in_turn(rank, world, folder, shape):
    """Losses of a model, of it beside another one, and of the other one when the first has gone but for a layer."""
    from torch.distributed.device_mesh import init_device_mesh

    from unsloth_ext.fsdp2 import gathered, load, peer_memory, shard
    from unsloth_ext.fsdp2.sharding import units_of

    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    gc.collect()  # models of other tests, which this process may have had
    closed, original = [], peer_memory.HostMemory.close
    peer_memory.HostMemory.close = staticmethod(lambda opened: closed.append(len(opened)))
    batch = models.batches(1, 2)[0]

    def loss(model):
        with torch.inference_mode():
            return model(input_ids=batch, labels=batch).loss.item()

    def bits(layer):
        with gathered(layer):
            return [p.data.clone() for p in layer.parameters() if getattr(p, "quant_state", None) is not None]

    try:
        policy = shard(models.with_lora(load(folder, mesh, dtype=torch.float32)), mesh, gather="copies")
        losses, layer = [loss(policy)], units_of(policy)[0][-1]
        reference, before = shard(load(folder, mesh, dtype=torch.float32), mesh, gather="copies"), bits(layer)
        losses += [loss(policy), loss(reference)]
        del policy
        gc.collect()
        held = len(closed), all(torch.equal(a, b) for a, b in zip(before, bits(layer), strict=True))
        del layer
        gc.collect()
        return losses, loss(reference), held, len(closed)
    finally:
        peer_memory.HostMemory.close = original


@pytest.mark.parametrize("shape", [(2,), (2, 2)])
def test_two_models_and_replicas(ranks, checkpoints, shape):
    answers = ranks(4 if len(shape) > 1 else 2, _models_in_turn, folder=str(checkpoints["nf4"]), shape=shape)
    for (first, again, other), later, (closed, same), closed_at_last in answers:
        assert first == again == answers[0][0][0] and other == later == answers[0][1] != first
        assert (closed, same, closed_at_last) == (0, True, 1)


def _nothing_to_copy(rank, world, folder):
    from unsloth_ext.fsdp2 import load, shard

    model = shard(load(folder, dtype=torch.float32), gather="copies")
    batch = models.batches(1, 2)[0]
    with torch.no_grad():
        return model(input_ids=batch, labels=batch).loss.item()


@pytest.mark.parametrize(("world", "kind"), [(1, "nf4"), (2, "16bit")])
def test_where_nothing_is_to_be_copied_copies_do_no_harm(ranks, checkpoints, world, kind):
    one = models.whole(checkpoints["nf4"]) if kind == "nf4" else None
    losses = ranks(world, _nothing_to_copy, folder=str(checkpoints[kind]))
    if one is not None:
        batch = models.batches(1, 2)[0]
        assert abs(one(input_ids=batch, labels=batch).loss.item() - losses[0]) < 1e-5
    assert len(set(losses)) == 1


def test_tensors_share_pieces_of_memory_so_that_little_is_rounded_up(monkeypatch):
    from unsloth_ext.fsdp2 import peer_memory

    layer, rows, ring = 56257024, 525336576, 15729664  # bytes a rank, Llama 3.1 8B on two: 53.65, 501 and 15 MiB
    sizes, megabytes = [layer] * 32 + [rows, ring], 2 << 20
    pieces = peer_memory.segments(sizes)
    assert sum(pieces) == sum(sizes) and max(pieces) <= 640 << 20
    assert sum(-piece % megabytes for piece in pieces) < megabytes < 13 * (1 << 20) < sum(-s % megabytes for s in sizes)
    assert peer_memory.segments([3 << 30, 5]) == [3 << 30, 256] and peer_memory.segments([]) == []

    made = []
    monkeypatch.setattr(
        peer_memory.PeerMemory,
        "_piece",
        lambda self, size: made.append(torch.zeros(size, dtype=torch.uint8)) or made[-1],
    )
    monkeypatch.setattr(peer_memory, "_driver", lambda: None)
    memory, sizes = peer_memory.PeerMemory(torch.device("cpu")), [1000, 256, 3, 70_000]
    memory.expect(sizes)
    parts = [memory.allocate(size) for size in sizes]
    assert [part.numel() for part in parts] == sizes and all(part.data_ptr() % 64 == 0 for part in parts)
    places = [part.data_ptr() - made[0].data_ptr() for part in parts]
    assert places == [0, 1024, 1280, 1536] and [piece.numel() for piece in made] == [1536 + 70_144]
    assert (
        memory.rest is None and memory.allocate(7).numel() == 7 and len(made) == 2
    )  # not expected: a piece of its own
    memory.expect([1000, 1000])
    memory.allocate(1000)
    with pytest.raises(ValueError, match="2000 bytes were not expected"):
        memory.allocate(2000)


def test_other_devices_are_refused_and_missing_files_not_made(tmp_path, monkeypatch):
    from unsloth_ext.fsdp2.peer_memory import HostMemory, of_device

    assert isinstance(of_device(torch.device("cpu")), HostMemory)
    with pytest.raises(RuntimeError, match="xpu"):
        of_device(torch.device("xpu"))
    monkeypatch.setattr(torch.version, "cuda", None)  # as in a build for ROCm
    with pytest.raises(RuntimeError, match="NVIDIA"):
        of_device(torch.device("cuda", 0))
    with pytest.raises(OSError):
        HostMemory().open((str(tmp_path / "elsewhere"), 64))
    assert not list(tmp_path.iterdir())
