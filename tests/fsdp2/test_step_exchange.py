"""Adapters that are gathered and reduced once a step: the numbers of one process, how often ranks meet, and what is never left whole."""

import contextlib

import fsdp2_models as models
import pytest
import torch


@contextlib.contextmanager
def _meetings():
    """Within it a list of the collectives that FSDP2 calls: ("gather" or "reduce", bytes of a rank's part)."""
    import torch.distributed as dist

    # The second names are torch 2.13's.
    known = {
        name: (kind, getattr(dist, name))
        for kind, names in (
            ("gather", ("all_gather_into_tensor", "all_gather_single")),
            ("reduce", ("reduce_scatter_tensor", "reduce_scatter_single")),
        )
        for name in names
        if hasattr(dist, name)
    }
    found = []

    def counted(kind, original):
        def call(*args, **kwargs):
            tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
            found.append((kind, min(t.numel() * t.itemsize for t in tensors)))
            return original(*args, **kwargs)

        return call

    for name, (kind, original) in known.items():
        setattr(dist, name, counted(kind, original))
    try:
        yield found
    finally:
        for name, (_, original) in known.items():
            setattr(dist, name, original)


def _optimizer(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)


def _steps(model, optimizer, tokens, run=None):
    losses = []
    for batch in tokens:
        loss = run(model, batch) if run else model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def _sharded_trained(model):
    """Whether each trained parameter is a rank's part."""
    from torch.distributed.tensor import DTensor

    return all(isinstance(p, DTensor) for p in model.parameters() if p.requires_grad)


def _counted(rank, world, folder, adapters, gather):
    from unsloth_ext.fsdp2 import load, shard

    model = shard(models.with_lora(load(folder, dtype=torch.float32)), adapters=adapters, gather=gather)
    optimizer, tokens = _optimizer(model), models.batches(4, world)[:, rank : rank + 1]
    losses = _steps(model, optimizer, tokens[:1])
    with _meetings() as step:
        losses += _steps(model, optimizer, tokens[1:2])
    kept = _sharded_trained(model)
    with _meetings() as forward, torch.no_grad():
        model(input_ids=tokens[0])
    kept &= _sharded_trained(model)
    return losses + _steps(model, optimizer, tokens[2:]), step, forward, kept


def test_ranks_meet_once_a_step_for_adapters_and_not_at_all_for_copied_layers(ranks, checkpoints):
    one = models.with_lora(models.whole(checkpoints["nf4"]))
    expected = torch.tensor(_steps(one, _optimizer(one), models.batches(4, 2)))
    counts = {}
    for adapters in ("step", "layer"):
        for gather in ("copies", "collective"):
            answers = ranks(2, _counted, folder=str(checkpoints["nf4"]), adapters=adapters, gather=gather)
            torch.testing.assert_close(torch.tensor([a[0] for a in answers]).mean(0), expected, rtol=0, atol=1e-5)
            assert all(kept for *_, kept in answers)
            assert [found[0] for found in answers[0][1:3]] == [
                ("gather", 106 * 136 * 4)
            ] * 2  # first the embedding, 211 rows
            counts[adapters, gather] = [
                {kind: sum(one == kind for one, _ in found) for kind in ("gather", "reduce")}
                for found in answers[0][1:3]
            ]
    # Three layers, the embedding and the head. Of copied layers only the last one's forward and backward bring ranks together.
    assert counts["step", "copies"] == [{"gather": 1 + 2 + 3, "reduce": 1}, {"gather": 1 + 1 + 2, "reduce": 0}]
    assert counts["step", "collective"] == [{"gather": 1 + 2 * 3 + 3, "reduce": 1}, {"gather": 1 + 3 + 2, "reduce": 0}]
    assert counts["layer", "copies"] == counts["layer", "collective"]
    assert counts["layer", "copies"] == [{"gather": 2 * 3 + 3, "reduce": 3}, {"gather": 3 + 2, "reduce": 0}]


def _inner(model, batch):
    """As TRL's chunked losses call a model: the decoder, then the head by its weight."""
    causal = model.get_base_model()
    hidden = causal.model(input_ids=batch).last_hidden_state
    return causal.loss_function(causal.lm_head(hidden), batch, vocab_size=causal.config.vocab_size)


