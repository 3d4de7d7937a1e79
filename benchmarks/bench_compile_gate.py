"""Graphs and breaks of Unsloth's Llama training step over 64 batches and 64 packings, traced without a card.

python benchmarks/bench_compile_gate.py        # about a minute; needs Unsloth and no GPU
"""

import json
import subprocess
import sys
from pathlib import Path

import record

GATE = Path(__file__).parents[1] / "tests" / "compiling" / "compile_gate.py"


def main() -> None:
    done = subprocess.run([sys.executable, str(GATE)], check=True, capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    rows = [{"case": f"64 {case}", "unit": "graphs", **counts} for case, counts in found.items()]
    baseline = "Unsloth 2026.10.9, which fails under fullgraph=True"
    record.write(
        "compile_gate",
        rows,
        [
            record.claim("compile.graphs_64_shapes", found["batches"]["graphs"], "graphs", "<= 2", baseline),
            record.claim("compile.graphs_64_packings", found["packings"]["graphs"], "graphs", "<= 4", baseline),
        ],
    )


if __name__ == "__main__":
    main()
