"""The command line: `unsloth-ext` and `python -m unsloth_ext`.

Every command is declared by the part that owns it (`training/cli.py`, `series/cli.py`); here they are put together, and an
error becomes one readable message and an exit code (errors.py).
"""

from __future__ import annotations

import argparse
import sys

from .errors import UnslothExtError
from .version import __version__


def _status(args: argparse.Namespace) -> int:
    import unsloth_ext

    if args.no_import:
        from .patching.release import folder_of
        from .patching.survey import survey

        patches = unsloth_ext.patches()
        rows = survey(patches, {p.package: folder for p in patches if (folder := folder_of(p.package))})
    else:
        _import_targets()
        rows = unsloth_ext.status()
    if args.json:
        import json

        print(json.dumps([row.as_dict() for row in rows], indent=1))
    else:
        print(rows)
    return 1 if any(row.state == "failed" for row in rows) else 0


def _import_targets() -> None:
    """Import Unsloth and every module that a patch changes, so that none is left pending for that reason alone."""
    import contextlib
    import importlib

    import unsloth_ext

    with contextlib.redirect_stdout(sys.stderr):  # Unsloth's banner is not our output
        try:
            importlib.import_module("unsloth")
        except unsloth_ext.PatchError:
            raise
        except Exception as error:  # it raises NotImplementedError where it finds no accelerator that it likes
            raise UnslothExtError(
                f"Unsloth cannot be imported: {type(error).__name__}: {error}",
                "`make setup` installs it; `unsloth-ext status --no-import` answers without importing it.",
            ) from error
        for module in sorted({target.module for patch in unsloth_ext.patches() for target in patch.targets}):
            try:
                importlib.import_module(module)
            except unsloth_ext.PatchError:
                raise
            except Exception:  # a module of another release or of the GPU path: its patches stay pending
                continue


def _parser() -> argparse.ArgumentParser:
    from .series.cli import add_parser as add_series
    from .tools.cli import add_parser as add_tools
    from .training.cli import add_parsers as add_training

    parser = argparse.ArgumentParser(
        prog="unsloth-ext",
        description="Measured improvements for Unsloth.",
        epilog="Exit codes: 0 done, 1 the job ran and did not hold, 2 bad usage or input, 3 refused and nothing changed.",
    )
    parser.add_argument("--version", action="version", version=f"unsloth_ext {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    status = commands.add_parser("status", help="which patches are in, which are not, and why")
    status.add_argument("--no-import", action="store_true", help="judge from Unsloth's files without importing it")
    status.add_argument("--json", action="store_true", help="print a JSON list")
    status.set_defaults(handler=_status)
    add_training(commands)
    add_series(commands)
    add_tools(commands)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    args = _parser().parse_args(argv)
    try:
        return args.handler(args)
    except UnslothExtError as error:
        print(f"unsloth-ext: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("unsloth-ext: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `unsloth-ext status | head`
        sys.stderr.close()
        return 1


def console() -> None:
    sys.exit(main())


if __name__ == "__main__":
    console()
