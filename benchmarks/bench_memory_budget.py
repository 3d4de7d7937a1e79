"""The frontier of time against memory of a QLoRA step: `memory_budget` at several budgets, and Unsloth's three checkpointing flags.

    python benchmarks/bench_memory_budget.py --tokenizer FOLDER [--budgets auto 8.1GiB ...] [--flags unsloth False]
    python benchmarks/bench_memory_budget.py --quick        tiny, plain transformers, on a CPU: shows that it runs
    python benchmarks/bench_memory_budget.py --draw         the frontier of the rows that are recorded, as a picture

A Llama-shaped checkpoint with random weights in 4 bit, LoRA of rank 16 on all seven projections, AdamW in 8 bit, batch 2 x 4096.
Each of Unsloth's flags runs in a process of its own, without this package. Ours runs twice, over Unsloth's layers as they are and
over `compile_model(scope="block")`; one process each, budget after budget on one model, from the same weights. All processes
load at the same time and then train one after another. Peak is `torch.cuda.max_memory_allocated` of whole steps, optimizer
included, after the warm-up. Our sides step the optimizer as a Trainer of this package does (`step_together`), Unsloth's as Unsloth
does. The first losses of all sides must agree. Every row is recorded as soon as it is measured: a side that fails or is given up
takes no other's rows with it.
"""

import argparse
import gc
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import checkpoints
import plots
import record

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FLAGS = ["unsloth", "True", "False"]
BUDGETS = {
    "llama-3.1-8b": ["auto", "8.1GiB", "12GiB", "20GiB", "10GiB", "16GiB", "28GiB"],
    "llama-3.2-1b": ["auto", "3GiB", "4GiB", "6GiB", "8GiB"],
    "toy": ["auto", "1GiB"],
}
CLAIMS = {"8.1GiB": ("8gib", 690), "12GiB": ("12gib", 640), "20GiB": ("20gib", 580), "auto": ("auto", 505)}
ROW = "ROW "  # what a side's process writes before a row
READY = "READY"  # and when it has loaded; it trains when a line comes in


def model_of(folder: Path, length: int, flag):
    import torch

    if not torch.cuda.is_available():  # --quick
        import peft
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return peft.get_peft_model(model, peft.LoraConfig(r=16, lora_alpha=16, target_modules=TARGETS)).train()
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=length, load_in_4bit=True, dtype=torch.bfloat16
    )
    return FastLanguageModel.get_peft_model(
        model, r=16, lora_alpha=16, target_modules=TARGETS, use_gradient_checkpointing=flag, random_state=3407
    ).train()


def optimizer_of(parameters):
    import torch

    if not torch.cuda.is_available():
        return torch.optim.AdamW(parameters, lr=1e-4)
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(parameters, lr=1e-4)


