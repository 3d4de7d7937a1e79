"""Fixtures: the made-up releases on a local index, a repository with a series made on one of them, checkouts to apply it to."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from made_up import BASE, FIRST, LOSS, ROOM, TEST, World, commit, git, make_wheel, release, usual, write

from unsloth_ext.series import cli, wheels


@pytest.fixture(scope="session")
def index(tmp_path_factory):
    """A folder of wheels that pip uses as its only index."""
    folder = tmp_path_factory.mktemp("index")
    for version in ("2026.1.1", BASE, "2026.1.3", "2026.1.4", "2026.1.5"):
        make_wheel(
            folder, "unsloth", version, release(version), ["unsloth_zoo>=2026.1.1", "unsloth_zoo>=9; extra == 'x'"]
        )
    windows = {name: content.replace("\n", "\r\n") for name, content in release(BASE).items()}
    for version in ("2026.1.1", BASE, "2026.1.4"):
        files = {**windows, "__init__.py": f'__version__ = "{version}"\r\n', "page.html": "<p>\r\n</p>\r\n"}
        del files["_version.py"]
        make_wheel(folder, "unsloth_zoo", version, files)
    return folder


@pytest.fixture(scope="session")
def shared(tmp_path_factory, index):
    """The cache and the repository that tests start from, made once: two patches, the second with code and a test of ours."""
    folder = tmp_path_factory.mktemp("shared")
    with pytest.MonkeyPatch.context() as patched:
        _point_at(patched, index, folder / "cache")
        world = World(folder / "root")
        (world.root / "patches" / "unsloth").mkdir(parents=True)
        write(world.root, {"unsloth_ext/loss/keywords.py": ROOM, "upstream_tests/unsloth/tests/test_loss.py": TEST})
        write(world.root, {"pr_descriptions/Square-the-loss.md": "x\n", "pr_descriptions/Read-the-keywords.md": "x\n"})
        assert world.run("base", "unsloth", BASE)[0] == 0
        checkout = folder / "checkout"
        git(folder, "clone", "-q", str(folder / "cache" / "repositories" / f"unsloth-{BASE}.git"), str(checkout))
        commit(checkout, "Square the loss", {"unsloth/loss.py": LOSS.replace(*FIRST)}, **usual("loss.square"))
        commit(
            checkout,
            "Read the keywords",
            {"unsloth/text.py": "TEXT = 2\n", "unsloth/new/part.py": "PART = 1\n", "tests/test_loss.py": "\n"},
            **usual(
                "loss.keywords",
                Room_Code="unsloth_ext.loss.keywords:read_keywords -> unsloth/loss.py",
                Upstream_Test="upstream_tests/unsloth/tests/test_loss.py -> tests/test_loss.py",
            ),
        )
        assert world.run("export", "--unsloth", checkout)[0] == 0
    return folder


def _point_at(patched, index, cache):
    patched.setenv("UNSLOTH_EXT_CACHE", str(cache))
    patched.setenv("PIP_NO_INDEX", "1")
    patched.setenv("PIP_FIND_LINKS", str(index))
    patched.setenv("HOME", str(cache.parent))
    for name in ("GIT_CONFIG_GLOBAL", "GIT_DIR", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        patched.delenv(name, raising=False)


@pytest.fixture
def world(shared, index, tmp_path, monkeypatch):
    """A copy of the repository to change at will; the cache is shared, because nothing may change in there."""
    _point_at(monkeypatch, index, shared / "cache")
    wheels.released_versions.cache_clear()
    monkeypatch.chdir(tmp_path)
    shutil.copytree(shared / "root", tmp_path / "root")
    return World(tmp_path / "root")


@pytest.fixture
def clone(world, tmp_path):
    """clone(version) makes what upstream's repository is at a release: other history, other files, no blobs of the base."""

    def make(version=BASE, name="upstream"):
        folder = tmp_path / name
        folder.mkdir()
        git(folder, "init", "-q", "-b", "main")
        write(folder, {"README.md": "upstream\n", ".gitignore": "ignored/\n", ".gitattributes": "*.py text eol=lf\n"})
        commit(folder, "Begin")
        commit(folder, f"Release {version}", {f"unsloth/{name}": text for name, text in release(version).items()})
        return folder

    return make


@pytest.fixture
def plain(world, tmp_path):
    """plain(version, package) makes a folder with an installed package, beside an unrelated one."""

    def make(version=BASE, package="unsloth", name="site-packages"):
        from unsloth_ext.series.base import pristine_tree

        folder = tmp_path / name
        shutil.copytree(pristine_tree(package, version), folder, dirs_exist_ok=True)
        write(folder, {f"{package}/__pycache__/x.pyc": "cache", "other/__init__.py": ""})
        return folder

    return make


@pytest.fixture
def killed_at():
    """killed_at(world, args, target, n): the command in a child that SIGKILLs itself before the n-th call of `target`.

    Returns how many calls there were, when the command had fewer and so ended by itself, else None.
    """
    code = """
import importlib, os, signal, sys
module, *inner, name = sys.argv[1].split(".")
owner, left = importlib.import_module(module), int(sys.argv[2])
for part in inner:
    owner = getattr(owner, part)
original = getattr(owner, name)
def counting(*args, **kwargs):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)
setattr(owner, name, counting)
import argparse
from unsloth_ext.series import cli
parser = argparse.ArgumentParser()
cli.add_parser(parser.add_subparsers())
args = parser.parse_args(["patches", *sys.argv[3:]])
args.handler(args)
print(int(sys.argv[2]) - left)
"""

    def run(world, args, target, n):
        command = [args[0], "--root", str(world.root), *map(str, args[1:])]
        path = str(Path(cli.__file__).resolve().parents[2])
        env = {**os.environ, "PYTHONPATH": path}
        done = subprocess.run(
            [sys.executable, "-c", code, target, str(n), *command], env=env, capture_output=True, text=True
        )
        assert done.returncode in (0, -9), done.stderr
        return None if done.returncode else int(done.stdout.split()[-1])

    return run
