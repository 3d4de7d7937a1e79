"""`unsloth-ext patches ...`: the commands around the patch series. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

SERIES_OPTIONS = {"unsloth": "unsloth", "zoo": "unsloth-zoo"}


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `patches` and its commands; each parsed result has `handler`, a function from it to an exit code."""
    parser = subparsers.add_parser("patches", help="the git patches: apply them to a checkout, check, export, rebase")
    commands = parser.add_subparsers(dest="patches_command", required=True, metavar="COMMAND")

    def command(name: str, handler, help: str, as_json: bool = False) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=help, description=help)
        added.add_argument(
            "--root", metavar="PATH", help="the repository that holds patches/ (default: found by itself)"
        )
        if as_json:
            added.add_argument("--json", action="store_true", help="print the result as JSON")
        added.set_defaults(handler=handler)
        return added

    def targets(added: argparse.ArgumentParser, what: str) -> None:
        for option, name in SERIES_OPTIONS.items():
            added.add_argument(f"--{option}", metavar="PATH", type=_folder, help=f"{what} {name}")

    command("list", _list, "show the patches of each series", as_json=True)
    place = "git checkout, or folder with the installed package,"
    targets(
        command("apply", _apply, "apply the series; changes nothing unless all of it fits", as_json=True), f"{place} of"
    )
    targets(command("unapply", _unapply, "take the series out again", as_json=True), f"{place} of")
    command("check", _check, "check patches, tests, descriptions and formats; changes nothing", as_json=True)
    targets(
        command("export", _export, "write the patch files anew (without a path: from themselves)"),
        "patched git checkout of",
    )

    upstream = command("pull-requests", _pull_requests, "write each patch as upstream wants it, with its page as PR.md")
    upstream.add_argument("folder", metavar="DIR", type=_folder)

    fingerprint = command("fingerprint", _fingerprint, "print the fingerprint of a definition, for a run-time patch")
    fingerprint.add_argument("module", metavar="MODULE", help="for example unsloth_zoo.cpu.loader")
    fingerprint.add_argument("attribute", metavar="ATTRIBUTE", help="a function, Class.method or module-level string")
    fingerprint.add_argument("--release", metavar="V", help="a release of that package (default: the series' base)")

    formatter = command("format", _format, "put Python files into upstream's format, in place")
    formatter.add_argument("files", nargs="+", metavar="FILE", type=Path)

    base = command("base", _base, "make a release the base of a new series")
    base.add_argument("name", help="unsloth or unsloth-zoo")
    base.add_argument("version", help="a release on PyPI")

    rebase = command("rebase", _rebase, "try the series on another release of Unsloth", as_json=True)
    rebase.add_argument("version", help="a release of unsloth on PyPI")
    rebase.add_argument(
        "--zoo-version", metavar="V", help="the release of unsloth_zoo (default: the one that goes with it)"
    )
    rebase.add_argument("--write", action="store_true", help="make that release the base, if everything fits")

    matrix = command("matrix", _matrix, "try the series on the newest releases", as_json=True)
    matrix.add_argument("--releases", type=int, default=10, metavar="N", help="how many releases (default: 10)")
    matrix.add_argument("--out", metavar="FILE", type=Path, help="write the rows there as JSON")


def _folder(value: str) -> Path:
    """A path as typed; make and some shells leave the ~ in it, and an empty one would be the current folder."""
    if not value:
        raise argparse.ArgumentTypeError("the path is empty; give a folder")
    return Path(os.path.expanduser(value))


def _repository(args: argparse.Namespace):
    from .layout import find_repository

    return find_repository(args.root)


def _paths(args: argparse.Namespace) -> dict[str, Path]:
    chosen = {name: getattr(args, option) for option, name in SERIES_OPTIONS.items()}
    return {name: path for name, path in chosen.items() if path is not None}


def _print_json(value) -> None:
    print(json.dumps(value, indent=2))


def _list(args: argparse.Namespace) -> int:
    series = _repository(args).all_series()
    rows = [
        {
            "series": one.name,
            "base": one.base.version,
            "patch": patch.name,
            "id": patch.id,
            "subject": patch.subject,
            "forwarded": ", ".join(patch.all("Forwarded")),
            "applies_to": ", ".join(patch.all("Applies-To")),
        }
        for one in series
        for patch in one.patches
    ]
    if args.json:
        _print_json(rows)
        return 0
    for one in series:
        print(f"{one.name} on {one.package} {one.base.version}: {len(one.patches)} patches")
    if rows:
        _print_table(("patch", "id", "forwarded", "applies_to"), rows)
    return 0


