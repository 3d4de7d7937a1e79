"""A step of AdamW8bit over a QLoRA's adapters: together (`step_together`), and one by one by bitsandbytes, by turns in one process.

    python benchmarks/bench_eight_bit_steps.py
    python benchmarks/bench_eight_bit_steps.py --quick        two layers, on a CPU: shows that it runs

The adapters of rank 16 on all seven projections, in fp32. One by one is measured twice: bitsandbytes as it is, which waits for the
card after each parameter, and as Unsloth runs it, which does not. `kernels` is the time of a step's kernels in torch's profile,
`host` the time until `step` returns, `step` until the card is done too. All three see the same gradients and must end
at the same parameters and states, bit for bit.
"""

import argparse
import inspect
import sys
import time
from importlib.util import find_spec

import record
import torch

MODELS = {  # layers, hidden, intermediate, queries, keys
    "llama-3.1-8b": (32, 4096, 14336, 4096, 1024),
    "llama-3.2-1b": (16, 2048, 8192, 2048, 512),
    "quick": (2, 256, 512, 256, 64),
}
SHORT = {"llama-3.1-8b": "8b", "llama-3.2-1b": "1b"}
RANK = 16
OURS, UNSLOTH, BNB = "unsloth_ext", "Unsloth", "bitsandbytes"


def shapes(layers, hidden, intermediate, queries, keys):
    projections = [(hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden)]
    projections += [(hidden, intermediate), (hidden, intermediate), (intermediate, hidden)]
    return [shape for inner, outer in projections * layers for shape in ((RANK, inner), (outer, RANK))]


class Side:
    """An optimizer of its own over parameters of its own, and one way to step it."""

    def __init__(self, name: str, model: str, device: str):
        from bitsandbytes.optim import AdamW8bit

        from unsloth_ext.compiling import step_together

        draw = torch.Generator().manual_seed(3407)
        self.parameters = [
            torch.nn.Parameter((torch.randn(shape, generator=draw) / 16).to(device)) for shape in shapes(*MODELS[model])
        ]
        self.optimizer = AdamW8bit(self.parameters, lr=1e-4)
        if name == OURS:
            self.step = step_together(self.optimizer).step
        elif name == UNSLOTH:
            self.step = self.optimizer.step
        else:
            alone = torch.no_grad()(inspect.unwrap(type(self.optimizer).step))
            self.step = lambda: alone(self.optimizer)

    def take(self, gradients) -> None:
        for p, gradient in zip(self.parameters, gradients, strict=True):
            p.grad = gradient

    def result(self):
        for p in self.parameters:
            yield p
            yield from (value for value in self.optimizer.state[p].values() if isinstance(value, torch.Tensor))


def kernels(step) -> float:
    """Milliseconds of the kernels and copies of one step."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        step()
        torch.cuda.synchronize()
    return sum(event.device_time_total for event in trace.key_averages()) / 1e3


def measured(model: str, device: str, names: list[str], rounds: int) -> tuple[list[dict], bool]:
    """A row a side, and whether all sides ended at the same bits."""
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    sides = {name: Side(name, model, device) for name in names}
    found = {name: {"kernels": [], "host": [], "step": []} for name in names}
    draw = torch.Generator(device).manual_seed(7)
    for turn in range(rounds + 3):
        gradients = [
            torch.randn(p.shape, generator=draw, device=device) / 1e3 for p in next(iter(sides.values())).parameters
        ]
        for name, side in sides.items():
            side.take(gradients)
            wait()
            start = time.perf_counter()
            side.step()
            returned = time.perf_counter()
            wait()
            if turn >= 3:  # the states are made in the first step, and laid together in the second
                found[name]["host"].append((returned - start) * 1e3)
                found[name]["step"].append((time.perf_counter() - start) * 1e3)
    if device == "cuda":
        for _ in range(5):
            for name, side in sides.items():
                found[name]["kernels"].append(kernels(side.step))
    same = all(
        torch.equal(one, other)
        for side in sides.values()
        for one, other in zip(side.result(), sides[BNB].result(), strict=True)
    )
    count = len(sides[BNB].parameters)
    rows = [
        {"architecture": model, "side": name, "unit": "ms", "parameters": count, "rank": RANK}
        | {what: record.percentiles(samples, 3) for what, samples in times.items() if samples}
        for name, times in found.items()
    ]
    return rows, same


def claims(rows: list[dict], baseline: str) -> list[dict]:
    made = []
    for model, short in SHORT.items():
        of = {row["side"]: row for row in rows if row["architecture"] == model}
        theirs = of.get(UNSLOTH, of[BNB])
        for what in ("kernels", "host", "step"):
            ratio = round(theirs[what]["p50"] / of[OURS][what]["p50"], 2)
            shown = f"{baseline}: {theirs[what]['p50']} ms, ours {of[OURS][what]['p50']}"
            made.append(record.claim(f"compile.eight_bit_{short}.{what}_vs_one_by_one", ratio, "x", ">= 1.0", shown))
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--quick", action="store_true", help="a tiny shape, on a CPU too; nothing recorded")
    args = parser.parse_args()
    if find_spec("bitsandbytes") is None or not (args.quick or torch.cuda.is_available()):
        print("bench_eight_bit_steps: needs bitsandbytes and a CUDA card (or --quick), left out")
        return 0
    device = "cuda" if torch.cuda.is_available() else "cpu"
    names, baseline = [OURS, BNB], "bitsandbytes"
    if device == "cuda" and find_spec("unsloth"):
        import unsloth  # noqa: F401

        from unsloth_ext.patching.release import installed_release

        names, baseline = [OURS, UNSLOTH, BNB], f"bitsandbytes as Unsloth {installed_release('unsloth')} runs it"
    rows, apart = [], []
    for model in ["quick"] if args.quick else list(SHORT):
        made, same = measured(model, device, names, 3 if args.quick else args.rounds)
        rows += made
        apart += [] if same else [model]
        for row in made:
            print(row, flush=True)
    if not args.quick:
        record.write("eight_bit_steps", rows, claims(rows, baseline))
    if apart:
        print(f"bench_eight_bit_steps: the results differ for {', '.join(apart)}")
    return 1 if apart else 0


if __name__ == "__main__":
    sys.exit(main())
