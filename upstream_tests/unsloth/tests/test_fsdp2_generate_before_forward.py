"""A model that native FSDP2 has sharded can generate before its first forward, and trains after it."""

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


def small_lora():
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
    lora = LoraConfig(r = 2, target_modules = ["q_proj", "v_proj"], task_type = "CAUSAL_LM")
    return get_peft_model(LlamaForCausalLM(config), lora)


def test_train_then_generate(one_rank):
    ids = torch.arange(5)[None]
    words = dict(input_ids = ids, max_new_tokens = 4, do_sample = False)
    expected = small_lora().generate(**words)
    config = fsdp2_native.FSDP2Config(device = "cpu", fit_layout = False)
    model = fsdp2_native.shard_model(small_lora(), config)
    model(input_ids = ids, labels = ids).loss.backward()
    assert torch.equal(model.generate(**words), expected)


@pytest.mark.parametrize("inner", [False, True], ids = ["outermost", "base model"])
def test_generate_then_train(one_rank, inner):
    ids = torch.arange(5)[None]
    plain = small_lora()
    words = dict(input_ids = ids, max_new_tokens = 4, do_sample = False)
    expected, loss = plain.generate(**words), plain(input_ids = ids, labels = ids).loss
    config = fsdp2_native.FSDP2Config(device = "cpu", fit_layout = False)
    model = fsdp2_native.shard_model(small_lora(), config)
    speaker = model.get_base_model() if inner else model
    assert torch.equal(speaker.generate(**words), expected)
    found = model(input_ids = ids, labels = ids).loss
    found.backward()
    torch.testing.assert_close(found.detach(), loss.detach())
    assert any(p.grad is not None for p in model.parameters())
    assert torch.equal(speaker.generate(**words), expected)
