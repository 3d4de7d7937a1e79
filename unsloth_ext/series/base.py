"""The base of a patch series: one release of a package, as files and as a git commit that everybody computes alike.

PyPI carries Unsloth as wheels without history, but git names a blob after its content alone. So a wheel's package folder,
committed with fixed metadata, has the very blobs of the upstream repository at that release, and a patch made on it finds its
base there: `git am -3` works in a real clone. One correction is needed. The wheels of unsloth_zoo are built on Windows, which
turns each LF into CRLF; upstream's repository holds LF. The commit of such a wheel therefore has LF again, while `pristine_tree`
gives the files as pip would install them.

Everything lives in the cache and is checked before use: the files by their git tree hash, computed here without git, the
repository by its tree and fsck. What fails is built again under a temporary name and renamed into place.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

from ..cache import cache_dir
from ..errors import UnslothExtError, UsageError
from .git import git, run
from .wheels import fetch_wheel, read_record, release_lock, write_atomically, write_record

_ABOUT_TREE = (
    "# tree: the wheel's package folder as in upstream's repository: LF, also where the wheel was built on Windows\n"
)
_DATE = "2026-01-01T00:00:00+0000"  # of every base commit: the commit id depends on the files alone


@dataclass(frozen=True)
class Base:
    """The release that a series is made for. `tree` is the hash of the git tree that holds only the package folder."""

    package: str
    version: str
    wheel: str
    sha256: str
    tree: str

    @classmethod
    def read(cls, path: Path) -> Base:
        """Read a BASE file: one `key: value` a line, the keys being this class's fields."""
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise UsageError(
                f"cannot read {path}: {error}", "Write it with: unsloth-ext patches base NAME VERSION"
            ) from error
        lines = [line for line in lines if line.strip() and not line.startswith("#")]
        values = dict(map(str.strip, line.partition(":")[::2]) for line in lines)
        missing = [field.name for field in fields(cls) if not values.get(field.name)]
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if missing or unknown:
            hint = "Write it again with: unsloth-ext patches base NAME VERSION"
            raise UsageError(f"{path}: missing {missing}, unknown {unknown}", hint)
        return cls(**values)

    def write(self, path: Path) -> None:
        lines = [f"{field.name}: {getattr(self, field.name)}\n" for field in fields(self)]
        write_atomically(path, "".join([_ABOUT_TREE, *lines]).encode())


def is_crlf(content: bytes) -> bool:
    """Whether every line ends in CRLF."""
    return b"\r\n" in content and content.count(b"\r\n") == content.count(b"\n")


def with_lf(content: bytes) -> bytes:
    """A file written with CRLF throughout, with LF; any other as it is."""
    return content.replace(b"\r\n", b"\n") if is_crlf(content) else content


def tree_hash(folder: Path) -> str:
    """The git tree hash of a folder's files as upstream's repository holds them, without __pycache__.

    Raises OSError for files that cannot be read.
    """
    return _tree(folder, _as_in_git(folder)).hex()


def _as_in_git(folder: Path) -> Callable[[bytes], bytes]:
    """What turns the files of an unpacked wheel into upstream's blobs: LF again, where the wheel was built on Windows.

    One file with CRLF in a wheel of files with LF is no sign of that: its blob has CRLF too.
    """
    modules = [path.read_bytes() for path in folder.rglob("*.py")]
    on_windows = 2 * sum(map(is_crlf, modules)) > sum(b"\n" in module for module in modules)
    return with_lf if on_windows else bytes


def _tree(folder: Path, as_in_git: Callable[[bytes], bytes]) -> bytes:
    entries = []
    for entry in os.scandir(folder):
        name = os.fsencode(entry.name)
        if entry.is_dir(follow_symlinks=False):
            if entry.name != "__pycache__" and (child := _tree(Path(entry.path), as_in_git)) != _EMPTY:
                entries.append((name + b"/", b"40000 " + name + b"\0" + child))
        else:
            content = as_in_git(Path(entry.path).read_bytes())
            entries.append((name, b"100644 " + name + b"\0" + _hashed(b"blob", content)))
    return _hashed(b"tree", b"".join(line for _, line in sorted(entries)))


def _hashed(kind: bytes, content: bytes) -> bytes:
    return hashlib.sha1(kind + b" %d\0" % len(content) + content).digest()


_EMPTY = _hashed(b"tree", b"")


