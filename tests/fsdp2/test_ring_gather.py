"""A layer's all-gather without a collective: the same numbers step for step, whatever is asked for ahead, and numbers that begin anew."""

import contextlib

import fsdp2_models as models
import pytest
import torch


@contextlib.contextmanager
def _counted(seen):
    """Bytes of each all-gather that went by the process group."""
    import torch.distributed as dist

    names = [
        name for name in ("all_gather_into_tensor", "all_gather_single") if hasattr(dist, name)
    ]  # torch 2.13 has both
    originals = {name: getattr(dist, name) for name in names}

    def counted(name):
        def all_gather(*args, **kwargs):
            output = args[0] if args else kwargs.get("output", kwargs.get("output_tensor"))
            seen.append(output.numel() * output.itemsize)
            return originals[name](*args, **kwargs)

        return all_gather

    for name in names:
        setattr(dist, name, counted(name))
    try:
        yield seen
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def _ring(model):
    from unsloth_ext.fsdp2.ring_gather import RingGather
    from unsloth_ext.fsdp2.sharding import units_of

    found = {id(c): c for layer in units_of(model)[0] if isinstance(c := _comm(layer), RingGather)}
    return next(iter(found.values()), None)


def _comm(layer):
    state = layer._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
    return groups[0]._all_gather_comm


def _trained(rank, world, folder, gather, count=None, cuda=False, residency=0):
    """Losses, gradients' sums and all-gathers by the group of four steps with an evaluation in between."""
    from unsloth_ext.fsdp2 import load, shard

    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    torch.manual_seed(5)
    model = models.with_lora(load(folder, dtype=torch.float32))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model = shard(model, gather=gather, residency=residency)
    ring = _ring(model)
    if count is not None and ring is not None:
        ring.count = count
        for kind in range(2):
            for other in range(world):
                ring.memory.write_number(0, [ring._number(rank, kind, other)], count & 0xFFFFFFFF, 0)
    torch.distributed.barrier()
    optimizer, losses, seen = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2), [], []
    batches = [batch.to(device) for batch in models.batches(4 * world, 2)][rank::world]
    with _counted(seen):
        for number, batch in enumerate(batches):
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            optimizer.zero_grad(set_to_none=number % 2 == 0)
            if number == 1:
                with torch.no_grad():
                    losses.append(model(input_ids=batch, labels=batch).loss.item())
    weights = [p.to_local().double().sum().item() for p in model.parameters() if p.requires_grad]
    return losses, weights, seen, None if ring is None else ring.count


def _compare(run, folder, world=2, **options):
    found = {
        gather: run(world, _trained, folder=folder, gather=gather, **options) for gather in ("collective", "copies")
    }
    for one, other in zip(found["collective"], found["copies"], strict=True):
        assert one[:2] == other[:2]
        assert len(set(one[0])) == len(one[0])  # the adapters did change from step to step
    return found


@pytest.mark.parametrize("world", [2, 4])
def test_the_numbers_of_the_collective_and_none_for_layers(ranks, checkpoints, world):
    found = _compare(ranks, str(checkpoints["nf4"]), world)
    for one, other in zip(found["collective"], found["copies"], strict=True):
        assert other[3] >= 4 * 2 * 3 and one[3] is None  # forward and backward of three layers in each step
        assert len(one[2]) - len(other[2]) >= other[3]


def test_layers_that_stay_gathered(ranks, checkpoints):
    found = _compare(ranks, str(checkpoints["nf4"]), residency="all")
    assert all(4 * 3 <= one[3] < 4 * 2 * 3 for one in found["copies"])


@pytest.mark.parametrize("kept", ["rank", "all"])
def test_who_keeps_gathered_tensors_or_asks_far_ahead_gathers_as_the_others_do(ranks, checkpoints, kept):
    found = ranks(2, _hoarding, folder=str(checkpoints["nf4"]), everyone=kept == "all")
    assert found[0] == found[1]
    losses, by_the_ring = found[0]
    assert len(set(losses)) == 1 and len(set(by_the_ring)) == 1 and by_the_ring[0] >= 3


def _hoarding(rank, world, folder, everyone):
    """Losses of the same batch and gathers by the ring: as it is, all layers ahead, and ahead while a rank lets no output go."""
    from unsloth_ext.fsdp2 import load, shard
    from unsloth_ext.fsdp2.sharding import units_of

    losses, by_the_ring, kept = [], [], []
    model = shard(models.with_lora(load(folder, dtype=torch.float32)), gather="copies")
    layers, ring = units_of(model)[0], _ring(model)
    batch = models.batches(1, 2)[0]

    def keeping(*args, **options):
        kept.append(type(ring).allocate(*args, **options))
        return kept[-1]

    for ahead, hoards in ((False, False), (True, False), (True, True), (True, True)):
        for layer in layers:
            layer._forward_pre_hooks = type(layer._forward_pre_hooks)(
                (key, hook) for key, hook in layer._forward_pre_hooks.items() if "_prefetcher" not in repr(hook)
            )
            layer.set_modules_to_forward_prefetch([])
        layers[0].set_modules_to_forward_prefetch(layers[1:] if ahead else [])
        if hoards and (everyone or rank == 1):
            ring.allocate = keeping
        before = ring.count
        with torch.no_grad():
            losses.append(model(input_ids=batch, labels=batch).loss.item())
        by_the_ring.append(ring.count - before)
    assert bool(kept) == (everyone or rank == 1)
    return losses, by_the_ring


