"""Checkpoints of real architectures with random weights, for measurements where no weights can be downloaded.

    python benchmarks/checkpoints.py llama-3.2-1b OUT --tokenizer FOLDER
    python benchmarks/checkpoints.py llama-3.1-405b OUT --nf4 --distinct 1        # 215 GB in NF4, as fast as memory is copied

Speed and memory do not depend on the values; a loss falls from ln(vocabulary) as it would for any fresh model.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
from concurrent.futures import ThreadPoolExecutor
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
    "llama-3.1-405b": dict(hidden_size=16384, intermediate_size=53248, num_hidden_layers=126, num_attention_heads=128,
                           num_key_value_heads=8, head_dim=128, tie_word_embeddings=False),
}  # fmt: skip
TOY = dict(vocab_size=512, hidden_size=128, intermediate_size=352, num_hidden_layers=2, num_attention_heads=4,
           num_key_value_heads=2, head_dim=32, tie_word_embeddings=False)  # fmt: skip


def config_of(name: str, layers: int | None = None):
    """The transformers config of `name`, a key of ARCHITECTURES or "toy"; `layers` cuts the depth."""
    from transformers import LlamaConfig

    shape = TOY if name == "toy" else _LLAMA_3 | ARCHITECTURES[name]
    return LlamaConfig(**(shape | ({"num_hidden_layers": layers} if layers else {})))


def build(name: str, out: Path, tokenizer: Path | None = None, layers: int | None = None, seed: int = 3407) -> Path:
    """Save `name` with random bf16 weights (std 0.02) to `out`, drawn on the GPU if there is one; `layers` cuts the depth."""
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = LlamaForCausalLM(config_of(name, layers))
        finally:
            torch.set_default_dtype(torch.float32)
    model.save_pretrained(out)
    _save_tokenizer(tokenizer, out)
    return out


def _save_tokenizer(tokenizer: Path | None, out: Path) -> None:
    if tokenizer is not None:
        from transformers import AutoTokenizer

        AutoTokenizer.from_pretrained(tokenizer).save_pretrained(out)


# -- quantised already -------------------------------------------------------------------------------------------------------


def linears_of(config) -> dict[str, tuple[int, int]]:
    """{name within a decoder layer: [out, in]} of the seven projections of a Llama."""
    hidden, inner = config.hidden_size, config.intermediate_size
    query, small = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    return {"self_attn.q_proj": (query, hidden), "self_attn.k_proj": (small, hidden), "self_attn.v_proj": (small, hidden),
            "self_attn.o_proj": (hidden, query), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner)}  # fmt: skip


def build_nf4(
    config, out: Path, tokenizer: Path | None = None, *, distinct: int | None = None, dtype=None, storage=None,
    seed: int = 3407, threads: int = 8,
) -> Path:  # fmt: skip
    """Save a Llama of random weights (std 0.02) in NF4 with double quantisation, as transformers saves one, and never hold it.

    config: a LlamaConfig, see `config_of`. distinct: how many decoder layers are drawn and quantised, by bitsandbytes, on the GPU
    if there is one; layer i of the files has the bytes of layer i modulo `distinct`. All are different if None. With a few, a
    checkpoint is written as fast as memory is copied, by `threads` threads. dtype: of what is not quantised, and what NF4
    dequantises to (bfloat16). storage: dtype under which packed bytes are stored (uint8). One file a layer; config.json is
    written last, so a folder that has it is whole; it says `distinct_layers`.
    """
    import torch
    from transformers import BitsAndBytesConfig, GenerationConfig

    dtype, storage = dtype or torch.bfloat16, storage or torch.uint8
    out, layers = Path(out), config.num_hidden_layers
    distinct = min(distinct or layers, layers)
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").unlink(missing_ok=True)
    draw = torch.Generator("cuda" if torch.cuda.is_available() else "cpu").manual_seed(seed)
    files = [f"model-{i + 1:05}-of-{layers + 1:05}.safetensors" for i in range(layers + 1)]
    where, total = {}, 0
    with ThreadPoolExecutor(threads) as pool:
        writes = []
        for kind in range(distinct):
            tensors = _layer(config, draw, dtype, storage)
            for i in range(kind, layers, distinct):
                named = {f"model.layers.{i}.{name}": tensor for name, tensor in tensors.items()}
                where |= dict.fromkeys(named, files[i])
                writes.append(pool.submit(_write, out / files[i], named))
            del tensors
            while len(writes) > 4 * threads:  # what is drawn waits in memory to be written
                total += writes.pop(0).result()
        named = _ends(config, draw, dtype)
        where |= dict.fromkeys(named, files[-1])
        writes.append(pool.submit(_write, out / files[-1], named))
        total += sum(write.result() for write in writes)
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    _save_tokenizer(tokenizer, out)
    config.dtype, config.architectures, config.distinct_layers = dtype, ["LlamaForCausalLM"], distinct
    config.quantization_config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=storage,
    ).to_dict()  # fmt: skip
    GenerationConfig.from_model_config(config).save_pretrained(out)
    config.save_pretrained(out)
    return out


def _random(draw, dtype, *shape):
    import torch

    return torch.empty(shape, device=draw.device, dtype=dtype).normal_(0.0, 0.02, generator=draw)


def _layer(config, draw, dtype, storage) -> dict:
    """{name: (safetensors' dtype, shape, bytes)} of one decoder layer."""
    import torch
    from bitsandbytes.functional import quantize_4bit

    tensors = {}
    for name, shape in linears_of(config).items():
        packed, state = quantize_4bit(
            _random(draw, dtype, *shape), compress_statistics=True, quant_type="nf4", quant_storage=storage
        )
        tensors[f"{name}.weight"] = packed
        tensors |= {f"{name}.weight.{part}": tensor for part, tensor in state.as_dict(packed=True).items()}
    for name in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"{name}.weight"] = torch.ones(config.hidden_size, dtype=dtype)
    return _stored(tensors)


def _ends(config, draw, dtype) -> dict:
    import torch

    tensors = {"model.embed_tokens.weight": _random(draw, dtype, config.vocab_size, config.hidden_size),
               "model.norm.weight": torch.ones(config.hidden_size, dtype=dtype)}  # fmt: skip
    if not config.tie_word_embeddings:
        tensors["lm_head.weight"] = _random(draw, dtype, config.vocab_size, config.hidden_size)
    return _stored(tensors)


@functools.cache
def _dtype_names() -> dict:
    import torch

    return {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.uint8: "U8"}


def _stored(tensors: dict) -> dict:
    import torch

    return {
        name: (
            _dtype_names()[t.dtype],
            list(t.shape),
            t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data,
        )
        for name, t in sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)  # so that each is aligned
    }


