"""A whole QLoRA step: Unsloth as it is released, plain transformers, and both with compile_model; padded, packed and dense.

    python benchmarks/bench_step.py --tokenizer FOLDER [--only REGEX] [--work FOLDER]     on a card, about 25 minutes for all
    python benchmarks/bench_step.py --quick                                               tiny, on a CPU: shows that it runs

Llama shapes with random weights in 4 bit, LoRA of rank 16 on all seven projections, bf16. Each variant runs in a process of
its own, one at a time, the released Unsloth without this package. A packed batch is one row of 8192 tokens, documents of 200 to 2000; every
step has another packing, the same for all variants, and the padded case pads the same documents. Tokens are counted without
padding. The first step is timed apart: it compiles. A row is kept as soon as it is measured: a second call with the same
--work goes on where the first stopped. With --jobs several processes load and compile at once; one at a time measures.

The case "1b text" trains 50 steps on the standard library's source text six times from the same weights: five times uncompiled, whose
largest difference among themselves is the noise of atomics, and compiled. Its row has the largest difference of a loss, and of the first
step's gradients, between any two uncompiled runs, and of the compiled one to any of them.
"""

import argparse
import contextlib
import fcntl
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import record

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES = {  # name -> architecture, kind of batch, rows, tokens a row
    "8b dense": ("llama-3.1-8b", "dense", 2, 4096),
    "8b packed": ("llama-3.1-8b", "packed", 1, 8192),
    "8b padded": ("llama-3.1-8b", "padded", 1, 8192),
    "1b dense": ("llama-3.2-1b", "dense", 2, 2048),
    "1b packed": ("llama-3.2-1b", "packed", 1, 8192),
    "1b text": ("llama-3.2-1b", "text", 2, 512),
    "quick dense": ("quick", "dense", 2, 48),
    "quick packed": ("quick", "packed", 1, 96),
    "quick padded": ("quick", "padded", 1, 96),
    "quick text": ("quick", "text", 2, 48),
}
VARIANTS = {  # name -> stack, use_gradient_checkpointing, scope of compile_model (None: not compiled by it)
    "Unsloth, checkpointing 'unsloth'": ("unsloth", "unsloth", None),
    "Unsloth, checkpointing True": ("unsloth", True, None),
    "Unsloth, checkpointing False": ("unsloth", False, None),
    "ours, checkpointing False, not compiled by us": ("ours", False, None),
    "ours, checkpointing 'unsloth', not compiled by us": ("ours", "unsloth", None),
    "ours, checkpointing 'unsloth', block": ("ours", "unsloth", "block"),
    "ours, checkpointing False, block": ("ours", False, "block"),
    "ours, checkpointing False, step": ("ours", False, "step"),
    "ours, checkpointing False, block, CUDA graphs": ("ours", False, "block"),
    "ours, checkpointing False, step, CUDA graphs": ("ours", False, "step"),
    "ours, checkpointing False, block, dense weights": ("ours", False, "block"),
    "ours, checkpointing False, block, CUDA graphs, dense weights": ("ours", False, "block"),
    "transformers": ("transformers", False, None),
    "transformers, torch.compile": ("transformers", False, "torch.compile"),
    "transformers and ours, block": ("transformers and ours", False, "block"),
    "transformers and ours, step": ("transformers and ours", False, "step"),
}
SCOPES = ("block", "step")
QUICK = dict(vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=16, max_position_embeddings=512)  # fmt: skip


def documents(total: int, seed: int, least: int, most: int) -> list[int]:
    """Lengths between `least` and `most` that fill `total`; only the last may be shorter."""
    draw, lengths = random.Random(seed), []
    while (left := total - sum(lengths)) > 0:
        lengths.append(min(left, draw.randint(least, most)))
    return lengths


