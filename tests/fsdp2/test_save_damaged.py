"""Folders that are no complete checkpoint, and checkpoints that do not fit: passed by or refused by name, nothing loaded."""

import datetime
import io
import json
import os
import pickle
import random
import shutil
from pathlib import Path

import fsdp2_models as models
import pytest
import torch

from unsloth_ext.errors import UnslothExtError, UsageError
from unsloth_ext.fsdp2 import latest_checkpoint, load_checkpoint, save_checkpoint
from unsloth_ext.fsdp2.atomic_folder import Damaged


def _made(seed=0, kind=torch.optim.AdamW, features=7):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(features, 4), torch.nn.Linear(4, 2))
    optimizer = kind(model.parameters(), lr=1e-2)
    model(torch.rand(3, features)).sum().backward()
    optimizer.step()
    return model, optimizer


@pytest.fixture
def run(tmp_path):
    """(folder with checkpoint-1 and checkpoint-2, model, optimizer)"""
    model, optimizer = _made()
    for step in (1, 2):
        save_checkpoint(tmp_path / f"checkpoint-{step}", model, optimizer, extra={"step": step})
    return tmp_path, model, optimizer


def test_a_checkpoint_in_a_trainers_folder_is_found_and_loaded(tmp_path):
    model, optimizer = _made()
    (folder := tmp_path / "checkpoint-3").mkdir()
    save_checkpoint(folder / "sharded_optimizer", model, optimizer, extra={"global_step": 3})
    (folder / "adapter_model.safetensors").touch()  # as the Trainer has it there, without an optimizer.pt
    assert latest_checkpoint(tmp_path) == folder
    other, its_optimizer = _made(seed=1)
    assert load_checkpoint(folder, other, its_optimizer) == {"global_step": 3}
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_a_file_of_the_callers_named_as_the_manifest_is_covered(tmp_path):
    model, optimizer = _made()

    def write(work):
        (work / "mine").mkdir()
        (work / "mine/manifest.json").write_text("{}")

    save_checkpoint(tmp_path / "checkpoint-1", model, optimizer, write=write)
    (tmp_path / "checkpoint-1/mine/manifest.json").write_text("[]")
    with pytest.raises(Damaged, match="mine/manifest.json has changed"):
        load_checkpoint(tmp_path / "checkpoint-1", model, optimizer)


def _with_a_class_of_its_own(rank, world):
    from unsloth_ext.fsdp2.team import Team

    class Unknown(Exception):
        """No other process can import it."""

    def job():
        if rank == 1:
            raise Unknown("the disk is gone")

    try:
        Team("a test").together(job)
    except UnslothExtError as error:
        return str(error)


def test_an_error_of_any_class_reaches_every_rank(ranks):
    for said in ranks(2, _with_a_class_of_its_own):
        assert said == "a test failed on 1 of 2 ranks; rank 1: the disk is gone"


def _truncate(path):
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - random.randrange(1, 20))


def _flip(path):
    data = bytearray(path.read_bytes())
    data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    path.write_bytes(data)


def _some(folder):
    return random.choice(sorted(p for p in folder.rglob("*") if p.is_file()))


