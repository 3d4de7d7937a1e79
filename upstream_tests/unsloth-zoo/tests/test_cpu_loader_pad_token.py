"""The CPU loader must choose a pad token as the GPU loaders do: a reserved one, never eos when
another is there, because a collator that hides pad from the loss then hides every end of turn."""

import unsloth  # noqa: F401 (before transformers and unsloth_zoo)
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    DataCollatorForLanguageModeling,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

FastCPUModel = pytest.importorskip("unsloth_zoo.cpu.loader").FastCPUModel

EOT, PAD = "<|eot_id|>", "<|finetune_right_pad_id|>"


def checkpoint(
    folder,
    reserved,
    pad_token = None,
    **special,
):
    words = ["[UNK]", EOT, "hello", "world", *reserved]
    words = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token = "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object = tokenizer, eos_token = EOT, **special)
    tokenizer.add_special_tokens({"additional_special_tokens": list(reserved)})
    if pad_token is not None:
        tokenizer.pad_token = pad_token
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size = len(tokenizer),
        hidden_size = 64,
        intermediate_size = 128,
        num_hidden_layers = 1,
        num_attention_heads = 2,
        num_key_value_heads = 1,
        eos_token_id = 1,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def load(folder, **kwargs):
    return FastCPUModel.from_pretrained(
        folder, max_seq_length = 64, dtype = torch.float32, load_in_4bit = False, **kwargs
    )


@pytest.mark.parametrize("pad_token", [None, EOT], ids = ["no pad", "pad is eos"])
def test_picks_the_reserved_token(tmp_path, pad_token):
    model, tokenizer = load(checkpoint(tmp_path, [PAD], pad_token))
    assert tokenizer.pad_token == PAD
    assert model.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id


def test_the_end_of_a_turn_is_trained(tmp_path):
    _, tokenizer = load(checkpoint(tmp_path, [PAD]))
    collate = DataCollatorForLanguageModeling(tokenizer, mlm = False)
    batch = collate([tokenizer("hello " + EOT), tokenizer("hello world hello " + EOT)])
    assert (batch["labels"] == tokenizer.eos_token_id).sum() == 2


def test_a_valid_pad_token_is_kept(tmp_path):
    _, tokenizer = load(checkpoint(tmp_path, [PAD, "[PAD]"], "[PAD]"))
    assert tokenizer.pad_token == "[PAD]"


def test_without_a_spare_token_nothing_is_added(tmp_path):
    folder = checkpoint(tmp_path, [])
    size = len(PreTrainedTokenizerFast.from_pretrained(folder))
    model, tokenizer = load(folder)
    assert tokenizer.pad_token == EOT
    assert len(tokenizer) == size == model.get_input_embeddings().num_embeddings


def test_without_a_reserved_token_unk_is_next(tmp_path):
    _, tokenizer = load(checkpoint(tmp_path, [], unk_token = "[UNK]"))
    assert tokenizer.pad_token == "[UNK]"


def test_a_saved_adapter_loads_with_the_same_pad_token(tmp_path):
    model, tokenizer = load(checkpoint(tmp_path / "base", [PAD]))
    model = FastCPUModel.get_peft_model(model, r = 4)
    model.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    _, again = load(str(tmp_path / "adapter"))
    assert again.pad_token == PAD
