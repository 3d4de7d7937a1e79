"""A layer's all-gather and reduce-scatter without collectives: the same figures step for step, whatever is asked for ahead, and numbers that begin anew."""

import contextlib

import fsdp2_models as models
import pytest
import torch


@contextlib.contextmanager
def _counted(gathered, reduced=None):
    """What each all-gather and reduce-scatter that went by the process group made, in bytes."""
    import torch.distributed as dist

    # torch 2.13 has two names for each
    names = {"all_gather_into_tensor": gathered, "all_gather_single": gathered}
    names |= {"reduce_scatter_tensor": reduced, "reduce_scatter_single": reduced}
    names = {name: seen for name, seen in names.items() if hasattr(dist, name) and seen is not None}
    originals = {name: getattr(dist, name) for name in names}

    def counted(name):
        def collective(*args, **kwargs):
            output = args[0] if args else kwargs.get("output", kwargs.get("output_tensor"))
            names[name].append(output.numel() * output.itemsize)
            return originals[name](*args, **kwargs)

        return collective

    for name in names:
        setattr(dist, name, counted(name))
    try:
        yield gathered
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def _staged(model):
    """[all-gather, reduce-scatter] that all layers have; [] where they have none."""
    from unsloth_ext.fsdp2.sharding import units_of

    staged = model._unsloth_ext_staged
    for layer in units_of(model)[0] if staged else ():
        state = layer._get_fsdp_state()
        group = (getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group])[0]
        assert [group._all_gather_comm, group._reduce_scatter_comm] == staged
    return staged


def _trained(rank, world, folder, gather, count=None, cuda=False, residency=0):
    """(losses, sums of weights, bytes of each all-gather and reduce-scatter by the group, numbers of staged ones) of four steps with an
    evaluation in between."""
    from unsloth_ext.fsdp2 import load, shard

    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    torch.manual_seed(5)
    model = models.with_lora(load(folder, dtype=torch.float32))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model = shard(model, gather=gather, residency=residency)
    staged = _staged(model)
    if count is not None:
        for one in staged:
            one.count = count
            for kind in range(2):
                for other in range(world):
                    one.memory.write_number(0, [one._number(rank, kind, other)], count & 0xFFFFFFFF, 0)
    torch.distributed.barrier()
    optimizer, losses = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2), []
    gathered, reduced = [], []
    batches = [batch.to(device) for batch in models.batches(4 * world, 2)][rank::world]
    with _counted(gathered, reduced):
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
    return losses, weights, gathered, reduced, [one.count for one in staged]


def _compare(run, folder, world=2, **options):
    found = {
        gather: run(world, _trained, folder=folder, gather=gather, **options) for gather in ("collective", "copies")
    }
    for one, other in zip(found["collective"], found["copies"], strict=True):
        for by_group, by_copies in zip(one[:2], other[:2], strict=True):  # of four, another order of additions
            assert by_copies == (by_group if world == 2 else pytest.approx(by_group, rel=1e-5, abs=1e-4))
        assert len(set(one[0])) == len(one[0])  # the adapters did change from step to step
        assert not one[4]
    return found


@pytest.mark.parametrize("world", [2, 4])
def test_the_numbers_of_the_collective_and_none_for_layers(ranks, checkpoints, world):
    found = _compare(ranks, str(checkpoints["nf4"]), world)
    for one, other in zip(found["collective"], found["copies"], strict=True):
        gathers, reductions = other[4]
        assert gathers >= 4 * 2 * 3 and reductions == 4 * 3  # forward and backward of three layers in each step
        assert len(one[2]) - len(other[2]) >= gathers and len(one[3]) - len(other[3]) == reductions


def test_layers_that_stay_gathered(ranks, checkpoints):
    found = _compare(ranks, str(checkpoints["nf4"]), residency="all")
    assert all(4 * 3 <= one[4][0] < 4 * 2 * 3 for one in found["copies"])


