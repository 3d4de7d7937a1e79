"""Does a sharded run learn what one card learns? trl's SFTTrainer and DPOTrainer on one card, and on several with UNSLOTH_EXT_FSDP2=1.

    python benchmarks/bench_fsdp2_loss.py --nproc 2 --tokenizer FOLDER
    python benchmarks/bench_fsdp2_loss.py --nproc 2 --tiny --cpu       # a toy model on gloo

A Llama-3.2-1B-shaped NF4 checkpoint with random weights, plain transformers, peft and trl, LoRA of rank 16, 20 steps of four rows of
the standard library's sources. A row is a micro-batch everywhere, so that its forward has the same shapes on one card and on
several. Adapters are kept in float32: trl would turn those of a 4-bit model to bfloat16, whose rounding hides what is compared here.
Without clipping, runs that differ only in the order of sums can be equal in every bit: gradients come in bfloat16, and a few of those
add up exactly in float32. Clipping divides by a norm that is summed in another order over parts; one rounded bit in a weight changes
all activations after it, and runs part. How far that takes them one card says of itself: clipped at the next larger float32.
`--attention eager` leaves fused attention out, with which SFT's losses part a little (NOTES.md). `--deterministic` keeps it: every side runs
under `torch.use_deterministic_algorithms(True)`, where SDPA takes a kernel whose backward is the same each time, and not cuDNN's.
What is left then is the sharding's own. An operator that has no such form fails the run (with warn_only, SDPA would take cuDNN's again).
"""

import argparse
import json
import os
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS = ("sft", "dpo")
ROWS = 4  # a step
CLIPS = (0.0, 1.0)
CONTROL = "one card at the next float"


def pieces(count: int, characters: int) -> list[str]:
    """Text of the standard library's sources, cut into pieces."""
    found: list[str] = []
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text = file.read_text(encoding="utf-8", errors="replace")
        found += [text[at : at + characters] for at in range(0, len(text) - characters, characters)]
        if len(found) >= count:
            return found[:count]
    raise SystemExit(f"bench_fsdp2_loss: the sources have {len(found)} pieces, {count} are needed")


