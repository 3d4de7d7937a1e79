"""Native FSDP2 loads the optimizer of a run on one GPU (or under DDP), whose state is keyed by integers."""

import os

import pytest
import torch
import torch.distributed as dist

if not torch.cuda.is_available():
    os.environ.setdefault("UNSLOTH_ALLOW_CPU", "1")

import unsloth  # noqa: F401, E402 (before transformers)
from peft import LoraConfig, get_peft_model  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402
from unsloth.models import fsdp2_native  # noqa: E402


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group("gloo", init_method = f"file://{tmp_path}/store", rank = 0, world_size = 1)
    yield
    dist.destroy_process_group()


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


def adamw(model, decay = True):
    """As a Trainer makes it: with and without weight decay."""
    trained = [p for p in model.parameters() if p.requires_grad]
    late = [] if decay else trained[1::2]
    early = [p for p in trained if not any(p is q for q in late)]
    groups = [
        {"params": early, "weight_decay": 0.1},
        {"params": late, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr = 0.01)


def step(model, optimizer, seed):
    ids = torch.randint(0, 64, (2, 8), generator = torch.Generator().manual_seed(seed))
    model(input_ids = ids, labels = ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def native(model):
    config = fsdp2_native.FSDP2Config(device = "cpu", fit_layout = False)
    return fsdp2_native.shard_model(model, config)


@pytest.mark.parametrize("decay", [True, False], ids = ["one group used", "both groups used"])
def test_resume_goes_on_as_one_gpu_would(one_rank, tmp_path, decay):
    plain = small_lora()
    optimizer = adamw(plain, decay)
    for seed in range(3):
        step(plain, optimizer, seed)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    resumed = small_lora()
    resumed.load_state_dict(plain.state_dict())
    resumed = native(resumed)
    again = adamw(resumed, decay)
    fsdp2_native.native_load_optimizer(resumed, again, str(tmp_path / "optimizer.pt"))
    for seed in range(3, 6):
        step(plain, optimizer, seed)
        step(resumed, again, seed)
    whole = {n: p.full_tensor() for n, p in resumed.named_parameters() if p.requires_grad}
    assert [g["weight_decay"] for g in again.param_groups] == [0.1, 0.0]
    for name, param in plain.named_parameters():
        if param.requires_grad:
            torch.testing.assert_close(whole[name], param.detach())


def test_its_own_optimizer_goes_on(one_rank, tmp_path):
    first, second = native(small_lora()), native(small_lora())
    ones, twos = adamw(first), adamw(second)
    step(first, ones, 0)
    fsdp2_native.native_save_optimizer(first, ones, str(tmp_path / "optimizer.pt"))
    second.load_state_dict(first.state_dict())
    fsdp2_native.native_load_optimizer(second, twos, str(tmp_path / "optimizer.pt"))
    for model, optimizer in ((first, ones), (second, twos)):
        step(model, optimizer, 1)
    for a, b in zip(first.parameters(), second.parameters()):
        assert torch.equal(a.full_tensor(), b.full_tensor())


def test_another_model_s_optimizer_is_refused(one_rank, tmp_path):
    other = small_lora(rank = 4)
    optimizer = adamw(other)
    step(other, optimizer, 0)
    model = native(small_lora())
    with pytest.raises(RuntimeError, match = "shape"):
        fsdp2_native.native_load_optimizer(model, adamw(model), optimizer.state_dict())
    fewer = optimizer.state_dict()
    fewer["param_groups"][0]["params"].pop()
    with pytest.raises(RuntimeError, match = "not saved from this model's optimizer"):
        fsdp2_native.native_load_optimizer(model, adamw(model), fewer)