def _write(file: Path, tensors: dict) -> int:
    """One safetensors file: 8 bytes of header length, a JSON header, the tensors without gaps. Returns bytes of tensors."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + data.nbytes]}
        at += data.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb", buffering=0) as out:
        for data in (len(text).to_bytes(8, "little") + text, *(data for _, _, data in tensors.values())):
            left = memoryview(data)
            while left:
                left = left[os.write(out.fileno(), left[: 1 << 28]) :]
    return at


def quant_state_bytes(folder: Path) -> int:
    """Bytes of absmax, nested absmax and offsets of all NF4 weights of a checkpoint: what ranks could share among them."""
    from unsloth_ext.fsdp2.checkpoint_index import CheckpointIndex

    index = CheckpointIndex(folder)
    scales = [name for name in index.names() if name.endswith((".absmax", ".nested_absmax"))]
    offsets = sum(name.endswith(".nested_absmax") for name in scales) * 4
    return offsets + sum(index.numel(name) * index.dtype(name).itemsize for name in scales)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("architecture", choices=[*ARCHITECTURES, "toy"])
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokenizer", type=Path, help="a folder with a Llama 3 tokenizer to save beside the weights")
    parser.add_argument("--layers", type=int, help="keep only so many layers")
    parser.add_argument("--nf4", action="store_true", help="quantised by bitsandbytes, instead of 16 bit")
    parser.add_argument("--distinct", type=int, help="with --nf4: so many different layers, then the same again (all)")
    parser.add_argument("--threads", type=int, default=8, help="with --nf4: that write")
    args = parser.parse_args()
    if args.nf4:
        config = config_of(args.architecture, args.layers)
        print(build_nf4(config, args.out, args.tokenizer, distinct=args.distinct, threads=args.threads))
    else:
        print(build(args.architecture, args.out, args.tokenizer, args.layers))


if __name__ == "__main__":
    main()
