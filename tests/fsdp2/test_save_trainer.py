"""Checkpoints that transformers' Trainer wrote on one device or under DDP go on under FSDP2, with the Trainer's own losses."""

import random

import fsdp2_models as models
import pytest
import torch

STEPS, HALF = 4, 2


def _lora(optim):
    """Large enough for states of 8 bit (4096 elements), where they are wanted. Norms have no weight decay: a group of their own."""
    return dict(modules_to_save=["norm"], rank_pattern=dict.fromkeys(models.TARGETS, 64) if "8bit" in optim else {})


class _Data(torch.utils.data.Dataset):
    def __init__(self, seed):
        self.rows = models.batches(STEPS, 4, seed=seed).flatten(0, 1)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return {"input_ids": self.rows[i], "labels": self.rows[i]}


def _trained_by_trainer(folder, root, data, optim, world=1):
    """Losses of the steps, with a checkpoint in the middle."""
    from torch.utils.data import SequentialSampler
    from transformers import Trainer, TrainingArguments

    class InOrder(Trainer):
        def _get_train_sampler(self, *_):
            return SequentialSampler(self.train_dataset)

    model = models.with_lora(models.whole(folder), **_lora(optim))
    arguments = TrainingArguments(
        str(root), per_device_train_batch_size=4 // world, max_steps=STEPS, save_steps=HALF, logging_steps=1, optim=optim,
        learning_rate=3e-3, lr_scheduler_type="linear", use_cpu=True, report_to=[], weight_decay=0.1, disable_tqdm=True,
        dataloader_pin_memory=False, ddp_find_unused_parameters=False,
    )  # fmt: skip
    trainer = InOrder(model, arguments, train_dataset=_Data(data))
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def _under_ddp(rank, world, **arguments):
    import os

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # the process group is there already
    from accelerate.state import AcceleratorState, PartialState

    AcceleratorState._reset_state(True)
    try:
        return _trained_by_trainer(world=world, **arguments)
    finally:
        AcceleratorState._reset_state(True)
        PartialState._reset_state()
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name)


def _resumed(rank, world, folder, checkpoint, data, optim, alone=False):
    """In a loop of one's own, under FSDP2 unless alone: the steps after the checkpoint."""
    from transformers import get_linear_schedule_with_warmup

    from unsloth_ext.fsdp2 import load, load_checkpoint, on_local_shards, shard

    model = models.whole(folder) if alone else load(folder, dtype=torch.float32)
    model = models.with_lora(model, seed=77, **_lora(optim))
    if not alone:
        shard(model)
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for n, p in trained if "norm" not in n], "weight_decay": 0.1},
        {"params": [p for n, p in trained if "norm" in n], "weight_decay": 0.0},
    ]
    if optim == "adamw_torch":
        optimizer = torch.optim.AdamW(groups, lr=1.0, foreach=True)
    else:
        import bitsandbytes as bnb

        optimizer = on_local_shards(bnb.optim.AdamW8bit(groups, lr=1.0))
    scheduler = get_linear_schedule_with_warmup(optimizer, 0, STEPS)
    extra = load_checkpoint(checkpoint, model, optimizer, scheduler)
    assert all(group.get("foreach", True) for group in optimizer.param_groups)  # not as it was saved: None
    if "8bit" in optim:
        assert any(state["state1"].dtype == torch.uint8 for state in optimizer.state.values())
    losses = []
    for batch in models.batches(STEPS, 4, seed=data)[extra["trainer_state"]["global_step"] :]:
        batch = batch[rank * 4 // world : (rank + 1) * 4 // world]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("optim, ddp", [("adamw_torch", False), ("adamw_torch", True), ("adamw_bnb_8bit", False)])
def test_a_trainers_checkpoint_goes_on_with_its_losses(ranks, checkpoints, tmp_path, optim, ddp, capsys):
    from unsloth_ext.fsdp2 import latest_checkpoint

    given = dict(folder=str(checkpoints["nf4"]), root=str(tmp_path), data=random.randrange(1 << 30), optim=optim)
    expected = ranks(2, _under_ddp, **given)[0] if ddp else _trained_by_trainer(**given)
    assert latest_checkpoint(tmp_path) == tmp_path / f"checkpoint-{STEPS}"
    assert (tmp_path / f"checkpoint-{HALF}" / f"rng_state{'_1' if ddp else ''}.pth").is_file()
    given = dict(given, checkpoint=str(tmp_path / f"checkpoint-{HALF}"))
    del given["root"]
    answers = {2: ranks(2, _resumed, **given), 1: [_resumed(0, 1, alone=True, **given)]}
    tolerance = (
        2e-5 if optim == "adamw_torch" else 1e-3
    )  # 8-bit states are quantised anew; the Trainer rounds what it logs
    for losses in answers.values():
        mean = torch.tensor(losses).mean(0)
        torch.testing.assert_close(mean, torch.tensor(expected[HALF:]), rtol=1e-4, atol=tolerance)
    capsys.readouterr()
    (tmp_path / f"checkpoint-{STEPS}" / "optimizer.pt").write_bytes(b"PK\\x03\\x04 and no more")
    assert latest_checkpoint(tmp_path) == tmp_path / f"checkpoint-{HALF}"
    assert "optimizer.pt is truncated" in capsys.readouterr().err


def test_another_order_of_parameters_is_refused(checkpoints, tmp_path):
    from unsloth_ext.errors import UsageError
    from unsloth_ext.fsdp2 import load_checkpoint

    folder = str(checkpoints["nf4"])
    _trained_by_trainer(folder, tmp_path, 1, "adamw_torch")
    model = models.with_lora(models.whole(folder), modules_to_save=["norm"])
    trained = [p for p in model.parameters() if p.requires_grad]
    for groups, says in (
        ([trained], "groups of"),
        ([trained[::-1][:42], trained[::-1][42:]], "order of the parameters differs"),
    ):
        optimizer = torch.optim.AdamW([{"params": group} for group in groups])
        with pytest.raises(UsageError, match=says):
            load_checkpoint(tmp_path / f"checkpoint-{HALF}", model, optimizer)
    with pytest.raises(UsageError, match="lacks|does not train"):
        load_checkpoint(
            tmp_path / f"checkpoint-{HALF}", models.with_lora(models.whole(folder), modules_to_save=["lm_head"])
        )
