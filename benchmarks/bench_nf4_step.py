"""What NF4 dequantisation costs in a whole QLoRA step of an 8B model: ours and Unsloth's own, by turns in one process.

A Llama-3.1-8B-shaped checkpoint with random weights in 4 bit, LoRA of rank 16 on all seven projections, batch 2 x 4096, no
gradient checkpointing. The share is the time of the dequantising kernels in torch's profile of a step; the step is timed on its
own, without the profiler. The losses of both must be equal bit for bit.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import checkpoints
import record
import torch

SIDES = {"unsloth_ext": "enable", "Unsloth": "disable"}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def model_of(architecture: str, layers: int | None, tokenizer: Path, length: int, checkpointing):
    from unsloth import FastLanguageModel

    with tempfile.TemporaryDirectory() as folder:
        checkpoints.build(architecture, Path(folder), tokenizer, layers)
        torch.cuda.empty_cache()
        model, _ = FastLanguageModel.from_pretrained(
            folder, max_seq_length=length, load_in_4bit=True, dtype=torch.bfloat16
        )
    return FastLanguageModel.get_peft_model(
        model,
        r=16,
        lora_alpha=16,
        target_modules=TARGETS,
        use_gradient_checkpointing=checkpointing,
        random_state=3407,
    ).train()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokenizer", type=Path, help="a folder with the Llama 3 tokenizer (128256 tokens)")
    parser.add_argument("--architecture", default="llama-3.1-8b", choices=checkpoints.ARCHITECTURES)
    parser.add_argument("--layers", type=int, help="keep only so many layers")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument(
        "--checkpointing", action="store_true", help="with it (releases up to 2026.9.14 cannot without)"
    )
    parser.add_argument("--record", default="nf4_step", help="name of the file in benchmarks/data")
    args = parser.parse_args()
    if not torch.cuda.is_available() or args.tokenizer is None:
        print("bench_nf4_step: needs a CUDA card and --tokenizer, left out")
        return 0
    import unsloth_ext  # isort: skip
    import unsloth  # noqa: F401
    from torch.profiler import ProfilerActivity, profile

    from unsloth_ext.patching.release import installed_release

    model = model_of(args.architecture, args.layers, args.tokenizer, 4096, args.checkpointing)
    tokens = torch.randint(0, 128000, (2, 4096), device="cuda")

    def step():
        model.zero_grad(set_to_none=True)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        return loss.detach()

    def profiled():
        with profile(activities=[ProfilerActivity.CUDA]) as trace:
            step()
            torch.cuda.synchronize()
        kernels = [e for e in trace.key_averages() if e.device_time_total]
        found = [e for e in kernels if "dequantize" in e.key.lower() or "nf4" in e.key.lower()]
        return sum(e.device_time_total for e in found) / 1e3, sum(e.device_time_total for e in kernels) / 1e3

    losses, steps = {}, {side: [] for side in SIDES}
    shares, kernels = {side: [] for side in SIDES}, {side: [] for side in SIDES}
    for turn in range(args.rounds + 1):
        for side, switch in SIDES.items():
            getattr(unsloth_ext, switch)("nf4")
            losses.setdefault(side, step())
            step()
            if turn == 0:
                continue
            for _ in range(3):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                step()
                end.record()
                end.synchronize()
                steps[side].append(start.elapsed_time(end))
            share, total = profiled()
            shares[side].append(share)
            kernels[side].append(total)
    unsloth_ext.enable("nf4")
    rows = [
        {"side": side, "unit": "ms", "loss": losses[side].item()}
        | {"dequantisation": record.percentiles(shares[side], 3), "all kernels": record.percentiles(kernels[side], 2)}
        | {"step": record.percentiles(steps[side], 2)}
        for side in SIDES
    ]
    for row in rows:
        print(row, flush=True)
    ours, theirs = (row["dequantisation"]["p50"] for row in rows)
    baseline = f"Unsloth {installed_release('unsloth')}'s kernel, {theirs} ms of a {rows[1]['step']['p50']} ms step"
    claims = [
        record.claim("nf4.step_8b.dequantize_ms", ours, "ms", "<= 10.2", baseline),
        record.claim(
            "nf4.step_8b.step_vs_2026_10",
            round(rows[1]["step"]["p50"] / rows[0]["step"]["p50"], 4),
            "x",
            ">= 1.0",
            baseline,
        ),
    ]
    the_claimed_case = args.architecture == "llama-3.1-8b" and not args.layers and not args.checkpointing
    record.write(args.record, rows, claims if the_claimed_case else [])
    if not torch.equal(*losses.values()):
        print(f"bench_nf4_step: the losses differ: {losses}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
