"""What a QLoRA step costs on several cards, and what each of them holds: one card, DDP, Unsloth's FSDP2, accelerate's, ours.

    python benchmarks/bench_fsdp2.py --nproc 2 --tokenizer FOLDER      # 8B, every side in turn, each under torchrun
    python benchmarks/bench_fsdp2.py --nproc 4 --architecture llama-3.1-70b --checkpointing unsloth --sides ours upstream-sharded
    python benchmarks/bench_fsdp2.py --nproc 4 --architecture llama-3.1-70b --checkpointing unsloth --sides ours --cap-gib 22.35
    python benchmarks/bench_fsdp2.py --nproc 4 --architecture llama-3.1-405b --checkpointing true --sides ours-sliced --steps 1
    python benchmarks/bench_fsdp2.py --nproc 2 --tiny --cpu            # that it runs: a toy model on gloo, no figures

A Llama-shaped NF4 checkpoint with random weights, LoRA of rank 16 on all seven projections, fused AdamW, bf16 autocast, one loop for
all sides, the same tokens (the standard library's sources, with --tokenizer) in the same global batch. One card sees a rank's rows
at a time and accumulates, so that its products have the same shapes. Sides with Unsloth's model have unsloth_ext's other parts in,
all alike. "held" is what is allocated after a step, held_*_mib what of it is known (other: the rest), "load peak" the most while the
model is made ready. All figures are of the rank with the largest. Rows are written after each side; those of earlier calls of the same
case on the same machine and commit stay beside them. With --together all sides load and take their first step at once, and then train
one after another: load_s, first_step_s and the time that --limit limits then have the other sides in them.
"""

import argparse
import contextlib
import fcntl
import gc
import json
import math
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import launch

SIDES = {
    "one": "1 card",
    "ddp": "DDP",
    "upstream-auto": "Unsloth's FSDP2, its own choice",
    "upstream-sharded": "Unsloth's FSDP2, sharded",
    "accelerate": "accelerate's FSDP2, plain transformers and peft",
    "ours": "UNSLOTH_EXT_FSDP2=1, Unsloth's model read in slices",
    "ours-lean": "the same, nothing kept gathered (residency=0)",
    "ours-collective": "the same, gathered by NCCL (gather=collective)",
    "ours-sliced": "unsloth_ext's load and shard, plain transformers and peft",
    "ours-whole": "unsloth_ext's shard, on Unsloth's model loaded whole",
}
SWITCHED = {  # UNSLOTH_EXT_FSDP2 of these sides
    "ours": "residency={residency}",
    "ours-lean": "residency=0",
    "ours-collective": "residency={residency},gather=collective",
}
UPSTREAM = ("upstream-auto", "upstream-sharded")
PLAIN = ("accelerate", "ours-sliced")  # without Unsloth
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES = {
    ("llama-3.1-8b", 2): "8b_x2",
    ("llama-3.1-70b", 4): "70b_x4",
    ("llama-3.1-405b", 2): "405b",
    ("llama-3.1-405b", 4): "405b",
    ("llama-3.1-405b", 8): "405b",
}


# -- one side, in each rank --------------------------------------------------------------------------------------------------


def lora(model, args, unsloth: bool):
    import torch

    torch.manual_seed(3407)
    if unsloth:
        from unsloth import FastLanguageModel

        checkpointing = {"true": True, None: False}.get(args.checkpointing, args.checkpointing)
        return FastLanguageModel.get_peft_model(
            model, r=16, lora_alpha=16, target_modules=TARGETS, use_gradient_checkpointing=checkpointing,
            random_state=3407,
        )  # fmt: skip
    from peft import LoraConfig, get_peft_model

    if args.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    return get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM"))


def loaded(args, device, unsloth: bool):
    """By Unsloth, else by transformers: whole on every rank, or in slices where the switch is on."""
    import torch

    if unsloth:
        from unsloth import FastLanguageModel

        model, _ = FastLanguageModel.from_pretrained(
            args.checkpoint, max_seq_length=args.length, load_in_4bit=True, dtype=torch.bfloat16
        )
        return model
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(args.checkpoint, dtype=args.dtype, device_map={"": device})


