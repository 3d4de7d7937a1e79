"""What a QLoRA step costs on several cards, and what each of them holds: one card, DDP, Unsloth's FSDP2, accelerate's, ours.

    python benchmarks/bench_fsdp2.py --nproc 2 --tokenizer FOLDER      # every side in turn, each under torchrun
    python benchmarks/bench_fsdp2.py --nproc 2 --tiny --cpu            # that it runs: a toy model on gloo, no figures

A Llama-shaped checkpoint with random weights in NF4, LoRA of rank 16 on all seven projections, AdamW, one loop for all sides, the
same tokens in the same global batch. "held" is what is allocated after a step, "load peak" the most while the model is made ready.
All figures are of the rank with the largest.
"""

import argparse
import contextlib
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SIDES = {
    "one": "1 card",
    "ddp": "DDP",
    "upstream-auto": "Unsloth's FSDP2, its own choice",
    "upstream-sharded": "Unsloth's FSDP2, sharded",
    "accelerate": "accelerate's FSDP2, plain transformers and peft",
    "ours": "unsloth_ext, on Unsloth's model loaded whole",
    "ours-sliced": "unsloth_ext, loaded in slices, plain transformers and peft",
}
NEEDS_UNSLOTH = {"upstream-auto", "upstream-sharded"}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


# -- one side, in each rank --------------------------------------------------------------------------------------------------


def lora(model, args, unsloth: bool):
    import torch

    torch.manual_seed(3407)
    if unsloth:
        from unsloth import FastLanguageModel

        return FastLanguageModel.get_peft_model(
            model, r=16, lora_alpha=16, target_modules=TARGETS, use_gradient_checkpointing=args.checkpointing or False,
            random_state=3407,
        )  # fmt: skip
    from peft import LoraConfig, get_peft_model

    if args.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    return get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM"))


def whole_model(args, device, storage=None):
    """By Unsloth where it is used, else by transformers; every rank has all of it."""
    import torch

    if args.unsloth and storage is None:
        from unsloth import FastLanguageModel

        model, _ = FastLanguageModel.from_pretrained(
            args.checkpoint, max_seq_length=args.length, load_in_4bit=True, dtype=torch.bfloat16
        )
        return model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options = {}
    if storage is not None:
        args.checkpoint = args.checkpoint_16bit
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=args.dtype, bnb_4bit_quant_storage=storage,
        )  # fmt: skip
    return AutoModelForCausalLM.from_pretrained(args.checkpoint, dtype=args.dtype, device_map={"": device}, **options)


def prepare(side, args, device):
    """(model, what to be inside of for a step)"""
    import torch

    nothing = contextlib.nullcontext
    if side == "ours-sliced":
        from unsloth_ext.fsdp2 import load, shard

        model = load(args.checkpoint, dtype=args.dtype, attn_implementation="sdpa")
        return shard(lora(model, args, False).train(), residency=args.residency), nothing
    if side == "accelerate":
        from accelerate import Accelerator, FullyShardedDataParallelPlugin

        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
        )
        model = lora(whole_model(args, device, storage=torch.bfloat16), args, False).train()
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)  # it wants one dtype
        return Accelerator(mixed_precision="bf16", fsdp_plugin=plugin).prepare(model), nothing
    model = lora(whole_model(args, device), args, args.unsloth).train()
    if side == "ddp":
        from torch.nn.parallel import DistributedDataParallel

        return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None), nothing
    if side in NEEDS_UNSLOTH:
        from unsloth.models.fsdp2_native import FSDP2Config, shard_model

        choice = {} if side == "upstream-auto" else {"fit_layout": False}
        return shard_model(model, FSDP2Config(**choice)) or model, nothing
    if side == "ours":
        from unsloth_ext.fsdp2 import gathered, shard

        model = shard(model, residency=args.residency)
        # Unsloth's loss reads the head's weight without calling the head.
        return model, lambda: gathered(model.get_output_embeddings())
    return model, nothing


