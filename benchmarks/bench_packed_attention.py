"""Attention over packed documents: every backend beside flash attention 2's variable-length kernels, which Unsloth and torch call.

    python benchmarks/bench_packed_attention.py        # on a card, under a minute

One row of tokens, causal in each document, forward and backward apart (attention_timing.py), in turns, over several packings. Cases: heads, key and value heads, head size, tokens, the shortest and the longest document.
"""

import functools
import random

import attention_timing
import record
import torch

CASES = {
    "Llama 3.1 8B, 8192 tokens, documents of 200 to 2000": (32, 8, 128, 8192, 200, 2000),
    "Llama 3.1 8B, 8192 tokens, documents of 20 to 300": (32, 8, 128, 8192, 20, 300),
    "Llama 3.1 8B, 32768 tokens, documents of 4000 to 8192": (32, 8, 128, 32768, 4000, 8192),
    "Llama 3.2 1B, 8192 tokens, documents of 200 to 2000": (32, 8, 64, 8192, 200, 2000),
    "Llama 3.1 70B, 4096 tokens, documents of 200 to 2000": (64, 8, 128, 4096, 200, 2000),
}
BACKENDS = ("flash", "cudnn", "flash4", "efficient")
NAMED = next(iter(CASES))  # the packed row of bench_step.py
PACKINGS, ROUNDS = 4, 6


def packing(tokens: int, least: int, most: int, seed: int) -> list[int]:
    draw, lengths = random.Random(seed), []
    while (left := tokens - sum(lengths)) > 0:
        lengths.append(min(left, draw.randint(least, most)))
    return lengths


def measure(case: str) -> list[dict]:
    from unsloth_ext.compiling.attention import packed_attention, refusal

    heads, kv_heads, width, tokens, least, most = CASES[case]
    shapes = (heads, kv_heads, kv_heads, heads)
    query, key, value, upstream = (
        torch.randn(tokens, n, width, device="cuda", dtype=torch.bfloat16, requires_grad=i < 3)
        for i, n in enumerate(shapes)
    )
    backends = [name for name in BACKENDS if not said(name, refusal(name, query))]
    cache = torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda")
    times = {name: ([], []) for name in backends}
    first = {}
    for round in range(ROUNDS + 2):
        for seed in range(PACKINGS):
            lengths = packing(tokens, least, most, seed)
            ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device="cuda")
            for name in backends:
                attend = functools.partial(packed_attention, cu_seqlens=ends, max_seqlen=max(lengths), backend=name)
                *ms, found = attention_timing.measured(attend, (query, key, value), upstream, cache)
                if round >= 2:  # before, graphs are built and memory is found
                    for part, one in zip(times[name], ms, strict=True):
                        part.append(one)
                elif round == 0 and seed == 0:
                    first[name] = found
    rows = [attention_timing.row(case, name, "flash", *times[name], first) for name in backends]
    print(*rows, sep="\n", flush=True)
    return rows


def said(name: str, reason: str) -> str:
    if reason:
        print(f"{name}: left out, {reason}", flush=True)
    return reason


def main() -> None:
    if not torch.cuda.is_available():
        print("bench_packed_attention: it needs a CUDA card; nothing was measured")
        return
    rows = [row for case in CASES for row in measure(case)]
    of = {(row["case"], row["backend"]): row["both"]["p50"] for row in rows}
    claims = []
    others = [name for name in ("cudnn", "flash4") if (NAMED, name) in of]
    if others:
        best = min(others, key=lambda name: of[NAMED, name])
        ratio = round(of[NAMED, "flash"] / of[NAMED, best], 3)
        baseline = f"aten's flash attention 2, same run; {best}"
        claims.append(record.claim("compile.packed_attention.vs_flash", ratio, "x", ">= 1.7", baseline))
    record.write("packed_attention", rows, claims)


if __name__ == "__main__":
    main()