def optimizer_of(model):
    import torch

    # As transformers' Trainer has it. Its default form would take each DTensor by itself, 0.1 s a step of the host's time.
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)


def by_accelerate(args, device):
    """(model, optimizer). Packed bytes are stored as bfloat16: it leaves uint8 whole on every rank."""
    import torch
    from accelerate import Accelerator, FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
    )
    model = lora(loaded(args, device, False), args, False).train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)  # it wants one dtype
    return Accelerator(mixed_precision="bf16", fsdp_plugin=plugin).prepare(model, optimizer_of(model))


def prepare(side, args, device):
    """(model, what to be inside of for a step)"""
    nothing = contextlib.nullcontext
    if side in SWITCHED:
        from unsloth_ext.fsdp2.trainer import shard_for_trainer

        # What the switch does at the start of a Trainer.
        return shard_for_trainer(lora(loaded(args, device, args.unsloth), args, args.unsloth).train()), nothing
    if side == "ours-sliced":
        from unsloth_ext.fsdp2 import load, shard

        model = load(args.checkpoint, dtype=args.dtype, attn_implementation="sdpa")
        return shard(lora(model, args, False).train(), residency=args.residency), nothing
    model = lora(loaded(args, device, args.unsloth), args, args.unsloth).train()
    if side == "ddp":
        from torch.nn.parallel import DistributedDataParallel

        return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None), nothing
    if side in UPSTREAM:
        from unsloth.models.fsdp2_native import FSDP2Config, shard_model

        choice = {} if side == "upstream-auto" else {"fit_layout": False}
        return shard_model(model, FSDP2Config(**choice)) or model, nothing
    if side == "ours-whole":
        from unsloth_ext.fsdp2 import gathered, shard

        model = shard(model, residency=args.residency)
        # Unsloth's loss reads the head's weight without calling the head.
        return model, lambda: gathered(model.get_output_embeddings())
    return model, nothing


def take_turn(turns: str, side: str, rank: int):
    """turns: number of sides:folder. Wait until all are ready, then for those before. What is returned ends the turn when it is closed."""
    sides, _, folder = turns.partition(":")
    folder, sides = Path(folder), int(sides)
    begun = folder / f"{side}.begun"
    if rank:
        while not begun.exists():  # not in a collective, which would be at work on the card meanwhile
            time.sleep(0.05)
        return None
    (folder / f"{side}.ready").touch()
    while len(list(folder.glob("*.ready"))) < sides:
        time.sleep(0.1)
    turn = open(folder / "turn", "w")
    fcntl.flock(turn, fcntl.LOCK_EX)
    begun.touch()
    return turn


