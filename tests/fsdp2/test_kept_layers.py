"""Layers that stay gathered from forward to backward: how many, on which rank, and that nothing whole is taken for the model's own."""

import contextlib
import random

import fsdp2_models as models
import pytest
import torch


def test_as_many_of_the_last_layers_as_the_bytes_are_enough_for():
    from unsloth_ext.fsdp2.kept_layers import count_within

    for _ in range(200):
        sizes = [random.randrange(1, 1 << 33) for _ in range(random.randrange(1, 9))]
        limit = random.randrange(sum(sizes) + 1)
        count = count_within(sizes, limit)
        assert sum(sizes[len(sizes) - count :]) <= limit
        assert count == len(sizes) or sum(sizes[len(sizes) - count - 1 :]) > limit
        exact = random.randrange(len(sizes) + 1)
        assert count_within(sizes, sum(sizes[len(sizes) - exact :])) == exact
        assert count_within(sizes, float("inf")) == len(sizes)
    assert count_within([], 5) == 0


def _kept(rank, world, folder):
    from unsloth_ext.fsdp2 import kept_layers, load, shard
    from unsloth_ext.fsdp2.held import gathered_bytes

    def count(lora=True, **options):
        model = load(folder, dtype=torch.float32)
        model = shard(models.with_lora(model) if lora else model, **options)
        layers = model.get_base_model().model.layers if lora else model.model.layers
        kept = model._unsloth_ext_resident
        assert all(one is other for one, other in zip(kept, layers[len(layers) - len(kept) :], strict=True))
        return len(kept), gathered_bytes(layers[0], [p for p in layers[0].parameters() if p.ndim == 1])

    found = {"cpu": count()[0]}
    found["all"], size = count(residency="all")
    found["bytes"] = count(residency=2 * size)[0], count(residency=2 * size - 1)[0], count(residency=0)[0]
    original = kept_layers.limit_of
    kept_layers.limit_of = lambda device: (3 * size, 2 * size + 1)[rank]
    try:
        found["smallest"] = count()[0]
        found["nothing"] = count(cpu_offload=True)[0], count(lora=False)[0]
    finally:
        kept_layers.limit_of = original
    return found


def test_auto_keeps_what_the_smallest_rank_may_and_nothing_on_a_cpu(ranks, checkpoints):
    for found in ranks(2, _kept, folder=str(checkpoints["nf4"])):
        assert found == {"cpu": 0, "all": 3, "bytes": (2, 1, 0), "smallest": 2, "nothing": (0, 0)}


@pytest.mark.gpu
def test_auto_spends_a_share_of_the_card():
    from unsloth_ext.fsdp2.kept_layers import limit_of

    device = torch.device("cuda", torch.cuda.current_device())
    total = torch.cuda.get_device_properties(device).total_memory
    assert limit_of(device) == int(0.05 * total)
    torch.cuda.set_per_process_memory_fraction(0.5, device)
    try:
        assert abs(limit_of(device) - 0.025 * total) < 2
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def _outer(model, batch):
    return model(input_ids=batch, labels=batch).loss


def _inner(model, batch):
    """As TRL's chunked losses call a model: the decoder, then the head by its weight."""
    causal = model.get_base_model()
    hidden = causal.model(input_ids=batch).last_hidden_state
    return causal.loss_function(causal.lm_head(hidden), batch, vocab_size=causal.config.vocab_size)