def batch_of(case: str, seed: int, vocabulary: int, device: str, stack: str) -> tuple[dict, int]:
    """(what the model is called with, tokens that are not padding)."""
    import torch

    _, kind, rows, length = CASES[case]
    generator = torch.Generator().manual_seed(seed)
    if kind == "dense":
        ids = torch.randint(vocabulary, (rows, length), generator=generator).to(device)
        return {"input_ids": ids, "labels": ids}, rows * length
    lengths = documents(length, seed, 200, 2000) if length > 500 else documents(length, seed, 5, 30)
    texts = [torch.randint(vocabulary, (n,), generator=generator) for n in lengths]
    if kind == "padded":
        ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
        labels = ids.masked_fill(mask == 0, -100)
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        return {name: value.to(device) for name, value in batch.items()}, length
    ids = torch.cat(texts)[None]
    labels = torch.cat([torch.cat([torch.tensor([-100]), text[1:]]) for text in texts])[None]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    batch = {"input_ids": ids.to(device), "labels": labels.to(device), "position_ids": positions.to(device)}
    if stack in ("unsloth", "ours"):  # as Unsloth's collator leaves them: on the host
        batch["packed_seq_lengths"] = torch.tensor(lengths, dtype=torch.int32)
    return batch, length


def checkpoint(architecture: str, work: Path, tokenizer: Path | None) -> Path:
    """The architecture with random weights, in 4 bit: made once, loaded by every variant."""
    folder = work / architecture
    if (folder / "config.json").exists():
        return folder
    import checkpoints

    if architecture != "quick":
        return checkpoints.build_nf4(checkpoints.config_of(architecture), folder, tokenizer)
    import torch
    from transformers import LlamaConfig

    config = LlamaConfig(**QUICK)
    torch.manual_seed(0)
    return checkpoints.build_nf4(config, folder, tokenizer)


def model_of(folder: Path, stack: str, checkpointing, length: int):
    import torch

    if stack in ("unsloth", "ours"):
        from unsloth import FastLanguageModel

        model, _ = FastLanguageModel.from_pretrained(
            str(folder), max_seq_length=length, load_in_4bit=True, dtype=torch.bfloat16
        )
        return FastLanguageModel.get_peft_model(
            model,
            r=16,
            lora_alpha=16,
            target_modules=TARGETS,
            use_gradient_checkpointing=checkpointing,
            random_state=3407,
        ).train()
    import peft
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map={"": device})
    model.config.use_cache = False
    return peft.get_peft_model(model, peft.LoraConfig(r=16, lora_alpha=16, target_modules=TARGETS)).train()


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # kept beside the rows: where a process ends early, this is what is known