def measure(side, args) -> None:
    """Runs in each rank; rank 0 writes the row to args.row."""
    import torch

    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu") if args.cpu else torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    args.dtype = torch.float32 if args.cpu else torch.bfloat16
    if not args.cpu:
        torch.cuda.set_device(device)
        if args.cap_gib:
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, args.cap_gib * 2**30 / total))
    if args.unsloth and side not in PLAIN:
        import unsloth_ext  # isort: skip
        import unsloth  # noqa: F401
    elif side in SWITCHED:
        import unsloth_ext  # noqa: F401
    import torch.distributed as dist

    if world > 1:
        dist.init_process_group("gloo" if args.cpu else "nccl", device_id=None if args.cpu else device)

    def allocated(most=False):
        if args.cpu:
            return 0.0
        return (torch.cuda.max_memory_allocated() if most else torch.cuda.memory_allocated()) / 2**30

    start = time.perf_counter()
    if side == "accelerate":
        (model, optimizer), during = by_accelerate(args, device), contextlib.nullcontext
    else:
        model, during = prepare(side, args, device)
        optimizer = optimizer_of(model)
        if side in SWITCHED:
            from unsloth_ext.fsdp2.optimizers import step_quickly

            step_quickly(optimizer)  # as the switch does
    gc.collect()
    load_peak, seconds = allocated(most=True), time.perf_counter() - start
    if not args.cpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    # [steps, ranks, rows a rank, length]; one card has all of them, others their own.
    tokens = torch.load(args.tokens)[: args.steps, : args.batch, : args.length]
    tokens = tokens.reshape(args.steps, args.shares, args.batch // args.shares, args.length)
    tokens = (tokens if world == 1 else tokens[:, rank : rank + 1]).to(device)
    options = {} if args.unsloth and side not in PLAIN else {"use_cache": False}
    losses, times, turn = [], [], None
    for number, shares in enumerate(tokens):
        if number == 1 and args.turns:  # the first step has compiled
            turn = take_turn(args.turns, side, rank)
            if world > 1:
                dist.barrier()
        before = time.perf_counter()
        value = torch.zeros((), device=device)
        for rows in shares:
            with during():
                with torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == torch.bfloat16):
                    loss = model(input_ids=rows, labels=rows, **options).loss / len(shares)
                loss.backward()
            value += loss.detach().float()
        optimizer.step()
        optimizer.zero_grad()
        if world > 1:
            dist.all_reduce(value)  # also waits for the slowest
        losses.append(value.item() / world)
        times.append(time.perf_counter() - before)
    del loss, value
    if turn is not None:
        turn.close()
    figures = {"peak_gib": allocated(most=True), "held_gib": allocated(), "load_peak_gib": load_peak, "load_s": seconds}
    if side.startswith("ours"):
        from unsloth_ext.fsdp2.held import bytes_held, parts_held

        held = bytes_held(model)
        figures |= {f"{kind}_gib": size / 2**30 for kind, size in held.items()}
        figures["quant_state_bytes"] = held["quant_state"]
        figures |= {f"held_{name}_mib": size / 2**20 for name, size in parts_held(model, optimizer).items()}
        figures["held_tokens_mib"] = tokens.untyped_storage().nbytes() / 2**20  # the benchmark's own
        if not args.cpu:
            torch._C._cuda_clearCublasWorkspaces()
            figures["held_cublas_mib"] = (figures["held_gib"] - allocated()) * 1024
            named = sum(size for name, size in figures.items() if name.startswith("held_") and name != "held_gib")
            figures["held_other_mib"] = figures["held_gib"] * 1024 - named
    everyone = [figures]
    if world > 1:
        everyone = [None] * world
        dist.all_gather_object(everyone, figures)
    if rank == 0:
        worst = {name: round(max(one[name] for one in everyone), 4) for name in figures}
        row = {"side": side, "ranks": world, "losses": [round(x, 5) for x in losses], "step_s": times} | worst
        Path(args.row).write_text(json.dumps(row))
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


# -- what all sides read -----------------------------------------------------------------------------------------------------


def make_checkpoint(args, folder: Path) -> None:
    """In NF4, unless it is there; for accelerate a second one whose packed bytes are stored as bfloat16."""
    import checkpoints
    import torch

    name = "toy" if args.tiny else args.architecture
    args.checkpoint, args.checkpoint_bf16 = str(folder / "nf4"), str(folder / "nf4_bf16")
    wanted = {args.checkpoint: torch.uint8} | (
        {args.checkpoint_bf16: torch.bfloat16} if "accelerate" in args.sides else {}
    )
    for path, storage in wanted.items():
        if not Path(path, "config.json").exists():
            start = time.perf_counter()
            checkpoints.build_nf4(
                checkpoints.config_of(name, args.layers), Path(path), args.tokenizer, distinct=args.distinct,
                dtype=torch.float32 if args.cpu else torch.bfloat16, storage=storage,
            )  # fmt: skip
            print(f"{path}: written in {time.perf_counter() - start:.1f} s", flush=True)


