"""A transformers model with peft adapters, on the head too: the model's own loss and gradients."""

import pytest
import torch

from unsloth_ext.loss import chunked_loss, functions

pytest.importorskip("peft")
pytest.importorskip("transformers")


@pytest.mark.parametrize("tied", [False, True])
def test_llama_with_an_adapter_on_the_head(tied):
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=97,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config)
    if not tied:
        adapters = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
        model = get_peft_model(model, adapters)
    ids = torch.randint(0, 97, (2, 11))
    labels = ids.clone()
    labels[0, :5] = -100
    items = (labels[:, 1:] != -100).sum()
    causal = model if tied else model.base_model.model
    trained = [p for p in model.parameters() if p.requires_grad]

    expected = model(ids, labels=labels, num_items_in_batch=items).loss
    expected_grads = torch.autograd.grad(expected, trained)

    hidden = causal.model(ids).last_hidden_state
    loss = chunked_loss(
        functions.cross_entropy(), hidden[:, :-1], causal.lm_head, labels[:, 1:], num_items_in_batch=items, chunk_size=6
    )
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, trained), expected_grads)
