"""What a pipeline-parallel QLoRA step costs: 1F1B, interleaved 1F1B and zero bubble, beside DDP and our FSDP2.

    python benchmarks/bench_pipeline.py --nproc 2                                  # 8B, every side in turn, each under torchrun
    python benchmarks/bench_pipeline.py --nproc 2 --compiled                       # each layer compiled, on every side
    python benchmarks/bench_pipeline.py --nproc 4 --architecture llama-3.1-70b --checkpointing
    python benchmarks/bench_pipeline.py --simulate                                 # no card: bubbles from counts of operations
    python benchmarks/bench_pipeline.py --nproc 2 --tiny --cpu                     # that it runs: a toy model on gloo, no figures

A Llama-shaped NF4 checkpoint of random weights (four different layers above 8B); LoRA of rank 16 on all seven projections, AdamW, plain
transformers and peft on all sides, the same tokens in the same global batch. Every side sees one row at a time: a pipeline as a
microbatch, the others by accumulation, so that activations are alike. Pipelines also time F, I and W of each of their stages alone
(forward; gradient of the input; the whole backward less I) and hand them to the simulator: what the step should take, and what
another schedule would make of the same stages. Messages go by copies, and in two sides by NCCL as torch has them. Figures are of the rank with the largest.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import launch

COLLECTIVE = "-collective"  # the same schedule with torch's messages
PIPELINES = {
    "1f1b": "pipeline, 1F1B",
    "interleaved-1f1b": "pipeline, interleaved 1F1B",
    "interleaved-zero-bubble": "pipeline, interleaved zero bubble (ZB1P)",
    "zbv": "pipeline, zero bubble in a V",
}
PIPELINES |= {f"{side}{COLLECTIVE}": f"{name}, messages by NCCL" for side, name in list(PIPELINES.items())[:2]}
SIDES = {"ddp": "DDP", "fsdp2": "unsloth_ext's FSDP2, loaded in slices", **PIPELINES}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK = 16


# -- one side, in each rank --------------------------------------------------------------------------------------------------


def lora_config():
    from peft import LoraConfig

    return LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS, task_type="CAUSAL_LM")


def prepare(side, args, device):
    """(step(batch of all ranks) -> loss, parameters, the pipeline or None)"""
    import torch
    import torch.distributed as dist

    if args.compiled:
        from unsloth_ext.compiling import compile_model
    torch.manual_seed(3407)
    if side in PIPELINES:
        from unsloth_ext.fsdp2 import pipeline

        pipe = pipeline(
            args.checkpoint, lora=lora_config(), schedule=side.removesuffix(COLLECTIVE), microbatches=args.batch, dtype=args.dtype,
            messages="collective" if side.endswith(COLLECTIVE) else "auto",
            stages_per_rank=args.stages_per_rank if side.startswith("interleaved") else None,
            checkpointing=args.checkpointing, attn_implementation="sdpa",
        )  # fmt: skip
        if args.compiled:
            compile_model(pipe.model)
        return lambda batch: pipe.step(batch, batch), list(pipe.parameters()), pipe
    from peft import get_peft_model

    if side == "fsdp2":
        from unsloth_ext.fsdp2 import accumulate, load, shard

        model = load(args.checkpoint, dtype=args.dtype, attn_implementation="sdpa")
    else:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(
            args.checkpoint, dtype=args.dtype, device_map={"": device}, attn_implementation="sdpa"
        )
    model = get_peft_model(model, lora_config()).train()
    if args.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if args.compiled:
        compile_model(model)
    if side == "fsdp2":
        model = shard(model)
    else:
        from torch.nn.parallel import DistributedDataParallel

        model = DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)
    rank, world = dist.get_rank(), dist.get_world_size()

    def step(batch):
        mine, total = batch[rank * len(batch) // world : (rank + 1) * len(batch) // world], 0.0
        for i, row in enumerate(mine.split(1)):
            last = i == len(mine) - 1
            if side == "fsdp2":
                accumulate(model, last)
            else:
                model.require_backward_grad_sync = last
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=args.dtype == torch.bfloat16):
                loss = model(input_ids=row, labels=row, use_cache=False).loss / len(mine)
            loss.backward()
            total = total + loss.detach().float()
        dist.all_reduce(total)
        return total / world

    return step, [p for p in model.parameters() if p.requires_grad], None


def stage_times(pipe, args, device, repeats=5) -> dict[int, tuple[float, float, float]]:
    """{stage: seconds of F, I, W for one microbatch} of this rank's stages, each alone, medians."""
    import torch

    found = {}
    hidden, items = pipe.model.config.hidden_size, torch.ones((), device=device)

    def now():
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    for number, stage in pipe.stages.items():
        ids = torch.randint(0, args.vocabulary, (1, args.length), device=device)
        times = {"F": [], "I": [], "B": []}
        for i in range(2 * repeats + 2):
            only_input = i % 2 and number > 0
            x = ids if number == 0 else torch.randn(1, args.length, hidden, device=device, dtype=stage.dtype)
            x = x if number == 0 else x.requires_grad_()
            start = now()
            out = stage(x)
            out = stage.loss(out, ids, items) if stage.head is not None else out
            middle = now()
            gradient = torch.ones_like(out)
            if only_input:
                torch.autograd.grad(out, x, gradient)
            else:
                out.backward(gradient)
            end = now()
            if i >= 2:
                times["F"].append(middle - start)
                times["I" if only_input else "B"].append(end - middle)
        forward, backward = statistics.median(times["F"]), statistics.median(times["B"])
        # Nobody waits for a gradient of token ids: torch leaves the whole backward of stage 0 to W.
        first = statistics.median(times["I"]) if number else 0.0
        found[number] = (forward, min(first, backward), max(backward - first, 0.0))
    for parameter in pipe.parameters():
        parameter.grad = None
    return found