@pytest.mark.parametrize("kept", ["rank", "all"])
def test_who_keeps_gathered_tensors_or_asks_far_ahead_gathers_as_the_others_do(ranks, checkpoints, kept):
    found = ranks(2, _hoarding, folder=str(checkpoints["nf4"]), everyone=kept == "all")
    assert found[0] == found[1]
    losses, gathers = found[0]
    assert len(set(losses)) == 1 and len(set(gathers)) == 1 and gathers[0] >= 3


def _hoarding(rank, world, folder, everyone):
    """Losses of the same batch and staged gathers: as it is, all layers ahead, and ahead while a rank lets no output go."""
    from unsloth_ext.fsdp2 import load, shard
    from unsloth_ext.fsdp2.sharding import units_of

    losses, gathers, kept = [], [], []
    model = shard(models.with_lora(load(folder, dtype=torch.float32)), gather="copies")
    layers, (staged, _) = units_of(model)[0], _staged(model)
    batch = models.batches(1, 2)[0]

    def keeping(*args, **options):
        kept.append(type(staged).allocate(*args, **options))
        return kept[-1]

    for ahead, hoards in ((False, False), (True, False), (True, True), (True, True)):
        for layer in layers:
            layer._forward_pre_hooks = type(layer._forward_pre_hooks)(
                (key, hook) for key, hook in layer._forward_pre_hooks.items() if "_prefetcher" not in repr(hook)
            )
            layer.set_modules_to_forward_prefetch([])
        layers[0].set_modules_to_forward_prefetch(layers[1:] if ahead else [])
        if hoards and (everyone or rank == 1):
            staged.allocate = keeping
        before = staged.count
        with torch.no_grad():
            losses.append(model(input_ids=batch, labels=batch).loss.item())
        gathers.append(staged.count - before)
    assert bool(kept) == (everyone or rank == 1)
    return losses, gathers


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
        staged = sum(one.part.numel() for one in _staged(model))
        found.append((bytes_held(model), before, parts_held(model, optimizer), staged))
    return found


def test_what_is_held_is_told_by_its_parts(ranks, checkpoints):
    for found in ranks(2, _parts, folder=str(checkpoints["nf4"])):
        for (held, gradients, parts, staged), by_copies in zip(found, (True, False), strict=True):
            assert (
                parts["parameters"] == sum(held.values()) and gradients == held["trainable"] and not parts["gradients"]
            )
            assert 2 * held["trainable"] < parts["optimizer"] < 2 * held["trainable"] + 4 * 100
            assert parts["staging"] == staged and parts["rotary"] == 20 and bool(staged) == by_copies


def _asynchronous(rank, world, folder):
    from unsloth_ext.fsdp2 import load, shard
    from unsloth_ext.fsdp2.sharding import units_of

    model = shard(models.with_lora(load(folder, dtype=torch.float32)), gather="copies")
    layer, (staged, _) = units_of(model)[0][0], _staged(model)
    wanted = []
    for asynchronous in (False, True):
        before = staged.count
        handle = layer.unshard(async_op=asynchronous)
        if handle is not None:
            handle.wait()
        wanted.append(([p.detach().clone() for p in layer.parameters() if p.requires_grad], staged.count - before))
        layer.reshard()
    (one, staged), (other, none) = wanted
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True)), staged, none


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
    return not _staged(model), model(input_ids=batch, labels=batch).loss.item(), said


def test_where_one_rank_cannot_wait_none_does_and_it_is_said(ranks, checkpoints):
    answers = ranks(2, _cannot_wait, folder=str(checkpoints["nf4"]))
    assert answers[0][1] == answers[1][1]
    assert all(none and "adapters go by collectives" in said[0] for none, _, said in answers)


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
    assert all(min(one[4]) > 2**32 for one in found["copies"])


@pytest.mark.gpu
def test_between_cards(cuda_ranks, checkpoints):
    found = _compare(cuda_ranks, str(checkpoints["nf4"]), cuda=True)
    assert all(one[4][0] >= 4 * 2 * 3 and one[4][1] == 4 * 3 for one in found["copies"])
    _compare(cuda_ranks, str(checkpoints["nf4"]), cuda=True, residency="all")


