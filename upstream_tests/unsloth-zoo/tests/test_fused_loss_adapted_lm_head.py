"""A head whose logits are not hidden @ lm_head.weight.T: under a LoRA adapter, or packed in 4 bit."""

import unsloth  # noqa: F401 (before transformers and unsloth_zoo)
import pytest
import torch

adapter = pytest.importorskip("unsloth_zoo.fused_losses.forward_adapter")
peft = pytest.importorskip("peft")

HIDDEN, VOCAB = 16, 97


def lora_head(**config):
    torch.manual_seed(3407)
    model = torch.nn.Sequential()
    model.add_module("lm_head", torch.nn.Linear(HIDDEN, VOCAB, bias = False))
    config = peft.LoraConfig(r = 4, target_modules = ["lm_head"], **config)
    head = peft.get_peft_model(model, config).base_model.model.lm_head
    torch.nn.init.normal_(head.lora_B["default"].weight)
    return head.eval()


def inputs():
    torch.manual_seed(3407)
    states = torch.randn(2, 16, HIDDEN, requires_grad = True)
    labels = torch.randint(0, VOCAB, (2, 16))
    labels[:, ::5] = -100
    return states, labels


def full(
    states,
    head,
    labels,
    divisor = None,
    scale = 1.0,
):
    logits, labels = scale * head(states)[:, :-1].reshape(-1, VOCAB), labels[:, 1:].reshape(-1)
    total = torch.nn.functional.cross_entropy(logits, labels, reduction = "sum")
    return total / ((labels != -100).sum() if divisor is None else divisor)


@pytest.mark.parametrize(
    "config", [{}, {"use_dora": True}, {"lora_dropout": 0.3}, {"lora_bias": True}], ids = str
)
def test_a_lora_adapter_counts_and_learns(config):
    head, (states, labels) = lora_head(**config), inputs()
    trained = [p for p in head.parameters() if p.requires_grad]
    found = adapter.unsloth_fused_lm_head_loss(states, head, labels, vocab_size = VOCAB)
    expected = full(states, head, labels)
    assert torch.allclose(found, expected, rtol = 1e-5)
    for a, b in zip(
        torch.autograd.grad(found, [states, *trained]),
        torch.autograd.grad(expected, [states, *trained]),
    ):
        assert torch.allclose(a, b, rtol = 1e-4, atol = 1e-6)


def test_counts_scales_and_shifted_labels():
    head, (states, labels) = lora_head(), inputs()
    found = adapter.unsloth_fused_lm_head_loss(
        states, head, labels, num_items_in_batch = 50, logit_scale_divide = 4.0
    )
    assert torch.allclose(found, full(states, head, labels, 50, 0.25), rtol = 1e-5)
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value = -100)
    found = adapter.unsloth_fused_lm_head_loss(states, head, labels, shift_labels = shifted)
    assert torch.allclose(found, full(states, head, labels), rtol = 1e-5)


def test_an_adapter_that_is_off_or_merged_takes_the_fused_loss(monkeypatch):
    calls = []
    fused = adapter.unsloth_fused_ce_loss
    monkeypatch.setattr(
        adapter, "unsloth_fused_ce_loss", lambda **kwargs: calls.append(1) or fused(**kwargs)
    )
    head, (states, labels) = lora_head(), inputs()
    head.enable_adapters(False)
    found = adapter.unsloth_fused_lm_head_loss(states, head, labels)
    assert torch.allclose(found, full(states, head.base_layer, labels), rtol = 1e-5)
    head.enable_adapters(True)
    expected = full(states, head, labels)
    head.merge()
    found = adapter.unsloth_fused_lm_head_loss(states, head, labels)
    assert torch.allclose(found, expected, rtol = 1e-5)
    assert len(calls) == 2


def test_a_4_bit_head_is_called():
    bnb = pytest.importorskip("bitsandbytes")
    head = bnb.nn.Linear4bit(64, VOCAB, bias = False, compute_dtype = torch.float32, quant_type = "nf4")
    head = head.to("cpu")
    states, labels = torch.randn(1, 16, 64, requires_grad = True), torch.randint(0, VOCAB, (1, 16))
    found = adapter.unsloth_fused_lm_head_loss(states, head, labels)
    assert torch.allclose(found, full(states, head, labels), rtol = 1e-5)
    found.backward()
    assert states.grad.abs().sum() > 0
