"""A run that is killed while it saves: whatever is killed and whenever, the last complete checkpoint is found and the run goes on."""

import os
import random
import signal
import sys
from pathlib import Path

import fsdp2_models as models
import pytest
import torch

from unsloth_ext.errors import UnslothExtError

WHEN = ("while the tensors are written", "before the manifest", "after the manifest")


def _made(folder, seed):
    from unsloth_ext.fsdp2 import load, shard

    model = shard(models.with_lora(load(folder, dtype=torch.float32), seed=seed))
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)


def _steps(model, optimizer, tokens):
    losses = []
    for batch in tokens:
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def _die_at(event, part):
    """SIGKILL to this process when it next does `event` on a file whose name begins with `part`."""

    def hook(name, arguments):
        if name == event and any(str(argument).rpartition("/")[2].startswith(part) for argument in arguments[:2]):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def _killed(rank, world, folder, root, data, when, who):
    """Two steps, a checkpoint, two steps, a second one in which ranks are killed."""
    import datetime

    from unsloth_ext.fsdp2 import save_checkpoint

    model, optimizer = _made(folder, 5)
    tokens = models.batches(6, world, seed=data)[:, rank : rank + 1]
    losses = _steps(model, optimizer, tokens[:2])
    save_checkpoint(f"{root}/checkpoint-2", model, optimizer, extra={"step": 2})
    losses += _steps(model, optimizer, tokens[2:4])
    if rank in who:
        event = {
            WHEN[0]: ("open", "__"),
            WHEN[1]: ("open", "rng_state"),
            WHEN[2]: ("os.rename", "partial-checkpoint-4"),
        }
        _die_at(*event[when])
    try:
        save_checkpoint(
            f"{root}/checkpoint-4", model, optimizer, extra={"step": 4}, timeout=datetime.timedelta(seconds=90)
        )
    except UnslothExtError as error:
        return losses, str(error)
    return losses, None


def _resumed(rank, world, folder, root, data):
    from unsloth_ext.fsdp2 import latest_checkpoint, load_checkpoint

    model, optimizer = _made(folder, 77)
    found = latest_checkpoint(root)
    step = load_checkpoint(found, model, optimizer)["step"]
    return found.name, _steps(model, optimizer, models.batches(6, world, seed=data)[step:, rank : rank + 1])


def _uninterrupted(rank, world, folder, data):
    return _steps(*_made(folder, 5), models.batches(6, world, seed=data)[:, rank : rank + 1])


@pytest.mark.parametrize(
    "world, when, who",
    [
        pytest.param(4, WHEN[0], (2,), marks=pytest.mark.extended),
        (2, WHEN[1], (0,)),
        (2, WHEN[0], (0, 1)),
        (2, WHEN[2], (0,)),
    ],
)
def test_a_killed_run_resumes_with_the_losses_of_an_uninterrupted_one(ranks, checkpoints, tmp_path, world, when, who):
    given = dict(folder=str(checkpoints["nf4"]), data=random.randrange(1 << 30))
    expected = ranks(world, _uninterrupted, **given)
    answers = ranks(world, _killed, root=str(tmp_path), when=when, who=who, may_die=who, **given)
    for rank in set(range(world)) - set(who):
        message = answers[rank][1]
        says = (
            "rank 0 did not answer"
            if 0 in who
            else f"not every rank arrived (waiting at most 90 s): missing {who[0]} of {world}"
        )
        assert message is not None and "checkpoint-4" in message and says in message, message
    assert not (tmp_path / "checkpoint-4").exists()
    names, losses = zip(*ranks(world, _resumed, root=str(tmp_path), **given), strict=True)
    # With its manifest in it the folder is complete: only the renaming was missing.
    step = 4 if when == WHEN[2] else 2
    assert set(names) == {"partial-checkpoint-4" if step == 4 else "checkpoint-2"}
    assert [list(one) for one in losses] == [one[step:] for one in expected]


def _hangs(rank, world, folder, root):
    """Rank 1 stays in the writing of files of its own until rank 0 has given it up."""
    import datetime
    import time

    from unsloth_ext.fsdp2 import save_checkpoint

    model, _ = _made(folder, 5)
    given_up = Path(root, "given-up")

    def write(path):
        while rank == 1 and not given_up.exists():
            time.sleep(0.1)

    try:
        save_checkpoint(f"{root}/checkpoint-1", model, write=write, timeout=datetime.timedelta(seconds=3))
    except UnslothExtError as error:
        return str(error)
    finally:
        given_up.touch()


def test_a_rank_that_hangs_is_named(ranks, checkpoints, tmp_path):
    message = ranks(2, _hangs, folder=str(checkpoints["nf4"]), root=str(tmp_path), may_die=(1,))[0]
    assert "not every rank arrived (waiting at most 3 s): missing 1 of 2" in message, message
    assert not (tmp_path / "checkpoint-1").exists() and not (tmp_path / "partial-checkpoint-1").exists()


def _die_at_operation(number, root):
    operations, done = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"), []

    def hook(name, arguments):
        if name in operations and root in str(arguments[0]):
            done.append(name)
            if len(done) == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def _one_save(root, deadly):
    """Save twice under one name in a process of its own; the `deadly`-th file operation of the second save kills it."""
    from unsloth_ext.fsdp2 import save_checkpoint

    torch.set_num_threads(1)
    model = torch.nn.Linear(5, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    for value in (1.0, 2.0):
        with torch.no_grad():
            model.weight.fill_(value)
        model(torch.ones(5)).sum().backward()
        optimizer.step()
        if value == 2.0:
            _die_at_operation(deadly, root)
        save_checkpoint(f"{root}/checkpoint-7", model, optimizer, extra={"value": value})
    os._exit(0)


def test_killed_at_any_file_operation_one_of_two_checkpoints_is_whole(tmp_path, ranks):
    from unsloth_ext.fsdp2 import latest_checkpoint, load_checkpoint

    context, seen, deadly, step = ranks.context, set(), random.randrange(1, 4), 0
    while True:
        root = tmp_path / str(step)
        root.mkdir()
        process = context.Process(target=_one_save, args=(str(root), deadly))
        process.start()
        process.join(120)
        finished = process.exitcode == 0
        assert finished or process.exitcode == -signal.SIGKILL, process.exitcode
        model = torch.nn.Linear(5, 3)
        optimizer = torch.optim.AdamW(model.parameters())
        value = load_checkpoint(latest_checkpoint(root), model, optimizer)["value"]
        # One step of AdamW at a rate of 0.001 and a decay of 0.01 from what was set.
        assert value in (1.0, 2.0) and abs(model.weight.mean().item() - value) < 0.01
        assert optimizer.state[model.weight]["step"] == value
        seen.add(value)
        if finished:
            break
        deadly, step = deadly + 4, step + 1
    assert seen == {1.0, 2.0} and step > 5
