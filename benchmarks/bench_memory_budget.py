"""The frontier of time against memory of a QLoRA step: `memory_budget` at several budgets, and Unsloth's three checkpointing flags.

A Llama-shaped checkpoint with random weights in 4 bit, LoRA of rank 16 on all seven projections, AdamW in 8 bit, batch 2 x 4096.
All sides run by turns in one process on one model each; peak is `torch.cuda.max_memory_allocated` of whole steps, optimizer
included, after the warm-up. The first losses of all sides must be equal.
"""

import argparse
import gc
import statistics
import sys
import tempfile
from pathlib import Path

import checkpoints
import record
import torch

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FLAGS = ["unsloth", True, False]
BUDGETS = {
    "llama-3.1-8b": ["8.1GiB", "10GiB", "12GiB", "16GiB", "20GiB", "28GiB", "auto"],
    "llama-3.2-1b": ["3GiB", "4GiB", "6GiB", "8GiB", "auto"],
}
CLAIMS = {"8.1GiB": ("8gib", 690), "12GiB": ("12gib", 640), "20GiB": ("20gib", 580), "auto": ("auto", 505)}


def steps_of(folder: Path, setting, tokens, warm_up: int, steps: int) -> dict:
    from unsloth import FastLanguageModel

    from unsloth_ext.compiling.memory_controller import budget_on

    model, _ = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=tokens.shape[1], load_in_4bit=True, dtype=torch.bfloat16
    )
    model = FastLanguageModel.get_peft_model(
        model, r=16, lora_alpha=16, target_modules=TARGETS, use_gradient_checkpointing=setting, random_state=3407
    ).train()
    from bitsandbytes.optim import AdamW8bit

    optimizer = AdamW8bit([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step():
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    first = step().item()
    for _ in range(warm_up):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(steps):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    peak = torch.cuda.max_memory_allocated()
    budget = budget_on(model)
    row = {"setting": str(setting), "unit": "ms", "loss": first, "peak_gib": round(peak / 2**30, 3)}
    row |= {
        "step": record.percentiles(times, 2),
        "tokens_per_s": round(tokens.numel() / statistics.median(times) * 1e3),
    }
    if budget is not None:
        plan = budget.plan
        row |= {"plan": plan.counts(), "predicted_peak_gib": round(plan.peak / 2**30, 3)}
        row |= {"predicted_extra_ms": round(plan.extra * 1e3, 1), "host_gib": round(plan.host / 2**30, 2)}
        row |= {
            "layer": {
                cost.name: {
                    "kept_mib": round(cost.kept / 2**20, 1),
                    "backward_peak_mib": round(cost.backward_peak / 2**20, 1),
                    "extra_ms": round(cost.extra * 1e3, 3),
                }
                for cost in budget.costs.levels
            },
            "link_gb_s": [round(budget.costs.to_host / 1e9, 1), round(budget.costs.from_host / 1e9, 1)],
        }
        budget.remove()
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokenizer", type=Path, help="a folder with the Llama 3 tokenizer (128256 tokens)")
    parser.add_argument("--architecture", default="llama-3.1-8b", choices=BUDGETS)
    parser.add_argument("--layers", type=int, help="keep only so many layers (nothing is claimed then)")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--budgets", nargs="*", help="instead of the usual ones")
    parser.add_argument("--flags", nargs="*", choices=[str(f) for f in FLAGS], help="instead of all three")
    args = parser.parse_args()
    if not torch.cuda.is_available() or args.tokenizer is None:
        print("bench_memory_budget: needs a CUDA card and --tokenizer, left out")
        return 0
    import unsloth_ext  # noqa: F401  isort: skip
    import unsloth  # noqa: F401

    from unsloth_ext.patching.release import installed_release

    tokens = torch.randint(0, 128000, (args.batch, args.length), device="cuda")
    flags = FLAGS if args.flags is None else [f for f in FLAGS if str(f) in args.flags]
    settings = [*flags, *(BUDGETS[args.architecture] if args.budgets is None else args.budgets)]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        checkpoints.build(args.architecture, Path(folder), args.tokenizer, args.layers)
        gc.collect()
        torch.cuda.empty_cache()
        for setting in settings:
            try:
                row = steps_of(Path(folder), setting, tokens, warm_up=4, steps=args.steps)
            except (torch.OutOfMemoryError, ValueError) as error:
                row = {"setting": str(setting), "error": str(error).splitlines()[0]}
            gc.collect()  # the model of this setting
            torch.cuda.empty_cache()
            rows.append({"architecture": args.architecture, "layers": args.layers, "tokens": tokens.numel()} | row)
            print(rows[-1], flush=True)
    claims, done = [], {row["setting"]: row for row in rows if "step" in row}
    usual = args.architecture == "llama-3.1-8b" and not args.layers and (args.batch, args.length) == (2, 4096)
    theirs = {s: f"{done[s]['step']['p50']} ms / {done[s]['peak_gib']} GiB" for s in map(str, flags) if s in done}
    baseline = f"Unsloth {installed_release('unsloth')}: " + ", ".join(f"{s} {text}" for s, text in theirs.items())
    for setting, (name, target) in CLAIMS.items() if usual else ():
        if setting in done:
            row = done[setting]
            claims.append(record.claim(f"compile.8b_{name}.ms", row["step"]["p50"], "ms", f"<= {target}", baseline))
    short = args.architecture.replace("llama-3.1-", "").replace("llama-3.2-", "")
    record.write(f"memory_budget_{short}" + (f"_{args.layers}_layers" if args.layers else ""), rows, claims)
    over = [
        r for r in rows if "step" in r and r["setting"].endswith("GiB") and r["peak_gib"] > float(r["setting"][:-3])
    ]
    losses = {round(r["loss"], 4) for r in rows if "step" in r}
    for text, wrong in (("more than the budget", over), ("losses differ", losses if len(losses) > 1 else ())):
        if wrong:
            print(f"bench_memory_budget: {text}: {wrong}")
    return 1 if over or len(losses) > 1 else 0


if __name__ == "__main__":
    sys.exit(main())
