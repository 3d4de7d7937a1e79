"""Checkpoints of real architectures with random weights, for measurements where no weights can be downloaded.

    python benchmarks/checkpoints.py llama-3.2-1b OUT --tokenizer FOLDER

Speed and memory do not depend on the values; a loss falls from ln(vocabulary) as it would for any fresh model.
"""

from __future__ import annotations

import argparse
from pathlib import Path

_LLAMA_3 = dict(
    vocab_size=128256,
    max_position_embeddings=131072,
    rms_norm_eps=1e-5,
    bos_token_id=128000,
    eos_token_id=[128001, 128008, 128009],
    rope_parameters={
        "rope_type": "llama3", "rope_theta": 500000.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "factor": 8.0,
    },
)  # fmt: skip

# Shapes as published in each model's config.json.
ARCHITECTURES = {
    "llama-3.2-1b": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
                         num_key_value_heads=8, head_dim=64, tie_word_embeddings=True),
    "llama-3.1-8b": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                         num_key_value_heads=8, head_dim=128, tie_word_embeddings=False),
    "llama-3.1-70b": dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
                          num_key_value_heads=8, head_dim=128, tie_word_embeddings=False),
}  # fmt: skip


def build(name: str, out: Path, tokenizer: Path | None = None, layers: int | None = None, seed: int = 3407) -> Path:
    """Save `name` with random bf16 weights (std 0.02) to `out`, drawn on the GPU if there is one; `layers` cuts the depth."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**(_LLAMA_3 | ARCHITECTURES[name] | ({"num_hidden_layers": layers} if layers else {})))
    torch.manual_seed(seed)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(torch.float32)
    model.save_pretrained(out)
    if tokenizer is not None:
        AutoTokenizer.from_pretrained(tokenizer).save_pretrained(out)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("architecture", choices=ARCHITECTURES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokenizer", type=Path, help="a folder with a Llama 3 tokenizer to save beside the weights")
    parser.add_argument("--layers", type=int, help="keep only so many layers")
    args = parser.parse_args()
    print(build(args.architecture, args.out, args.tokenizer, args.layers))


if __name__ == "__main__":
    main()
