"""A small world for the patch tooling: made-up releases, a repository with a series, and ways to look at what commands did.

Everything is real but small: pip downloads real wheels from a folder, git works on real repositories. The releases of the
made-up `unsloth`: 2026.1.2 is the base; 2026.1.1 and 2026.1.3 differ from it far from the patches; 2026.1.4 has the first patch;
2026.1.5 changed the very lines that the first patch changes.
"""

import argparse
import os
import subprocess
import zipfile

from unsloth_ext.errors import UnslothExtError
from unsloth_ext.series import cli

BASE = "2026.1.2"
PADDING = "".join(f"# line {number}\n" for number in range(30))
LOSS = (
    '"""Losses."""\n\nimport inspect\n\nSCALE = 1\n\n\ndef read_keywords(loss):\n    return set()\n\n\n'
    + PADDING
    + "\n\ndef loss(x, y):\n    return x - y\n\n\n"
    + PADDING
)
FIRST = ("    return x - y\n", "    return (x - y) ** 2\n")
ROOM = '''"""Ours."""

import inspect


def unrelated():
    return 1


def read_keywords(loss):
    """The keywords that `loss` names."""
    return set(inspect.signature(loss, follow_wrapped=True).parameters)
'''
TEST = 'def test_loss():\n    assert True, "a = b"\n'


def release(version):
    """The files of a release of the made-up package."""
    loss = LOSS
    files = {
        "__init__.py": '"""The package."""\n',
        "_version.py": f'__version__ = "{version}"\n',
        "text.py": "TEXT = 1\n",
    }
    if version == "2026.1.1":
        loss = loss.replace("import inspect\n", "import inspect\nimport os\nimport sys\n")
    if version == "2026.1.3":
        loss = loss + "\n\ndef later():\n    return None\n"
    if version == "2026.1.4":
        loss = loss.replace(*FIRST)
    if version == "2026.1.5":
        loss = loss.replace(FIRST[0], "    return abs(x - y)\n")
    return {**files, "loss.py": loss}


def make_wheel(folder, package, version, files, requires=()):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{package}-{version}-py3-none-any.whl"
    info = f"{package}-{version}.dist-info"
    metadata = [f"Name: {package}", f"Version: {version}", *(f"Requires-Dist: {line}" for line in requires)]
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(f"{package}/{name}"), content)
        archive.writestr(zipfile.ZipInfo("studio/unrelated.py"), "UNRELATED = 1\n")
        archive.writestr(zipfile.ZipInfo(f"{info}/METADATA"), "Metadata-Version: 2.1\n" + "\n".join(metadata) + "\n")
        archive.writestr(
            zipfile.ZipInfo(f"{info}/WHEEL"), "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(zipfile.ZipInfo(f"{info}/RECORD"), "")
    return path


def git(folder, *args, check=True):
    """git as a developer would run it, with an identity."""
    env = {**os.environ, "GIT_AUTHOR_NAME": "Dev", "GIT_AUTHOR_EMAIL": "dev@example.org"}
    env |= {"GIT_COMMITTER_NAME": "Dev", "GIT_COMMITTER_EMAIL": "dev@example.org"}
    done = subprocess.run(["git", *args], cwd=folder, env=env, capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stderr
    return done.stdout


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


def commit(checkout, subject, files=None, **trailers):
    """Commit `files` with a body and trailers; the values of `trailers` are strings or lists, keys with _ for -."""
    write(checkout, files or {})
    git(checkout, "add", "-A")
    lines = [f"{k.replace('_', '-')}: {v}" for k, vs in trailers.items() for v in ([vs] if isinstance(vs, str) else vs)]
    git(
        checkout,
        "commit",
        "-q",
        "--allow-empty",
        "-m",
        subject,
        "-m",
        "Why it is needed.",
        *(["-m", "\n".join(lines)] if lines else []),
    )
    return git(checkout, "rev-parse", "HEAD").strip()


def usual(patch_id, **more):
    """The trailers that every patch has."""
    required = {"Forwarded": "not-yet", "Applies_To": "unsloth >=2026.1.1", "License": "Apache-2.0"}
    return {**required, "Unsloth_Ext_Patch": patch_id, **more}


def snapshot(folder):
    """Everything a command must leave alone when it refuses: git's own state, when there is one, and every file."""
    state = {}
    if (folder / ".git").exists():
        for args in (
            ("status", "--porcelain", "--ignored"),
            ("log", "--format=%H %s"),
            ("rev-parse", "HEAD"),
            ("symbolic-ref", "-q", "HEAD"),
            ("stash", "list"),
            ("ls-files", "-s"),
            ("for-each-ref",),
            ("config", "--local", "--list"),
        ):
            state[args] = git(folder, "--no-optional-locks", *args, check=False)
    for path in sorted(folder.rglob("*")):
        if path.is_file() and ".git" not in path.relative_to(folder).parts:
            state[path.relative_to(folder).as_posix()] = path.read_bytes()
    return state


class World:
    """A repository with patches/ (`root`), made-up releases, and a way to run commands."""

    def __init__(self, root):
        self.root = root
        self.series = root / "patches" / "unsloth"

    def run(self, *args, capsys=None):
        """Run `unsloth-ext patches ARGS`: (exit code, what it said)."""
        parser = argparse.ArgumentParser()
        cli.add_parser(parser.add_subparsers())
        parsed = parser.parse_args(["patches", args[0], "--root", str(self.root), *map(str, args[1:])])
        try:
            code, error = parsed.handler(parsed), ""
        except UnslothExtError as raised:
            code, error = raised.exit_code, str(raised)
        return code, (capsys.readouterr().out if capsys else "") + error

    def problems(self, capsys):
        code, said = self.run("check", capsys=capsys)
        return said if code else ""