def make_tokens(args, folder: Path) -> None:
    """int64 [steps, batch, length] of the standard library's sources, or at random without a tokenizer."""
    import torch

    if args.tokenizer and not args.tiny:
        from bench_loss_training import batches

        tokens = batches(args.tokenizer, args.steps, args.batch, args.length)
    else:
        vocabulary = 512 if args.tiny else 128000
        draw = torch.Generator().manual_seed(7)
        tokens = torch.randint(0, vocabulary, (args.steps, args.batch, args.length), generator=draw)
    args.tokens = str(folder / f"tokens-{os.getpid()}.pt")
    torch.save(tokens, args.tokens)


# -- all sides in turn -------------------------------------------------------------------------------------------------------


def run_side(side, args, folder: Path) -> dict:
    """The row of one side; one that has "failed" says why there are no figures."""
    checkpoint = args.checkpoint_bf16 if side == "accelerate" else args.checkpoint
    options = ["--worker", side, "--checkpoint", checkpoint, "--tokens", args.tokens, "--shares", str(args.nproc)]
    for name in ("steps", "batch", "length", "residency", "checkpointing", "cap_gib", "turns"):
        if (value := getattr(args, name)) is not None:
            options += [f"--{name.replace('_', '-')}", str(value)]
    options += [flag for flag, on in (("--cpu", args.cpu), ("--unsloth", args.unsloth)) if on]
    switches = {"UNSLOTH_FSDP2": "1" if side in UPSTREAM else None, "UNSLOTH_EXT_FSDP2": None}
    if side in SWITCHED:
        switches["UNSLOTH_EXT_FSDP2"] = SWITCHED[side].format(residency=args.residency)
    name = f"fsdp2_{args.case}_{side}{'_capped' if args.cap_gib else ''}"
    found = launch.run(
        str(Path(__file__)), options, folder / f"{name}-{os.getpid()}.json", 1 if side == "one" else args.nproc, args.limit,
        cpu=args.cpu, log=name, **switches,
    )  # fmt: skip
    (folder / f"{side}.ready").touch()  # where it failed, nobody waits for it
    return found if isinstance(found, dict) else {"side": side, "failed": found}


def summary(row: dict, args, record) -> dict:
    """The row as it is recorded: the case, and percentiles of the steps after the warm-up."""
    row |= {"name": SIDES[row["side"]], "cap_gib": args.cap_gib, "loaded_together": args.together}
    if "failed" in row:
        return row
    steps, tokens = row.pop("step_s"), args.batch * args.length
    row["first_step_s"] = round(steps[0], 3)
    if len(steps) - args.warmup >= 3:
        rate = [tokens / s for s in steps[args.warmup :]]
        row |= {"unit": "tokens/s", "tokens_s": record.percentiles(rate, 1)}
    if row["side"].startswith("ours"):
        row["quant_state_share"] = round(row.pop("quant_state_bytes") / args.quant_state_bytes, 6)
        row["load_ideal_gib"] = round(
            sum(row[f"{kind}_gib"] for kind in ("packed", "quant_state", "frozen", "trainable")) + args.largest_gib, 4
        )
    return row


