"""Small causal language models of each family, plain transformers + peft + bitsandbytes, and one training step of them."""

import torch
import transformers

FAMILIES = {
    "llama": (transformers.LlamaConfig, {}),
    "mistral": (transformers.MistralConfig, {"sliding_window": 16}),
    "qwen2": (transformers.Qwen2Config, {}),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 16}),
    "gemma2": (transformers.Gemma2Config, {"head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 16}),
}
VOCABULARY = 96


def make(family="llama", *, layers=2, four_bit=True, lora=True, checkpointing=False, dropout=0.0):
    """A model in training mode, fp32 activations, its LoRA's B away from zero so that every gradient is there."""
    config_class, extra = FAMILIES[family]
    config = config_class(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=128,
        pad_token_id=0,
        attn_implementation="eager" if family == "gemma2" else "sdpa",  # SDPA would ignore the softcap
        **extra,
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    if four_bit:
        _quantize(model)
    if lora:
        import peft

        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        model = peft.get_peft_model(
            model, peft.LoraConfig(r=4, target_modules=targets, lora_dropout=dropout, task_type="CAUSAL_LM")
        )
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return model.train()


def _quantize(model):
    import bitsandbytes

    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is torch.nn.Linear and name != "lm_head":
                packed = bitsandbytes.nn.Linear4bit(
                    child.in_features,
                    child.out_features,
                    bias=child.bias is not None,
                    compute_dtype=torch.float32,
                    quant_type="nf4",
                )
                packed.weight = bitsandbytes.nn.Params4bit(child.weight.data, requires_grad=False, quant_type="nf4")
                if child.bias is not None:
                    packed.bias.data.copy_(child.bias.data)
                setattr(module, name, packed.to("cpu"))


def batch(rows=2, length=None, *, padded=False, low=5, high=40):
    length = length or int(torch.randint(low, high, ()))
    ids = torch.randint(1, VOCABULARY, (rows, length))
    found = {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}
    if padded:
        for row in range(rows):
            keep = int(torch.randint(2, length, ()))
            found["attention_mask"][row, keep:] = 0
            found["labels"][row, keep:] = -100
    return found


def packed_batch(documents=3):
    lengths = torch.randint(3, 14, (documents,)).tolist()
    ids = torch.randint(1, VOCABULARY, (1, sum(lengths)))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    labels = ids.clone()
    labels[positions == 0] = -100
    return {"input_ids": ids, "labels": labels, "position_ids": positions}


def step(model, *batches):
    """(losses, {name: gradient}) of one optimizer step's accumulation."""
    model.zero_grad(set_to_none=True)
    losses = []
    for one in batches:
        loss = model(**one).loss
        loss.backward()
        losses.append(loss.detach())
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return torch.stack(losses), gradients


def worst_difference(found, wanted):
    """The largest difference of losses and gradients, each measured against the largest value of its own tensor."""
    assert found[1].keys() == wanted[1].keys() and found[1]
    pairs = [(found[0], wanted[0]), *((found[1][name], wanted[1][name]) for name in wanted[1])]
    return max(((a - b).abs().max() / b.abs().max().clamp_min(1e-3)).item() for a, b in pairs)
