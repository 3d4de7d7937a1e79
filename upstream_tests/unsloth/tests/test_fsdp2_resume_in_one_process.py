"""One process resumes the optimizer that native FSDP2 saved in parts (UNSLOTH_FSDP2_DCP_OPTIM=1)."""

import os

import pytest
import torch
import torch.distributed as dist

if not torch.cuda.is_available():
    os.environ.setdefault("UNSLOTH_ALLOW_CPU", "1")

import unsloth  # noqa: F401, E402 (before transformers)
from peft import LoraConfig, get_peft_model  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments  # noqa: E402
from unsloth.models import fsdp2_native  # noqa: E402
from unsloth.models._utils import patch_gradient_accumulation_fix  # noqa: E402

STEPS = 3


@pytest.fixture(autouse = True, scope = "module")
def trainer_as_after_a_load():
    patch_gradient_accumulation_fix(Trainer)  # what FastLanguageModel.from_pretrained does


def small_lora(rank = 2):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size = 64,
        hidden_size = 32,
        intermediate_size = 64,
        num_hidden_layers = 2,
        num_attention_heads = 2,
        num_key_value_heads = 1,
        max_position_embeddings = 64,
    )
    lora = LoraConfig(r = rank, target_modules = ["q_proj", "v_proj"], task_type = "CAUSAL_LM")
    return get_peft_model(LlamaForCausalLM(config), lora)


def trainer(
    folder,
    steps,
    model = None,
):
    rows = torch.randint(0, 64, (16, 8), generator = torch.Generator().manual_seed(1)).tolist()
    args = TrainingArguments(
        str(folder),
        max_steps = steps,
        save_steps = STEPS,
        per_device_train_batch_size = 2,
        learning_rate = 0.01,
        weight_decay = 0.1,
        use_cpu = True,
        report_to = [],
        disable_tqdm = True,
    )
    data = [{"input_ids": row, "labels": row} for row in rows]
    return Trainer(model or small_lora(), args, train_dataset = data)


def saved_in_parts(model, optimizer, folder):
    """The optimizer as native FSDP2 writes it, of one rank: the state is the plain optimizer's."""
    dist.init_process_group("gloo", init_method = f"file://{folder}.store", rank = 0, world_size = 1)
    try:
        sharded = small_lora()
        sharded.load_state_dict(model.state_dict())
        config = fsdp2_native.FSDP2Config(device = "cpu", fit_layout = False)
        sharded = fsdp2_native.shard_model(sharded, config)
        names = {p: n for n, p in model.named_parameters()}
        shards = dict(sharded.named_parameters())
        groups = [
            {**g, "params": [shards[names[p]] for p in g["params"]]} for g in optimizer.param_groups
        ]
        again = torch.optim.AdamW(groups)
        again.load_state_dict(optimizer.state_dict())
        for param, state in again.state.items():  # as a sharded run keeps them
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = dist.tensor.distribute_tensor(
                    state[key], param.device_mesh, param.placements
                )
        fsdp2_native.native_save_optimizer_sharded(sharded, again, folder)
    finally:
        dist.destroy_process_group()


def trained(model):
    return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}


def state_of(a_trainer):
    """{name: (exp_avg, exp_avg_sq, step)}"""
    names = {p: n for n, p in a_trainer.model.named_parameters()}
    optimizer = fsdp2_native._inner_optimizer(a_trainer.optimizer)
    return {
        names[p]: (s["exp_avg"], s["exp_avg_sq"], s["step"]) for p, s in optimizer.state.items()
    }


@pytest.fixture(scope = "module")
def runs(tmp_path_factory):
    """A run without a stop, and its checkpoint at the middle."""
    folder = tmp_path_factory.mktemp("runs")
    whole = trainer(folder, 2 * STEPS)
    whole.train()
    return whole, folder / f"checkpoint-{STEPS}"


@pytest.fixture
def in_parts(runs, tmp_path):
    """That checkpoint, as native FSDP2 would have written it."""
    import shutil

    whole, checkpoint = runs
    copy = tmp_path / checkpoint.name
    shutil.copytree(checkpoint, copy)
    here = trainer(tmp_path / "unused", 2 * STEPS)
    here.create_optimizer()
    optimizer = fsdp2_native._inner_optimizer(here.optimizer)
    optimizer.load_state_dict(torch.load(copy / "optimizer.pt", weights_only = True))
    saved_in_parts(here.model, optimizer, copy / "optimizer_dcp")
    (copy / "optimizer.pt").unlink()
    return copy


def test_a_trainer_of_one_process_goes_on(runs, in_parts, tmp_path):
    resumed = trainer(tmp_path, 2 * STEPS)
    resumed.train(resume_from_checkpoint = str(in_parts))
    for name, param in trained(runs[0].model).items():
        torch.testing.assert_close(trained(resumed.model)[name], param)
    for name, values in state_of(runs[0]).items():
        torch.testing.assert_close(state_of(resumed)[name], values)
    assert resumed.lr_scheduler.state_dict() == runs[0].lr_scheduler.state_dict()


def test_a_loop_of_one_s_own_goes_on(in_parts, runs):
    model = small_lora()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr = 0.5)
    fsdp2_native.native_load_optimizer(model, optimizer, str(in_parts / "optimizer_dcp"))
    saved = torch.load(runs[1] / "optimizer.pt", weights_only = True)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1]
    assert optimizer.param_groups[0]["lr"] == saved["param_groups"][0]["lr"]
    for mine, theirs in zip(optimizer.state.values(), saved["state"].values()):
        torch.testing.assert_close(mine, theirs)


def test_another_model_s_optimizer_is_refused(in_parts):
    model = small_lora(rank = 4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(RuntimeError, match = "shape"):
        fsdp2_native.native_load_optimizer(model, optimizer, str(in_parts / "optimizer_dcp"))
    model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(RuntimeError, match = "not saved from this model's optimizer"):
        fsdp2_native.native_load_optimizer(model, optimizer, str(in_parts / "optimizer_dcp"))
    assert not optimizer.state


def test_an_optimizer_in_one_file_is_resumed_as_before(runs, tmp_path):
    resumed = trainer(tmp_path, 2 * STEPS)
    resumed.train(resume_from_checkpoint = str(runs[1]))
    for name, param in trained(runs[0].model).items():
        torch.testing.assert_close(trained(resumed.model)[name], param)