def timed(model, tokens, warm_up: int, steps: int, together: bool = False) -> dict:
    """One row's figures: an optimizer of its own, first loss, times and peak. together: as this package's Trainers step it."""
    import torch

    cuda = tokens.is_cuda
    optimizer = optimizer_of([p for p in model.parameters() if p.requires_grad])
    if together and cuda:
        from unsloth_ext.compiling import step_together

        step_together(optimizer)

    def step():
        start = time.perf_counter()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - start) * 1e3, loss.item()

    begun, first = step()
    print(f"first step {begun / 1e3:.2f} s", file=sys.stderr, flush=True)
    second = step()[0] if warm_up else 0.0  # the adapters are not zeros any more: looked at once more
    for _ in range(warm_up - 1):
        step()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    times = [step()[0] for _ in range(steps)]
    row = {"unit": "ms", "loss": first, "first step s": round(begun / 1e3, 2)}
    row["second step s"] = round(second / 1e3, 2)
    row["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 3) if cuda else None
    row["step"] = record.percentiles(times, 2)
    row["tokens_per_s"] = round(tokens.numel() / statistics.median(times) * 1e3)
    return row


def planned(budget) -> dict:
    """What a budget decided, and what it decided it from."""
    plan, costs = budget.plan, budget.costs
    row = {"plan": plan.counts(), "predicted_peak_gib": round(plan.peak / 2**30, 3)}
    row |= {"predicted_extra_ms": round(plan.extra * 1e3, 1), "host_gib": round(plan.host / 2**30, 2)}
    row["dense_gib"] = round(budget.dense.nbytes / 2**30, 2) if budget.dense is not None else 0.0
    row["exceeded_by_mib"] = round(budget.correction / 2**20)
    row["layer_ms"] = [round(costs.forward * 1e3, 3), round(costs.backward * 1e3, 3)]
    row["layer"] = {
        cost.name: {
            "kept_mib": round(cost.kept / 2**20, 1),
            "host_mib": round(cost.host / 2**20, 1),
            "early_mib": round(cost.ahead / 2**20, 1),
            "forward_peak_mib": round(cost.forward_peak / 2**20, 1),
            "backward_peak_mib": round(cost.backward_peak / 2**20, 1),
            "extra_ms": round(cost.extra * 1e3, 3),
        }
        for cost in costs.levels
    }
    scripts = budget.scripts.values()
    row["layer_ms_at"] = {cost.name: round(costs.seconds(cost) * 1e3, 3) for cost in costs.levels}
    row["static_gib"] = round(plan.static / 2**30, 3)
    row["loss_mib"] = round((budget.loss_bytes or 0) * costs.tokens / 2**20, 1)
    row["found"] = {
        "scripts": len(scripts),
        "products": sum(s.products is not None for s in scripts),
        "copies": sum(bool(s.copies) for s in scripts),
        "outlines": sum(s.outline is not None for s in scripts),
        "seconds": {n: round(getattr(budget, n), 2) for n in ("probing", "looking", "planning")},
        "looked": sum(state.looked for state in budget.states),
        "searches": budget.searches,
        "why": sorted({s.why for s in scripts if s.why})[:3],
    }
    return row | {"link_gb_s": [round(costs.to_host / 1e9, 1), round(costs.from_host / 1e9, 1)]}


def side(name: str, folder: Path, args) -> None:
    """One side, in this process; its rows go to standard output."""
    logging.basicConfig(format="%(asctime)s %(message)s")
    logging.getLogger("unsloth_ext.compiling").setLevel(logging.INFO)
    begun = time.perf_counter()
    kind, _, flag = name.partition(": ")
    if kind != "Unsloth":
        import unsloth_ext  # noqa: F401  before unsloth
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    vocabulary = checkpoints.config_of(args.architecture).vocab_size
    draw = torch.Generator().manual_seed(7)
    tokens = torch.randint(0, vocabulary - 256, (args.batch, args.length), generator=draw).to(device)
    model = model_of(folder, args.length, {"True": True, "False": False}.get(flag, flag) if flag else False)

    print(f"{name}: loaded after {time.perf_counter() - begun:.1f} s", file=sys.stderr, flush=True)
    print(READY, flush=True)
    sys.stdin.readline()

    def tell(setting, row):
        print(ROW + json.dumps({"side": kind, "setting": setting} | row), flush=True)

    if kind == "Unsloth":
        tell(flag, timed(model, tokens, args.warm_up, args.steps))
        return
    from unsloth_ext.compiling import memory_budget

    if kind == "ours, block":
        from unsloth_ext.compiling import compile_model

        compile_model(model, "block", **({} if device == "cuda" else {"backend": "aot_eager"}))
    start = {n: p.detach().to("cpu", copy=True) for n, p in model.named_parameters() if p.requires_grad}
    for setting in args.budgets or BUDGETS[args.architecture]:
        with torch.no_grad():
            for n, p in model.named_parameters():
                if n in start:
                    p.copy_(start[n])
                    p.grad = None
        budget = memory_budget(model, setting)
        try:
            row = timed(model, tokens, args.warm_up, args.steps, together=True) | planned(budget)
        except Exception as error:  # the next budget may do
            row = {"error": f"{type(error).__name__}: {error}"[:600], "plan": str(budget)}
        budget.remove()
        del budget
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
        tell(setting, row)


class Process:
    """A side in a process of its own, which loads at once and trains when `run` says so."""

    def __init__(self, name: str, folder: Path, args):
        environment = dict(os.environ)
        if name.startswith("Unsloth"):
            environment["UNSLOTH_EXT_DISABLE"] = "all"
        environment["UNSLOTH_COMPILE_LOCATION"] = tempfile.mkdtemp(prefix="unsloth_")
        options = ["--warm-up", args.warm_up, "--steps", args.steps, "--batch", args.batch, "--length", args.length]
        options += ["--architecture", args.architecture, *(["--budgets", *args.budgets] if args.budgets else [])]
        command = [sys.executable, __file__, "--side", name, str(folder), *map(str, options)]
        self.name, self.limit, self.given_up = name, args.limit, False
        self.errors = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True
        )

    def run(self, keep) -> None:
        """`keep` gets each row as it comes, and the failure, if there is one. The limit counts from here on."""

        def give_up():
            self.given_up = True
            self.process.kill()

        timer = threading.Timer(self.limit, give_up)
        timer.start()
        try:
            for line in self.process.stdout:
                if line.startswith(READY):
                    self.process.stdin.write("go\n")
                    self.process.stdin.flush()
                elif line.startswith(ROW):
                    keep(json.loads(line.removeprefix(ROW)))
            code = self.process.wait()
        finally:
            timer.cancel()
        if code:
            why = f"given up after {self.limit} s" if self.given_up else f"exit status {code}"
            self.errors.seek(0)
            keep({"side": self.name, "error": f"{why}: {self.errors.read()[-6000:]}"})

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def claims_of(rows: list[dict], args) -> list[dict]:
    usual = args.architecture == "llama-3.1-8b" and not args.layers and (args.batch, args.length) == (2, 4096)
    done = [row for row in rows if "step" in row]
    if not usual or not done:
        return []
    theirs = {row["setting"]: row for row in done if row["side"] == "Unsloth"}
    from unsloth_ext.patching.release import installed_release

    shown = ", ".join(f"{s} {row['step']['p50']} ms / {row['peak_gib']} GiB" for s, row in theirs.items())
    baseline = f"Unsloth {installed_release('unsloth')}: {shown or 'not measured in this run'}"
    claims = []
    for setting, (name, target) in CLAIMS.items():
        ours = [r for r in done if r["side"] != "Unsloth" and r["setting"] == setting and not over([r])]
        if ours:
            least = min(row["step"]["p50"] for row in ours)
            claims.append(record.claim(f"compile.8b_{name}.ms", least, "ms", f"<= {target}", baseline))
    return claims