def _steps(model, tokens, run):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for batch in tokens:
        loss = run(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def _parts_only(model):
    from torch.distributed.tensor import DTensor

    return all(isinstance(p, DTensor) for p in model.parameters() if p.requires_grad)


def _made(folder, sharded, run, reentrant=None, **options):
    from unsloth_ext.fsdp2 import load, shard

    model = load(folder, dtype=torch.float32) if sharded else models.whole(folder)
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()  # in an evaluation too, the first layer's input then asks for a gradient
    # The last norm belongs to the root, which only its own forward gathers.
    model = models.with_lora(model, modules_to_save=["norm"] if run is _outer else None)
    return shard(model, **options).train() if sharded else model


_WAYS = [dict(residency="all"), dict(residency="all", gather="copies"), dict(reshard_after_forward=False)]


def _evaluated_first(rank, world, folder, way, reentrant):
    """[loss of an evaluation, losses of the steps after it] by whole model and by decoder, and whether parts were listed."""
    tokens = models.batches(3, world)[:, rank : rank + 1]
    found = []
    for run in (_outer, _inner):
        parts = []
        model = _made(folder, True, run, reentrant, **way)
        for context in (torch.no_grad(), torch.inference_mode()):
            with context:
                first = run(model, tokens[0]).item()
            parts.append(_parts_only(model))
        losses = _steps(model, tokens, run)
        parts.append(_parts_only(model))
        with torch.no_grad():
            run(model, tokens[0])
        found.append((first, losses, [*parts, _parts_only(model)]))
    return found


@pytest.mark.parametrize(
    "reentrant", [True, *(pytest.param(value, marks=pytest.mark.extended) for value in (None, False))]
)
def test_an_optimizer_that_is_made_after_an_evaluation_trains(ranks, checkpoints, reentrant):
    runs = (_outer, _inner)
    expected = [_steps(_made(checkpoints["nf4"], False, run), models.batches(3, 2), run) for run in runs]
    for way in _WAYS:
        answers = ranks(2, _evaluated_first, folder=str(checkpoints["nf4"]), way=way, reentrant=reentrant)
        for losses, answer in zip(expected, zip(*answers, strict=True), strict=True):  # of both ranks
            mean = torch.tensor([one[1] for one in answer]).mean(0)
            torch.testing.assert_close(mean, torch.tensor(losses), rtol=0, atol=1e-5)
            for first, losses, parts in answer:
                assert first == pytest.approx(losses[0], abs=1e-6) and all(parts), way


def _made_in_between(rank, world, folder):
    from unsloth_ext.errors import UsageError
    from unsloth_ext.fsdp2 import on_local_shards

    model = _made(folder, True, _inner, residency="all")

    def make():
        return on_local_shards(torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2))

    loss = _inner(model, models.batches(1, world)[0, rank : rank + 1])
    with pytest.raises(UsageError, match="gathered at the moment"):
        make()
    loss.backward()
    before = [p.to_local().clone() for p in model.parameters() if p.requires_grad]
    make().step()
    after = [p.to_local() for p in model.parameters() if p.requires_grad]
    return sum(not torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_an_optimizer_that_is_made_between_forward_and_backward_is_an_error(ranks, checkpoints):
    assert all(changed > 10 for changed in ranks(2, _made_in_between, folder=str(checkpoints["nf4"])))


def _odd_orders(rank, world, folder, way, reentrant):
    """Losses, or gradient norms, of loops that do things between forward, backward and step. way: None for one process."""
    sharded = way is not None
    tokens = models.batches(6, world)
    tokens = tokens[:, rank : rank + 1] if sharded else tokens
    found = {}

    def norm(model):
        gradients = [p.grad.full_tensor() if sharded else p.grad for p in model.parameters() if p.requires_grad]
        return torch.stack([g.norm() for g in gradients]).norm().item()

    model = _made(folder, sharded, _outer, reentrant, **way or {})
    norms = []
    for batch in tokens[:3]:
        value = _outer(model, batch)
        model.zero_grad()
        value.backward()
        norms.append(norm(model))
    found["zero_grad before backward"] = norms

    model = _made(folder, sharded, _inner, reentrant, **way or {})
    first, second = _inner(model, tokens[0]), _inner(model, tokens[1])
    first.backward()
    second.backward()
    found["two decoder forwards, two backwards"] = [norm(model)]
    model.zero_grad()
    value = _inner(model, tokens[2])
    with torch.no_grad():
        _outer(model, tokens[3])
    value.backward()
    found["an evaluation before backward"] = [norm(model)]

    model = _made(folder, sharded, _outer, reentrant, **way or {})
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    losses = []
    for batch in tokens[:4]:
        value = _outer(model, batch)
        value.backward()
        with torch.no_grad():
            _outer(model, tokens[5])
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
    found["an evaluation before step"] = losses

    model = _made(folder, sharded, _outer, reentrant, **way or {})
    hook = model.get_base_model().lm_head.register_forward_pre_hook(lambda *_: 1 / 0)
    with contextlib.suppress(ZeroDivisionError):
        _outer(model, tokens[0])
    hook.remove()
    with torch.no_grad():
        found["after an exception"] = [_outer(model, tokens[1]).item()]
    return found


@pytest.mark.parametrize("reentrant", [None, pytest.param(False, marks=pytest.mark.extended)])
def test_whatever_comes_between_forward_backward_and_step(ranks, checkpoints, reentrant):
    given = dict(folder=str(checkpoints["nf4"]), reentrant=reentrant)
    (expected,) = ranks(1, _odd_orders, way=None, **given)
    (alone,) = ranks(1, _odd_orders, way=dict(residency="all"), **given)
    for name, values in expected.items():
        torch.testing.assert_close(torch.tensor(alone[name]), torch.tensor(values), rtol=1e-4, atol=1e-5, msg=name)
    freed = ranks(2, _odd_orders, way=dict(residency=0), **given)
    for way in _WAYS:
        assert ranks(2, _odd_orders, way=way, **given) == freed, way
