"""A run that is saved and goes on equals the uninterrupted one: on as many ranks bit for bit, on others up to rounding."""

import random

import fsdp2_models as models
import numpy as np
import pytest
import torch

STEPS, HALF = 6, 3


def _optimizer(model, kind):
    parameters = [p for p in model.parameters() if p.requires_grad]
    if kind == "adamw":
        half = len(parameters) // 2
        groups = [{"params": parameters[:half], "weight_decay": 0.1}, {"params": parameters[half:]}]
        return torch.optim.AdamW(groups, lr=3e-3)
    import bitsandbytes as bnb

    from unsloth_ext.fsdp2 import on_local_shards

    if kind == "adamw local":
        return on_local_shards(torch.optim.AdamW(parameters, lr=3e-3))
    if kind == "lion8bit":
        return on_local_shards(bnb.optim.Lion8bit(parameters, lr=3e-4, min_8bit_size=200))
    return on_local_shards(bnb.optim.AdamW8bit(parameters, lr=3e-3, min_8bit_size=200))


def _train(model, optimizer, scheduler, tokens):
    losses = []
    for batch in tokens:
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def _run(
    rank, world, folder, data, root, save=False, resume=False, kind="adamw", seed=5, lora=None, alone=False, sharding=None, base=False,
    replicas=1,
):  # fmt: skip
    """Losses of this rank's rows: six steps, of which the last three are run from a checkpoint if `resume`."""
    from unsloth_ext.fsdp2 import latest_checkpoint, load, load_checkpoint, save_checkpoint, shard

    torch.manual_seed(100 + rank)
    random.seed(rank)
    np.random.seed(rank)
    quantised = None if "nf4" in folder else models.quantization()
    device, mesh = "cuda" if torch.cuda.is_available() else "cpu", None
    if replicas > 1:
        shape, names = (replicas, world // replicas), ("replicate", "shard")
        mesh = torch.distributed.init_device_mesh(device, shape, mesh_dim_names=names)
    if alone:
        model = models.whole(folder, device=device)
    else:
        model = load(folder, mesh, dtype=torch.float32, quantization_config=quantised)
    model = models.with_lora(model, seed=seed, **(lora or {}))
    if not alone:
        shard(model, mesh, **(sharding or {}))
    optimizer = _optimizer(model, kind)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    tokens = models.batches(STEPS, 4, seed=data).to(device)
    mine = tokens[:, rank * 4 // world : (rank + 1) * 4 // world]
    torch.manual_seed(200 + rank)
    if resume:
        found = latest_checkpoint(root)
        extra = load_checkpoint(found, model, optimizer, scheduler)
        assert extra["step"] == HALF and torch.equal(extra["some"], torch.arange(3)), extra
        losses = []
    else:
        losses = _train(model, optimizer, scheduler, mine[:HALF])
        if save:
            torch.rand(rank + 1)
            extra = {"step": HALF, "some": torch.arange(3), "more": [1.5, None, {"a": (1, 2)}]}
            save_checkpoint(f"{root}/checkpoint-3", model, optimizer, scheduler, extra=extra, base=base)
    state = _held(model, optimizer)
    losses += _train(model, optimizer, scheduler, mine[HALF:])
    drawn = (random.random(), float(np.random.rand()), torch.rand(1).item())
    rate = optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]
    weights = {n: _whole(p).detach().cpu() for n, p in model.named_parameters() if p.requires_grad}
    return losses, drawn, rate, weights, state


def _held(model, optimizer):
    """{(parameter, key, where this rank's part starts): float32 values}, read with bitsandbytes' own dequantisation."""
    from bitsandbytes.functional import dequantize_blockwise

    from unsloth_ext.fsdp2.optimizer_state import slots

    found = {}
    for slot in (slot for group in slots(model, optimizer) for slot in group if slot.member is not None):
        for key, value in optimizer.state[slot.member].items():
            if isinstance(value, torch.Tensor) and value.ndim and key.startswith(("exp_avg", "state")):
                value = value.to_local() if hasattr(value, "to_local") else value
                flat = value.reshape(-1).clone()
                if flat.dtype == torch.uint8:
                    state, number = optimizer.state[slot.member], key[-1]
                    flat = dequantize_blockwise(
                        flat, absmax=state[f"absmax{number}"], code=state[f"qmap{number}"], blocksize=256
                    )
                found[slot.name, key, slot.start] = flat.cpu()
    return found


def _whole(value):
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def _mean(answers):
    return torch.tensor([a[0] for a in answers], dtype=torch.float64).mean(0)


@pytest.fixture
def data():
    return random.randrange(1 << 30)


SAME = [
    (2, "adamw", dict(lora=dict(lora_dropout=0.2))),
    (4, "adamw local", dict(replicas=2)),
    (2, "adamw8bit", dict(lora=dict(modules_to_save=["lm_head"]))),
    (2, "lion8bit", dict(sharding=dict(cpu_offload=True))),
    (1, "adamw", dict(base=True)),
]


@pytest.mark.parametrize("world, kind, options", SAME, ids=str)
def test_on_as_many_ranks_it_is_the_uninterrupted_run_bit_for_bit(
    ranks, checkpoints, tmp_path, data, world, kind, options
):
    given = dict(folder=str(checkpoints["nf4"]), data=data, root=str(tmp_path), kind=kind, **options)
    first = ranks(world, _run, save=True, **given)
    again = ranks(world, _run, resume=True, seed=77, **given)
    for (losses, *rest, weights, _), (resumed, *others, same, _) in zip(first, again, strict=True):
        assert resumed == losses[HALF:] and rest == others
        assert weights.keys() == same.keys()
        for name, weight in weights.items():
            assert torch.equal(weight, same[name]), name


OTHERS = [
    ("adamw", 2, (4, 1)),
    ("adamw8bit", 1, (2,)),
    pytest.param("adamw8bit", 4, (2, 1), marks=pytest.mark.extended),
]


@pytest.mark.parametrize("kind, before, afters", OTHERS)
def test_on_another_number_of_ranks_it_goes_on(ranks, checkpoints, tmp_path, data, kind, before, afters):
    """1: the whole model in one process, without torch.distributed."""
    given = dict(folder=str(checkpoints["nf4"]), data=data, root=str(tmp_path), kind=kind)

    def run(world, **options):
        if world == 1:
            return [_run(rank=0, world=1, alone=True, **given, **options)]
        return ranks(world, _run, **given, **options)

    first = run(before, save=True)
    for after in afters:
        again = run(after, resume=True, seed=77)
        exact = kind == "adamw"
        torch.testing.assert_close(_mean(again), _mean(first)[HALF:], rtol=0, atol=1e-5 if exact else 1e-3)
        assert first[0][2] == again[0][2]
        was, is_now = _state(first), _state(again)
        assert was.keys() == is_now.keys() and was
        for (name, key), values in was.items():
            # Quantised anew: each value moves by at most half a step of a codebook whose steps are some percent.
            error, size = (is_now[name, key] - values).norm().item(), values.norm().item()
            assert size > 0 and error <= (0 if exact else 0.1) * size, (name, key, error, size)
        if exact:
            for name, weight in first[0][3].items():
                torch.testing.assert_close(again[0][3][name], weight, rtol=0, atol=1e-5)


def _state(answers):
    """{(parameter, key): float32 values of the whole} of what the ranks hold."""
    pieces = {}
    for *_, state in answers:
        for (name, key, start), values in state.items():
            pieces.setdefault((name, key), {})[start] = values
    return {at: torch.cat([found[start] for start in sorted(found)]) for at, found in pieces.items()}


@pytest.mark.gpu
@pytest.mark.parametrize(
    "kind, options", [("adamw", {}), ("adamw8bit", {}), ("adamw", dict(sharding=dict(cpu_offload=True)))], ids=str
)
def test_two_cards_go_on_as_two_and_as_one(cuda_ranks, checkpoints, tmp_path, data, kind, options):
    given = dict(folder=str(checkpoints["nf4"]), data=data, root=str(tmp_path), kind=kind)
    first = cuda_ranks(2, _run, save=True, **given, **options)
    again = cuda_ranks(2, _run, resume=True, seed=77, **given, **options)
    one = [_run(rank=0, world=1, alone=True, resume=True, seed=77, **given)]
    was, same, other = _state(first), _state(again), _state(one)
    for at, values in was.items():
        assert torch.equal(values, same[at]), at
        assert (other[at] - values).norm() <= (0 if kind == "adamw" else 0.1) * values.norm(), at
    for found in (again, one):  # not bit for bit: attention's backward adds in any order
        torch.testing.assert_close(_mean(found), _mean(first)[HALF:], rtol=0, atol=1e-3)
