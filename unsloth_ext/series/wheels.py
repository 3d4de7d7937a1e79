"""Releases of Unsloth as they stand on PyPI: wheels, kept in the cache, each with the checksum that was first seen.

A wheel is downloaded once, to a temporary name that is renamed when it is complete, and its sha256 is compared on every use of
the file: with `patches/<name>/BASE` for the release that a series is made for, with the record beside the wheel for any other.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from email.parser import HeaderParser
from functools import cache
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from ..cache import cache_dir
from ..errors import UnslothExtError, UsageError


@contextlib.contextmanager
def release_lock(package: str, version: str) -> Iterator[None]:
    """One process at a time works on the cache entries of a release."""
    with open(cache_dir("locks") / f"{package}-{version}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """Write to a temporary name in the same folder, then rename: a reader or a kill never meets half a file."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _record_path(package: str, version: str) -> Path:
    return cache_dir("wheels") / f"{package}-{version}.json"


def read_record(package: str, version: str) -> dict[str, str]:
    """What was seen of a release before: `wheel` (file name), `sha256`, `tree`; empty when there is no usable record."""
    try:
        record = json.loads(_record_path(package, version).read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def write_record(package: str, version: str, record: dict[str, str]) -> None:
    write_atomically(_record_path(package, version), (json.dumps(record, indent=2, sort_keys=True) + "\n").encode())


def fetch_wheel(package: str, version: str, sha256: str | None = None) -> Path:
    """The wheel of a release, from the cache or downloaded; call it under `release_lock`.

    Raises UnslothExtError when it cannot be had, or when a fresh download has another checksum than `sha256` or the record.
    """
    record = read_record(package, version)
    wanted = sha256 or record.get("sha256")
    known = cache_dir("wheels") / record.get("wheel", f"{package}-{version}-py3-none-any.whl")
    if known.is_file() and wanted and sha256_of(known) == wanted:
        path = known
    else:
        path = _download(package, version)
    seen = sha256_of(path)
    if wanted and seen != wanted:
        path.unlink()
        said = "patches/*/BASE says" if sha256 else f"{_record_path(package, version)} says"
        hint = (
            "Releases on PyPI do not change: find out which is right (a proxy, a mirror) before you change the record."
        )
        raise UnslothExtError(f"the wheel of {package} {version} has sha256 {seen}, {said} {wanted}", hint)
    if record.get("sha256") != seen or record.get("wheel") != path.name:
        write_record(package, version, {"wheel": path.name, "sha256": seen})
    return path


def _pip(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip"]
    if subprocess.run([*command, "--version"], capture_output=True).returncode:
        found = shutil.which("pip")
        if not found:
            raise UsageError("pip is needed to get releases and is not installed", "Run: python -m ensurepip --upgrade")
        command = [found]
    return subprocess.run([*command, *args, "--disable-pip-version-check"], capture_output=True, text=True)


def _download(package: str, version: str) -> Path:
    folder = cache_dir("wheels")
    with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as temporary:
        wanted = f"{package}=={version}"
        options = ("--no-deps", "--only-binary=:all:", "--ignore-requires-python", "--quiet")
        done = _pip("download", *options, "--dest", temporary, wanted)
        wheels = sorted(Path(temporary).glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            _refuse_unknown(package, version)
            raise UnslothExtError(
                f"pip could not download {wanted}:\n{done.stderr.strip()}",
                f"Check the network and `pip index versions {package}`.",
            )
        path = folder / wheels[0].name
        os.replace(wheels[0], path)
    return path


def _refuse_unknown(package: str, version: str) -> None:
    """Raise UsageError if the index can be read and has no such release."""
    try:
        known = released_versions(package)
    except UnslothExtError:
        return
    if Version(version) not in map(Version, known):
        raise UsageError(f"there is no release {version} of {package}; the newest are {', '.join(known[:-6:-1])}")


def checked_version(version: str) -> str:
    """A version that a person typed, in its normal form. Raises UsageError for what is none."""
    try:
        return str(Version(version))
    except InvalidVersion as error:
        raise UsageError(f"{version!r} is not a version", "Give a release on PyPI, such as 2026.10.9.") from error


def metadata_requirement(wheel: Path, name: str) -> str | None:
    """The lowest version of `name` that a wheel's own METADATA requires outside its extras, or None."""
    with zipfile.ZipFile(wheel) as archive:
        entry = next(entry for entry in archive.namelist() if entry.endswith(".dist-info/METADATA"))
        headers = HeaderParser().parsestr(archive.read(entry).decode("utf-8"))
    for line in headers.get_all("Requires-Dist", []):
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            continue
        if canonicalize_name(requirement.name) != canonicalize_name(name) or "extra" in str(requirement.marker):
            continue
        lowest = [part.version for part in requirement.specifier if part.operator in (">=", "==", "~=")]
        if lowest:
            return max(lowest, key=Version)
    return None


@cache
def released_versions(package: str) -> tuple[str, ...]:
    """The final releases of a package on the index, oldest first. Raises UnslothExtError when the index cannot be read."""
    done = _pip("index", "versions", package)
    listed = re.search(r"^\s*Available versions:\s*(.+)$", done.stdout, re.MULTILINE)
    if not listed:
        raise UnslothExtError(
            f"pip listed no versions of {package}:\n{done.stderr.strip()}",
            "Check the network; `pip index versions` needs pip 21.2 or newer.",
        )
    versions = []
    for word in listed.group(1).split(","):
        try:
            version = Version(word.strip())
        except InvalidVersion:
            continue
        if not version.is_prerelease:
            versions.append((version, word.strip()))
    return tuple(word for _, word in sorted(versions))
