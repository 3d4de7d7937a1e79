"""Causal attention of a batch's rows: FlashAttention 4 as a compiled layer calls it, beside torch's SDPA with cuDNN's kernels, which Unsloth takes on Hopper.

    python benchmarks/bench_row_attention.py        # on a Hopper card with flash-attn-4, under a minute

bf16, forward and backward apart (attention_timing.py), in turns. "new length" is what the host waits for a
forward and a backward of a length that was not there before, without the padding to 128 by which Unsloth makes such lengths few. Cases:
heads, key and value heads, head size, rows, tokens of a row.
"""

import time

import attention_timing
import record
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

CASES = {
    "Llama 3.1 8B, 2 x 4096": (32, 8, 128, 2, 4096),
    "Llama 3.1 8B, 8 x 1024": (32, 8, 128, 8, 1024),
    "Llama 3.1 8B, 1 x 8192": (32, 8, 128, 1, 8192),
    "Llama 3.1 8B, 1 x 32768": (32, 8, 128, 1, 32768),
    "Llama 3.2 1B, 2 x 2048": (32, 8, 64, 2, 2048),
}
ROUNDS, NEW_LENGTHS = 12, 5


def sdpa(query, key, value):
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2)


def tensors(case: str, length: int) -> list[torch.Tensor]:
    heads, kv_heads, width, batch, _ = CASES[case]
    shapes = (heads, kv_heads, kv_heads, heads)
    return [
        torch.randn(batch, length, n, width, device="cuda", dtype=torch.bfloat16, requires_grad=i < 3)
        for i, n in enumerate(shapes)
    ]


def measure(case: str) -> list[dict]:
    from unsloth_ext.compiling.attention_rows import row_attention

    ways, length = {"cudnn": sdpa, "flash4": row_attention}, CASES[case][-1]
    query, key, value, upstream = tensors(case, length)
    cache = torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda")
    times, unseen, first = {name: ([], []) for name in ways}, {name: [] for name in ways}, {}
    for round in range(ROUNDS + 2):
        for name, attend in ways.items():
            *ms, found = attention_timing.measured(attend, (query, key, value), upstream, cache)
            if round >= 2:  # before, plans are made and kernels compiled
                for part, one in zip(times[name], ms, strict=True):
                    part.append(one)
            elif round == 0:
                first[name] = found
    for shorter in range(1, NEW_LENGTHS + 1):
        *inputs, upstream = tensors(case, length - 7 * shorter)
        for name, attend in ways.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            torch.autograd.grad(attend(*inputs), inputs, upstream)
            torch.cuda.synchronize()
            unseen[name].append((time.perf_counter() - start) * 1e3)
    rows = [
        attention_timing.row(case, name, "cudnn", *times[name], first)
        | {"new length": record.percentiles(unseen[name])}
        for name in ways
    ]
    print(*rows, sep="\n", flush=True)
    return rows


def main() -> None:
    from unsloth_ext.compiling.attention import refusal

    if not torch.cuda.is_available():
        print("bench_row_attention: it needs a CUDA card; nothing was measured")
        return
    if reason := refusal("flash4", torch.empty(1, 8, 8, 128, device="cuda", dtype=torch.bfloat16)):
        print(f"bench_row_attention: left out, {reason}")
        return
    record.write("row_attention", [row for case in CASES for row in measure(case)], [])


if __name__ == "__main__":
    main()
