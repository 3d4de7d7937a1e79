"""The launch table of `unsloth_ext/nf4/launch.py` for this card: every launch shape of the package's kernel, size by size.

    python benchmarks/sweep_nf4_launch.py [--dtype bfloat16] [--output FOLDER]

A time is the p50 of graph replays over more than 200 MB of rotating buffers, the shapes in turn. Prints the microseconds of the
best shapes at each size, beside Unsloth's kernel, then the rows of a table that stays within 0.5 % of the best everywhere.
Before it is timed, a shape is compared with bitsandbytes: at its first use, by the package itself.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import record
import torch

from unsloth_ext.nf4 import dequantize, launch

SIZES = [(512, 2048), (1024, 2048), (1024, 4096), (2048, 4096), (3072, 4096), (4096, 4096), (5120, 5120), (8192, 4096)]
SIZES += [(11008, 4096), (14336, 4096), (16384, 6144), (8192, 14336), (20480, 8192), (28672, 8192)]


def candidates(card):
    shapes = [
        launch.Shape(*s) for s in itertools.product((1, 2, 4, 8), (4, 8), (True,) if card >= (9, 0) else (False,))
    ]
    if card >= (9, 0):
        cuts = ((2, 4), (4, 4), (8, 4), (2, 8), (4, 8))
        rooms = (0, 18000, 27000, 36800)
        shapes += [launch.Shape(*cut, True, *rest) for cut, *rest in itertools.product(cuts, (2048, 4096), rooms)]
    return shapes


def caller(shape):
    """call(packed, state, out) with this launch shape."""

    def call(packed, state, out):
        launch.TABLES[torch.cuda.get_device_capability()] = launch.Table("sweep", ((None, shape),))
        dequantize(packed, state, out=out)

    return call


def compile_one(shape, dtype):
    """In a process of its own, so that many compile at a time; the code is found in Triton's cache later."""
    from bench_nf4_dequantize import weights

    warnings.simplefilter("error", RuntimeWarning)
    try:
        caller(shape)(*weights(512, 2048, getattr(torch, dtype), rotate=1)[0])
    except RuntimeWarning as problem:
        return str(problem)
    return ""


def fewest_rows(times, sizes):
    """[(limit, shape)]: each row the shape that stays within 0.5 % of the best for the most sizes."""
    lowest = {n: min(found[n] for found in times.values()) for n in sizes}
    table, i = [], 0
    while i < len(sizes):
        reach = {}
        for shape, found in times.items():
            j = i
            while j < len(sizes) and found[sizes[j]] <= 1.005 * lowest[sizes[j]]:
                j += 1
            reach[shape] = (j, -sum(found[n] / lowest[n] for n in sizes[i:j]))
        shape = max(reach, key=reach.get)
        i = reach[shape][0]
        table.append((sizes[i - 1] if i < len(sizes) else None, shape))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dtype", default="bfloat16", choices=("float16", "bfloat16", "float32"))
    parser.add_argument("--output", type=Path, default=Path("."))
    args = parser.parse_args()
    start, card = time.perf_counter(), torch.cuda.get_device_capability()
    shapes = candidates(card)
    workers = min(12, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        problems = pool.map(compile_one, shapes, itertools.repeat(args.dtype))
        for shape, problem in list(zip(shapes, problems, strict=True)):
            if problem:
                print(f"FAILED {tuple(shape)}: {problem}")
                shapes.remove(shape)
    print(f"{len(shapes)} shapes, {time.perf_counter() - start:.0f} s", flush=True)

    import unsloth  # noqa: F401
    from bench_nf4_dequantize import UNSLOTH, contestants, graph_times, weights

    calls = {shape: caller(shape) for shape in shapes} | {UNSLOTH: contestants()[UNSLOTH]}
    times = {shape: {} for shape in calls}
    for rows, columns in SIZES:
        sets, n = weights(rows, columns, getattr(torch, args.dtype)), rows * columns
        for shape, samples in graph_times(calls, sets, rounds=3, replays=6).items():
            times[shape][n] = record.percentiles(samples, 3)["p50"]
        best = sorted(shapes, key=lambda s: times[s][n])[:5]
        line = ", ".join(f"{tuple(s)} {times[s][n]:.2f}" for s in best)
        print(f"{rows}x{columns}: {line}; {UNSLOTH} {times[UNSLOTH][n]:.2f}", flush=True)
        del sets
        torch.cuda.empty_cache()
    table = fewest_rows({shape: times[shape] for shape in shapes}, [rows * columns for rows, columns in SIZES])
    print(f"table for {torch.cuda.get_device_name()} {card} (units, warps, overlap, ahead, room):")
    for limit, shape in table:
        print(f"    ({limit}, {shape}),")
    args.output.mkdir(parents=True, exist_ok=True)
    file = args.output / f"sweep_nf4_launch.{args.dtype}.json"
    named = {s if isinstance(s, str) else str(tuple(s)): found for s, found in times.items()}
    content = {"card": torch.cuda.get_device_name(), "times": named, "table": [(n, tuple(s)) for n, s in table]}
    file.write_text(json.dumps(content, indent=1) + "\n")
    print(f"{file}, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
