"""Each patch as upstream wants it: a mail for `git am` in a fork, and the text of the pull request.

What the patches say for our own sake stays here: where their code comes from, which run-time patch is the same change, and that
they have not been forwarded yet.
"""

from __future__ import annotations

import re
from email.utils import formataddr
from pathlib import Path

from ..errors import UsageError
from .git import data, run, text
from .layout import Repository
from .mail import ID, MailPatch
from .wheels import write_atomically

# Description is the body's one-line twin, Forwarded would still say not-yet.
OURS = (ID, "Room-Code", "Room-File", "Room-Import", "Upstream-Test", "Description", "Forwarded")
_GENERATED = re.compile(r"^<!-- (generated: .*|end) -->\n", re.MULTILINE)  # the marks around a page's tables


def write_pull_requests(repository: Repository, folder: Path, author: str | None) -> list[Path]:
    """Write `<folder>/<series>/<patch>/` for every patch, with the mail and PR.md, and return the files.

    `author` is the mails' From, by default as in the series. Raises UsageError, with nothing written, for a patch without a page.
    """
    files: dict[Path, bytes] = {}
    for series in repository.all_series():
        for patch in series.patches:
            page = repository.descriptions / f"{patch.stem}.md"
            if not page.is_file():
                raise UsageError(f"{patch.name} has no page {page}", "Write it: the text of the pull request.")
            made = f"Made against {series.package} {series.base.version}.\n\n"
            place = folder / series.name / patch.stem
            files[place / patch.name] = mail_for_upstream(patch, author)
            files[place / "PR.md"] = data(made + _GENERATED.sub("", page.read_text(encoding="utf-8")))
    for path, content in files.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"{path.parent} cannot be made: {error.strerror}", "Give a new or empty folder."
            ) from error
        write_atomically(path, content)
    return list(files)


def mail_for_upstream(patch: MailPatch, author: str | None) -> bytes:
    """The patch with its subject, body and diff as they are, and none of our trailers."""
    header = text(patch.content.partition(b"\n\n")[0])
    if author:
        header = re.sub(r"^From: .*(\n[ \t].*)*", lambda _: f"From: {author}", header, count=1, flags=re.MULTILINE)
    trailers = "\n".join(f"{key}: {value}" for key, value in patch.trailers if key not in OURS)
    parts = [header, patch.body or patch.description, trailers, patch.diff]
    return data("\n\n".join(part for part in parts if part))


def author_from_git(folder: Path) -> str | None:
    """`Name <address>` as the user's git configuration has it, in a mail's encoding; None unless both are set."""
    found = [run(folder, "config", "--get", f"user.{key}", theirs=True).stdout for key in ("name", "email")]
    name, email = (text(value).strip() for value in found)
    return formataddr((name, email)) if name and email else None