DAMAGES = {
    "truncated": (lambda folder: _truncate(_some(folder)), None),
    "a bit flipped": (lambda folder: _flip(_some(folder / "tensors")), "has changed since it was written"),
    "a file missing": (lambda folder: next((folder / "tensors").glob("*.distcp")).unlink(), "is missing"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "has no manifest.json"),
    "an empty manifest": (lambda folder: (folder / "manifest.json").write_text(""), "cannot be read"),
    "another's manifest": (lambda folder: (folder / "manifest.json").write_text('{"files": {}}'), "no manifest of an unsloth"),
    "a manifest that looks outside": (
        lambda folder: (folder / "manifest.json").write_text(
            (folder / "manifest.json").read_text().replace('"training.pt"', '"../../training.pt"')
        ),
        "outside its folder",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_by_and_not_loaded(run, damage, capsys):
    root, model, optimizer = run
    before = {n: p.clone() for n, p in model.named_parameters()}
    make, says = DAMAGES[damage]
    make(root / "checkpoint-2")
    assert latest_checkpoint(root) == root / "checkpoint-1"
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "passed by" in said and "checkpoint-2" in said and (says or "checkpoint-2") in said
    with pytest.raises(UnslothExtError, match="checkpoint-2"):
        load_checkpoint(root / "checkpoint-2", model, optimizer)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
    assert load_checkpoint(latest_checkpoint(root), model, optimizer) == {"step": 1}


def test_what_is_no_checkpoint(run, capsys):
    root, model, optimizer = run
    assert latest_checkpoint(root / "nowhere") is None
    (root / "logs-99").mkdir()
    (root / "checkpoint-30").mkdir()  # a Trainer was killed here
    (root / "checkpoint-30" / "adapter_model.safetensors").write_bytes(b"half")
    (root / "partial-checkpoint-40").mkdir()
    assert latest_checkpoint(root) == root / "checkpoint-2"
    said = capsys.readouterr().err
    assert "trainer_state.json" in said and "partial-checkpoint-40" in said and "logs" not in said
    with pytest.raises(UsageError, match="is no checkpoint"):
        load_checkpoint(root / "logs-99", model, optimizer)
    with pytest.raises(UsageError, match="is no folder"):
        load_checkpoint(root / "nothing", model, optimizer)


def test_a_checkpoint_is_replaced_and_other_things_are_kept(run, capsys):
    root, model, optimizer = run
    (root / "checkpoint-2" / "tensors" / ".metadata").unlink()
    save_checkpoint(root / "checkpoint-2", model, optimizer, extra={"step": "again"})
    assert load_checkpoint(latest_checkpoint(root), model, optimizer) == {"step": "again"}
    (root / "checkpoint-3").mkdir()
    (root / "checkpoint-3" / "mine.txt").write_text("not yours")
    for n in (1, 2):
        save_checkpoint(root / "checkpoint-3", model)
        if n == 1:
            shutil.rmtree(root / "checkpoint-3")
            (root / "checkpoint-3").mkdir()
            (root / "checkpoint-3" / "mine.txt").write_text("nor this")
    assert (root / "replaced-checkpoint-3-1" / "mine.txt").read_text() == "not yours"
    assert (root / "replaced-checkpoint-3-2" / "mine.txt").read_text() == "nor this"
    assert sorted(p.name for p in root.iterdir()) == [
        "checkpoint-1", "checkpoint-2", "checkpoint-3", "replaced-checkpoint-3-1", "replaced-checkpoint-3-2",
    ]  # fmt: skip
    (root / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        save_checkpoint(root / "file", model)


def test_what_does_not_fit_is_named(run):
    root, model, optimizer = run
    folder = root / "checkpoint-2"
    with pytest.raises(UsageError, match="optimizer is AdamW, this one is SGD"):
        load_checkpoint(folder, model, torch.optim.SGD(model.parameters(), lr=1.0))
    with pytest.raises(UsageError, match=r"'0.weight' has shape \(4, 7\) .* \(4, 9\) in the model"):
        load_checkpoint(folder, _made(features=9)[0])
    with pytest.raises(UsageError, match="lacks 2 parameters that the model trains, '2.bias'"):
        load_checkpoint(folder, torch.nn.Sequential(*model, torch.nn.Linear(2, 2)))
    with pytest.raises(UsageError, match="has 2 parameters that the model does not train, '1.bias'"):
        load_checkpoint(folder, model[:1])
    halves = [{"params": list(model[0].parameters())}, {"params": list(model[1].parameters())}]
    with pytest.raises(UsageError, match="has 1 groups of parameters, this one 2"):
        load_checkpoint(folder, model, torch.optim.AdamW(halves))
    with pytest.raises(UsageError, match="differs from the checkpoint's in 2 parameters, '1.bias'"):
        load_checkpoint(folder, model, torch.optim.AdamW(model[0].parameters()))
    with pytest.raises(UsageError, match="not in the model"):
        save_checkpoint(root / "x", model, torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))]))
    with pytest.raises(UsageError, match="saved without a scheduler"):
        load_checkpoint(folder, model, optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer))
    save_checkpoint(root / "checkpoint-3", model)
    with pytest.raises(UsageError, match="saved without an optimizer"):
        load_checkpoint(root / "checkpoint-3", model, optimizer)
    with pytest.raises(UsageError, match="extra must be made of"):
        save_checkpoint(root / "x", model, extra={"code": Path.cwd})
    with pytest.raises(UsageError, match="nothing to save"):
        save_checkpoint(root / "x", torch.nn.Linear(2, 2).requires_grad_(False))
    assert not (root / "x").exists() and not (root / "partial-x").exists()


