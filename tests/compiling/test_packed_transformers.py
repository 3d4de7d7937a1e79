"""Plain transformers and peft: a packed row is its documents one by one; padded rows and generation are as they were."""

import random

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from transformers import (  # noqa: E402
    DataCollatorWithFlattening,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from unsloth_ext.compiling import packed_transformers  # noqa: E402
from unsloth_ext.compiling.packed import packed_arguments  # noqa: E402
from unsloth_ext.compiling.packed_transformers import (  # noqa: E402
    register,
    remove_packed_attention,
    use_packed_attention,
)

VOCABULARY, WINDOW = 61, 5
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
}
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES)),
    "mistral": (MistralForCausalLM, MistralConfig(**SIZES, sliding_window=WINDOW)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SIZES)),
    "gemma2": (
        Gemma2ForCausalLM,
        Gemma2Config(**SIZES, sliding_window=WINDOW, attn_logit_softcapping=1.5, query_pre_attn_scalar=8),
    ),
}
COLLATORS = {
    "positions": DataCollatorWithFlattening(return_tensors="pt"),
    "boundaries": DataCollatorWithFlattening(return_tensors="pt", return_flash_attn_kwargs=True),
}


def model_of(family, layers=2, lora=True):
    kind, config = FAMILIES[family]
    config = kind.config_class.from_dict({**config.to_dict(), "num_hidden_layers": layers})
    # Without the packed attention, gemma2's softcap is in "eager" alone.
    model = kind._from_config(config, attn_implementation="eager" if family == "gemma2" else "sdpa")
    if lora:
        settings = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        model = peft.get_peft_model(model, settings)
    return model.train()


def documents(count=None, longest=40):
    return [torch.randint(VOCABULARY, (random.randint(2, longest),)) for _ in range(count or random.randint(2, 6))]


def collated(collator, rows):
    return COLLATORS[collator]([{"input_ids": row} for row in rows])


def loss_and_gradients(model, batches):
    model.zero_grad()
    count = sum((batch["labels"][:, 1:] != -100).sum() for batch in batches)
    losses = [model(**batch, num_items_in_batch=count, use_cache=False).loss for batch in batches]
    sum(losses).backward()
    return sum(losses).detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(found, wanted):
    assert abs(found[0] - wanted[0]) < 1e-4
    assert found[1].keys() == wanted[1].keys()
    largest = max(gradient.abs().max() for gradient in wanted[1].values())
    assert max((found[1][name] - gradient).abs().max() for name, gradient in wanted[1].items()) < 1e-4 * largest


@pytest.mark.parametrize("collator", COLLATORS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_row_is_its_documents(family, collator):
    model, rows = model_of(family), documents()
    wanted = loss_and_gradients(model, [{"input_ids": row[None], "labels": row[None]} for row in rows])
    assert use_packed_attention(model) is model
    same(loss_and_gradients(model, [collated(collator, rows)]), wanted)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant):
    model, rows = model_of("llama"), documents()
    wanted = loss_and_gradients(model, [{"input_ids": row[None], "labels": row[None]} for row in rows])
    use_packed_attention(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    same(loss_and_gradients(model, [collated("positions", rows)]), wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_rows_and_generation(family):
    model = model_of(family).eval()
    ids = torch.randint(1, VOCABULARY, (2, 12))
    mask = torch.ones_like(ids)
    mask[0, : random.randint(1, 8)] = 0

    def run():
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
        return logits, model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0
        )

    wanted = run()
    use_packed_attention(model)
    found = run()
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(found[1], wanted[1])


# Where a float is a symbol dynamo begins a graph again, and the counter counts twice.
@torch._dynamo.config.patch(specialize_float=True)
def test_one_graph_for_packed_rows():
    """The whole model with its loss, packed by position ids, 64 packings; a row of one document is a plain row, a graph more."""
    model = model_of("llama", layers=1, lora=False)
    use_packed_attention(model)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    for i in range(64):
        rows = documents(1 if i % 8 == 7 else None, longest=20)
        batch = collated("positions" if i % 2 else "boundaries", rows)
        batch.pop("max_length_k", None)
        loss = compiled(**packed_arguments(batch), use_cache=False).loss
        loss.backward()
    assert abs(loss - model(**batch, use_cache=False).loss) < 1e-4
    assert counter.frame_count == 2


def test_no_mask_is_made_for_a_packed_row(monkeypatch):
    model, rows = model_of("mistral"), documents()
    use_packed_attention(model)
    made = []
    original = packed_transformers.packed_mask

    def counted(*args, **kwargs):
        made.append(original(*args, **kwargs))
        return made[-1]

    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, register(), counted)
    model(**collated("positions", rows), use_cache=False)
    assert made
    assert all(mask is None for mask in made)
    made.clear()
    ids = torch.randint(VOCABULARY, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    model(input_ids=ids, attention_mask=mask, use_cache=False)
    assert made[0].shape == (2, 1, 9, 9)


def test_an_exception_leaves_nothing_behind():
    """A forward pass that dies in a packed row: the next padded row has its mask."""
    model = model_of("llama", lora=False)
    use_packed_attention(model)
    layer = model.model.layers[0]
    hook = layer.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**collated("positions", documents()), use_cache=False)
    hook.remove()
    assert packed_transformers._in_packed_forward == [False]


def test_taking_it_out():
    model = model_of("llama")
    use_packed_attention(model)
    use_packed_attention(model, backend="exact")
    stack = model.get_base_model().base_model
    assert len(stack._forward_pre_hooks) == 1
    assert stack.config._attn_implementation == "unsloth_ext_varlen_exact"
    assert remove_packed_attention(model) is model
    assert not stack._forward_pre_hooks
    assert not stack._forward_hooks
    assert stack.config._attn_implementation == "sdpa"


def test_refusals():
    with pytest.raises(
        ValueError, match="backend must be auto or one of flash4, cudnn, flash, efficient, flex, exact, got 'sdpa'"
    ):
        register("sdpa")
    with pytest.raises(TypeError, match="needs a transformers model, got Linear"):
        use_packed_attention(torch.nn.Linear(2, 2))
    model = model_of("llama")
    use_packed_attention(model)
    for layer in model.get_base_model().model.layers:
        layer.self_attn.attention_dropout = 0.1
    with pytest.raises(ValueError, match="LlamaAttention asks for dropout 0.1"):
        model(**collated("positions", documents()), use_cache=False)