@contextlib.contextmanager
def alone(lock: str | None, processes: int, name: str):
    """The card is this process's to measure on, and where all `processes` run at once (else 0), none of them compiles any more."""
    if lock is None:
        yield
        return
    Path(f"{lock}.{name}").touch()
    while len(list(Path(lock).parent.glob(f"{Path(lock).name}.*"))) < processes:
        time.sleep(0.2)
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def measure(case: str, variant: str, folder: Path, steps: int, lock: str | None = None, processes: int = 0) -> dict:
    """One row, in this process."""
    if CASES[case][1] == "text":
        return losses_of(case, variant, folder)
    stack, checkpointing, scope = VARIANTS[variant]
    if stack in ("ours", "transformers and ours"):
        import unsloth_ext  # noqa: F401  before unsloth
    import torch

    cuda = torch.cuda.is_available()
    model = model_of(folder, stack, checkpointing, CASES[case][3])
    vocabulary = model.get_base_model().config.vocab_size
    run, compiled, graphs = model, None, False
    if stack == "transformers and ours":
        from unsloth_ext.compiling import use_packed_attention

        use_packed_attention(model)
    if scope == "torch.compile":
        run = torch.compile(model, dynamic=True, backend="inductor" if cuda else "aot_eager")
    elif scope is not None:
        from unsloth_ext.compiling import compile_model, keep_dense_weights

        graphs = "CUDA graphs" in variant
        if variant.endswith("dense weights"):
            keep_dense_weights(model)
        compiled = compile_model(model, scope, **({"cuda_graphs": graphs} if cuda else {"backend": "aot_eager"}))

    def step(seed):
        batch, tokens = batch_of(case, seed, vocabulary, "cuda" if cuda else "cpu", stack)
        model.zero_grad(set_to_none=True)
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        loss = run(**batch).loss
        loss.backward()
        host = time.perf_counter()
        if cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - start) * 1e3, tokens, (host - start) * 1e3, loss.item()

    first, _, _, loss = step(0)
    say(f"first step {first / 1e3:.1f} s")
    for seed in range(1, 7):  # a second kind of batch, the allocator, the clocks, the recording of CUDA graphs
        say(f"step {seed}: {step(seed)[0]:.1f} ms")
    with alone(lock, processes, f"{case}, {variant}"):
        step(7)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        times, tokens, host = zip(*(step(seed)[:3] for seed in range(8, 8 + steps)), strict=True)
    row = {"case": case, "variant": variant, "unit": "ms", "step": record.percentiles(times, 2)}
    row["tokens/s"] = record.percentiles([n / t * 1e3 for n, t in zip(tokens, times, strict=True)], 1)
    row["host"] = record.percentiles(host, 2)  # until the last launch: near the step where the host is the limit
    row["first step s"], row["loss"] = round(first / 1e3, 2), round(loss, 5)
    row["peak GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 2) if cuda else None
    counters = torch._dynamo.utils.counters
    row["graphs"], row["breaks"] = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    if compiled is not None:
        report = compiled.report()
        row |= {"graphs": report.graphs, "breaks": report.breaks, "compile s": round(report.compile_seconds, 1)}
        if scope == "step":
            row |= {"layers compiled by kind": report.shared_layers, "not by kind": report.not_shared}
        if graphs and cuda:
            row |= {"recorded forwards": report.recorded_forwards, "not recorded": report.unrecorded}
            row["recordings refused"] = counters["inductor"]["cudagraph_skips"]
    return row


def text_batches(folder: Path, rows: int, length: int, count: int, vocabulary: int):
    """Batches of Python's own source text; of bytes where there is no tokenizer."""
    import torch

    text = "".join(file.read_text(errors="replace") for file in sorted(Path(os.__file__).parent.glob("*.py"))[:120])
    if (folder / "tokenizer.json").exists():
        from transformers import AutoTokenizer

        ids = AutoTokenizer.from_pretrained(folder)(text[: rows * length * count * 6])["input_ids"]
    else:
        ids = [byte % vocabulary for byte in text.encode()]
    return torch.tensor(ids[: rows * length * count]).view(count, rows, length)


def losses_of(case: str, variant: str, folder: Path) -> dict:
    """50 steps several times from the same weights: uncompiled, uncompiled again, compiled."""
    stack, checkpointing, scope = VARIANTS[variant]
    if stack in ("ours", "transformers and ours"):
        import unsloth_ext  # noqa: F401  before unsloth
    import torch

    from unsloth_ext.compiling import compile_model

    device, (_, _, rows, length) = "cuda" if torch.cuda.is_available() else "cpu", CASES[case]
    model = model_of(folder, stack, checkpointing, length)
    say("loaded")
    vocabulary = model.get_base_model().config.vocab_size
    batches = text_batches(folder, rows, length, 50 if device == "cuda" else 6, vocabulary).to(device)
    say(f"{len(batches)} batches of text")
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    start = {n: p.detach().clone() for n, p in trained.items()}

    def run():
        with torch.no_grad():
            for n, p in trained.items():
                p.copy_(start[n])
        optimizer, losses, gradients = torch.optim.AdamW(trained.values(), lr=2e-4), [], {}
        for ids in batches:
            optimizer.zero_grad(set_to_none=True)
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            gradients = gradients or {n: p.grad.double().cpu() for n, p in trained.items()}
            optimizer.step()
            losses.append(loss.detach().double().cpu())
        say(f"{len(losses)} steps, loss {losses[0]:.4f} to {losses[-1]:.4f}")
        return torch.stack(losses), gradients

    def apart(found, wanted):
        off = sum((found[1][n] - g).square().sum() for n, g in wanted[1].items()).sqrt()
        whole = sum(g.square().sum() for g in wanted[1].values()).sqrt()
        return {"loss": (found[0] - wanted[0]).abs().max().item(), "gradients": (off / whole).item()}

    plain = [run() for _ in range(5 if device == "cuda" else 2)]
    noise = [apart(one, other) for one, other in itertools.combinations(plain, 2)]
    compiled = compile_model(model, scope, **({} if device == "cuda" else {"backend": "aot_eager"}))
    found, report = run(), compiled.report()
    row = {"case": case, "variant": variant, "unit": "nats", "steps": len(batches), "tokens": rows * length}
    row |= {"uncompiled_runs": len(plain), "breaks": report.breaks}
    for name, differences in (("uncompiled_again", noise), ("compiled", [apart(found, one) for one in plain])):
        row[name] = {what: max(one[what] for one in differences) for what in ("loss", "gradients")}
    return row | {"losses": [[round(x.item(), 5) for x in run[0][::7]] for run in (*plain, found)]}


def _seconds(row) -> str:
    return "not in this run" if row is None else f"{row['first step s']} s"


def _milliseconds(row) -> str:
    return "not in this run" if row is None else f"{row['step']['p50']} ms"


def claims_of(rows: list[dict]) -> list[dict]:
    """What the rows say about the figures we stand for; a claim whose rows are missing is left out."""
    found = {(row["case"], row["variant"]): row for row in rows if "error" not in row}
    claims = []

    def add(id, unit, target, baseline, value):
        try:
            claims.append(record.claim(id, value(), unit, target, baseline))
        except (KeyError, TypeError, ValueError):  # what is chosen of none
            print(f"{id}: not measured", flush=True)

    release = next((row["unsloth"] for row in found.values()), "")
    block, step, theirs = (
        "ours, checkpointing False, block",
        "ours, checkpointing False, step",
        "Unsloth, checkpointing False",
    )
    small = [row for key, row in found.items() if key[0] == "1b dense" and row["variant"].startswith("ours")]
    least = min(small, key=lambda row: row["step"]["p50"], default=None)
    add(
        "compile.1b.ms",
        "ms",
        "<= 55",
        f"Unsloth {release}, the same flag: {_milliseconds(found.get(('1b dense', theirs)))}; {least and least['variant']}",
        lambda: least["step"]["p50"],
    )
    packed = [row for key, row in found.items() if key[0] == "8b packed" and key[1].startswith(block)]
    best = max(packed, key=lambda row: row["tokens/s"]["p50"], default=None)
    add(
        "compile.packed_8b.vs_unsloth",
        "x",
        ">= 1.3",
        f"Unsloth {release}, the same batches and flag; {best and best['variant']}",
        lambda: round(best["tokens/s"]["p50"] / found["8b packed", theirs]["tokens/s"]["p50"], 4),
    )
    for name, flag in (("by_import", "False"), ("by_import_checkpointed", "'unsloth'")):
        alone, same = f"ours, checkpointing {flag}, not compiled by us", f"Unsloth, checkpointing {flag}"
        add(
            f"compile.packed_8b_{name}.vs_unsloth",
            "x",
            ">= 1.2",
            f"Unsloth {release}, the same batches and flag {flag}; ours by `import unsloth_ext` alone",
            lambda alone=alone, same=same: round(
                found["8b packed", alone]["tokens/s"]["p50"] / found["8b packed", same]["tokens/s"]["p50"], 4
            ),
        )
    add(
        "compile.step_8b.first_step_s",
        "s",
        "<= 90",
        f"Unsloth {release}, its own compiled layers: {_seconds(found.get(('8b dense', theirs)))}",
        lambda: found["8b dense", step]["first step s"],
    )
    add(
        "compile.block_8b.first_step_vs_unsloth",
        "x",
        "<= 1",
        f"Unsloth {release}, its own compiled layers, the same flag, each from empty caches: {_seconds(found.get(('8b dense', theirs)))}",
        lambda: round(found["8b dense", block]["first step s"] / found["8b dense", theirs]["first step s"], 4),
    )
    for row in (row for row in found.values() if "uncompiled_again" in row):
        again, target = row["uncompiled_again"]["loss"], f"<= {row['uncompiled_again']['loss']:.6f}"
        value = round(row["compiled"]["loss"], 6)
        claims.append(
            record.claim(
                "compile.loss_difference",
                value,
                "nats",
                target,
                f"any two of {row.get('uncompiled_runs', 2)} uncompiled runs: {again:.6f}",
            )
        )
    ours = [row for row in found.values() if row["variant"].startswith("ours") and "compile s" in row]
    if ours:
        add("compile.breaks", "breaks", "<= 0", "none: a count", lambda: sum(row["breaks"] for row in ours))
    return claims


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokenizer", type=Path, help="a folder with the Llama 3 tokenizer (128256 tokens)")
    parser.add_argument("--work", type=Path, help="where checkpoints and rows are kept (a temporary folder)")
    parser.add_argument(
        "--only",
        default="",
        help="regular expressions, separated by ';': the cases and variants ('8b packed|ours') to run, in this order",
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--lock", help=argparse.SUPPRESS)
    parser.add_argument("--processes", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=int, default=420, help="seconds after which a variant is given up")
    parser.add_argument(
        "--quick", action="store_true", help="a tiny shape, plain transformers, any machine; nothing recorded"
    )
    parser.add_argument("--measure", nargs=3, metavar=("CASE", "VARIANT", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        case, variant, folder = args.measure
        print(json.dumps(measure(case, variant, Path(folder), args.steps, args.lock, args.processes)))
        return 0
    import torch

    if not args.quick and (not torch.cuda.is_available() or args.tokenizer is None):
        print("bench_step: needs a CUDA card and --tokenizer (or --quick), left out")
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        return run_all(args, args.work or Path(temporary))


def run_all(args, work: Path) -> int:
    work.mkdir(parents=True, exist_ok=True)
    kept = work / ("quick.jsonl" if args.quick else "step.jsonl")
    rows = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    done = {(row["case"], row["variant"]) for row in rows if "error" not in row}
    wanted = [pattern for pattern in args.only.split(";") if pattern] or [""]
    todo = []  # in the order of the patterns
    for pattern in wanted:
        for case, (architecture, kind, *_) in CASES.items():
            for variant, (stack, _, scope) in VARIANTS.items():
                if args.quick != (architecture == "quick") or (args.quick and not stack.startswith("transformers")):
                    continue
                if kind == "text" and (scope not in SCOPES or variant.endswith(("CUDA graphs", "dense weights"))):
                    continue
                if (case, variant) in done or (case, variant) in todo or not re.search(pattern, f"{case}: {variant}"):
                    continue
                todo.append((case, variant))
    folders = {name: checkpoint(name, work, args.tokenizer) for name in dict.fromkeys(CASES[c][0] for c, _ in todo)}
    args.lock = str(work / "measuring")
    timed = [case for case, _ in todo if CASES[case][1] != "text"]
    args.processes = len(timed) if 1 < len(todo) <= args.jobs else 0
    for old in work.glob("measuring.*"):
        old.unlink()
    with ThreadPoolExecutor(args.jobs) as pool:
        try:
            for row in pool.map(lambda one: in_its_own_process(*one, folders[CASES[one[0]][0]], args, kept), todo):
                rows.append(row)
                if not args.quick:
                    record.write("step", [row for row in rows if "error" not in row], claims_of(rows))
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    failed = [row for row in rows if "error" in row and (row["case"], row["variant"]) not in done]
    return 1 if failed else 0


def in_its_own_process(case: str, variant: str, folder: Path, args, kept: Path) -> dict:
    row = run_alone(case, variant, folder, args)
    with kept.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(row, flush=True)
    return row


def run_alone(case: str, variant: str, folder: Path, args) -> dict:
    environment = dict(os.environ)
    if VARIANTS[variant][0] in ("unsloth", "transformers"):
        environment["UNSLOTH_EXT_DISABLE"] = "all"
    caches = Path(args.lock).parent / f"caches of {case}, {variant}"  # cold, and nobody else's
    environment |= {
        "UNSLOTH_COMPILE_LOCATION": str(caches / "unsloth"),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "TRITON_CACHE_DIR": str(caches / "triton"),
        "XDG_CACHE_HOME": str(caches / "cache"),  # of our CUDA kernels
    }
    environment["PYTHONFAULTHANDLER"] = "1"
    steps = min(args.steps, 4) if args.quick else args.steps
    command = [sys.executable, __file__, "--steps", str(steps), "--lock", args.lock]
    command += ["--processes", str(args.processes), "--measure", case, variant]
    shutil.rmtree(caches, ignore_errors=True)
    caches.mkdir(parents=True)
    said, result = caches / "stderr.txt", caches / "stdout.txt"
    try:
        with said.open("w") as stderr, result.open("w") as stdout:
            process = subprocess.run(
                [*command, str(folder)], env=environment, stdout=stdout, stderr=stderr, timeout=args.limit, check=False
            )
        ended = f"exit status {process.returncode}" if process.returncode else None
    except subprocess.TimeoutExpired:
        ended = f"not done in {args.limit} s"
    if ended is None:
        try:
            from importlib.metadata import version

            return json.loads(result.read_text().splitlines()[-1]) | {"unsloth": version("unsloth")}
        except (IndexError, ValueError) as error:
            ended = f"no result: {error}"
    if CASES[case][1] != "text":
        Path(f"{args.lock}.{case}, {variant}").touch()  # nobody waits for it
    return {"case": case, "variant": variant, "error": f"{ended}: {said.read_text(errors='replace')[-2500:]}"}


if __name__ == "__main__":
    sys.exit(main())