def _decoder_alone(rank, world, folder, reentrant):
    """Its first forward has no gradient, and so has one in between: what is trained is a part again after both."""
    from unsloth_ext.fsdp2 import load, shard

    model = load(folder, dtype=torch.float32)
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
    model = shard(models.with_lora(model), adapters="step", gather="copies").train()
    tokens = models.batches(4, world)[:, rank : rank + 1]
    with torch.no_grad():
        first = _inner(model, tokens[0]).item()
    parts = [_sharded_trained(model)]
    optimizer = _optimizer(model)
    losses = _steps(model, optimizer, tokens[:2], _inner)
    parts.append(_sharded_trained(model))
    with torch.no_grad():
        _inner(model, tokens[0])
    parts.append(_sharded_trained(model))
    return first, losses + _steps(model, optimizer, tokens[2:]), parts


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_code_that_calls_the_decoder_alone_trains_the_same(ranks, checkpoints, reentrant):
    one = models.with_lora(models.whole(checkpoints["nf4"]))
    expected = torch.tensor(_steps(one, _optimizer(one), models.batches(4, 2)))
    answers = ranks(2, _decoder_alone, folder=str(checkpoints["nf4"]), reentrant=reentrant)
    torch.testing.assert_close(torch.tensor([a[1] for a in answers]).mean(0), expected, rtol=0, atol=1e-5)
    assert all(parts == [True] * 3 and first == losses[0] for first, losses, parts in answers)


def _odd_orders(rank, world, folder, adapters, reentrant):
    """Losses, or gradient norms, of loops that do things between forward, backward and step. Whole with adapters=None."""
    from unsloth_ext.fsdp2 import load, shard

    tokens = models.batches(6, world)
    tokens = tokens[:, rank : rank + 1] if adapters else tokens
    found = {}

    def fresh(**options):
        model = load(folder, dtype=torch.float32) if adapters else models.whole(folder)
        if reentrant is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model = models.with_lora(model)
        return (shard(model, adapters=adapters, gather="copies", **options) if adapters else model).train()

    def loss(model, batch):
        return model(input_ids=batch, labels=batch).loss

    def norm(model):
        gradients = [p.grad.full_tensor() if adapters else p.grad for p in model.parameters() if p.requires_grad]
        return torch.stack([g.norm() for g in gradients]).norm().item()

    model = fresh()
    norms = []
    for batch in tokens[:3]:
        value = loss(model, batch)
        model.zero_grad()
        value.backward()
        norms.append(norm(model))
    found["zero_grad before backward"] = norms

    model = fresh()
    model.zero_grad()
    first, second = _inner(model, tokens[0]), _inner(model, tokens[1])
    first.backward()
    second.backward()
    found["two decoder forwards, two backwards"] = [norm(model)]
    model.zero_grad()
    value = _inner(model, tokens[2])
    with torch.no_grad():
        loss(model, tokens[3])
    value.backward()
    found["another forward before backward"] = [norm(model)]

    model = fresh()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    losses = []
    for batch in tokens[:4]:
        value = loss(model, batch)
        value.backward()
        loss(model, tokens[5])  # with a graph that nobody needs
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
    found["forward before step"] = losses

    for name, options in (("made late", {}), ("made late, not resharded", {"reshard_after_forward": False})):
        model = fresh(**options)
        loss(model, tokens[0])
        with torch.no_grad():
            loss(model, tokens[0])
        optimizer = _optimizer(model)
        found[f"optimizer {name}"] = _steps(model, optimizer, tokens[:3])

    model = fresh()
    with contextlib.suppress(ZeroDivisionError):
        hook = model.get_base_model().lm_head.register_forward_pre_hook(lambda *_: 1 / 0)
        loss(model, tokens[0])
    hook.remove()
    with torch.no_grad():
        found["after an exception"] = [loss(model, tokens[1]).item()]
    if adapters:
        assert _sharded_trained(model)
    return found


@pytest.mark.parametrize("reentrant", [None, pytest.param(False, marks=pytest.mark.extended)])
def test_whatever_comes_between_forward_backward_and_step(ranks, checkpoints, reentrant):
    folder = str(checkpoints["nf4"])
    (expected,) = ranks(1, _odd_orders, folder=folder, adapters=None, reentrant=reentrant)
    answers = ranks(1, _odd_orders, folder=folder, adapters="step", reentrant=reentrant)
    for name, values in expected.items():
        torch.testing.assert_close(torch.tensor(answers[0][name]), torch.tensor(values), rtol=1e-4, atol=1e-5, msg=name)
    by_step, by_layer = (
        ranks(2, _odd_orders, folder=folder, adapters=adapters, reentrant=reentrant) for adapters in ("step", "layer")
    )
    for one, other in zip(by_step, by_layer, strict=True):
        for name, values in other.items():
            if "made late" not in name:  # by layer, an optimizer may be made of whole parameters, as FSDP2 has it
                assert one[name] == values, name
        assert one["optimizer made late"] == one["optimizer made late, not resharded"]


