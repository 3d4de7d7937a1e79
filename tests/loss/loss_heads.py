"""Every kind of head, small: HEADS[name](hidden size, vocabulary, dtype) -> the head."""

import torch
from torch import nn


def linear(d, v, dtype):
    return nn.Linear(d, v, bias=False, dtype=dtype)


def bias(d, v, dtype):
    return nn.Linear(d, v, dtype=dtype)


def frozen(d, v, dtype):
    return nn.Linear(d, v, dtype=dtype).requires_grad_(False)


def only_bias(d, v, dtype):
    head = nn.Linear(d, v, dtype=dtype)
    head.weight.requires_grad_(False)
    return head


def tied(d, v, dtype):
    return nn.Embedding(v, d, dtype=dtype).weight


def computed(d, v, dtype):
    """A weight that is no leaf."""
    return torch.randn(v, 2, dtype=dtype, requires_grad=True) @ torch.randn(2, d, dtype=dtype, requires_grad=True)


def sequence(d, v, dtype):
    return nn.Sequential(nn.LayerNorm(d, dtype=dtype), nn.Linear(d, v, dtype=dtype))


def lora(d, v, dtype, **options):
    from peft import LoraConfig, get_peft_model

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.lm_head = nn.Linear(d, v, bias=False)

        def forward(self, x):
            return self.lm_head(x)

    config = LoraConfig(r=2, lora_alpha=4, target_modules=["lm_head"], init_lora_weights=False, **options)
    return get_peft_model(Model(), config).base_model.model.lm_head.to(dtype)


def dora(d, v, dtype):
    return lora(d, v, dtype, use_dora=True)


def modules_to_save(d, v, dtype):
    from peft.utils.other import ModulesToSaveWrapper

    return ModulesToSaveWrapper(nn.Linear(d, v, dtype=dtype), "default")


def four_bit(d, v, dtype):
    import bitsandbytes as bnb

    head = bnb.nn.Linear4bit(d, v, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    head.load_state_dict({"weight": torch.randn(v, d)})
    return head.to("cpu").requires_grad_(False)


EXACT = {
    f.__name__: f for f in (linear, bias, frozen, only_bias, tied, computed, sequence, lora, dora, modules_to_save)
}


def trainable(head):
    tensors = [head] if isinstance(head, torch.Tensor) else list(head.parameters())
    return [tensor for tensor in tensors if tensor.requires_grad]
