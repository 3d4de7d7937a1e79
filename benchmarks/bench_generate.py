"""Greedy generation with an 8B-shaped model in 4 bit: milliseconds a decoding step, each side in a process of its own.

A Llama-3.1-8B-shaped NF4 checkpoint with random weights, prompts of 32 random tokens, batches of 1, 4, 16 and 64. A step's time is
the difference of two whole generate() calls, of 64 and of 128 new tokens, over 64, for every side: no prefill, no capture, and
everything else that a user pays, sampling and Python too. Sides: Unsloth as it is, Unsloth with unsloth_ext as it is, Unsloth with
its own decoding graphs switched on, transformers as it is, transformers with `unsloth_ext.nf4.generate`.

Each row says which way it went: CUDA graphs replayed for a token (33 in Unsloth's decoding of 32 layers), and the kernels that
multiply; and how fast the host was, since most of a step is the host's: `launch_us` is a small kernel's launch, `load` what else
ran on the machine.

Do they say the same? Every side's logits are kept for 4 prompts and 64 tokens. As long as two sides have said the same, their logits
are of the same context; there the root mean square of their difference is the noise, and tokens must agree wherever the winner
leads by more than 4 times that.
"""

import argparse
import contextlib
import json
import math
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
PROMPT, SHORT, LONG = 32, 64, 128
SHARE = 10  # seconds that the rounds of a batch may take; three are measured in any case
UNSLOTH, GRAPHS, OURS = "Unsloth", "Unsloth, its decoding graphs on", "Unsloth with unsloth_ext"
PLAIN, PLAIN_OURS = "transformers", "transformers with unsloth_ext"
SIDES = (OURS, UNSLOTH, GRAPHS, PLAIN_OURS, PLAIN)


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


@contextlib.contextmanager
def replays_counted():
    """A list that gets an entry for each CUDA graph replayed."""
    seen, own = [], torch.cuda.CUDAGraph.replay

    def replay(graph):
        seen.append(None)
        return own(graph)

    torch.cuda.CUDAGraph.replay = replay
    try:
        yield seen
    finally:
        torch.cuda.CUDAGraph.replay = own


def kernels(model, rows: int) -> dict:
    """{shape of a weight: what multiplies so many rows by it}, after it has been used."""
    if "unsloth_ext" not in sys.modules:
        return {}
    from unsloth_ext.nf4 import matmul_plan
    from unsloth_ext.nf4.quant_state import read

    found = {}
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None and (shape := "x".join(map(str, state.shape))) not in found:
            facts = read(state)
            variant = matmul_plan._variant(0, torch.bfloat16, rows, facts, False, facts.absmax.data_ptr())
            used = variant is not None and variant in matmul_plan._ready
            found[shape] = (variant.shape.kernel if variant.cuda else "Triton") if used else "dequantise"
    return found


def launch_us() -> float:
    x, times = torch.zeros(1, device="cuda"), []
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(400):
            x.add_(1)
        times.append((time.perf_counter() - start) / 400 * 1e6)
    return statistics.median(times)