def _last_meetings(rank, world, folder, residency):
    from unsloth_ext.fsdp2 import load, shard
    from unsloth_ext.fsdp2.held import gathered_bytes
    from unsloth_ext.fsdp2.sharding import units_of

    model = load(folder, dtype=torch.float32)
    if residency == "one layer":
        residency = gathered_bytes(units_of(model)[0][0])
    model = shard(models.with_lora(model), residency=residency, adapters="step", gather="copies")
    token, tokens = None, models.batches(1, 1)[0]
    for _ in range(2):
        with _meetings() as found, torch.no_grad():
            model(input_ids=tokens)
        found = [size for _, size in found]
        token = token or found[-1]
    return len(model._unsloth_ext_resident), found, token


@pytest.mark.parametrize("residency", [0, "one layer"])
def test_the_last_copies_of_a_forward_are_followed_by_a_meeting(ranks, checkpoints, residency):
    """Also with a tied head, after which nothing is gathered."""
    for resident, found, token in ranks(2, _last_meetings, folder=str(checkpoints["tied-16bit"]), residency=residency):
        assert resident == (0 if residency == 0 else 1)
        assert len(found) == 2 and found[-1] == token < found[0]  # the root, and 16 bytes a weight of one layer


def _accumulated(rank, world, folder):
    from unsloth_ext.fsdp2 import accumulate, load, shard

    model = shard(models.with_lora(load(folder, dtype=torch.float32)), adapters="step")
    optimizer, losses = _optimizer(model), []
    with _meetings() as found:
        for batch in models.batches(3, 4 * world):
            mine, total = batch[rank * 4 : rank * 4 + 4], 0.0
            for i in range(4):
                accumulate(model, last=i == 3)
                loss = model(input_ids=mine[i : i + 1], labels=mine[i : i + 1]).loss / 4
                loss.backward()
                total += loss.item()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(total)
    adapters = sum(p.to_local().numel() * 4 for p in model.parameters() if p.requires_grad)
    return losses, [kind for kind, size in found if size == adapters], _sharded_trained(model)


def test_micro_batches_of_a_step_share_one_gather_and_one_reduction(ranks, checkpoints):
    one = models.with_lora(models.whole(checkpoints["nf4"]))
    expected = torch.tensor(_steps(one, _optimizer(one), models.batches(3, 8)))
    answers = ranks(2, _accumulated, folder=str(checkpoints["nf4"]))
    torch.testing.assert_close(torch.tensor([a[0] for a in answers]).mean(0), expected, rtol=0, atol=1e-5)
    for _, kinds, kept in answers:
        assert kinds == ["gather", "reduce"] * 3 and kept


def _chosen(rank, world, folder):
    """How "auto" decides, and what "step" refuses."""
    from unsloth_ext.errors import UsageError
    from unsloth_ext.fsdp2 import gathered, load, shard, step_exchange

    def made(**options):
        return models.with_lora(load(folder, dtype=torch.float32), **options)

    def mixed():
        model = made()
        first = next(p for p in model.parameters() if p.requires_grad)
        first.data = first.data.bfloat16()
        return model

    found = {"small": shard(made(), adapters="auto")._unsloth_ext_once}
    limit = step_exchange._LEAST
    step_exchange._LEAST = 1000 if rank else limit
    try:
        found["large on one rank"] = shard(made(), adapters="auto")._unsloth_ext_once
    finally:
        step_exchange._LEAST = limit
    found["frozen"] = shard(load(folder, dtype=torch.float32), adapters="auto")._unsloth_ext_once
    model = made()
    layer = model.get_base_model().model.layers[0]
    shard(model, adapters="auto")
    with gathered(layer):
        whole = [tuple(p.shape) for n, p in layer.named_parameters() if "lora_A" in n]
    found["whole"] = set(whole), _sharded_trained(model)
    said = []
    for make, options in (
        (mixed, {"adapters": "step"}),
        (made, {"adapters": "step", "cpu_offload": True}),
        (made, {"adapters": "often"}),
    ):
        try:
            shard(make(), **options)
        except UsageError as error:
            said.append(str(error))
    return found, said


def test_what_is_too_large_or_of_several_dtypes_is_exchanged_by_layer(ranks, checkpoints):
    for found, said in ranks(2, _chosen, folder=str(checkpoints["nf4"])):
        assert (found["small"], found["large on one rank"], found["frozen"]) == (True, False, False)
        assert found["whole"] == ({(6, 136), (6, 370)}, True)
        dtypes, offload, word = said
        assert "several dtypes: torch.bfloat16, torch.float32" in dtypes and "cpu_offload" in offload
        assert "auto, step or layer, got 'often'" in word
