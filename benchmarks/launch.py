"""One measured side in processes of its own: a benchmark's script under torchrun, and the row that its rank 0 leaves.

A side that fails or hangs must not take the others with it: its output goes to a file, not to a pipe that nobody reads, and what
was started is ended with its children, as torchrun ends them.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

_ERROR = re.compile(r"(?:^|\]:\s*)((?:\w+\.)*\w*(?:Error|Exception|Refused|Interrupt)\b:? .*)")
_GRACE = 40  # seconds; torchrun waits 30 for its ranks


def run(script: str, options: list[str], row: Path, ranks: int, limit: float, *, cpu=False, log="", **environment):
    """The JSON in `row` that `script options --row row` wrote in `ranks` processes, or a line that says why there is none.

    ranks: 1 starts it without torchrun, with one card in sight. limit: seconds. log: what the output of a failed side is called
    in $UNSLOTH_EXT_BENCH_DATA. environment: variables beside those of this process; None removes one.
    """
    row.unlink(missing_ok=True)
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    else:
        cards = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
        environment.setdefault("CUDA_VISIBLE_DEVICES", cards.partition(",")[0])
    if cpu:
        environment |= {"GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"), "OMP_NUM_THREADS": "1"}
    around = {name: value for name, value in (os.environ | environment).items() if value is not None}
    output = row.with_suffix(".log")
    with open(output, "wb") as out:
        process = subprocess.Popen(
            [*command, script, *options, "--row", str(row)],
            env=around,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
        )
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            _end(process)
    if status == 0 and row.exists():
        return json.loads(row.read_text())
    text = output.read_text(errors="replace").strip()
    if log and (folder := os.environ.get("UNSLOTH_EXT_BENCH_DATA")):
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, f"{log}.log").write_text(text)
    if status is None:
        return f"no end after {limit:g} s"
    found = [
        match.group(1) for line in text.splitlines() if (match := _ERROR.search(line)) and "ChildFailed" not in line
    ]
    return (found or text.splitlines()[-1:] or ["no output"])[0][:300]


def apart(losses: list[float], others: list[float]) -> float:
    """The largest difference of two runs' losses, step by step; infinite where one is no number."""
    differences = [abs(a - b) for a, b in zip(losses, others, strict=True)]
    return max(x if math.isfinite(x) else math.inf for x in differences)


def _end(process: subprocess.Popen) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