class _Runs:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("file", ["tensors/.metadata", "training.pt", "rng_state_0.pth"])
def test_no_code_of_a_checkpoint_is_run(run, file):
    """Its manifest may even vouch for it."""
    from unsloth_ext.fsdp2 import atomic_folder

    root, model, optimizer = run
    folder = root / "checkpoint-2"
    manifest = json.loads((folder / "manifest.json").read_text())
    evil = _Runs(root / "owned")
    if file.endswith("metadata"):
        (folder / file).write_bytes(pickle.dumps(evil))
    else:
        torch.save({"extra": evil}, folder / file)
    manifest["files"] |= atomic_folder.hashes(folder, [file])
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(Damaged, match=Path(file).name):
        load_checkpoint(folder, model, optimizer)
    assert not (root / "owned").exists()


class _Got:
    """Pickled as Python before 3.11.4 pickles the member of an enumeration."""

    def __init__(self, kind, name):
        self.how = getattr, (kind, name)

    def __reduce__(self):
        return self.how


def test_members_of_enumerations_are_read_and_no_other_attributes():
    from torch.distributed.checkpoint import metadata

    from unsloth_ext.fsdp2.stored import _Unpickler

    def read(*of):
        return _Unpickler(io.BytesIO(pickle.dumps(_Got(*of)))).load()

    encoding = metadata._MEM_FORMAT_ENCODING
    member = next(iter(encoding))
    assert read(encoding, member.name) is member
    for kind, name in (
        (encoding, "__init__"),
        (metadata.Metadata, "__init__"),
        (metadata.TensorProperties, "__module__"),
    ):
        with pytest.raises(pickle.UnpicklingError, match="no part of a checkpoint's index"):
            read(kind, name)


def _disagree(rank, world, folder, root):
    from unsloth_ext.fsdp2 import load, shard

    model = shard(models.with_lora(load(folder, dtype=torch.float32)))
    messages = []

    def attempt(**options):
        try:
            save_checkpoint(f"{root}/checkpoint-1", model, timeout=datetime.timedelta(seconds=60), **options)
        except UnslothExtError as error:
            messages.append((type(error).__name__, str(error)))

    attempt(extra={"a": attempt} if rank == 1 else {})

    def write(path):
        if rank == 0:
            raise OSError(28, "No space left on device")

    attempt(write=write)
    torch.distributed.barrier()
    left = sorted(p.name for p in Path(root).iterdir())
    attempt()
    if rank == 1:
        next(Path(root, "checkpoint-1", "tensors").glob("__1*")).write_bytes(b"")
    torch.distributed.barrier()
    before = [p.to_local().clone() for p in model.parameters() if p.requires_grad]
    with pytest.raises(UnslothExtError, match="has 0 bytes"):
        load_checkpoint(f"{root}/checkpoint-1", model)
    for old, new in zip(before, (p for p in model.parameters() if p.requires_grad), strict=True):
        assert torch.equal(old, new.to_local())
    return messages, left


def test_an_error_of_one_rank_is_raised_on_all(ranks, checkpoints, tmp_path):
    answers = ranks(2, _disagree, folder=str(checkpoints["nf4"]), root=str(tmp_path))
    for messages, left in answers:
        (kind, extra), (_, space) = messages
        assert kind == "UsageError" and "failed on 1 of 2 ranks; rank 1: extra must be made of" in extra
        assert "rank 0: " in space and "No space left" in space
        assert left == []


def test_what_is_saved_of_the_base_is_loaded(ranks, checkpoints, tmp_path):
    answers = ranks(
        3, _with_base, folder=str(checkpoints["nf4"]), other=str(checkpoints["flat-nf4"]), root=str(tmp_path)
    )
    assert all(answer == answers[0] and "differs from this one in" in answer for answer in answers)