def measure(side: str, folder: str, out: Path, rounds: int) -> None:
    """One side, in this process: {batch: {ms: [ms a step], ...}} to `out` after each batch, tokens and logits beside it."""
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

    said = call(4, 64, return_dict_in_generate=True, output_logits=True)
    torch.save(
        (said.sequences[:, PROMPT:].cpu(), torch.stack(said.logits, 1).to(torch.float32).cpu()), out.with_suffix(".pt")
    )
    del said
    found = {}
    for batch in BATCHES:
        with replays_counted() as replays:
            call(batch, LONG)  # kernels compile, graphs are captured
        times, start, host = [], time.perf_counter(), launch_us()
        while len(times) < rounds and (len(times) < 3 or time.perf_counter() - start < SHARE):
            short, long = seconds(batch, SHORT), seconds(batch, LONG)
            times.append((long - short) / (LONG - SHORT) * 1000)
        route = {"replays_a_token": round(len(replays) / LONG, 2), "kernels": kernels(model, batch)}
        host = {"launch_us": round((host + launch_us()) / 2, 2), "load": round(os.getloadavg()[0], 1)}
        found[batch] = {"ms": times} | route | host
        print(f"{side}, batch {batch}: {statistics.median(times):.2f} ms a step; {route}; {host}", flush=True)
        out.write_text(json.dumps(found))
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
    parser.add_argument("--rounds", type=int, default=7, help="of a batch, at most")
    parser.add_argument("--model", type=Path, help="an NF4 checkpoint of checkpoints.py, instead of one made now")
    parser.add_argument(
        "--limit", type=float, default=math.inf, help="seconds; a side that has none left is left out or cut"
    )
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--record", default="generate", help="name of the file in benchmarks/data")
    parser.add_argument("--side", nargs=3, metavar=("SIDE", "MODEL", "OUT"), help="measure one side in this process")
    args = parser.parse_args()
    if not torch.cuda.is_available() or not (args.tokenizer or args.model or args.side):
        print("bench_generate: needs a CUDA card, and --tokenizer or --model, left out")
        return 0
    if args.side:
        side, folder, out = args.side
        measure(side, folder, Path(out), args.rounds)
        return 0
    start, found, said, failed = time.perf_counter(), {}, {}, []
    with tempfile.TemporaryDirectory() as folder:
        model = args.model or Path(folder) / "model"
        if args.model is None:
            script = Path(__file__).with_name("checkpoints.py")
            build = [
                sys.executable,
                str(script),
                args.architecture,
                str(model),
                "--nf4",
                "--tokenizer",
                str(args.tokenizer),
            ]
            subprocess.run([*build, *(["--layers", str(args.layers)] if args.layers else [])], check=True)
        for number, side in enumerate(args.sides):
            left = args.limit - (time.perf_counter() - start)
            if left < 45:
                print(f"{side}: left out, {left:.0f} s are left", flush=True)
                continue
            out = Path(folder) / f"{number}.json"
            # Every side with caches of its own: none finds what another has compiled.
            switches = ("UNSLOTH_EXT_NF4_MATMUL", "UNSLOTH_EXT_DECODE_GRAPHS")  # a user has set none
            environment = {name: value for name, value in os.environ.items() if name not in switches} | {
                "UNSLOTH_DECODE_CUDA_GRAPHS": "1" if side == GRAPHS else "",
                "UNSLOTH_COMPILE_LOCATION": f"{folder}/unsloth{number}",
                "TRITON_CACHE_DIR": f"{folder}/triton{number}",
            }
            command = [sys.executable, __file__, "--rounds", str(args.rounds), "--side", side, str(model), str(out)]
            try:
                code = subprocess.run(command, env=environment, timeout=None if math.isinf(left) else left).returncode
            except subprocess.TimeoutExpired:
                code = "out of time"
            if code:
                print(f"{side}: failed ({code})", flush=True)
                failed.append(side)
            if out.exists():
                found[side] = {int(batch): row for batch, row in json.loads(out.read_text()).items()}
            if out.with_suffix(".pt").exists():
                said[side] = torch.load(out.with_suffix(".pt"))
            if found:
                report(args, found, said)  # after each side: what has been measured stays, whatever comes
    return 1 if failed else 0


def report(args, found, said) -> None:
    import record

    from unsloth_ext.patching.release import installed_release

    rows = [
        {"architecture": args.architecture, "batch": batch, "side": side, "unit": "ms"}
        | record.percentiles(row["ms"], 3)
        | {key: value for key, value in row.items() if key != "ms"}
        for side, batches in found.items()
        for batch, row in batches.items()
    ]
    release = installed_release("unsloth")
    claims = []
    for ours, theirs in ((OURS, UNSLOTH), (PLAIN_OURS, PLAIN)):
        if ours in said and theirs in said:
            same = agreement(said[ours], said[theirs])
            rows.append({"case": "agreement", "side": ours, "with": theirs} | same)
            print(f"{ours} and {theirs}: {same}", flush=True)
            if ours == OURS:
                share = same["clear_and_equal"] / max(1, same["clear"])
                claims.append(
                    record.claim("generate.8b.agreement", round(share, 4), "x", ">= 1.0", f"Unsloth {release}")
                )
    p50 = {side: {batch: statistics.median(row["ms"]) for batch, row in of.items()} for side, of in found.items()}
    for batch, target in TARGETS.items():
        if batch in p50.get(OURS, {}):
            value = round(p50[OURS][batch], 3)
            claims.append(
                record.claim(f"generate.8b.batch{batch}_ms", value, "ms", f"<= {target}", f"Unsloth {release}")
            )
    if set(BATCHES) <= p50.get(OURS, {}).keys() & p50.get(UNSLOTH, {}).keys():
        ratio = min(p50[UNSLOTH][batch] / p50[OURS][batch] for batch in BATCHES)
        claims.append(record.claim("generate.8b.min_vs_unsloth", round(ratio, 3), "x", ">= 1.0", f"Unsloth {release}"))
    record.write(args.record, rows, claims)


if __name__ == "__main__":
    sys.exit(main())
