"""The main job on a real architecture: pristine Unsloth and Unsloth + unsloth_ext, the same QLoRA run, loss by loss.

A Llama-3.2-1B-shaped checkpoint with random weights, 4-bit, sequence 2048, batch 2, 30 steps on the standard library's sources,
rows of full length. Run from here it is exactly `unsloth-ext train --compare`; this file only builds the checkpoint and keeps
the report as data.
"""

import argparse
import json
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import checkpoints
import record


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokenizer", type=Path, help="a folder with the Llama 3 tokenizer (128256 tokens)")
    parser.add_argument("--architecture", default="llama-3.2-1b", choices=checkpoints.ARCHITECTURES)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--output", type=Path, help="keep the run and its report.html here")
    args = parser.parse_args()
    import torch

    if not torch.cuda.is_available() or args.tokenizer is None:
        print("bench_train_compare: needs a CUDA card and --tokenizer, left out")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        model = checkpoints.build(args.architecture, Path(folder, args.architecture), args.tokenizer)
        texts = Path(folder, "standard-library.txt")
        with texts.open("w", encoding="utf-8") as out:
            for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
                out.write(file.read_text(encoding="utf-8", errors="replace") + "\n\n")
        output = args.output or Path(folder, "run")
        command = [
            sys.executable,
            "-m",
            "unsloth_ext",
            "train",
            "--compare",
            "--model",
            str(model),
            "--dataset",
            str(texts),
        ]
        command += ["--max-seq-length", "2048", "--batch-size", "2", "--gradient-accumulation", "1"]
        command += ["--steps", str(args.steps), "--tolerance", "0.01", "--output", str(output)]
        code = subprocess.run(command).returncode
        report = json.loads((output / "report.json").read_text())
    verdict, sides = report["verdict"], report["runs"]
    rows = [
        {
            "side": run["side"],
            "step": step["step"],
            "loss": step["loss"],
            "tokens": step["tokens"],
            "seconds": step["seconds"],
        }
        for run in sides
        for step in run["steps"]
    ]
    name = f"{args.architecture}, pristine Unsloth {sides[0]['environment']['unsloth']}"
    claims = [
        record.claim(
            "foundation.train_compare.max_loss_difference", verdict["largest_difference"], "nats", "<= 0.01", name
        )
    ]
    record.write("train_compare", rows, claims)
    return code


if __name__ == "__main__":
    sys.exit(main())