def _parts(rank, world, folder):
    from types import SimpleNamespace

    from unsloth_ext.fsdp2 import bytes_held, load, shard
    from unsloth_ext.fsdp2.held import parts_held
    from unsloth_ext.fsdp2.optimizers import step_quickly

    found = []
    for gather in ("copies", "collective"):
        model = shard(models.with_lora(load(folder, dtype=torch.float32)), gather=gather)
        optimizer = step_quickly(torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]))
        model.rotary = torch.nn.Module()
        model.rotary.multi_gpu_cos_cached, model.rotary.other = [None, torch.zeros(5)], SimpleNamespace()
        batch = models.batches(1, 2)[0]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        before = parts_held(model, optimizer)["gradients"]
        optimizer.zero_grad()
        ring = _ring(model)
        found.append((bytes_held(model), before, parts_held(model, optimizer), ring and ring.part.numel()))
    return found


def test_what_is_held_is_told_by_its_parts(ranks, checkpoints):
    for found in ranks(2, _parts, folder=str(checkpoints["nf4"])):
        for (held, gradients, parts, ring), by_copies in zip(found, (True, False), strict=True):
            assert (
                parts["parameters"] == sum(held.values()) and gradients == held["trainable"] and not parts["gradients"]
            )
            assert 2 * held["trainable"] < parts["optimizer"] < 2 * held["trainable"] + 4 * 100
            assert parts["ring"] == (ring or 0) and parts["rotary"] == 20 and bool(ring) == by_copies


def _asynchronous(rank, world, folder):
    from unsloth_ext.fsdp2 import load, shard
    from unsloth_ext.fsdp2.sharding import units_of

    model = shard(models.with_lora(load(folder, dtype=torch.float32)), gather="copies")
    layer, ring = units_of(model)[0][0], _ring(model)
    wanted = []
    for asynchronous in (False, True):
        before = ring.count
        handle = layer.unshard(async_op=asynchronous)
        if handle is not None:
            handle.wait()
        wanted.append(([p.detach().clone() for p in layer.parameters() if p.requires_grad], ring.count - before))
        layer.reshard()
    (one, by_the_ring), (other, not_by_it) = wanted
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True)), by_the_ring, not_by_it


def test_an_asynchronous_gather_does_not_wait_on_the_stream_of_who_asks(ranks, checkpoints):
    assert ranks(2, _asynchronous, folder=str(checkpoints["nf4"])) == [(True, 1, 0)] * 2


def _cannot_wait(rank, world, folder):
    from unsloth_ext.fsdp2 import load, peer_memory, shard, switch

    said, originals = [], (peer_memory.streams_can_wait, switch.say)
    peer_memory.streams_can_wait, switch.say = (lambda device: rank == 0), said.append
    try:
        model = shard(models.with_lora(load(folder, dtype=torch.float32)), gather="copies")
    finally:
        peer_memory.streams_can_wait, switch.say = originals
    batch = models.batches(1, 2)[0]
    return _ring(model) is None, model(input_ids=batch, labels=batch).loss.item(), said


def test_where_one_rank_cannot_wait_none_does_and_it_is_said(ranks, checkpoints):
    answers = ranks(2, _cannot_wait, folder=str(checkpoints["nf4"]))
    assert answers[0][1] == answers[1][1]
    assert all(none and "adapters are gathered by the collective" in said[0] for none, _, said in answers)


def _dense(rank, world, folder):
    from unsloth_ext.compiling import keep_dense_weights
    from unsloth_ext.compiling.dense_weights import bytes_wanted
    from unsloth_ext.fsdp2 import gathered, load, shard
    from unsloth_ext.fsdp2.sharding import units_of

    model = shard(models.with_lora(load(folder, dtype=torch.float32)))
    with gathered(*units_of(model)[0]):  # whole and plain, as in a layer's forward
        try:
            keep_dense_weights(model)
        except ValueError as error:
            return bytes_wanted(model), str(error)


def test_what_is_gathered_is_not_kept_dense(ranks, checkpoints):
    for wanted, said in ranks(2, _dense, folder=str(checkpoints["nf4"])):
        assert wanted == 0 and "no NF4 weights" in said


def test_numbers_begin_anew(ranks, checkpoints):
    found = _compare(ranks, str(checkpoints["nf4"]), count=2**32 - 7)
    assert all(one[3] > 2**32 for one in found["copies"])


@pytest.mark.gpu
def test_between_cards(cuda_ranks, checkpoints):
    found = _compare(cuda_ranks, str(checkpoints["nf4"]), cuda=True)
    assert all(one[3] >= 4 * 2 * 3 for one in found["copies"])
    _compare(cuda_ranks, str(checkpoints["nf4"]), cuda=True, residency="all")


def _late(rank, world):
    import unsloth_ext.fsdp2.peer_memory as peer_memory

    memory = peer_memory.HostMemory()
    part, peer_memory._PATIENCE = memory.allocate(64).zero_(), 0.2
    memory.forget()
    try:
        memory.wait_for_number(part.data_ptr(), 5, 0, 1)
    except RuntimeError as error:
        return str(error)


def test_who_does_not_come_is_named(ranks):
    assert "rank 1 has not come to this gather" in ranks(1, _late)[0]