def over(rows: list[dict]) -> list[dict]:
    return [
        row
        for row in rows
        if row.get("peak_gib") and row["setting"].endswith("GiB") and row["peak_gib"] > float(row["setting"][:-3])
    ]


def draw(rows: list[dict], name: str, folder: Path) -> None:
    """Time of a step against its peak of memory: ours as a curve of budgets, each of Unsloth's flags a point."""
    done = [row for row in rows if "step" in row]
    labels = {"Unsloth": "Unsloth's use_gradient_checkpointing", "ours": "memory_budget"}
    labels["ours, block"] = "memory_budget, layers compiled by compile_model"

    def paint(axes):
        for name in sorted({row["side"] for row in done}):
            found = [row for row in done if row["side"] == name]
            points = sorted((row["peak_gib"], row["step"]["p50"], row["setting"]) for row in found)
            ours = name != "Unsloth"
            axes.plot(
                *zip(*(point[:2] for point in points), strict=True), "o-" if ours else "s",
                color="tab:blue" if not ours else "tab:red" if "block" in name else "tab:orange",
                label=labels[name],
            )  # fmt: skip
            for gib, ms, setting in points:
                axes.annotate(setting, (gib, ms), fontsize=8, xytext=(5, 5), textcoords="offset points")
        axes.margins(0.1)
        axes.set(xlabel="peak GiB of a step", ylabel="ms a step", xlim=(0, None))
        axes.legend(frameon=False)

    plots.draw(folder, name, paint)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokenizer", type=Path, help="a folder with the Llama 3 tokenizer (128256 tokens)")
    parser.add_argument("--architecture", default="llama-3.1-8b", choices=BUDGETS)
    parser.add_argument(
        "--folder", type=Path, help="the checkpoint in 4 bit; made there if it is missing (a temporary folder)"
    )
    parser.add_argument("--layers", type=int, help="keep only so many layers (nothing is claimed then)")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--warm-up", type=int, default=4)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--budgets", nargs="*", help="instead of the usual ones")
    parser.add_argument("--flags", nargs="*", choices=FLAGS, default=FLAGS, help="instead of all three")
    parser.add_argument("--ours", nargs="*", choices=("ours", "ours, block"), default=["ours", "ours, block"])
    parser.add_argument("--limit", type=int, default=300, help="seconds after which a side is given up")
    parser.add_argument("--quick", action="store_true", help="tiny, plain transformers, any machine; nothing recorded")
    parser.add_argument("--draw", action="store_true", help="nothing is measured: draw what is recorded")
    parser.add_argument("--side", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.architecture, args.flags, args.batch, args.length, args.warm_up, args.steps = "toy", [], 2, 48, 1, 3
    if args.side:
        side(args.side[0], Path(args.side[1]), args)
        return 0
    short = args.architecture.replace("llama-3.1-", "").replace("llama-3.2-", "")
    name = f"memory_budget_{short}" + (f"_{args.layers}_layers" if args.layers else "")
    if args.draw:
        draw(json.loads((record.DATA / f"{name}.json").read_text())["rows"], name, record.DATA)
        return 0
    import torch

    if not args.quick and (not torch.cuda.is_available() or args.tokenizer is None):
        print("bench_memory_budget: needs a CUDA card and --tokenizer (or --quick), left out")
        return 0
    rows = []

    def keep(row):
        rows.append(
            {"architecture": args.architecture, "layers": args.layers, "tokens": args.batch * args.length} | row
        )
        print(rows[-1], flush=True)
        if not args.quick:
            record.write(name, rows, claims_of(rows, args))

    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        if not (folder / "config.json").exists():
            if args.quick:
                checkpoints.build("toy", folder)
            else:
                config = checkpoints.config_of(args.architecture, args.layers)
                checkpoints.build_nf4(config, folder, args.tokenizer)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        names = [*args.ours[:1], *(f"Unsloth: {flag}" for flag in args.flags), *args.ours[1:]]
        sides = [Process(one, folder, args) for one in names]
        try:
            for one in sides:
                one.run(keep)
        finally:
            for one in sides:
                one.end()
    if not args.quick:
        draw(rows, name, Path(os.environ.get("UNSLOTH_EXT_BENCH_DATA", record.DATA)))
    losses = [row["loss"] for row in rows if "loss" in row]
    apart = losses and max(losses) - min(losses) > 5e-3  # of about 12; the sides round in different places
    for text, wrong in (("more than the budget", over(rows)), ("first losses differ", apart and losses)):
        if wrong:
            print(f"bench_memory_budget: {text}: {wrong}")
    return 1 if over(rows) or apart or any("error" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