def _print_table(columns: tuple[str, ...], rows: list[dict]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*(column.replace("_", " ") for column in columns), box=None)
    for row in rows:
        table.add_row(*(row[column] for column in columns))
    console = Console()
    if not console.is_terminal:
        console.width = 200  # a pipe or a log has no width to fit into
    console.print(table)


def _apply(args: argparse.Namespace) -> int:
    from .apply import apply

    return _show(args, apply(_repository(args), _paths(args)))


def _unapply(args: argparse.Namespace) -> int:
    from .apply import unapply

    return _show(args, unapply(_repository(args), _paths(args)))


def _show(args: argparse.Namespace, reports: list) -> int:
    if args.json:
        _print_json([report.as_json() for report in reports])
    else:
        print("\n".join(map(str, reports)))
    return 0


def _check(args: argparse.Namespace) -> int:
    from .check import check

    repository = _repository(args)
    problems = check(repository)
    if args.json:
        _print_json({"ok": not problems, "problems": problems})
    elif problems:
        print("\n".join(problems))
        print(f"{len(problems)} problems")
    else:
        counts = ", ".join(f"{len(one.patches)} on {one.package} {one.base.version}" for one in repository.all_series())
        print(f"patches are in order: {counts}")
    return 1 if problems else 0


def _export(args: argparse.Namespace) -> int:
    from .export import export

    repository, paths = _repository(args), _paths(args)
    chosen = [repository.series(name) for name in paths] if paths else repository.all_series()
    for series in chosen:
        _print_export(export(series, paths.get(series.name)))
    return 0


def _print_export(done) -> None:
    for name in done.written:
        print(f"{done.series}: wrote {name}")
    for name in done.removed:
        print(f"{done.series}: removed {name}")
    if not done.written and not done.removed:
        print(f"{done.series}: zero difference in {len(done.same)} patches")


def _pull_requests(args: argparse.Namespace) -> int:
    from .pull_requests import author_from_git, write_pull_requests

    repository = _repository(args)
    author = author_from_git(repository.root)
    for path in write_pull_requests(repository, args.folder, author):
        print(f"wrote {path}")
    if author is None:
        print("git config has no user.name and user.email: the author is the series' own")
    return 0


def _fingerprint(args: argparse.Namespace) -> int:
    from .pristine import pristine_fingerprint

    print(pristine_fingerprint(_repository(args), args.module, args.attribute, args.release))
    return 0


def _format(args: argparse.Namespace) -> int:
    from ..errors import UsageError
    from .upstream_format import format_like_upstream
    from .wheels import write_atomically

    for path in args.files:
        try:
            text = path.read_bytes().decode()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"cannot read {path}: {error}", "Give Python files.") from error
        wanted = format_like_upstream(text)
        if wanted != text:
            write_atomically(path, wanted.encode())
            print(f"formatted {path}")
    return 0


def _base(args: argparse.Namespace) -> int:
    from .base import pristine_repository
    from .rebase import new_base

    base = new_base(_repository(args), args.name, args.version)
    print(f"{base.package} {base.version}: sha256 {base.sha256}, tree {base.tree}")
    print(f"to work on it: git clone {pristine_repository(base.package, base.version, base)} CHECKOUT")
    return 0


def _rebase(args: argparse.Namespace) -> int:
    from .rebase import dropped, rebase

    trials, written = rebase(_repository(args), args.version, args.zoo_version, args.write)
    if args.json:
        _print_json([trial.as_json() for trial in trials])
    else:
        print("\n".join(map(str, trials)))
        for done in written:
            _print_export(done)
        for name in (name for trial in trials if args.write for name in dropped(trial)):
            print(f"{name} left the series, upstream has it: delete its page in pr_descriptions/ and its tests")
    return 0 if all(trial.fits for trial in trials) else 1


def _matrix(args: argparse.Namespace) -> int:
    from ..errors import UsageError
    from .rebase import matrix
    from .wheels import write_atomically

    if args.releases < 1:
        raise UsageError(f"--releases must be positive, got {args.releases}", "Give the number of releases to try.")
    trials = matrix(_repository(args), args.releases)
    rows = [
        {"release": t.release, "series": t.series, "version": t.version, "base": t.base, **outcome.as_json()}
        for t in trials
        for outcome in t.patches
    ]
    for row in rows:
        row.pop("commit", None)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(args.out, (json.dumps({"rows": rows}, indent=2) + "\n").encode())
    if args.json:
        _print_json({"rows": rows})
    else:
        _print_table(("release", "series", "version", "patch", "result"), rows)
    return 0