def claims(rows: list[dict], case: str, record) -> list[dict]:
    """What the rows of one case say of our targets, as far as they are there. Ours is the switch with Unsloth's model, the path
    that README gives; where it has no figures, `load` and `shard` by hand, and the claim says so."""
    free = {row["side"]: row for row in rows if not row["cap_gib"] and "failed" not in row}
    capped = [row for row in rows if row["cap_gib"] and row["cap_gib"] <= 24 and row["side"].startswith("ours")]
    best = max(capped, key=_finite, default=None)
    # Where there is no run without a cap, the one that has it harder.
    ours = free.get("ours") or free.get("ours-sliced")
    if not ours and best and _finite(best):
        ours = {**best, "name": f"{best['name']}, at most {best['cap_gib']} GiB a rank"}
    found = []

    def claim(name, value, unit, target, baseline):
        found.append(record.claim(f"fsdp2.{name}", value, unit, target, baseline))

    def against(name, side, target):
        if side in free and "tokens_s" in ours and "tokens_s" in free[side]:
            ratio = round(ours["tokens_s"]["p50"] / free[side]["tokens_s"]["p50"], 4)
            claim(f"{case}.{name}", ratio, "x", target, f"{SIDES[side]}, same run; ours: {ours['name']}")

    if case == "405b":
        done = [row for row in rows if row["side"].startswith("ours")]
        if done:
            layers = max(row.get("layers", 0) for row in done)
            trained = any(_finite(row) for row in done)
            ranks, distinct = (max(row.get(name) or 0 for row in done) for name in ("ranks", "distinct_layers"))
            repeated = f", the weights of {distinct} in turn" if distinct < layers else ""
            claim(
                "405b.step",
                int(trained),
                "",
                ">= 1",
                f"read in slices by {ranks} ranks, one step, {layers} layers{repeated}",
            )
        return found
    if case == "70b_x4" and capped:
        said = f"each rank may allocate {best['cap_gib']} GiB; ours: {best['name']}"
        claim("70b_x4.trains_under_24gb", int(_finite(best)), "", ">= 1", said)
    if not ours:
        return found
    said = f"a rank's part and the largest layer, {ours['load_ideal_gib']:.2f} GiB; ours: {ours['name']}"
    claim(
        f"{case}.load_peak_over_ideal", round(ours["load_peak_gib"] / ours["load_ideal_gib"], 4), "x", "<= 1.15", said
    )
    if case == "70b_x4":
        against("tokens_vs_upstream", "upstream-sharded", ">= 1.0")
    else:
        against("tokens_vs_ddp", "ddp", ">= 0.98")
        said = f"3.30, Unsloth's FSDP2 sharded; ours: {ours['name']}"
        claim("8b_x2.held_gib", ours["held_gib"], "GiB", "<= 2.95", said)
        share = max(row["quant_state_share"] for row in free.values() if row["side"].startswith("ours"))
        said = "1/N of absmax, nested absmax and offsets; the largest rank's share x N"
        claim("quant_state_share", round(share * ours["ranks"], 4), "/N", "<= 1.01", said)
        if "one" in free and len(free["one"]["losses"]) == len(ours["losses"]):
            worst = round(launch.apart(ours["losses"], free["one"]["losses"]), 6)
            claim("8b_x2.loss_difference", worst, "", "<= 0.001", "one card, same tokens, rows at a time alike")
    return found


def _finite(row: dict) -> bool:
    return bool(row.get("losses")) and all(map(math.isfinite, row["losses"]))


