"""The same job twice: pristine Unsloth, and Unsloth with unsloth_ext.

Each side runs in a process of its own, because a patch cannot be taken out of memory as if it had never been there: compiled graphs, caches
and the allocator remember. Model, data, seeds and options are the same, the embedded base is built once before, and every step's record
carries a fingerprint of its batch, so the claim "same data" is checked and not assumed.

The verdict is arithmetic on the records alone (`judge`): it can be repeated from the files by `unsloth-ext report`, without running anything.
"""

import json
import os
import sys
from pathlib import Path

from . import embedded
from .follow import LOG, follow
from .job import make_folder
from .options import EMBEDDED_MODELS, Options
from .recorder import read_steps
from .summary import outcome, summarize

SIDES = ("pristine", "patched")
LOG_LINES = 30  # of a crashed side, kept in the report


def run_sides(options: Options, folder: Path, resume: bool) -> list[dict]:
    """Run the sides one after the other and return their runs; a side that crashed comes back with its log instead of a sample."""
    make_folder(folder)
    if options.model in EMBEDDED_MODELS:
        embedded.ensure_base(options.model)
    for side in SIDES:
        started = (folder / side / "request.json").exists()
        if not (resume and (load_side(folder / side) or {}).get("status") == "finished"):
            run_side(side, options, folder / side, resume and started)
    return [load_side(folder / side) for side in SIDES]


def run_side(side: str, options: Options, folder: Path, resume: bool) -> int:
    """One side in a fresh process, its output in log.txt. Whatever ends this process ends the side too."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ)
    if side == "pristine":
        environment["UNSLOTH_EXT_DISABLE"] = "all"
    # Caches of its own: else the first side would compile for the second, whose steps would then look faster.
    for name, cache in (("TRITON_CACHE_DIR", "triton"), ("TORCHINDUCTOR_CACHE_DIR", "inductor")):
        environment[name] = str(folder.resolve() / "compiled" / cache)
    command = [sys.executable, "-m", "unsloth_ext", "train", f"--side={side}", f"--output={folder}", *options.argv()]
    command += ["--resume"] if resume else []
    code = follow(command, environment, folder, f"{side:<8}", options.steps, resume)
    if code:
        print(f"{side} ended with exit code {code}; see {folder / LOG}", file=sys.stderr)
    return code


def load_side(folder: Path) -> dict | None:
    """The run in `folder`: its run.json, or what a crash left of it. None if nothing ever ran there."""
    run = None
    if (folder / "run.json").is_file():
        run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    elif (folder / "request.json").is_file() or (folder / LOG).is_file():
        steps = read_steps(folder / "steps.jsonl")
        run = {
            "format": 1,
            "side": folder.name,
            "status": "failed",
            "error": "the process ended without a word",
            "steps": steps,
        }
        run["summary"] = summarize(steps)
        if (folder / "request.json").is_file():
            run["options"] = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    if run and run["status"] != "finished" and (folder / LOG).is_file():
        run["log_tail"] = (folder / LOG).read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
    return run


def judge(runs: list[dict], tolerance: float) -> dict:
    """The verdict on one run or two: whether it `holds`, a `headline`, and the reasons in `problems`.

    Two runs hold together if each does alone and, at every step, they saw the same tokens and their losses differ by at most `tolerance`.
    """
    problems = [f"{run['side']}: {reason}" if len(runs) > 1 else reason for run in runs for reason in outcome(run)]
    verdict: dict = {
        "tolerance": tolerance,
        "applied": sum(row["state"] == "applied" for row in runs[-1].get("patches", [])),
    }
    if len(runs) > 1:
        verdict |= _differences(runs, tolerance, problems)
    verdict["problems"] = problems
    verdict["holds"] = not problems
    verdict["headline"] = _headline(runs, verdict)
    return verdict


def _differences(runs: list[dict], tolerance: float, problems: list[str]) -> dict:
    steps, others = (run["steps"] for run in runs)
    if len(steps) != len(others):
        problems.append(f"{runs[0]['side']} ran {len(steps)} steps and {runs[1]['side']} {len(others)}")
    pairs = [(a, b) for a, b in zip(steps, others, strict=False) if a["loss"] is not None and b["loss"] is not None]
    strangers = [a["step"] for a, b in pairs if a["batch"] != b["batch"]]
    if strangers:
        problems.append(
            f"the two sides saw different data from step {strangers[0]} on, so their losses cannot be compared"
        )
    differences = [b["loss"] - a["loss"] for a, b in pairs]
    worst = max(range(len(differences)), key=lambda index: abs(differences[index]), default=None)
    if worst is None:
        return {"same_data": not strangers, "largest_difference": None, "at_step": None}
    if abs(differences[worst]) > tolerance:
        problems.append(
            f"the losses differ by {abs(differences[worst]):.3g} at step {pairs[worst][0]['step']}, more than the tolerance of {tolerance:g}"
        )
    return {
        "same_data": not strangers,
        "largest_difference": abs(differences[worst]),
        "at_step": pairs[worst][0]["step"],
    }


def _headline(runs: list[dict], verdict: dict) -> str:
    count = verdict["applied"]
    patches = f"{count or 'no'} patch{'' if count == 1 else 'es'} applied"
    crashed = [run["side"] for run in runs if run["status"] != "finished"]
    if crashed:
        return f"{' and '.join(crashed).capitalize()} did not finish"
    if len(runs) == 1:
        summary = runs[0]["summary"]
        loss = (
            f"{summary['first_loss']:.3f} to {summary['last_loss']:.3f}"
            if None not in _ends(summary)
            else "a value that is no number"
        )
        return f"Loss went from {loss} in {summary['steps']} steps; {patches}"
    if not verdict["holds"]:
        return "The two runs do not hold together"
    worst = verdict["largest_difference"]
    agreement = "Losses are identical" if worst == 0 else f"Losses agree within {worst:.2g}"
    return f"{agreement} at every one of {len(runs[0]['steps'])} steps; {patches}"


def _ends(summary: dict) -> tuple:
    return summary["first_loss"], summary["last_loss"]
