"""Sums of products, as a LoRA layer has them: the kernel beside the same sums by torch.

    python benchmarks/bench_products.py        # on a Hopper card, a minute and a half

Baselines: "one by one", a product and then the others added in place, which is how Unsloth's functions and peft's modules do it; "copied
together", one product of matrices that are set side by side first; "low apart", x A^T by a kernel of its own before ours. Rank 16, bf16. The
card is at its power limit in such products, so each is repeated for a tenth of a second, in turns, and a time is the average of that.
"""

import record
import torch

SECONDS, ROUNDS, RANK = 0.1, 8, 16


def layer(hidden: int, of_keys: int, intermediate: int) -> dict[str, tuple]:
    """name: (calls a layer, N, widths of the inputs, weights transposed, columns of low that are computed with it or 0)"""
    return {
        "q": (1, hidden, (hidden,), True, 3 * RANK),
        "o": (1, hidden, (hidden,), True, RANK),
        "k, v": (2, of_keys, (hidden,), True, 0),
        "gate": (1, intermediate, (hidden,), True, 2 * RANK),
        "up": (1, intermediate, (hidden,), True, 0),
        "down": (1, hidden, (intermediate,), True, 0),
        "gradient of the input of q, k, v": (1, hidden, (hidden, of_keys, of_keys), False, 3 * RANK),
        "gradient of the input of o": (1, hidden, (hidden,), False, RANK),
        "gradient of the input of gate, up": (1, hidden, (intermediate, intermediate), False, 2 * RANK),
        "gradient of the input of down": (1, intermediate, (hidden,), False, RANK),
    }


SHAPES = {
    "Llama 3.1 8B, 8192 tokens": (8192, layer(4096, 1024, 14336)),
    "Llama 3.2 1B, 4096 tokens": (4096, layer(2048, 512, 8192)),
}
NAMED = next(iter(SHAPES))


def average_us(call, calls: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / calls * 1e3


def measure(model: str, name: str) -> list[dict]:
    from unsloth_ext.nf4.products import _one_by_one, product_with_low, sum_of_products

    tokens, (calls_a_layer, columns, widths, transposed, rank) = SHAPES[model][0], SHAPES[model][1][name]

    def weight(n, k):
        matrix = torch.randn(n, k, device="cuda").bfloat16() / k**0.5
        return matrix if transposed else matrix.t().contiguous()

    inputs = [torch.randn(tokens, k, device="cuda").bfloat16() for k in widths]
    weights, used = [weight(columns, k) for k in widths], (rank if not transposed else RANK) or RANK
    downs, up = [weight(rank, k) for k in widths], weight(columns, used)
    below = torch.randn(tokens, used, device="cuda").bfloat16()
    wide = torch.cat(downs, 1 if transposed else 0)

    def low():
        """As it is computed apart: one product of inputs that lie side by side already, else added up."""
        if not rank:
            return below
        return (
            _one_by_one(inputs, downs, transposed)
            if len(inputs) > 1
            else inputs[0] @ (wide.t() if transposed else wide)
        )[:, :used]

    def added(how):
        return how([*inputs, low()], [*weights, up], transposed)

    # In the model LoRA's part would be copied in each step, a small thing.
    together = torch.cat([*weights, up], 1 if transposed else 0)

    def copied_together():
        return torch.cat([*inputs, low()], 1) @ (together.t() if transposed else together)

    ways = {
        "one by one": lambda: added(_one_by_one),
        "copied together": copied_together,
        "low apart": lambda: added(sum_of_products),
        "ours": lambda: product_with_low(inputs, downs, weights, up, transposed)[0] if rank else added(sum_of_products),
    }

    def in_fp32(xs, weights):
        return sum(x.float() @ (w.float().t() if transposed else w.float()) for x, w in zip(xs, weights, strict=True))

    exact = in_fp32(inputs, weights) + in_fp32([in_fp32(inputs, downs)[:, :used] if rank else below], [up])
    off = {way: ((run().float() - exact).norm() / exact.norm()).item() for way, run in ways.items()}
    del exact
    calls = {way: max(3, int(SECONDS / (average_us(run, 3) / 1e6))) for way, run in ways.items()}
    times = {way: [] for way in ways}
    for round in range(ROUNDS + 1):
        for way, run in ways.items():
            found = average_us(run, calls[way])
            if round:
                times[way].append(found)
    rows = []
    for way in ways:
        row = {"model": model, "product": name, "way": way, "calls_a_layer": calls_a_layer, "unit": "us"}
        row |= {"baseline": "one by one"} | record.percentiles(times[way]) | {"off": off[way]}
        rows.append(row)
        print(row, flush=True)
    return rows


def main() -> None:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        print("bench_products: it needs a Hopper card; nothing was measured")
        return
    rows = [row for model, (_, products) in SHAPES.items() for name in products for row in measure(model, name)]
    layer = {
        way: sum(row["calls_a_layer"] * row["p50"] for row in rows if (row["model"], row["way"]) == (NAMED, way))
        for way in ("one by one", "copied together", "low apart", "ours")
    }
    print({way: round(us) for way, us in layer.items()})
    ratio = round(layer["one by one"] / layer["ours"], 3)
    against = "product, then the others added in place, same run"
    record.write("products", rows, [record.claim("compile.products_8b.vs_one_by_one", ratio, "x", ">= 1.05", against)])


if __name__ == "__main__":
    main()