def _late(rank, world):
    import unsloth_ext.fsdp2.peer_memory as peer_memory

    memory = peer_memory.HostMemory(patience=0.2)
    part = memory.allocate(64).zero_()
    memory.forget()
    try:
        memory.wait_for_number(part.data_ptr(), 5, 0, 1)
    except RuntimeError as error:
        return str(error)


def test_who_does_not_come_is_named(ranks):
    assert "rank 1 has not come to this exchange" in ranks(1, _late)[0]


def _exchanged(rank, world, cuda=False):
    """Differences of staged exchanges of random tensors from what a rank that has all of them computes, over rounds on changing streams."""
    import contextlib

    import torch.distributed as dist

    from unsloth_ext.fsdp2.peer_gather import connect
    from unsloth_ext.fsdp2.processes import default_mesh
    from unsloth_ext.fsdp2.staged_collectives import StagedAllGather, StagedReduceScatter

    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    most = 1 << 20 if cuda else 1 << 12
    gather, reduce = StagedAllGather([], most * 4, world), StagedReduceScatter([], most * 4 * (world - 1), world)
    reason = connect([], default_mesh(), others=[gather, reduce])
    assert reason is None, reason
    group, seed = dist.group.WORLD, torch.Generator().manual_seed(3)
    streams = [torch.cuda.Stream(device) for _ in range(2)] if cuda else [None]
    busy = torch.randn(2048, 2048, device=device) if cuda else None
    wrong = []
    for number in range(40):
        dtype = (torch.float32, torch.bfloat16, torch.float16)[number % 3]
        size = int(torch.randint(1, most, (), generator=seed))
        everyone = torch.randn(world, world, size, generator=seed, dtype=torch.float64).to(dtype)
        operation = (dist.ReduceOp.SUM, dist.ReduceOp.AVG)[number % 2]
        inputs = everyone[rank].to(device).view(-1)
        stream = streams[number % len(streams)]
        with contextlib.nullcontext() if stream is None else torch.cuda.stream(stream):
            if stream is not None:
                stream.wait_stream(torch.cuda.default_stream(device))
                for _ in range(rank * 3):  # this rank comes later
                    busy @ busy
            whole = gather.allocate((world * size,), dtype=dtype, device=device)
            if number % 4:
                whole.view(world, -1)[rank] = inputs[:size]
                assert gather(whole, whole.view(world, -1)[rank], group) is None
            else:  # an input that is somewhere else
                assert gather(output_tensor=whole, input_tensor=inputs[:size].clone(), group=group) is None
            summed = reduce.allocate((size,), dtype=dtype, device=device)
            assert reduce(summed, inputs, group, operation) is None
        if stream is not None:
            torch.cuda.default_stream(device).wait_stream(stream)
        wrong.append(not torch.equal(whole.view(world, -1).cpu(), everyone[:, 0]))
        expected = everyone[:, rank].double().sum(0) / (1 if operation == dist.ReduceOp.SUM else world)
        most_wrong = (summed.cpu().double() - expected).abs().max() / expected.abs().max()
        wrong.append(bool(most_wrong > world * torch.finfo(dtype).eps))
    before = gather.count, reduce.count
    inputs = torch.full((world * 8,), rank + 1.0, device=device)
    reduce(summed := torch.empty(8, device=device), inputs, group, dist.ReduceOp.MAX)
    large = torch.full((world * (most + 1),), rank + 1.0, device=device)
    reduce(large_sum := torch.empty(most + 1, device=device), large, group, dist.ReduceOp.SUM)
    return sum(wrong), before, (gather.count, reduce.count), summed.tolist() + large_sum[:2].tolist()


@pytest.mark.parametrize("world", [2, 3, 4])
def test_random_exchanges(ranks, world):
    for answer in ranks(world, _exchanged):
        assert answer == (0, (40, 40), (40, 40), [float(world)] * 8 + [world * (world + 1) / 2] * 2)


@pytest.mark.gpu
def test_random_exchanges_between_cards(cuda_ranks):
    for answer in cuda_ranks(2, _exchanged, cuda=True):
        assert answer == (0, (40, 40), (40, 40), [2.0] * 8 + [3.0] * 2)