def _with_base(rank, world, folder, other, root):
    from unsloth_ext.fsdp2 import load, shard
    from unsloth_ext.fsdp2.held import base_state
    from unsloth_ext.fsdp2.whole import local_of

    model = shard(models.with_lora(load(folder, dtype=torch.float32)))
    before = {name: local_of(tensor).clone() for name, tensor in base_state(model).items()}
    assert any(name.endswith("nested_offset") for name in before) and any("embed" in name for name in before)
    save_checkpoint(f"{root}/checkpoint-1", model, base=True)
    for tensor in base_state(model).values():
        local_of(tensor).zero_()
    load_checkpoint(f"{root}/checkpoint-1", model)
    for name, tensor in base_state(model).items():
        assert torch.equal(local_of(tensor), before[name]), name
    try:
        load_checkpoint(f"{root}/checkpoint-1", shard(models.with_lora(load(other, dtype=torch.float32))))
    except UsageError as error:
        return str(error)


def test_the_base_of_a_whole_4bit_model_is_refused_before_anything_is_written(checkpoints, tmp_path):
    model = models.with_lora(models.whole(checkpoints["nf4"]))
    with pytest.raises(
        UsageError, match=r"base=True saves the 4-bit weights of a sharded model, and .*q_proj.* is whole"
    ):
        save_checkpoint(tmp_path / "checkpoint-1", model, base=True)
    assert not any(tmp_path.iterdir())


def test_the_base_of_a_16_bit_model_comes_back(tmp_path):
    model, _ = _made()
    model[0].weight.requires_grad_(False)
    save_checkpoint(tmp_path / "checkpoint-1", model, base=True)
    other, _ = _made(seed=1)
    other[0].weight.requires_grad_(False)
    load_checkpoint(tmp_path / "checkpoint-1", other)
    assert torch.equal(other[0].weight, model[0].weight)


def test_a_resumed_run_begins_at_the_newest_checkpoint_that_is_whole(run, capsys):
    from unsloth_ext.training.recorder import COMPLETE, newest_checkpoint

    root, *_ = run
    assert newest_checkpoint(root) is None
    for step in (1, 2):
        (root / f"checkpoint-{step}" / COMPLETE).write_text("{}")
    assert newest_checkpoint(root) == root / "checkpoint-2"
    _flip(_some(root / "checkpoint-2" / "tensors"))
    assert newest_checkpoint(root) == root / "checkpoint-1"
    assert "passed by" in capsys.readouterr().err


@pytest.mark.parametrize("saved, made, says", [
    ("AdamW", "AdamW8bit", "keeps exp_avg, exp_avg_sq of a parameter, AdamW8bit keeps state1, state2"),
    ("AdamW8bit", "AdamW", "keeps state1, state2 of a parameter, AdamW keeps exp_avg, exp_avg_sq"),
    ("Momentum", "AdamW", "keeps momentum_buffer of a parameter, AdamW keeps exp_avg"),
    ("AdamW", "SGD", "keeps exp_avg, exp_avg_sq of a parameter, SGD keeps none"),
    ("AdamW8bit", "Lion8bit", "keeps state1, state2 of a parameter, Lion8bit keeps state1"),
])  # fmt: skip
def test_a_trainers_folder_of_another_optimizer_is_refused_before_anything_changes(tmp_path, saved, made, says):
    import bitsandbytes as bnb
    from safetensors.torch import save_file

    kinds = {"AdamW": torch.optim.AdamW, "SGD": torch.optim.SGD, "AdamW8bit": bnb.optim.AdamW8bit,
             "Lion8bit": bnb.optim.Lion8bit, "Momentum": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9)}  # fmt: skip
    model, optimizer = _made(kind=kinds[saved])
    save_file({n: p.detach() for n, p in model.named_parameters()}, tmp_path / "model.safetensors")
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    (tmp_path / "trainer_state.json").write_text("{}")
    other, its_optimizer = _made(seed=1, kind=kinds[made])
    before = [p.clone() for p in other.parameters()]
    with pytest.raises(UsageError, match=says):
        load_checkpoint(tmp_path, other, its_optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, other.parameters(), strict=True))
    same, its_optimizer = _made(seed=1, kind=kinds[saved])
    load_checkpoint(tmp_path, same, its_optimizer)
    fresh = kinds[saved](same.parameters(), lr=1e-2)
    load_checkpoint(tmp_path, same, fresh)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True))