def measure(side, args) -> None:
    """Runs in each rank; rank 0 writes the row to args.row."""
    import torch
    import torch.distributed as dist

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cpu") if args.cpu else torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    args.dtype = torch.float32 if args.cpu else torch.bfloat16
    if not args.cpu:
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if args.cpu else "cpu:gloo,cuda:nccl", device_id=None if args.cpu else device)

    def allocated(most=False):
        if args.cpu:
            return 0.0
        return (torch.cuda.max_memory_allocated() if most else torch.cuda.memory_allocated()) / 2**30

    start = time.perf_counter()
    step, parameters, pipe = prepare(side, args, device)
    figures = {"load_s": time.perf_counter() - start, "load_peak_gib": allocated(most=True)}
    if not args.cpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    generator = torch.Generator().manual_seed(7)
    losses, times = [], []
    for _ in range(args.steps):
        batch = torch.randint(0, args.vocabulary, (args.batch, args.length), generator=generator).to(device)
        before = time.perf_counter()
        loss = step(batch)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        dist.barrier()  # the slowest
        times.append(time.perf_counter() - before)
    figures |= {"held_gib": allocated(), "peak_gib": allocated(most=True)}
    everyone, stages = [None] * world, [None] * world
    dist.all_gather_object(everyone, figures)
    dist.all_gather_object(stages, stage_times(pipe, args, device) if pipe else {})
    if rank == 0:
        row = {"side": side, "ranks": world, "losses": [round(x, 5) for x in losses], "step_s": times[args.warmup :]}
        row |= {name: round(max(one[name] for one in everyone), 4) for name in figures}
        if pipe:
            row["cut"] = [len(span) for span in pipe.cut]
            row["stage_ms"] = [
                [round(1e3 * x, 4) for x in t]
                for _, t in sorted({k: v for found in stages for k, v in found.items()}.items())
            ]
        Path(args.row).write_text(json.dumps(row))
    dist.barrier()
    dist.destroy_process_group()


