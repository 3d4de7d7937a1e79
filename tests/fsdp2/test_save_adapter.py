"""The adapter of a sharded model in PEFT's format: the files of PEFT on one device, and no half of one where writing fails."""

import json
import os
import random
import resource
import signal

import fsdp2_models as models
import pytest
import torch
from safetensors.torch import load_file

from unsloth_ext.errors import UnslothExtError, UsageError

OPTIONS = {
    "plain": {},
    "trained head, rank-stabilised": dict(modules_to_save=["lm_head", "norm"], use_rslora=True),
    "DoRA": dict(use_dora=True),
}


def _filled(model, seed, dtype=torch.float32):
    """Random trained parameters, the same whatever the model is cut into."""
    with torch.no_grad():
        for number, (_, parameter) in enumerate((n, p) for n, p in model.named_parameters() if p.requires_grad):
            parameter.data = parameter.data.to(dtype)
            values = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed + number)) / 8
            parameter.copy_(values)
    return model


def _saved(rank, world, folder, out, seed, lora, dtype, offload=False):
    from unsloth_ext.fsdp2 import save_adapter, shard

    model = _filled(models.with_lora(models.whole(folder), **lora), seed, dtype)
    shard(model, cpu_offload=offload)
    with torch.no_grad():
        model(input_ids=models.batches(1, 1)[0])  # the root stays gathered after it
    save_adapter(model, out)
    save_adapter(model, f"{out}/there-already")
    return sorted(os.listdir(out))


@pytest.mark.parametrize(
    "kind, world, dtype", [("plain", 4, torch.bfloat16), *((k, 2, torch.float32) for k in list(OPTIONS)[1:])]
)
def test_the_files_are_those_of_peft_on_one_device(ranks, checkpoints, tmp_path, kind, world, dtype):
    from peft import PeftModel

    folder, seed, lora = str(checkpoints["nf4"]), random.randrange(1 << 30), OPTIONS[kind]
    out, expected = tmp_path / "ours", tmp_path / "pefts"
    (out / "there-already").mkdir(parents=True)
    for name in ("adapter_config.json", "notes.txt"):
        (out / "there-already" / name).write_text("old")
    one = _filled(models.with_lora(models.whole(folder), **lora), seed, dtype)
    one.save_pretrained(expected)
    listed = ranks(world, _saved, folder=folder, out=str(out), seed=seed, lora=lora, dtype=dtype, offload=world == 4)
    assert listed[0] == ["adapter_config.json", "adapter_model.safetensors", "there-already"]
    for place in (out, out / "there-already"):
        theirs, ours = load_file(expected / "adapter_model.safetensors"), load_file(place / "adapter_model.safetensors")
        assert theirs.keys() == ours.keys() and len(ours) >= 42
        for name, tensor in theirs.items():
            assert tensor.dtype == ours[name].dtype == dtype and torch.equal(tensor, ours[name]), name
        configs = [json.loads((f / "adapter_config.json").read_text()) for f in (expected, place)]
        for config in configs:
            config["target_modules"].sort()  # a set, written in the order of its hashes
        assert configs[0] == configs[1]
    assert (out / "there-already" / "notes.txt").read_text() == "old"
    assert not list(out.glob("partial*")) and not (tmp_path / "partial-ours").exists()
    read = dict(PeftModel.from_pretrained(models.whole(folder), out).named_parameters())
    for name, parameter in one.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(read[name].float(), parameter.float()), name


def _full(rank, world, folder, out):
    """The file system refuses what rank 0 writes beyond 20 kB: the limit on file sizes, which a process may lower."""
    from unsloth_ext.fsdp2 import load, save_adapter, save_checkpoint, save_merged, shard

    model = shard(models.with_lora(load(folder, dtype=torch.float32)))
    messages = []
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if rank == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        for job, name in ((save_adapter, "a"), (save_merged, "b"), (save_checkpoint, "c")):
            try:
                job(f"{out}/{name}", model) if job is save_checkpoint else job(model, f"{out}/{name}")
            except UnslothExtError as error:
                messages.append(str(error))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    torch.distributed.barrier()
    left = os.listdir(out)
    save_adapter(model, f"{out}/a")
    return messages, left, os.listdir(f"{out}/a")


def test_a_full_disk_leaves_nothing_behind(ranks, checkpoints, tmp_path):
    for messages, left, after in ranks(2, _full, folder=str(checkpoints["nf4"]), out=str(tmp_path)):
        assert len(messages) == 3 and left == [] and len(after) == 2
        for message in messages:
            assert "failed on 1 of 2 ranks" in message and "rank 0: " in message and "File too large" in message
        assert "Free some space" in messages[0]


def test_what_has_no_adapter_says_so(checkpoints, tmp_path):
    from unsloth_ext.fsdp2 import save_adapter

    model = models.whole(checkpoints["nf4"])
    with pytest.raises(UsageError, match="no PEFT model"):
        save_adapter(model, tmp_path / "x")
    with pytest.raises(UsageError, match="adapter_name must be one of .'default'., got 'other'"):
        save_adapter(models.with_lora(model), tmp_path / "x", adapter_name="other")
    assert not list(tmp_path.iterdir())
