"""Running git so that nobody's configuration changes the result.

Two kinds of repository are touched. Ours (the cached bases and the throw-away rehearsals) run without any user or system
configuration, hooks or attributes, so a patch comes out the same on every machine. The user's checkout runs with the user's own
configuration, because only that says how their files look on disk (line endings, filters, safe directories), but without hooks,
signing or maintenance, and with an identity taken from the environment: nothing is ever written into their configuration.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from ..errors import UnslothExtError, UsageError

NAME, EMAIL = "unsloth_ext", "unsloth_ext@localhost"

# Both kinds: what a person may have switched on for their own commits and what must not happen inside ours.
_QUIET = (
    f"core.hooksPath={os.devnull}",
    "commit.gpgSign=false",
    "gc.auto=0",
    "maintenance.auto=false",
    "core.fsmonitor=false",
    "submodule.recurse=false",
    "advice.mergeConflict=false",
)
_OURS = (
    *_QUIET,
    "safe.directory=*",
    "core.autocrlf=false",
    "core.eol=lf",
    "core.quotePath=false",
    "merge.conflictStyle=merge",
    "merge.renames=true",
    "i18n.commitEncoding=UTF-8",
)


class GitFailed(UnslothExtError):
    """A git command failed where it should not have."""


def _environment(theirs: bool) -> dict[str, str]:
    # GIT_DIR and its like, set by a hook or an editor around us, would point git at another repository. A user may, however,
    # carry their configuration in GIT_CONFIG_*.
    kept = {k: v for k, v in os.environ.items() if not k.startswith("GIT_") or (theirs and k.startswith("GIT_CONFIG_"))}
    for role in ("AUTHOR", "COMMITTER"):
        kept[f"GIT_{role}_NAME"], kept[f"GIT_{role}_EMAIL"] = NAME, EMAIL
    kept.update(LC_ALL="C", TZ="UTC", GIT_TERMINAL_PROMPT="0", GIT_OPTIONAL_LOCKS="0", GIT_EDITOR="true")
    if not theirs:
        nowhere = os.devnull
        kept.update(
            GIT_CONFIG_GLOBAL=nowhere, GIT_CONFIG_SYSTEM=nowhere, GIT_CONFIG_NOSYSTEM="1", GIT_ATTR_NOSYSTEM="1"
        )
        kept.update(HOME=nowhere, XDG_CONFIG_HOME=nowhere)  # git before 2.32 knows only these
    return kept


def run(
    folder: Path,
    *args: str,
    stdin: bytes | None = None,
    theirs: bool = False,
    env: dict[str, str] | None = None,
) -> subprocess.CompletedProcess[bytes]:
    """Run `git args` in `folder` and return the finished process, whatever its exit status."""
    settings = [part for setting in (_QUIET if theirs else _OURS) for part in ("-c", setting)]
    try:
        return subprocess.run(
            ["git", *settings, *args],
            cwd=folder,
            env={**_environment(theirs), **(env or {})},
            input=stdin if stdin is not None else b"",
            capture_output=True,
        )
    except FileNotFoundError as error:
        if not Path(folder).is_dir():
            raise UsageError(
                f"{folder} is not a folder", "Give the path of a checkout or of an installed package."
            ) from error
        raise UsageError("git is not installed", "Install git 2.32 or newer and run the command again.") from error


def git_bytes(folder: Path, *args: str, **options) -> bytes:
    """The output of a git command that has to succeed."""
    done = run(folder, *args, **options)
    if done.returncode:
        said = text(done.stderr or done.stdout).strip()
        raise GitFailed(
            f"git {' '.join(args)} failed in {folder}:\n{said}", "Nothing was changed; see git's own message above."
        )
    return done.stdout


def git(folder: Path, *args: str, **options) -> str:
    """The output of a git command that has to succeed, as text without its last newline."""
    return text(git_bytes(folder, *args, **options)).rstrip("\n")


def text(data: bytes) -> str:
    """Bytes from git as text; names and file contents that are not UTF-8 survive the way back through `data`."""
    return data.decode("utf-8", "surrogateescape")


def data(string: str) -> bytes:
    """The inverse of `text`."""
    return string.encode("utf-8", "surrogateescape")


def names(output: bytes) -> list[str]:
    """The entries of a `-z` listing."""
    return [text(name) for name in output.split(b"\0") if name]