# -- what the simulator says -------------------------------------------------------------------------------------------------


def predicted(side: str, ranks: int, microbatches: int, stage_costs: list) -> dict:
    from unsloth_ext.fsdp2.pipeline_schedules import actions, simulate

    found = simulate(
        actions(side.removesuffix(COLLECTIVE), ranks, len(stage_costs) // ranks, microbatches),
        *(list(x) for x in zip(*stage_costs, strict=True)),
    )
    return {"time": found.time, "bubble": round(found.bubble, 4), "in_flight": found.in_flight}


def counted(config, ranks, stages_per_rank, v_shaped, length, checkpointing):
    """[(F, I, W) of each stage], in operations a token, for the cut that `pipeline` makes."""
    from unsloth_ext.fsdp2.pipeline_cut import cut_layers, head_in_layers
    from unsloth_ext.fsdp2.pipeline_schedules import costs

    forward, backward_input, weight, head = costs(config, RANK, length, checkpointing)
    cut = cut_layers(config.num_hidden_layers, ranks, stages_per_rank, head_in_layers(config), v_shaped)
    found = [(n * forward, n * backward_input, n * weight) for n in cut]
    found[-1] = (found[-1][0] + head, found[-1][1] + head, found[-1][2])
    found[0] = (found[0][0], 0.0, found[0][1] + found[0][2])  # see stage_times
    return found


def simulate_all(args, record) -> None:
    """Bubbles with every linear at the same speed, messages free. Zero bubble's gain is an upper bound: its split costs nothing here."""
    from checkpoints import config_of

    rows = []
    for architecture, ranks in (("llama-3.1-8b", 2), ("llama-3.1-8b", 4), ("llama-3.1-70b", 4), ("llama-3.1-70b", 8)):
        config = config_of(architecture)
        for microbatches in (ranks, 8, 16):
            if any(
                r["architecture"] == architecture and (r["ranks"], r["microbatches"]) == (ranks, microbatches)
                for r in rows
            ):
                continue
            row = {"architecture": architecture, "ranks": ranks, "microbatches": microbatches, "length": args.length}
            for side, stages in (("1f1b", 1), ("interleaved-1f1b", 2), ("interleaved-1f1b", 4), ("interleaved-zero-bubble", 1),
                                 ("interleaved-zero-bubble", 2), ("zbv", 2)):  # fmt: skip
                costs = counted(config, ranks, stages, side == "zbv", args.length, args.checkpointing)
                found = predicted(side, ranks, microbatches, costs)
                row[f"{side}-{stages}"] = {
                    "bubble": found["bubble"],
                    "time": found["time"],
                    "in_flight": max(found["in_flight"]),
                }
            forward, backward_input, weight = (sum(x) for x in zip(*costs, strict=True))
            best = min(row["interleaved-zero-bubble-2"]["time"], row["zbv-2"]["time"])
            row["zero_bubble_gain"] = round(row["interleaved-1f1b-2"]["time"] / best, 4)
            row["interleaving_gain"] = round(row["1f1b-1"]["time"] / row["interleaved-1f1b-2"]["time"], 4)
            rows.append(row)
            print({k: (v["bubble"], v["in_flight"]) if isinstance(v, dict) else v for k, v in row.items()}, flush=True)
    for row in rows:
        for value in row.values():
            if isinstance(value, dict):
                del value["time"]
    worst = min(row["interleaving_gain"] for row in rows)
    most = max(row["zero_bubble_gain"] for row in rows if row["microbatches"] >= 2 * row["ranks"])
    record.write(
        "pipeline_simulated", rows,
        [
            record.claim("fsdp2.pipeline.simulated.interleaving_gain", worst, "x", ">= 1.0", "1F1B, one stage a rank, simulated"),
            record.claim(
                "fsdp2.pipeline.simulated.zero_bubble_gain", most, "x", "<= 1.03",
                "interleaved 1F1B, simulated, at least two microbatches a rank",
            ),
        ],
    )  # fmt: skip


# -- all sides in turn -------------------------------------------------------------------------------------------------------


def run_side(side, args, folder: Path) -> dict | str:
    """The row of one side, or why there is none."""
    worker = ["--worker", side, "--checkpoint", args.checkpoint]
    for name in ("steps", "warmup", "batch", "length", "vocabulary", "stages_per_rank"):
        worker += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    flags = ("checkpointing", "compiled", "cpu")
    worker += [f"--{flag}" for flag in flags if getattr(args, flag)]
    row = folder / f"{side}-{os.getpid()}.json"
    return launch.run(str(Path(__file__)), worker, row, args.nproc, args.limit, cpu=args.cpu, log=f"pipeline_{side}")


def summary(row: dict, args, record) -> dict:
    steps = row.pop("step_s")
    tokens = args.batch * args.length
    row |= {
        "name": SIDES[row["side"]],
        "unit": "tokens/s",
        "tokens_s": record.percentiles([tokens / s for s in steps], 1),
    }
    if "stage_ms" in row:
        ranks, stage_ms = row["ranks"], row["stage_ms"]
        row["simulated"] = predicted(row["side"], ranks, args.batch, stage_ms)
        row["simulated"]["tokens_s"] = round(1e3 * tokens / row["simulated"].pop("time"), 1)
        if (
            len(stage_ms) == 2 * ranks and row["side"] != "zbv"
        ):  # the same stages under the other schedules of two a rank
            row["other_schedules"] = {
                side: round(1e3 * tokens / predicted(side, ranks, args.batch, stage_ms)["time"], 1)
                for side in ("interleaved-1f1b", "interleaved-zero-bubble")
            }
        head_free = (
            statistics.median(sum(ms) / n for ms, n in list(zip(stage_ms, row["cut"], strict=True))[1:-1] if n)
            if len(stage_ms) > 2
            else None
        )
        if head_free:
            row["head_in_layers"] = round((sum(stage_ms[-1]) - row["cut"][-1] * head_free) / head_free, 2)
        row["weight_share"] = round(sum(ms[2] for ms in stage_ms[1:]) / sum(sum(ms) for ms in stage_ms[1:]), 4)
    return row


def claims(rows: dict[str, dict], args, record) -> list[dict]:
    case, found = f"fsdp2.{args.record.replace('_', '.', 1)}", []
    rate = {side: row["tokens_s"]["p50"] for side, row in rows.items()}

    def claim(name, side, other, target, baseline):
        if side in rate and other in rate:
            found.append(record.claim(f"{case}.{name}", round(rate[side] / rate[other], 4), "x", target, baseline))

    claim("interleaved_vs_1f1b", "interleaved-1f1b", f"1f1b{COLLECTIVE}", ">= 1.0", "1F1B of torch, same run")
    claim("interleaved_vs_1f1b_by_copies", "interleaved-1f1b", "1f1b", ">= 1.0", "1F1B, its messages by copies too")
    claim("copies_vs_nccl", "interleaved-1f1b", f"interleaved-1f1b{COLLECTIVE}", ">= 1.0", "the same, messages by NCCL")
    for side in ("interleaved-zero-bubble", "zbv"):
        claim(f"interleaved_vs_{side}", "interleaved-1f1b", side, ">= 1.0", f"{PIPELINES[side]} in the same run")
    claim("tokens_vs_fsdp2", "interleaved-1f1b", "fsdp2", ">= 0.8", "our FSDP2 in the same run")
    claim("tokens_vs_ddp", "interleaved-1f1b", "ddp", ">= 0.75", "DDP in the same run")
    if len(rows) > 1:
        runs = [row["losses"] for row in rows.values()]
        worst = max(launch.apart(a, b) for a, b in itertools.combinations(runs, 2))
        found.append(record.claim(f"{case}.loss_difference", round(worst, 6), "", "<= 0.01", "all sides, same tokens"))
    return found


def parse():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--nproc", type=int, default=2, help="ranks")
    parser.add_argument("--architecture", default="llama-3.1-8b")
    parser.add_argument("--layers", type=int, help="keep only so many layers")
    parser.add_argument(
        "--distinct", type=int, help="so many different layers, then the same again (all of 8B, else 4)"
    )
    parser.add_argument("--folder", type=Path, help="keep the checkpoint here, and use one that is there")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--batch", type=int, default=8, help="sequences in the global batch, one a microbatch")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--stages-per-rank", type=int, default=2, help="of the interleaved schedules")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations layer by layer")
    parser.add_argument("--compiled", action="store_true", help="layers through compile_model, on every side")
    parser.add_argument("--limit", type=int, default=300, help="seconds a side")
    parser.add_argument("--simulate", action="store_true", help="only the simulator, from counts of operations")
    parser.add_argument("--tiny", action="store_true", help="a toy model")
    parser.add_argument("--cpu", action="store_true", help="on gloo")
    parser.add_argument("--record", help="name of the file in benchmarks/data (pipeline_<architecture>_x<nproc>)")
    for hidden in ("--worker", "--row", "--checkpoint"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--vocabulary", type=int, default=128000, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    args = parse()
    if args.worker:
        measure(args.worker, args)
        return 0
    import record

    if args.simulate:
        simulate_all(args, record)
        return 0
    import checkpoints
    import torch

    if args.batch % args.nproc:
        print(f"bench_pipeline: --batch {args.batch} must be a multiple of --nproc {args.nproc}")
        return 2
    if args.steps - args.warmup < 3:
        print(f"bench_pipeline: --steps {args.steps} must be at least 3 more than --warmup {args.warmup}")
        return 2
    if not args.cpu and torch.cuda.device_count() < args.nproc:
        print(f"bench_pipeline: needs {args.nproc} CUDA cards, {torch.cuda.device_count()} found, left out")
        return 0
    if args.tiny:
        args.length, args.vocabulary = min(args.length, 32), 512
    compiled = "_compiled" if args.compiled else ""
    args.record = args.record or f"pipeline_{args.architecture.split('-')[-1]}_x{args.nproc}{compiled}"
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch)
        checkpoint = folder / "nf4"
        args.checkpoint = str(checkpoint)
        if not (checkpoint / "config.json").exists():
            dtype = torch.float32 if args.cpu else torch.bfloat16
            config = checkpoints.config_of(
                "toy" if args.tiny else args.architecture, args.layers or (8 if args.tiny else None)
            )
            distinct = args.distinct or (None if args.tiny or args.architecture == "llama-3.1-8b" else 4)
            checkpoints.build_nf4(config, checkpoint, dtype=dtype, distinct=distinct)
            if not args.cpu:
                torch.cuda.empty_cache()
        rows, failures = {}, {}
        for side in args.sides:
            start = time.perf_counter()
            result = run_side(side, args, Path(scratch))
            print(f"{SIDES[side]}: {time.perf_counter() - start:.0f} s", flush=True)
            if isinstance(result, str):
                failures[side] = result
                print(f"{SIDES[side]}: no figures: {result}", flush=True)
                continue
            rows[side] = summary(result, args, record)
            shown = {k: v for k, v in rows[side].items() if k not in ("losses", "name", "side")}
            print(f"{SIDES[side]}: {shown} loss {rows[side]['losses'][0]} -> {rows[side]['losses'][-1]}", flush=True)
            if (
                not args.tiny and not args.layers
            ):  # the rows of sides that are done stay if a later one takes all else down
                record.write(args.record, [*rows.values()], claims(rows, args, record))
    if args.tiny or args.layers:
        print([claim for claim in claims(rows, args, record) if claim["id"].endswith("loss_difference")])
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
