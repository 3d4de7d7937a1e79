"""Ten steps of TRL's GRPO and DPO on a tiny Llama, on a CPU: python trl_runs.py FILE writes what each step logged."""

import json
import sys
import tempfile

if "--alone" not in sys.argv:
    import unsloth_ext

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

STEPS = 10


def tokenizer():
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *letters])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")


def model(size):
    set_seed(3407)
    config = LlamaConfig(
        vocab_size=size, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def common(folder):
    return dict(
        output_dir=folder, per_device_train_batch_size=4, max_steps=STEPS, logging_steps=1, learning_rate=2e-3, seed=11,
        report_to="none", use_cpu=True, bf16=False, save_strategy="no", disable_tqdm=True, gradient_checkpointing=False,
    )  # fmt: skip


def reward_vowels(completions, **_):
    return [sum(letter in "aeiou" for letter in text) / 8 + len(set(text)) / 16 for text in completions]


def grpo(words, folder):
    prompts = Dataset.from_dict({"prompt": [f"say {i % 7}:" for i in range(16)]})
    config = GRPOConfig(
        **common(folder), num_generations=4, max_completion_length=12, beta=0.05, temperature=0.9, num_iterations=2,
        top_entropy_quantile=0.8,
    )  # fmt: skip
    start = f"{folder}/start"  # a path, because the reference model is loaded again
    model(len(words)).save_pretrained(start)
    return GRPOTrainer(start, reward_vowels, args=config, train_dataset=prompts, processing_class=words)


def dpo(words, folder):
    rows = [(f"q{i}: ", f"yes {i * i}", f"no {i}") for i in range(16)]
    data = Dataset.from_dict(
        dict(zip(("prompt", "chosen", "rejected"), map(list, zip(*rows, strict=True)), strict=True))
    )
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])  # so the head is frozen
    config = DPOConfig(**common(folder), beta=0.2, max_length=48, loss_type=["sigmoid"], use_weighting=True)
    return DPOTrainer(model(len(words)), args=config, train_dataset=data, processing_class=words, peft_config=lora)


def main():
    torch.set_num_threads(1)
    words, found = tokenizer(), {}
    for make in (grpo, dpo):
        with tempfile.TemporaryDirectory() as folder:
            trainer = make(words, folder)
            trainer.train()
            found[make.__name__] = [row for row in trainer.state.log_history if "loss" in row]
    if "--alone" not in sys.argv:
        found["state"] = {row.id: row.state for row in unsloth_ext.status()}["loss.trl_logprobs"]
    with open(sys.argv[1], "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main()