def byte_tokenizer():
    """256 tokens, for the toy model."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: i for i, letter in enumerate([*letters, "<s>", "</s>", "<pad>"])}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def train(kind: str, args) -> list[float]:
    """The losses that the trainer logs, one a step."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    torch.use_deterministic_algorithms(args.deterministic)
    world = int(os.environ.get("WORLD_SIZE", 1))
    dtype = torch.float32 if args.cpu else torch.bfloat16
    if args.cpu:
        tokenizer, place = byte_tokenizer(), "cpu"
    else:
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
        place = int(os.environ.get("LOCAL_RANK", 0))
        tokenizer.pad_token = tokenizer.pad_token or "<|finetune_right_pad_id|>"
    model = AutoModelForCausalLM.from_pretrained(
        args.checkpoint, dtype=dtype, device_map={"": place}, attn_implementation=args.attention
    )
    torch.manual_seed(3407)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM"))
    model.get_base_model().is_loaded_in_4bit = False  # see the head of this file
    if args.cpu:
        for module in model.modules():
            module.support_avx512bf16_for_cpu = False  # bitsandbytes' evaluation there wants other sizes
    count, length = args.steps * ROWS, 32 if args.tiny else 512
    options = dict(
        output_dir=str(Path(args.row).with_suffix("")), max_steps=args.steps, per_device_train_batch_size=1,
        gradient_accumulation_steps=ROWS // world, learning_rate=args.learning_rate, max_grad_norm=args.clip, logging_steps=1, report_to="none", seed=7,
        save_strategy="no", disable_tqdm=True, gradient_checkpointing=False, bf16=dtype == torch.bfloat16, use_cpu=args.cpu,
        max_length=length, lr_scheduler_type="linear", optim="adamw_torch",
    )  # fmt: skip
    if kind == "sft":
        rows = Dataset.from_dict({"text": pieces(count, 6 * length)})
        trainer = SFTTrainer(
            model=model, args=SFTConfig(**options), train_dataset=rows, processing_class=tokenizer
        )  # fmt: skip
    else:
        texts = pieces(3 * count, length // 3)
        columns = {"prompt": texts[0::3], "chosen": texts[1::3], "rejected": texts[5::3] + texts[2:3]}
        trainer = DPOTrainer(
            model=model, args=DPOConfig(**options), train_dataset=Dataset.from_dict(columns), processing_class=tokenizer
        )  # fmt: skip
    trainer.train()
    sharded = type(trainer.model).__name__.startswith("FSDP")
    if sharded != ("UNSLOTH_EXT_FSDP2" in os.environ):
        raise RuntimeError(f"{kind}: the model is a {type(trainer.model).__name__}")
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def work(args) -> None:
    """Runs in each rank; rank 0 writes the row."""
    import unsloth_ext  # noqa: F401

    losses = train(args.worker, args)
    if int(os.environ.get("RANK", 0)) == 0:
        Path(args.row).write_text(json.dumps({"kind": args.worker, "losses": losses}))
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def _claims(rows, record, args) -> list[dict]:
    """Of both trainers or of none."""
    apart = {clip: [row for row in rows if row["clip"] == clip and "sharded from one card" in row] for clip in CLIPS}
    free, clipped = ([row["sharded from one card"] for row in apart[clip]] for clip in (0.0, 1.0))
    if len(free) < len(KINDS):
        return []
    said = f"one card, {args.steps} steps of SFT and of DPO by trl's trainers in bfloat16, {args.attention} attention, not clipped, {args.nproc} ranks"
    if args.deterministic:
        said += ", all under torch.use_deterministic_algorithms"
    for clip, words in ((0.0, "DDP's"), (1.0, "DDP's clipped at 1")):
        if others := [row["DDP from one card"] for row in apart[clip] if "DDP from one card" in row]:
            said += f"; {words}: {max(others):.6f}"
    if clipped:
        said += f"; ours clipped at 1: {max(clipped):.4f}"
    return [record.claim("fsdp2.loss_difference", round(max(free), 6), "", "<= 0.001", said)]


def parse():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--nproc", type=int, default=2, help="ranks that are compared with one card")
    parser.add_argument("--tokenizer", type=Path, help="a folder with the Llama 3 tokenizer")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument(
        "--clips", nargs="+", type=float, choices=CLIPS, default=list(CLIPS), help="max_grad_norm; 0: none"
    )
    parser.add_argument("--attention", choices=("sdpa", "eager"), default="sdpa", help="transformers' attention")
    parser.add_argument(
        "--deterministic", action="store_true", help="no algorithm whose result differs from run to run"
    )
    parser.add_argument("--limit", type=int, default=300, help="seconds a run")
    parser.add_argument(
        "--at-once", type=int, default=1, help="runs side by side on the same cards: losses need no quiet host"
    )
    parser.add_argument("--tiny", action="store_true", help="a toy model")
    parser.add_argument("--cpu", action="store_true", help="on gloo; with --tiny")
    for hidden in ("--worker", "--row", "--checkpoint"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--clip", type=float, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    args = parse()
    if args.worker:
        work(args)
        return 0
    import checkpoints
    import launch
    import record
    import torch

    if ROWS % args.nproc:
        print(f"bench_fsdp2_loss: --nproc {args.nproc} must divide the {ROWS} rows of a step")
        return 2
    if not args.cpu and (torch.cuda.device_count() < args.nproc or args.tokenizer is None):
        print(f"bench_fsdp2_loss: needs {args.nproc} CUDA cards and --tokenizer, left out")
        return 0
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        config = checkpoints.config_of("toy" if args.tiny else "llama-3.2-1b")
        dtype = torch.float32 if args.cpu else torch.bfloat16
        checkpoints.build_nf4(config, folder / "nf4", args.tokenizer, dtype=dtype)
        options = [
            "--checkpoint",
            str(folder / "nf4"),
            "--steps",
            str(args.steps),
            "--learning-rate",
            str(args.learning_rate),
        ]
        options += ["--attention", args.attention]
        options += ["--tokenizer", str(args.tokenizer)] if args.tokenizer else []
        options += [f"--{flag}" for flag in ("tiny", "cpu", "deterministic") if getattr(args, flag)]
        sides = {
            "one card": (1, None),
            "sharded": (args.nproc, "1"),
            "DDP": (args.nproc, None),
            CONTROL: (1, None),
        }

        def losses(kind, clip, side):
            (ranks, switch), name = sides[side], f"{kind}-{clip:g}-{side.replace(' ', '-')}"
            limit = 1.0000001192092896 if side == CONTROL else clip
            run = launch.run(
                str(Path(__file__)), ["--worker", kind, "--clip", repr(limit), *options], folder / f"{name}.json", ranks,
                args.limit, cpu=args.cpu, log=f"fsdp2_loss_{name}", UNSLOTH_FSDP2=None, UNSLOTH_EXT_FSDP2=switch,
                CUBLAS_WORKSPACE_CONFIG=":4096:8",
            )  # fmt: skip
            if isinstance(run, str) or len(run["losses"]) != args.steps:
                print(f"{name}: no figures: {run}", flush=True)
                return None
            return run["losses"]

        with ThreadPoolExecutor(args.at_once) as pool:
            wanted = {
                (kind, clip): {side: pool.submit(losses, kind, clip, side) for side in sides if side != CONTROL or clip}
                for clip in args.clips
                for kind in args.kinds
            }
            for (kind, clip), runs in wanted.items():
                found = {side: run.result() for side, run in runs.items() if run.result() is not None}
                row = {
                    "kind": kind,
                    "clip": clip,
                    "attention": args.attention,
                    "deterministic": args.deterministic,
                    "ranks": args.nproc,
                    "unit": "nats",
                    **found,
                }
                for side in sides:
                    if "one card" in found and side in found and side != "one card":
                        row[f"{side} from one card"] = launch.apart(found["one card"], found[side])
                rows.append(row)
                print({k: v for k, v in row.items() if k not in found}, flush=True)
                if not args.tiny:
                    record.write("fsdp2_loss", rows, _claims(rows, record, args))
    return 0 if all("sharded from one card" in row for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
