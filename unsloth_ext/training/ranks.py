"""`unsloth-ext train --nproc N`: the same job in N processes that share one sharded model, with the same records and report.

torchrun starts the processes and ends them all when one fails. Rank 0 writes the folder, as a single run does; every rank reads
its part of the model and trains on its part of each batch. What torchrun and the ranks say is in log.txt; here the steps are shown
as they appear, and a rank that was killed is named.
"""

import os
import re
import signal
import sys
from pathlib import Path

from .. import switches
from ..errors import UsageError
from . import embedded
from .compare import LOG_LINES, load_side
from .follow import LOG, follow
from .job import REQUEST, prepare_folder
from .options import EMBEDDED_MODELS, Options
from .recorder import write_json

__all__ = ["run_ranks", "why_ranks_ended"]

_FAILED = re.compile(r"rank\s*:\s*(\d+) \(local_rank: \d+\)\s*\n\s*exitcode\s*:\s*(-?\d+)")


def run_ranks(options: Options, folder: Path, nproc: int, resume: bool) -> dict:
    """The run of `nproc` processes in `folder`, or what was left of it with the reason as its `error`.

    Raises Refused or UsageError before anything is started, as a single run does.
    """
    if not options.load_in_4bit:
        raise UsageError("--nproc shards a 4-bit model, and --no-load-in-4bit asks for none.", "Leave one of them out.")
    prepare_folder(folder, options, resume)
    if options.model in EMBEDDED_MODELS:
        embedded.ensure_base(options.model)
    if not resume:
        write_json(folder / REQUEST, options.as_dict())
    (folder / "run.json").unlink(missing_ok=True)  # an earlier part's: it must not pass for this one's
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}", "-m",
               "unsloth_ext", "train", "--as-rank", f"--output={folder}", *options.argv()]  # fmt: skip
    command += ["--resume"] if resume else []
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    if switches.said("UNSLOTH_EXT_FSDP2") in ("", *switches.OFF):
        environment["UNSLOTH_EXT_FSDP2"] = "1"
    log = folder / LOG
    begin = log.stat().st_size if log.exists() else 0
    code = follow(command, environment, folder, f"{nproc} ranks", options.steps, resume)
    run = load_side(folder)
    if code and run["status"] != "interrupted":
        said = log.read_bytes()[begin:].decode(errors="replace")
        run |= {"status": "failed", "error": why_ranks_ended(said, code), "side": "train"}
        run["log_tail"] = said.splitlines()[-LOG_LINES:]
        write_json(folder / "run.json", run)
    return run


def why_ranks_ended(log: str, code: int) -> str:
    """One sentence from torchrun's own summary of who failed first: a signal by its name, else the rank's last words."""
    failed = [(int(rank), int(status)) for rank, status in _FAILED.findall(log)]
    # torchrun ends the others with SIGTERM: the one that was not asked to end is the cause.
    failed.sort(key=lambda pair: pair[1] == -signal.SIGTERM)
    if not failed:
        return f"torchrun ended with exit code {code}; see {LOG}"
    rank, status = failed[0]
    if status < 0:
        name = signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"
        hint = ": often the kernel, when memory runs out" if name == "SIGKILL" else ""
        return f"rank {rank} was killed by {name}{hint}; the other ranks were ended. See {LOG}"
    said = re.findall(
        r"^(?:\[rank(\d+)\]:\s*)?(?:unsloth-ext: |[\w.]*(?:Error|Exception|Refused): )(.+)$", log, re.MULTILINE
    )
    said.sort(key=lambda pair: pair[0] != str(rank))  # another's words may only be what came of it
    return f"rank {rank} ended with exit code {status}{': ' + said[0][1] if said else ''}; see {LOG}"
