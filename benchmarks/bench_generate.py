"""Greedy generation with an 8B-shaped model in 4 bit: milliseconds a decoding step, each side in a process of its own.

A Llama-3.1-8B-shaped checkpoint with random weights, prompts of 32 random tokens, batches of 1, 4, 16 and 64. A step's time is the
difference of two whole generate() calls, of 64 and of 160 new tokens, over 96: no prefill, no capture, and everything else that
a user pays, sampling and Python too. Sides that capture nothing, and so take 20 ms a step, generate 16 and 64. Sides: Unsloth as it is, Unsloth with its own decoding graphs switched on, Unsloth with
unsloth_ext, transformers as it is, transformers with `unsloth_ext.nf4.generate`.

Do they say the same? Every side's logits are kept for 4 prompts and 64 tokens. As long as two sides have said the same, their logits
are of the same context; there the root mean square of their difference is the noise, and tokens must agree wherever the winner
leads by more than 4 times that.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

BATCHES = (1, 4, 16, 64)
TARGETS = {1: 5, 4: 6, 16: 7, 64: 10}  # ms a step
PROMPT = 32
UNSLOTH, GRAPHS, OURS = "Unsloth", "Unsloth, its decoding graphs on", "Unsloth with unsloth_ext"
PLAIN, PLAIN_OURS = "transformers", "transformers with unsloth_ext"
SIDES = (UNSLOTH, GRAPHS, OURS, PLAIN, PLAIN_OURS)
LENGTHS = {UNSLOTH: (16, 64), PLAIN: (16, 64)}  # new tokens of the two calls; of the others (64, 160)


def model_of(side: str, folder: str):
    """(model, its generate)"""
    if side in (OURS, PLAIN_OURS):
        import unsloth_ext  # noqa: F401
    if side in (UNSLOTH, GRAPHS, OURS):
        from unsloth import FastLanguageModel

        model, _ = FastLanguageModel.from_pretrained(
            folder, max_seq_length=512, load_in_4bit=True, dtype=torch.bfloat16
        )
        FastLanguageModel.for_inference(model)
        generate = model.generate
    else:
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        how = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        model = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=how, device_map={"": 0}, dtype=torch.bfloat16
        ).eval()
        generate = model.generate
        if side == PLAIN_OURS:
            import functools

            from unsloth_ext.nf4 import generate as captured

            generate = functools.partial(captured, model)
    assert ("unsloth_ext" in sys.modules) == (side in (OURS, PLAIN_OURS))
    model.generation_config.eos_token_id = None  # random weights may say it at any time
    return model, generate


def measure(side: str, folder: str, out: Path, rounds: int) -> None:
    """One side, in this process: {batch: [ms a step]} to `out`, tokens and logits beside it."""
    model, generate = model_of(side, folder)
    random = torch.Generator().manual_seed(3407)
    prompts = torch.randint(0, 100_000, (max(BATCHES), PROMPT), generator=random).cuda()

    def call(batch, tokens, **keywords):
        ids = prompts[:batch]
        return generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
            **keywords,
        )

    def seconds(batch, tokens):
        torch.cuda.synchronize()
        start = time.perf_counter()
        result = call(batch, tokens)
        torch.cuda.synchronize()
        assert result.shape == (batch, PROMPT + tokens), result.shape
        return time.perf_counter() - start

    found, (shorter, longer) = {}, LENGTHS.get(side, (64, 160))
    for batch in BATCHES:
        for tokens in (shorter, longer):
            call(batch, tokens)  # kernels compile, graphs are captured
        times = []
        for _ in range(rounds):
            short, long = seconds(batch, shorter), seconds(batch, longer)
            times.append((long - short) / (longer - shorter) * 1000)
        found[batch] = times
        print(f"{side}, batch {batch}: {statistics.median(times):.2f} ms a step", flush=True)
    said = call(4, 64, return_dict_in_generate=True, output_logits=True)
    torch.save(
        (said.sequences[:, PROMPT:].cpu(), torch.stack(said.logits, 1).to(torch.float32).cpu()), out.with_suffix(".pt")
    )
    out.write_text(json.dumps({str(batch): times for batch, times in found.items()}))
    print(f"{side}: peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB", flush=True)


def agreement(ours, theirs) -> dict:
    """Of (tokens [B, T], logits [B, T, V]) twice: how often two sides say the same, and whether they do where it is no coin toss."""
    (tokens, logits), (other, other_logits) = ours, theirs
    same = (tokens == other).long().cumprod(1).bool()
    compared = torch.cat([torch.ones_like(same[:, :1]), same[:, :-1]], 1)  # the context is the same
    noise = (logits - other_logits)[compared].square().mean().sqrt().item()
    top = other_logits.topk(2, -1).values
    clear = compared & (top[..., 0] - top[..., 1] > 4 * noise)
    return {
        "compared": int(compared.sum()),
        "equal": int((compared & same).sum()),
        "clear": int(clear.sum()),
        "clear_and_equal": int((clear & same).sum()),
        "noise": noise,
        "logits_rms": other_logits[compared].square().mean().sqrt().item(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokenizer", type=Path, help="a folder with the Llama 3 tokenizer (128256 tokens)")
    parser.add_argument("--architecture", default="llama-3.1-8b")
    parser.add_argument("--layers", type=int, help="keep only so many layers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--record", default="generate", help="name of the file in benchmarks/data")
    parser.add_argument("--side", nargs=3, metavar=("SIDE", "MODEL", "OUT"), help="measure one side in this process")
    args = parser.parse_args()
    if not torch.cuda.is_available() or (args.tokenizer is None and args.side is None):
        print("bench_generate: needs a CUDA card and --tokenizer, left out")
        return 0
    if args.side:
        side, folder, out = args.side
        measure(side, folder, Path(out), args.rounds)
        return 0
    times, said, failed = {}, {}, []
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        code = "import sys, checkpoints as c; from pathlib import Path as P; a = sys.argv; "
        code += "c.build(a[1], P(a[2]), P(a[3]), int(a[4]) or None)"
        build = [sys.executable, "-c", code, args.architecture, str(model), str(args.tokenizer.resolve())]
        subprocess.run([*build, str(args.layers or 0)], check=True, cwd=Path(__file__).parent)
        for number, side in enumerate(args.sides):
            out = Path(folder) / f"{number}.json"
            # Every side with caches of its own: none finds what another has compiled.
            environment = os.environ | {
                "UNSLOTH_DECODE_CUDA_GRAPHS": "1" if side == GRAPHS else "",
                "UNSLOTH_COMPILE_LOCATION": f"{folder}/unsloth{number}",
                "TRITON_CACHE_DIR": f"{folder}/triton{number}",
                "UNSLOTH_EXT_NF4_MATMUL": "1" if side in (OURS, PLAIN_OURS) else "0",
                "UNSLOTH_EXT_DECODE_GRAPHS": "1" if side == OURS else "0",
            }
            command = [sys.executable, __file__, "--rounds", str(args.rounds), "--side", side, str(model), str(out)]
            if subprocess.run(command, env=environment).returncode:
                print(f"{side}: failed", flush=True)
                failed.append(side)
                continue
            times[side] = {int(batch): found for batch, found in json.loads(out.read_text()).items()}
            said[side] = torch.load(out.with_suffix(".pt"))
            report(args, times, said)  # after each side: what has been measured stays, whatever comes
    return 1 if failed else 0


def report(args, times, said) -> None:
    import record

    from unsloth_ext.patching.release import installed_release

    rows = [
        {"architecture": args.architecture, "batch": batch, "side": side, "unit": "ms"} | record.percentiles(found, 3)
        for side, batches in times.items()
        for batch, found in batches.items()
    ]
    release = installed_release("unsloth")
    claims = []
    for ours, theirs in ((OURS, UNSLOTH), (PLAIN_OURS, PLAIN)):
        if ours in said and theirs in said:
            found = agreement(said[ours], said[theirs])
            rows.append({"case": "agreement", "side": ours, "with": theirs} | found)
            print(f"{ours} and {theirs}: {found}", flush=True)
            if ours == OURS:
                share = found["clear_and_equal"] / max(1, found["clear"])
                claims.append(
                    record.claim("generate.8b.agreement", round(share, 4), "x", ">= 1.0", f"Unsloth {release}")
                )
    if OURS in times:
        p50 = {side: {batch: statistics.median(t) for batch, t in found.items()} for side, found in times.items()}
        for batch, target in TARGETS.items():
            value = round(p50[OURS][batch], 3)
            claims.append(
                record.claim(f"generate.8b.batch{batch}_ms", value, "ms", f"<= {target}", f"Unsloth {release}")
            )
        if UNSLOTH in p50:
            ratio = min(p50[UNSLOTH][batch] / p50[OURS][batch] for batch in BATCHES)
            claims.append(
                record.claim("generate.8b.min_vs_unsloth", round(ratio, 3), "x", ">= 1.0", f"Unsloth {release}")
            )
    record.write(args.record, rows, claims)


if __name__ == "__main__":
    sys.exit(main())
