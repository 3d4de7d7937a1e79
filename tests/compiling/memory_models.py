"""Small real models for the memory tests, and one training step whose every gradient is returned."""

import torch

torch.set_num_threads(1)  # two threads wait for each other on a busy machine: a matmul of a hundred rows took 40 ms

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2")


def model_of(
    family="llama", layers=2, hidden=64, dtype=torch.float32, lora=True, dropout=0.0, seed=None, wide=192, **config
):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(torch.seed() % 2**31 if seed is None else seed)
    options = dict(
        vocab_size=96, hidden_size=hidden, intermediate_size=wide, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=hidden // 4, max_position_embeddings=1024, pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(options | config)), dtype=dtype)
    if lora:
        from peft import LoraConfig, get_peft_model

        adapter = LoraConfig(
            r=4,
            lora_alpha=8,
            lora_dropout=dropout,
            target_modules=TARGETS,
            init_lora_weights=False,
            lora_bias=lora == "bias",
        )
        model = get_peft_model(model, adapter)
    return model.train()


def tokens_of(rows=2, length=48):
    return torch.randint(1, 96, (rows, length))


def trained(model, tokens, seed=0, **arguments):
    """(loss, {name: gradient}) of one forward and backward."""
    model.zero_grad()
    torch.manual_seed(seed)
    loss = model(input_ids=tokens, labels=tokens, **arguments).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_equal(ours, expected):
    """Bit for bit."""
    assert torch.equal(ours[0], expected[0])
    assert ours[1].keys() == expected[1].keys() != set()
    for name, gradient in expected[1].items():
        assert torch.equal(ours[1][name], gradient), name


def hold(budget, level):
    """Let every layer stand at `level`, whatever the plan."""
    from unsloth_ext.compiling.memory_plan import Plan

    levels = (level,) * len(budget.states) if isinstance(level, str) else tuple(level)
    budget._planned = lambda tokens, sequence: Plan(levels, 0, 0.0, 0, 0, 0)