def pristine_tree(package: str, version: str, base: Base | None = None) -> Path:
    """A folder that holds `<package>/` of a release as pip installs it. Read it, import from it, never write into it.

    With `base` the wheel and its tree are checked against that; otherwise against what the cache recorded at the first use.
    Raises UnslothExtError when the release cannot be had or is not the recorded one.
    """
    with release_lock(package, version):
        return _checked_tree(package, version, base)[0]


def _checked_tree(package: str, version: str, base: Base | None) -> tuple[Path, str]:
    folder = cache_dir("trees") / f"{package}-{version}"
    wanted = base.tree if base else read_record(package, version).get("tree")
    if wanted and _hash_or_none(folder) == wanted:
        return folder, wanted
    wheel = fetch_wheel(package, version, base.sha256 if base else None)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".unpack-") as temporary:
        fresh = Path(temporary, "tree")
        _unpack(wheel, package, fresh)
        tree = tree_hash(fresh)
        if base and tree != base.tree:
            hint = "BASE is damaged: write it again with `unsloth-ext patches base`."
            raise UnslothExtError(f"{wheel.name} unpacks to tree {tree}, BASE says {base.tree}", hint)
        _swap(fresh, folder, Path(temporary))
    write_record(package, version, {**read_record(package, version), "tree": tree})
    return folder, tree


def _hash_or_none(folder: Path) -> str | None:
    try:
        return tree_hash(folder)
    except OSError:
        return None


def _unpack(wheel: Path, package: str, folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        members = [name for name in archive.namelist() if name.startswith(f"{package}/")]
        if not members:
            raise UsageError(
                f"{wheel.name} holds no folder {package}/", "Give the import name of the package as PyPI knows it."
            )
        archive.extractall(folder, members)


def _swap(fresh: Path, place: Path, attic: Path) -> None:
    """Put `fresh` at `place`; what stood there moves into `attic` first, because a folder cannot be renamed over a full one."""
    if place.exists():
        os.rename(place, attic / "damaged")
    os.rename(fresh, place)


def pristine_repository(package: str, version: str, base: Base | None = None) -> Path:
    """A bare git repository whose branch `base` is one commit: the package folder of a release. Clone it, never write into it.

    Raises what `pristine_tree` raises.
    """
    with release_lock(package, version):
        files, tree = _checked_tree(package, version, base)
        repository = cache_dir("repositories") / f"{package}-{version}.git"
        if not _holds(repository, tree):
            with tempfile.TemporaryDirectory(dir=repository.parent, prefix=".build-") as temporary:
                fresh = Path(temporary, "repository")
                _commit(files, fresh, package, version, tree)
                _swap(fresh, repository, Path(temporary))
    return repository


def _holds(repository: Path, tree: str) -> bool:
    if not (repository / "HEAD").is_file():
        return False
    found = run(repository, "rev-parse", "--verify", "-q", "base^{tree}")
    return found.stdout.decode().strip() == tree and run(repository, "fsck", "--no-dangling", "base").returncode == 0


def _commit(files: Path, repository: Path, package: str, version: str, tree: str) -> None:
    with tempfile.TemporaryDirectory(dir=repository.parent, prefix=".lf-") as temporary:
        worktree = Path(temporary, "files")
        shutil.copytree(files, worktree, ignore=shutil.ignore_patterns("__pycache__"))
        as_in_git = _as_in_git(worktree)
        for path in worktree.rglob("*"):
            if path.is_file():
                path.write_bytes(as_in_git(path.read_bytes()))
        repository.mkdir()
        git(repository, "init", "--quiet", "--bare", "--template=", "--initial-branch=base")
        (repository / "info").mkdir()
        (repository / "info" / "attributes").write_text("* -text !filter !ident\n")
        git(repository, "config", "core.fileMode", "false")
        here = (f"--git-dir={repository}", f"--work-tree={worktree}")
        git(worktree, *here, "add", "--force", "--all", ".")
        written = git(repository, "write-tree")
    if written != tree:
        raise UnslothExtError(
            f"git makes tree {written} of {package} {version}, expected {tree}", "Please report this."
        )
    dates = {"GIT_AUTHOR_DATE": _DATE, "GIT_COMMITTER_DATE": _DATE}
    commit = git(repository, "commit-tree", tree, "-m", f"{package} {version}", env=dates)
    git(repository, "update-ref", "refs/heads/base", commit)
    shutil.rmtree(repository / "logs", ignore_errors=True)


def make_base(package: str, version: str) -> Base:
    """The BASE of a release, from its wheel."""
    pristine_tree(package, version)
    record = read_record(package, version)
    return Base(package, version, record["wheel"], record["sha256"], record["tree"])
