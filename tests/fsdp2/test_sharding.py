"""The whole model under `shard`: the numbers of one process, in every arrangement; what is held; who fails, and how."""

import contextlib
import math

import fsdp2_models as models
import pytest
import torch


def _train(model, tokens, optimizer=None, clip=None):
    optimizer = optimizer or torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for batch in tokens:
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def _whole(value):
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def _gradients(model, batch):
    model(input_ids=batch, labels=batch).loss.backward()
    found = {n: _whole(p.grad).clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return found


def _parity(rank, world, folder, sharded_load, steps=20, checkpointing=False, replicas=1, lora=None, **options):
    from torch.distributed.device_mesh import init_device_mesh

    from unsloth_ext.fsdp2 import load, shard

    mesh = None
    if replicas > 1:
        mesh = init_device_mesh("cpu", (replicas, world // replicas), mesh_dim_names=("replicate", "shard"))
    if sharded_load:
        model = load(
            folder, mesh, dtype=torch.float32, quantization_config=None if "nf4" in folder else models.quantization()
        )
    else:
        model = models.whole(folder)
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    model = shard(models.with_lora(model, **(lora or {})), mesh, **options)
    tokens = models.batches(steps, 4)
    mine = tokens[:, rank * 4 // world : (rank + 1) * 4 // world]
    gradients = _gradients(model, mine[0])
    losses = _train(model, mine, clip=0.5)
    return losses, gradients


def test_twenty_steps_equal_one_process(ranks, checkpoints):
    one = models.with_lora(models.whole(checkpoints["nf4"]))
    tokens = models.batches(20, 4)
    gradients, losses = _gradients(one, tokens[0]), _train(one, tokens, clip=0.5)
    for world, sharded_load in ((2, True), (4, False)):
        answers = ranks(world, _parity, folder=str(checkpoints["nf4"]), sharded_load=sharded_load)
        for name, expected in gradients.items():
            torch.testing.assert_close(answers[0][1][name], expected, rtol=0, atol=1e-5)
        mean = torch.tensor([a[0] for a in answers]).mean(0)
        # Which products a CPU has decides the last bits: 1.3e-5 at the 17th step of one.
        torch.testing.assert_close(mean, torch.tensor(losses), rtol=0, atol=3e-5)


@pytest.mark.parametrize("kind", ["tied-16bit", pytest.param("16bit", marks=pytest.mark.extended)])
def test_other_arrangements_equal_one_process(ranks, checkpoints, kind):
    """From 16 bit; head tied to the embedding; activation checkpointing; no resharding; offload; gathers by copies."""
    one = models.with_lora(models.whole(checkpoints[kind]))
    tokens = models.batches(4, 4)
    gradients, losses = _gradients(one, tokens[0]), _train(one, tokens, clip=0.5)
    variants = [
        dict(sharded_load=True, checkpointing=True),
        dict(sharded_load=False, cpu_offload=True, reshard_after_forward=False),
        dict(sharded_load=True, residency="all"),
        dict(sharded_load=True, gather="copies", checkpointing=True),
        dict(sharded_load=False, gather="copies", residency="all"),
    ]
    for world, variant in zip((4, 2, 2, 4, 2), variants, strict=True):
        answers = ranks(world, _parity, folder=str(checkpoints[kind]), steps=4, **variant)
        for name, expected in gradients.items():
            torch.testing.assert_close(answers[0][1][name], expected, rtol=0, atol=1e-5, msg=f"{variant} {name}")
        mean = torch.tensor([a[0] for a in answers]).mean(0)
        torch.testing.assert_close(mean, torch.tensor(losses), rtol=0, atol=1e-5)


def test_mixed_precision_computes_in_its_dtype(ranks, checkpoints):
    one = models.with_lora(models.whole(checkpoints["nf4"]))
    losses = _train(one, models.batches(4, 4), clip=0.5)
    options = dict(sharded_load=True, steps=4, mixed_precision=torch.bfloat16)
    answers = ranks(2, _parity, folder=str(checkpoints["nf4"]), **options)
    mean = torch.tensor([a[0] for a in answers]).mean(0)
    difference = (mean - torch.tensor(losses)).abs().max().item()
    assert 1e-6 < difference < 2e-2  # bfloat16's roundings, and no more


def test_replicas_of_shards_and_a_trained_head_equal_one_process(ranks, checkpoints):
    lora = dict(modules_to_save=["lm_head", "norm"])
    one = models.with_lora(models.whole(checkpoints["nf4"]), **lora)
    tokens = models.batches(4, 4)
    gradients, losses = _gradients(one, tokens[0]), _train(one, tokens, clip=0.5)
    assert any("lm_head" in name for name in gradients)
    for options in (dict(replicas=2, gather="copies"), dict(replicas=1, residency=1 << 20)):
        answers = ranks(4, _parity, folder=str(checkpoints["nf4"]), sharded_load=True, steps=4, lora=lora, **options)
        for name, expected in gradients.items():
            torch.testing.assert_close(answers[0][1][name], expected, rtol=0, atol=1e-5)
        mean = torch.tensor([a[0] for a in answers]).mean(0)
        torch.testing.assert_close(mean, torch.tensor(losses), rtol=0, atol=1e-5)


def _on_cards(rank, world, folder, **options):
    from unsloth_ext.fsdp2 import load, shard

    tokens = models.batches(6, 4).to("cuda")
    one = models.with_lora(models.whole(folder, device=torch.device("cuda", rank)))
    expected = _train(one, tokens, clip=0.5)
    model = shard(models.with_lora(load(folder, dtype=torch.float32)), **options)
    return _train(model, tokens[:, rank * 4 // world : (rank + 1) * 4 // world], clip=0.5), expected


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [
        {"gather": "copies"},
        {"gather": "collective"},
        {"cpu_offload": True},
        {"gather": "copies", "residency": "all"},
    ],
    ids=str,
)
def test_two_cards_equal_one(cuda_ranks, checkpoints, options):
    answers = cuda_ranks(2, _on_cards, folder=str(checkpoints["nf4"]), **options)
    mean = torch.tensor([a[0] for a in answers]).mean(0)
    torch.testing.assert_close(mean, torch.tensor(answers[0][1]), rtol=0, atol=2e-4)


@contextlib.contextmanager
def _counted_gathers():
    """Within it a list of the shapes of NF4 weights that are gathered."""
    from unsloth_ext.fsdp2.nf4_parameter import NF4Shard

    gathers, original = [], NF4Shard.fsdp_pre_all_gather

    def counted(self, mesh, outer_size, outer_stride, module, mp_policy):
        gathers.append(tuple(self.cut.shape))
        return original(self, mesh, outer_size, outer_stride, module, mp_policy)

    NF4Shard.fsdp_pre_all_gather = counted
    try:
        yield gathers
    finally:
        NF4Shard.fsdp_pre_all_gather = original


def _accumulated(rank, world, folder, residency):
    from unsloth_ext.fsdp2 import accumulate, load, shard

    with _counted_gathers() as gathers:
        model = shard(models.with_lora(load(folder, dtype=torch.float32)), residency=residency)
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=3e-3)
        losses, counts = [], []
        for batch in models.batches(3, 8):
            mine, total = batch[rank * 4 : rank * 4 + 4], 0.0
            before = len(gathers)
            for i in range(4):
                accumulate(model, last=i == 3)
                loss = model(input_ids=mine[i : i + 1], labels=mine[i : i + 1]).loss / 4
                loss.backward()
                total += loss.item()
            torch.nn.utils.clip_grad_norm_(parameters, 0.5)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(total)
            counts.append(len(gathers) - before)
        return losses, counts


def _checkpointed(rank, world, folder, reentrant, residency):
    from unsloth_ext.fsdp2 import load, shard

    model = load(folder, dtype=torch.float32)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model = shard(models.with_lora(model), residency=residency)
    model.train()
    with _counted_gathers() as gathers:
        losses = _train(model, models.batches(3, 2))
    return losses, len(gathers)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_s_second_forward_gathers_its_own_layer_only(ranks, checkpoints, reentrant):
    expected = _train(models.with_lora(models.whole(checkpoints["nf4"])), models.batches(3, 2))
    # Each layer for the forward and for the backward of each step; kept ones once.
    for residency, count in ((0, 21 * 2 * 3), ("all", 21 * 3)):
        given = dict(folder=str(checkpoints["nf4"]), reentrant=reentrant, residency=residency)
        for losses, gathers in ranks(2, _checkpointed, **given):
            torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=0, atol=1e-5)
            assert gathers == count


def test_accumulation_equals_one_large_batch_and_gathers_once(ranks, checkpoints):
    one = models.with_lora(models.whole(checkpoints["nf4"]))
    expected = torch.tensor(_train(one, models.batches(3, 8), clip=0.5))
    counts = {}
    for residency in (0, "all"):
        answers = ranks(2, _accumulated, folder=str(checkpoints["nf4"]), residency=residency)
        torch.testing.assert_close(torch.tensor([a[0] for a in answers]).mean(0), expected, rtol=0, atol=1e-5)
        counts[residency] = answers[0][1]
    assert counts[0] == [21 * 2 * 4] * 3  # each layer for each forward and each backward
    assert counts["all"] == [21] * 3  # each layer once a step


def _generated(rank, world, folder, inner=False):
    from unsloth_ext.fsdp2 import load, shard

    model = shard(models.with_lora(load(folder, dtype=torch.float32)))
    prompt = models.batches(1, 1, length=5)[0]
    speaker = model.get_base_model() if inner else model
    model.eval()
    first = speaker.generate(input_ids=prompt, max_new_tokens=6, do_sample=False)
    model.train()
    losses = _train(model, models.batches(2, 2))
    model.eval()
    return first, losses, model.generate(input_ids=prompt, max_new_tokens=6, do_sample=False)


def test_generate_before_the_first_forward_then_train_then_generate(ranks, checkpoints):
    for kind, inner in (("nf4", False), ("nf4", True), ("tied-16bit", False)):
        one = models.with_lora(models.whole(checkpoints[kind]))
        prompt = models.batches(1, 1, length=5)[0]
        for module in one.modules():
            module.support_avx512bf16_for_cpu = False
        one.eval()
        first = one.generate(input_ids=prompt, max_new_tokens=6, do_sample=False)
        one.train()
        losses = _train(one, models.batches(2, 2))
        one.eval()
        second = one.generate(input_ids=prompt, max_new_tokens=6, do_sample=False)
        for answer in ranks(2, _generated, folder=str(checkpoints[kind]), inner=inner):
            assert torch.equal(answer[0], first) and torch.equal(answer[2], second)
            torch.testing.assert_close(torch.tensor(answer[1]), torch.tensor(losses), rtol=0, atol=1e-5)


def _held(rank, world, folder):
    from unsloth_ext.fsdp2 import bytes_held, gathered, shard

    model = models.with_lora(models.whole(folder))
    whole = bytes_held(model)
    shard(model)
    before = bytes_held(model)
    model(input_ids=models.batches(1, 1)[0]).logits.sum().backward()
    layer = model.get_base_model().model.layers[1]
    with gathered(layer, model.get_output_embeddings()):
        assert layer.mlp.up_proj.base_layer.weight.quant_state.shape == (370, 136)
        assert model.get_output_embeddings().weight.shape == (211, 136)
        assert layer.mlp.up_proj.base_layer.weight.sum() > 0
    return whole, before, bytes_held(model)


def test_a_rank_holds_its_share_before_and_after_a_step(ranks, checkpoints):
    for whole, before, after in ranks(4, _held, folder=str(checkpoints["nf4"])):
        assert before == after
        sizes = [136 * 136, 68 * 136, 68 * 136, 136 * 136, *[136 * 370] * 3]
        groups = 3 * sum(
            math.ceil(math.ceil(n / 16384) / 4) for n in sizes
        )  # that each of four ranks has, padding included
        assert before["packed"] == groups * 8192
        assert before["quant_state"] <= groups * 260 + 21 * 4
        assert before["trainable"] < whole["trainable"] * 0.34  # six rows over four ranks: two a rank
        assert before["frozen"] < whole["frozen"] * 0.28


def _optimized(rank, world, folder):
    import bitsandbytes as bnb

    from unsloth_ext.fsdp2 import load, on_local_shards, shard

    model = shard(models.with_lora(load(folder, dtype=torch.float32)))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = on_local_shards(bnb.optim.AdamW8bit(parameters, lr=3e-3, min_8bit_size=16))
    losses = _train(model, [models.batches(1, 2)[0]] * 5, optimizer, clip=0.5)
    assert optimizer.state[optimizer.param_groups[0]["params"][0]]["state1"].dtype == torch.uint8
    with pytest.raises(ValueError, match="before the optimizer's first step"):
        on_local_shards(optimizer)
    reference = shard(models.with_lora(load(folder, dtype=torch.float32)))
    expected = _train(reference, [models.batches(1, 2)[0]] * 5, clip=0.5)
    return losses, expected


def test_bitsandbytes_optimizers_step_on_local_shards(ranks, checkpoints):
    for losses, expected in ranks(2, _optimized, folder=str(checkpoints["nf4"])):
        assert losses[-1] < losses[0] - 0.05
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=0, atol=1e-3)


def _refused(rank, world, folder):
    from unsloth_ext.errors import UnslothExtError
    from unsloth_ext.fsdp2 import load, shard

    messages = []

    def attempt(make, **options):
        try:
            shard(make(), **options)
        except UnslothExtError as error:
            messages.append(str(error))

    model = shard(load(folder))
    attempt(lambda: model)
    attempt(lambda: models.whole(folder), residency=-1)
    attempt(lambda: models.whole(folder), reshard_after_forward=2)
    attempt(lambda: torch.nn.Linear(3, 3))

    def integers():
        found = models.whole(folder)
        found.lm_head.weight = torch.nn.Parameter(torch.zeros(3, 3, dtype=torch.int8), requires_grad=False)
        return found

    attempt(integers)
    attempt(lambda: models.whole(folder) if rank else torch.nn.Linear(3, 3))
    attempt(lambda: models.with_lora(models.whole(folder)), gather="copies" if rank else "auto")
    return messages


def test_what_cannot_be_sharded_says_so_on_every_rank(ranks, checkpoints):
    for messages in ranks(2, _refused, folder=str(checkpoints["nf4"])):
        twice, budget, reshard, layers, integers, disagree, settings = messages
        assert "gather must be the same on every rank, got auto and copies" in settings
        assert "sharded by FSDP2 already" in twice and "residency" in budget and "-1" in budget
        assert "reshard_after_forward must be True or False, got 2" in reshard
        assert "no decoder layers" in layers and "Linear" in layers
        assert "lm_head.weight is torch.int8" in integers
        assert "1 of 2 ranks" in disagree and "rank 0:" in disagree


def test_torchrun_forgotten_says_so(monkeypatch):
    from unsloth_ext.errors import UsageError
    from unsloth_ext.fsdp2 import shard

    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UsageError, match="torchrun --nproc-per-node"):
        shard(torch.nn.Linear(3, 3))


def _one_dies(rank, world, folder, when):
    import datetime
    import os
    import time

    from unsloth_ext.fsdp2 import load, shard

    model = models.with_lora(load(folder, dtype=torch.float32))
    if when == "before sharding" and rank == 1:
        os._exit(9)
    start = time.monotonic()
    try:
        # In a step both ranks are alive while the model is sharded: a busy machine may keep one of them waiting.
        shard(model, timeout=datetime.timedelta(seconds=4 if when == "before sharding" else 120))
        for step, batch in enumerate(models.batches(50, 1)):
            if step == 3 and rank == 1:
                os._exit(9)
            model(input_ids=batch, labels=batch).loss.backward()
    except Exception as error:
        return str(error), time.monotonic() - start
    return "nothing happened", 0.0


@pytest.mark.parametrize("when", ["before sharding", "in a step"])
def test_a_rank_that_dies_is_noticed(ranks, checkpoints, when):
    message, seconds = ranks(2, _one_dies, folder=str(checkpoints["nf4"]), when=when, may_die=(1,))[0]
    assert seconds < 240 and message != "nothing happened"  # before the process group's own 300 s
    if when == "before sharding":
        assert "sharding the model: not every rank arrived (waiting at most 4 s): missing 1 of 2" in message
    else:
        assert "Connection" in message or "peer" in message, message