def flush(row: dict, args, record) -> None:
    """Add a row to the record, beside those of other sides of the same case, and claim anew from all of them."""
    keys = ("architecture", "nproc", "batch", "length", "checkpointing", "residency")
    row["case"] = {key: getattr(args, key) for key in keys}
    row["layers"], row["distinct_layers"] = args.config.num_hidden_layers, getattr(args.config, "distinct_layers", None)
    folder = Path(os.environ.get("UNSLOTH_EXT_BENCH_DATA", record.DATA))
    facts = record.environment()
    with open(Path(tempfile.gettempdir(), f"{args.record}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one card may measure beside two
        try:
            before = json.loads((folder / f"{args.record}.json").read_text())
        except (OSError, ValueError):
            before = {"environment": {}, "rows": []}
        same = {**before["environment"], "date": ""} == {**facts, "date": ""}
        rows = [
            old for old in before["rows"]
            if same and old.get("case") == row["case"] and (old["side"], old["cap_gib"]) != (row["side"], row["cap_gib"])
        ] + [row]  # fmt: skip
        one = next((r for r in rows if r["side"] == "one" and "losses" in r), None)
        for other in rows:
            if one and len(other.get("losses", ())) == len(one["losses"]):
                other["loss_vs_one"] = round(launch.apart(other["losses"], one["losses"]), 6)
        made = claims(rows, args.case, record) if args.claimed else []
        record.write(args.record, rows, made, facts)


def parse():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--nproc", type=int, default=2, help="ranks")
    parser.add_argument("--architecture", default="llama-3.1-8b")
    parser.add_argument("--layers", type=int, help="keep only so many layers")
    parser.add_argument(
        "--distinct", type=int, help="so many different layers, then the same again (all of 8B, else 4)"
    )
    parser.add_argument(
        "--tokenizer", type=Path, help="a folder with the Llama 3 tokenizer, which Unsloth's loader wants"
    )
    parser.add_argument("--folder", type=Path, help="keep the checkpoint here, and use one that is there")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--batch", type=int, default=4, help="sequences in the global batch")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--checkpointing", choices=["unsloth", "true"], help="activation checkpointing")
    parser.add_argument("--residency", default="auto", help="bytes, auto or all")
    parser.add_argument("--cap-gib", type=float, help="what a rank may allocate of its card")
    parser.add_argument("--limit", type=int, default=300, help="seconds a side")
    parser.add_argument("--together", action="store_true", help="load all sides at once, then measure one by one")
    parser.add_argument("--tiny", action="store_true", help="a toy model")
    parser.add_argument("--cpu", action="store_true", help="on gloo, without Unsloth")
    parser.add_argument("--record", help="name of the file in benchmarks/data (fsdp2_<case>)")
    for hidden in ("--worker", "--row", "--checkpoint", "--tokens", "--turns"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--unsloth", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--shares", type=int, default=1, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    args = parse()
    if args.worker:
        args.residency = args.residency if args.residency in ("auto", "all") else int(args.residency)
        measure(args.worker, args)
        return 0
    import record
    import torch

    if args.batch % args.nproc:
        print(f"bench_fsdp2: --batch {args.batch} must be a multiple of --nproc {args.nproc}")
        return 2
    cards = 1 if args.sides == ["one"] else args.nproc
    if not args.cpu and torch.cuda.device_count() < cards:
        print(f"bench_fsdp2: needs {cards} CUDA cards, {torch.cuda.device_count()} found, left out")
        return 0
    args.unsloth = not args.cpu
    if args.tiny:
        args.length = min(args.length, 32)
    if args.distinct is None and args.architecture not in ("llama-3.2-1b", "llama-3.1-8b"):
        args.distinct = 4
    args.case = CASES.get((args.architecture, args.nproc), f"{args.architecture}_x{args.nproc}")
    args.claimed = args.case in CASES.values() and not args.layers and not args.tiny
    args.record = args.record or f"fsdp2_{args.case}"
    failed = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        make_checkpoint(args, folder)
        make_tokens(args, Path(scratch))
        import checkpoints
        from transformers import AutoConfig

        args.config = AutoConfig.from_pretrained(args.checkpoint)
        args.largest_gib = args.config.vocab_size * args.config.hidden_size * 2 / 2**30
        args.quant_state_bytes = checkpoints.quant_state_bytes(Path(args.checkpoint))
        gc.collect()
        if not args.cpu:
            torch.cuda.empty_cache()
        sides = [side for side in args.sides if not args.cpu or (side not in UPSTREAM and side != "accelerate")]
        if left := [SIDES[side] for side in args.sides if side not in sides]:
            print(f"left out, needs CUDA: {'; '.join(left)}", flush=True)
        args.turns = f"{len(sides)}:{scratch}" if args.together else None

        def run(side):
            start = time.perf_counter()
            return side, summary(run_side(side, args, Path(scratch)), args, record), time.perf_counter() - start

        with ThreadPoolExecutor(len(sides) if args.together else 1) as pool:
            for side, row, seconds in pool.map(run, sides):
                if "failed" in row:
                    failed.append(side)
                    print(f"{SIDES[side]}: no figures after {seconds:.0f} s: {row['failed']}", flush=True)
                else:
                    shown = {k: v for k, v in row.items() if k not in ("losses", "name", "side")}
                    print(
                        f"{SIDES[side]}: {shown} loss {row['losses'][0]} -> {row['losses'][-1]}, {seconds:.0f} s",
                        flush=True,
                    )
                if not args.tiny:
                    flush(row, args, record)
    return 1 if any(side.startswith("ours") for side in failed) else 0


if __name__ == "__main__":
    sys.exit(main())
