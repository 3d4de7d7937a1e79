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
        for slot in range(4):
            for kind in range(2):
                for other in range(world):
                    ring.memory.write_number(0, [ring._number(rank, kind, slot, other)], count & 0xFFFFFFFF, 0)
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


def test_what_is_asked_for_too_far_ahead_goes_by_the_group(ranks, checkpoints):
    found = ranks(2, _crowded, folder=str(checkpoints["nf4"]))
    assert found[0] == found[1]
    (right, by_the_group, by_the_ring), _ = found
    assert right and by_the_group > 0 and by_the_ring > 0


def _crowded(rank, world, folder):
    """Gathers that wait to be used in all slots but one, and two units more."""
    from unsloth_ext.fsdp2 import load, ring_gather, shard
    from unsloth_ext.fsdp2.sharding import units_of

    slots, ring_gather._SLOTS = ring_gather._SLOTS, 2
    try:
        model = shard(models.with_lora(load(folder, dtype=torch.float32)), gather="copies")
        layers, ring, seen, wanted = units_of(model)[0], _ring(model), [], []
        for layer in layers:
            layer.unshard()
            wanted.append([p.detach().clone() for p in layer.parameters() if p.requires_grad])
            layer.reshard()
        before = ring.count
        with _counted(seen):
            handles = [layer.unshard(async_op=True) for layer in layers]  # three at once, two slots
            for handle in handles:
                handle.wait()
        right = all(
            torch.equal(a, b)
            for layer, tensors in zip(layers, wanted, strict=True)
            for a, b in zip((p for p in layer.parameters() if p.requires_grad), tensors, strict=True)
        )
        return right, len(seen), ring.count - before
    finally:
        ring_gather._SLOTS = slots


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