def measure(side, args) -> None:
    """Runs in each rank; rank 0 writes the row to args.row."""
    import torch
    import torch.distributed as dist

    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu") if args.cpu else torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    args.dtype = torch.float32 if args.cpu else torch.bfloat16
    if not args.cpu:
        torch.cuda.set_device(device)
    if args.unsloth and side not in ("accelerate", "ours-sliced"):
        import unsloth_ext  # isort: skip  # noqa: F401
        import unsloth  # noqa: F401
    if world > 1:
        dist.init_process_group("gloo" if args.cpu else "nccl", device_id=None if args.cpu else device)

    def allocated(most=False):
        if args.cpu:
            return 0.0
        return (torch.cuda.max_memory_allocated() if most else torch.cuda.memory_allocated()) / 2**30

    start = time.perf_counter()
    model, during = prepare(side, args, device)
    gc.collect()
    loaded, seconds = allocated(most=True), time.perf_counter() - start
    if not args.cpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    tokens = torch.randint(
        0, args.vocabulary, (args.steps, args.batch, args.length), generator=torch.Generator().manual_seed(7)
    )
    mine = tokens.view(args.steps, world, args.batch // world, args.length)[:, rank].to(device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    losses, times = [], []
    for batch in mine:
        before = time.perf_counter()
        with during():
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        value = loss.detach().float().clone()
        if world > 1:
            dist.all_reduce(value)  # also waits for the slowest
        losses.append(value.item() / world)
        times.append(time.perf_counter() - before)
    held = allocated()
    figures = {"peak_gib": allocated(most=True), "held_gib": held, "load_peak_gib": loaded, "load_s": seconds}
    if side.startswith("ours"):
        from unsloth_ext.fsdp2 import bytes_held

        figures |= {f"{kind}_gib": size / 2**30 for kind, size in bytes_held(model).items()}
    everyone = [figures]
    if world > 1:
        everyone = [None] * world
        dist.all_gather_object(everyone, figures)
    if rank == 0:
        worst = {name: round(max(one[name] for one in everyone), 4) for name in figures}
        warm = times[args.warmup :]
        row = {"side": side, "ranks": world, "losses": [round(x, 5) for x in losses], "step_s": warm} | worst
        Path(args.row).write_text(json.dumps(row))
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


# -- all sides in turn -------------------------------------------------------------------------------------------------------


def make_checkpoints(args, folder: Path) -> None:
    """A 16-bit checkpoint and, from it, a quantised one."""
    import checkpoints
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    args.checkpoint_16bit, args.checkpoint = str(folder / "16bit"), str(folder / "nf4")
    if not Path(args.checkpoint_16bit).exists():
        if args.tiny:
            from transformers import LlamaConfig, LlamaForCausalLM

            torch.manual_seed(3407)
            config = LlamaConfig(
                vocab_size=512, hidden_size=128, intermediate_size=352, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, tie_word_embeddings=False,
            )  # fmt: skip
            LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(args.checkpoint_16bit)
        else:
            checkpoints.build(args.architecture, Path(args.checkpoint_16bit), args.tokenizer, args.layers)
    if not Path(args.checkpoint).exists():
        dtype = torch.float32 if args.cpu else torch.bfloat16
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
        model = AutoModelForCausalLM.from_pretrained(
            args.checkpoint_16bit, dtype=dtype, device_map={"": "cpu" if args.cpu else "cuda:0"},
            quantization_config=quantization,
        )  # fmt: skip
        model.save_pretrained(args.checkpoint)
        if args.tokenizer:
            from transformers import AutoTokenizer

            AutoTokenizer.from_pretrained(args.tokenizer).save_pretrained(args.checkpoint)


def run_side(side, args, folder: Path) -> dict | str:
    """The row of one side, or why there is none."""
    row = folder / f"{side}.json"
    row.unlink(missing_ok=True)
    worker = [str(Path(__file__)), "--worker", side, "--row", str(row), "--checkpoint", args.checkpoint,
              "--checkpoint-16bit", args.checkpoint_16bit, "--vocabulary", str(args.vocabulary), "--steps", str(args.steps),
              "--warmup", str(args.warmup), "--batch", str(args.batch), "--length", str(args.length),
              "--residency", args.residency, *(["--cpu"] if args.cpu else []), *(["--unsloth"] if args.unsloth else []),
              *(["--checkpointing", args.checkpointing] if args.checkpointing else [])]  # fmt: skip
    launch = [sys.executable, *worker]
    if side != "one":
        launch = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(args.nproc),
            *worker,
        ]
    environment = os.environ | ({"UNSLOTH_FSDP2": "1"} if side in NEEDS_UNSLOTH else {})
    if args.cpu:
        environment |= {"GLOO_SOCKET_IFNAME": environment.get("GLOO_SOCKET_IFNAME", "lo"), "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(launch, env=environment, capture_output=True, text=True, timeout=args.limit)
    except subprocess.TimeoutExpired:
        return f"no end after {args.limit} s"
    if done.returncode or not row.exists():
        text = (done.stdout + done.stderr).strip()
        if log := os.environ.get("UNSLOTH_EXT_BENCH_DATA"):
            Path(log, f"fsdp2_{side}.log").write_text(text)
        lines = [line for line in text.splitlines() if "Error" in line and "ChildFailed" not in line]
        return (lines or text.splitlines() or ["no output"])[0][-300:]
    return json.loads(row.read_text())


def summary(row: dict, args, record) -> dict:
    step = row.pop("step_s")
    rate = [args.batch * args.length / s for s in step]
    return row | {"name": SIDES[row["side"]], "unit": "tokens/s", "tokens_s": record.percentiles(rate, 1)}


def claims(rows: dict[str, dict], args, record) -> list[dict]:
    found = []
    if "ours" in rows and "ddp" in rows:
        ratio = round(rows["ours"]["tokens_s"]["p50"] / rows["ddp"]["tokens_s"]["p50"], 4)
        found.append(record.claim("fsdp2.8b_x2.tokens_vs_ddp", ratio, "x", ">= 0.98", "DDP in the same run"))
        found.append(
            record.claim(
                "fsdp2.8b_x2.held_gib", rows["ours"]["held_gib"], "GiB", "<= 2.95", "3.30, Unsloth's FSDP2 sharded"
            )
        )
    if "ours-sliced" in rows:
        row = rows["ours-sliced"]
        ideal = row["packed_gib"] + row["quant_state_gib"] + row["frozen_gib"] + row["trainable_gib"] + args.largest_gib
        found.append(
            record.claim(
                "fsdp2.8b_x2.load_peak_over_ideal",
                round(row["load_peak_gib"] / ideal, 4),
                "x",
                "<= 1.15",
                f"a rank's part and the largest layer, {ideal:.2f} GiB",
            )  # fmt: skip
        )
    if "one" in rows:
        ours = [rows[side]["losses"] for side in ("ours", "ours-sliced") if side in rows]
        if ours:
            worst = max(abs(a - b) for losses in ours for a, b in zip(losses, rows["one"]["losses"], strict=True))
            found.append(
                record.claim("fsdp2.loss_difference", round(worst, 6), "", "<= 0.001", "one card, same tokens")
            )
    return found


def parse():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--nproc", type=int, default=2, help="ranks")
    parser.add_argument("--architecture", default="llama-3.1-8b")
    parser.add_argument("--layers", type=int, help="keep only so many layers")
    parser.add_argument(
        "--tokenizer", type=Path, help="a folder with the Llama 3 tokenizer, which Unsloth's loader wants"
    )
    parser.add_argument("--folder", type=Path, help="keep the checkpoints here, and use those that are there")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--batch", type=int, default=4, help="sequences in the global batch")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--checkpointing", choices=["unsloth", "true"], help="activation checkpointing")
    parser.add_argument("--residency", default="0", help="bytes, or all")
    parser.add_argument("--limit", type=int, default=300, help="seconds a side")
    parser.add_argument("--tiny", action="store_true", help="a toy model")
    parser.add_argument("--cpu", action="store_true", help="on gloo, without Unsloth")
    parser.add_argument("--record", default="fsdp2", help="name of the file in benchmarks/data")
    for hidden in ("--worker", "--row", "--checkpoint", "--checkpoint-16bit"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--unsloth", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--vocabulary", type=int, default=128000, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    args = parse()
    if args.worker:
        args.residency = "all" if args.residency == "all" else int(args.residency)
        measure(args.worker, args)
        return 0
    import record
    import torch

    if args.batch % args.nproc:
        print(f"bench_fsdp2: --batch {args.batch} must be a multiple of --nproc {args.nproc}")
        return 2
    if not args.cpu and torch.cuda.device_count() < args.nproc:
        print(f"bench_fsdp2: needs {args.nproc} CUDA cards, {torch.cuda.device_count()} found, left out")
        return 0
    args.unsloth = not args.cpu
    if args.tiny:
        args.length, args.vocabulary = min(args.length, 32), 512
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        make_checkpoints(args, folder)
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(args.checkpoint)
        args.largest_gib = config.vocab_size * config.hidden_size * 2 / 2**30
        gc.collect()
        if not args.cpu:
            torch.cuda.empty_cache()
        rows, failures = {}, {}
        for side in args.sides:
            if args.cpu and (side in NEEDS_UNSLOTH or side == "accelerate"):
                print(f"{SIDES[side]}: left out, needs CUDA", flush=True)
                continue
            result = run_side(side, args, folder)
            if isinstance(result, str):
                failures[side] = result
                print(f"{SIDES[side]}: no figures: {result}", flush=True)
                continue
            rows[side] = summary(result, args, record)
            shown = {k: v for k, v in rows[side].items() if k not in ("losses", "name", "side")}
            print(f"{SIDES[side]}: {shown} loss {rows[side]['losses'][0]} -> {rows[side]['losses'][-1]}", flush=True)
    the_claimed_case = args.architecture == "llama-3.1-8b" and not args.layers and not args.tiny and args.nproc == 2
    if not args.tiny:
        record.write(args.record, [*rows.values()], claims(rows, args, record) if the_claimed_case else [])
    else:
        for claim in claims(rows, args, record):
            if claim["id"] == "fsdp2.loss_difference":
                print(claim)
    ours = [side for side in args.sides if side.startswith("ours")]
    return 1 if any(side in failures for side in ours) else 0


if __name__ == "__main__":
    sys.exit(main())
