"""x W^T with an NF4 weight: ours, Unsloth as it runs, bitsandbytes, and a plain bf16 weight, in one run.

GPU time is one call inside a CUDA graph over rotating weights that exceed L2, the contestants in turn, each round beginning with
another; a call of ours there overlaps the end of the one before it, as in a model. "best peer / ours" is taken within each round,
since a card under load changes its clock from second to second. Where more than a tenth of the rounds say either and the middle one
is within 1 %, it counts as a tie (1.0) for `min_vs_best_peer`: from 512 rows on everybody's time is mostly that of one and the same
matmul of cuBLAS. `rows` is tokens: up to 512 Unsloth is called as its decoding does (`fast_linear_forward`, one token a sequence;
its GEMV at one row, else dequantise and matmul), above as its prefill does (`matmul_lora`). bitsandbytes is `matmul_4bit`, which
picks its own kernel. Errors are relative to float64 with the fp32 weight.
Every linear of Llama 3.2 1B, 3.1 8B and 70B is a shape. `--quick`: two shapes, six numbers of rows.
"""

import argparse
import math
import statistics
import sys
import time

import record
import torch

MODELS = {  # hidden, intermediate, queries, keys
    "Llama 3.2 1B": (2048, 8192, 2048, 512),
    "Llama 3.1 8B": (4096, 14336, 4096, 1024),
    "Llama 3.1 70B": (8192, 28672, 8192, 1024),
}
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 2048, 8192)
QUICK_SHAPES, QUICK_ROWS = [(4096, 4096), (14336, 4096)], (1, 2, 4, 16, 64, 256)
NAMED = (14336, 4096)
OURS, UNSLOTH, BNB, PLAIN = "unsloth_ext", "Unsloth", "bitsandbytes", "plain bf16 weight"
EAGER = "eager call, 1 row, 1024x2048"


def shapes():
    found = {}
    for hidden, intermediate, queries, keys in MODELS.values():
        for shape in (
            (queries, hidden),
            (keys, hidden),
            (hidden, queries),
            (intermediate, hidden),
            (hidden, intermediate),
        ):
            found[shape] = None
    return sorted(found, key=lambda s: (s != NAMED, s[0] * s[1], s))


def quantised(n, k, rotate=200e6):
    """[Linear4bit], its weight quantised on the card from random numbers."""
    import bitsandbytes as bnb

    found = []
    for _ in range(min(64, max(2, math.ceil(rotate / (0.5 * n * k))))):
        with torch.device("meta"):
            layer = bnb.nn.Linear4bit(k, n, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
        weight = torch.randn(n, k, dtype=torch.bfloat16, device="cuda") * 0.02
        packed, state = bnb.functional.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
        layer.weight = bnb.nn.Params4bit(
            packed, requires_grad=False, quant_state=state, bnb_quantized=True, quant_type="nf4"
        )
        layer.weight.quant_state = layer.quant_state = state
        found.append(layer.requires_grad_(False))
    return found


def contestants():
    """name -> call(x, layer, dense)."""
    import bitsandbytes as bnb
    from unsloth.kernels import utils

    import unsloth_ext
    from unsloth_ext.nf4.matmul import linear

    unsloth_ext.disable("nf4")  # the others as they are without this package

    def unsloth(x, layer, dense):
        if x.shape[0] <= 512:
            return utils.fast_linear_forward(layer, x.unsqueeze(1))
        return utils.matmul_lora(x, layer.weight, layer.weight.quant_state, None, None, None)

    return {
        OURS: lambda x, layer, dense: linear(x, layer.weight, layer.weight.quant_state),
        UNSLOTH: unsloth,
        BNB: lambda x, layer, dense: bnb.matmul_4bit(x, layer.weight.t(), layer.weight.quant_state),
        PLAIN: lambda x, layer, dense: torch.nn.functional.linear(x, dense),
    }


def graph_times(calls, sets, rounds, replays, budget_ms=8.0):
    """name -> microseconds of a call, one sample a replay, the contestants in turn; each graph about `budget_ms` at most."""
    graphs, counts = {}, {}
    for name, call in calls.items():
        for arguments in sets[:2]:
            call(*arguments)
        torch.cuda.synchronize()
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        marks[0].record()
        call(*sets[0])
        marks[1].record()
        marks[1].synchronize()
        fit = int(budget_ms / max(marks[0].elapsed_time(marks[1]), 1e-3))
        counts[name] = len(sets) * max(1, 24 // len(sets)) if fit >= len(sets) else max(2, fit)
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name]):
            for i in range(counts[name]):
                call(*sets[i % len(sets)])
    samples = {name: [] for name in calls}
    names = list(graphs)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            graph = graphs[name]
            graph.replay()
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
            marks[0].record()
            for mark in marks[1:]:
                graph.replay()
                mark.record()
            marks[-1].synchronize()
            times = [a.elapsed_time(b) for a, b in zip(marks, marks[1:])]  # noqa: B905, RUF007
            samples[name] += [ms * 1000 / counts[name] for ms in times]
    return samples


