"""`unsloth-ext train` and `unsloth-ext report`. Everything heavy is imported by the handler that needs it."""

import argparse
import contextlib
import json
import sys
from datetime import datetime, timezone
from pathlib import Path

from .options import Options, add_options


def add_parsers(subparsers) -> None:
    train = subparsers.add_parser(
        "train",
        help="one QLoRA fine-tune, measured; with --compare also on pristine Unsloth",
        description="Fine-tunes a 4-bit model with LoRA through Unsloth and trl, on a GPU or a CPU, and writes a report. "
        "Without options it needs nothing: it builds a small model from the standard library's sources.",
    )
    add_options(train)
    where = train.add_argument_group("what comes out")
    where.add_argument("--output", type=Path, metavar="FOLDER", help="(default: runs/<UTC time>)")
    where.add_argument(
        "--resume", action="store_true", help="continue the run in --output from its newest whole checkpoint"
    )
    where.add_argument(
        "--compare", action="store_true", help="run the job on pristine Unsloth too, and compare the losses"
    )
    where.add_argument(
        "--nproc", type=int, default=1, metavar="N",
        help="processes, a card each, that share one sharded model (FSDP2; without a card N processes of the CPU)",
    )  # fmt: skip
    where.add_argument(
        "--tolerance", type=float, default=1e-2, help="largest allowed difference of the losses (default: %(default)s)"
    )
    where.add_argument(
        "--report", action=argparse.BooleanOptionalAction, default=True, help="write report.json and report.html"
    )
    where.add_argument(
        "--json", action="store_true", help="print the result as JSON and nothing else on standard output"
    )
    where.add_argument(
        "--side", choices=("pristine", "patched"), help=argparse.SUPPRESS
    )  # how --compare starts its two processes
    where.add_argument("--as-rank", action="store_true", help=argparse.SUPPRESS)  # how --nproc starts its ranks
    train.set_defaults(handler=run_train)

    report = subparsers.add_parser(
        "report", help="render report.html again", description="Renders report.html from what a run left."
    )
    report.add_argument("path", type=Path, metavar="PATH", help="a report.json, or the folder of a run or a comparison")
    report.add_argument("--tolerance", type=float, help="judge with this tolerance instead of the recorded one")
    report.set_defaults(handler=run_report)


def run_train(args: argparse.Namespace) -> int:
    from ..errors import UsageError
    from . import data

    options = Options.from_args(args)
    if not 0 <= args.tolerance < float("inf"):
        raise UsageError(f"--tolerance must be a number from 0 up, got {args.tolerance}.")
    if args.resume and args.output is None:
        raise UsageError("--resume needs --output: the folder of the run to continue.")
    if args.nproc < 1:
        raise UsageError(f"--nproc must be at least 1, got {args.nproc}.")
    if args.nproc > 1 and args.compare:
        raise UsageError("--compare runs one process a side; it cannot be combined with --nproc.")
    data.read_rows(options.dataset)  # a bad line is cheaper to find now than after the imports
    _require_stack()
    folder = args.output or Path("runs", datetime.now(timezone.utc).strftime("%Y%m%d-%H%M%S"))
    # Unsloth prints as it loads; with --json that must not mix with the result.
    with contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext():
        runs = _run(args, options, folder)
    if args.side or args.as_rank:
        return 0  # the parent process judges
    return _finish(runs, args.tolerance, folder, args.report, args.json)


def _require_stack() -> None:
    """Ask for the stack without importing it: that takes ten seconds."""
    from importlib.util import find_spec

    from ..errors import UsageError

    missing = [name for name in ("torch", "unsloth", "unsloth_zoo") if find_spec(name) is None]
    if missing:
        raise UsageError(f"train needs packages that are not installed: {', '.join(missing)}.", "Run: make setup")


def _run(args: argparse.Namespace, options: Options, folder: Path) -> list[dict]:
    from . import compare, job

    if args.compare:
        if not args.resume and any((folder / side / job.REQUEST).exists() for side in compare.SIDES):
            job.refuse(folder)
        return compare.run_sides(options, folder, args.resume)
    if args.nproc > 1:
        from .ranks import run_ranks

        return [run_ranks(options, folder, args.nproc, args.resume)]
    return [job.run_job(options, folder, args.resume, args.side or "train")]


def _finish(runs: list[dict], tolerance: float, folder: Path, write_report: bool, as_json: bool) -> int:
    from . import compare, report

    verdict = compare.judge(runs, tolerance)
    page = report.write(runs, verdict, folder) if write_report else None
    if as_json:
        result = {"verdict": verdict, "summaries": {run["side"]: run["summary"] for run in runs}, "folder": str(folder)}
        print(json.dumps({**result, "report": page and str(page)}, indent=1))
    else:
        print(f"\n{verdict['headline']}.")
        for problem in verdict["problems"]:
            print(f"  {problem}")
        print(page or folder)
    return 0 if verdict["holds"] else 1


def run_report(args: argparse.Namespace) -> int:
    from . import compare, report

    runs, tolerance, folder = report.load(args.path)
    verdict = compare.judge(runs, tolerance if args.tolerance is None else args.tolerance)
    print(f"{verdict['headline']}.")
    print(report.write(runs, verdict, folder))
    return 0
