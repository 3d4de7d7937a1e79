"""A tiny Llama whose sizes divide by nothing: no weight is a whole number of groups, the vocabulary is odd."""

from pathlib import Path

import torch

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def config(**changes):
    from transformers import LlamaConfig

    return LlamaConfig(
        **dict(
            vocab_size=211, hidden_size=136, intermediate_size=370, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, head_dim=34, max_position_embeddings=128, tie_word_embeddings=False,
        )
        | changes
    )  # fmt: skip


def quantization(nested=True, dtype=torch.float32):
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=nested, bnb_4bit_compute_dtype=dtype
    )


def whole(folder, nested=True, dtype=torch.float32, device="cpu"):
    """As transformers loads it on one device, from a 16-bit or a quantised checkpoint."""
    from transformers import AutoModelForCausalLM

    quantised = "nf4" in Path(folder).name
    options = {} if quantised else {"quantization_config": quantization(nested, dtype)}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map={"": device}, **options)


def save_all(folder):
    from transformers import LlamaForCausalLM

    torch.manual_seed(11)
    found = {name: folder / name for name in ("16bit", "tied-16bit", "nf4", "flat-nf4")}
    for name, tied in (("16bit", False), ("tied-16bit", True)):
        model = LlamaForCausalLM(config(tie_word_embeddings=tied)).to(torch.bfloat16)
        model.save_pretrained(found[name], max_shard_size="300KB")
    whole(found["16bit"]).save_pretrained(found["nf4"], max_shard_size="150KB")
    whole(found["16bit"], nested=False).save_pretrained(found["flat-nf4"])
    return found


def with_lora(model, seed=5, **options):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    settings = LoraConfig(
        r=6, lora_alpha=12, target_modules=TARGETS, init_lora_weights=False, task_type="CAUSAL_LM", **options
    )
    return get_peft_model(model, settings).train()


def batches(steps, rows, length=12, seed=3):
    """int64 [steps, rows, length]"""
    return torch.randint(0, 211, (steps, rows, length), generator=torch.Generator().manual_seed(seed))