def versus(samples, replays):
    """The faster peer's time over ours, round by round."""
    by_round = {
        name: [statistics.mean(t[i : i + replays]) for i in range(0, len(t), replays)] for name, t in samples.items()
    }
    peer = min((UNSLOTH, BNB), key=lambda name: statistics.median(by_round[name]))
    ratios = [theirs / ours for theirs, ours in zip(by_round[peer], by_round[OURS], strict=True)]
    cuts = statistics.quantiles(ratios, n=10, method="inclusive")
    found = {"p10": round(cuts[0], 4), "p50": round(cuts[4], 4), "p90": round(cuts[8], 4), "peer": peer}
    return found | {"tie": cuts[0] <= 1 <= cuts[8] and abs(cuts[4] - 1) <= 0.01}


def gpu_rows(calls, quick, flush, until):
    """[row]. flush(rows) after each shape; none is begun after `until`, of time.perf_counter()."""
    from unsloth_ext.nf4 import dequantize

    found = []
    for n, k in QUICK_SHAPES if quick else shapes():
        if time.perf_counter() > until:
            print(f"{n}x{k} and larger: left out, the time is over", flush=True)
            break
        own = quantised(n, k)
        dense = [dequantize(layer.weight, layer.weight.quant_state) for layer in own]
        exact = dequantize(own[0].weight, own[0].weight.quant_state, dtype=torch.float32)
        for rows in QUICK_ROWS if quick else ROWS:
            x = torch.randn(rows, k, dtype=torch.bfloat16, device="cuda")
            sets = [(x, layer, weight) for layer, weight in zip(own, dense, strict=True)]
            few = x[: min(rows, 512)]
            right = few.double() @ exact.double().t()
            errors = {}
            for name, call in calls.items():
                y = call(*sets[0]).reshape(rows, n)[: few.shape[0]]
                errors[name] = ((y.double() - right).norm() / right.norm()).item()
            rounds, replays = (9, 2) if quick else (15, 2)
            samples = graph_times(calls, sets, rounds, replays)
            row = {"shape": [n, k], "rows": rows, "dtype": "bfloat16", "unit": "us", "error": errors}
            row |= {name: record.percentiles(samples[name], 3) for name in calls}
            row["vs_best_peer"] = versus(samples, replays)
            found.append(row)
            times = ", ".join(f"{name} {row[name]['p50']:.2f}" for name in calls)
            off = ", ".join(f"{errors[name]:.2e}" for name in calls)
            times += f" us; best peer / ours {row['vs_best_peer']['p50']:.3f}"
            print(f"{n}x{k}, {rows} rows: {times}; errors {off}", flush=True)
        del own, dense, exact, sets
        torch.cuda.empty_cache()
        flush(found)
    return found


def eager_rows(calls):
    """Host time of one call, the contestants in turn, while the card is never behind."""
    (layer, *_) = quantised(1024, 2048, rotate=1)
    dense = torch.randn(1024, 2048, dtype=torch.bfloat16, device="cuda")
    x = torch.randn(1, 2048, dtype=torch.bfloat16, device="cuda")
    samples = {name: [] for name in calls}
    with torch.no_grad():
        for _ in range(25):
            for name, call in calls.items():
                for _ in range(30):
                    call(x, layer, dense)
                torch.cuda.synchronize()
                start = time.perf_counter()
                for _ in range(100):
                    call(x, layer, dense)
                samples[name].append((time.perf_counter() - start) / 100 * 1e6)
                torch.cuda.synchronize()
    rows = [
        {"case": EAGER, "name": name, "unit": "us"} | record.percentiles(found, 3) for name, found in samples.items()
    ]
    for row in rows:
        print(f"{EAGER}, {row['name']}: {row['p50']:.2f} us", flush=True)
    return rows


def claims(rows, release):
    upstream = f"Unsloth {release}"
    targets = {1: 12, 16: 16, 64: 22, 256: 60}
    made = []
    for row in rows:
        if tuple(row["shape"]) == NAMED and row["rows"] in targets:
            bound = targets[row["rows"]]
            name = f"nf4.matmul.rows{row['rows']}_us"
            made.append(record.claim(name, row[OURS]["p50"], "us", f"<= {bound}", upstream))
    ratios = (row["vs_best_peer"] for row in rows)
    ratio = min(max(1.0, found["p50"]) if found["tie"] else found["p50"] for found in ratios)
    both = f"the faster of {upstream} and bitsandbytes"
    made.append(record.claim("nf4.matmul.min_vs_best_peer", round(ratio, 3), "x", ">= 1.0", both))
    worse = max(row["error"][OURS] / row["error"][PLAIN] for row in rows)
    made.append(record.claim("nf4.matmul.max_error_vs_dense", round(worse, 3), "x", "<= 1.01", "dequantise + cuBLAS"))
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two shapes, six numbers of rows")
    parser.add_argument("--limit", type=float, default=math.inf, help="seconds after which no shape is begun")
    args = parser.parse_args()
    quick = args.quick
    if not torch.cuda.is_available():
        print("bench_nf4_matmul: needs a CUDA card, left out")
        return 0
    import unsloth  # noqa: F401

    from unsloth_ext.patching.release import installed_release

    torch.manual_seed(3407)
    start, calls = time.perf_counter(), contestants()
    with torch.no_grad():
        eager = eager_rows(calls)

        def flush(rows):
            name = "nf4_matmul_quick" if quick else "nf4_matmul"
            record.write(name, rows + eager, claims(rows, installed_release("unsloth")))

        gpu_rows(calls, quick, flush, start + args.limit)
    print(f"{time.perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
