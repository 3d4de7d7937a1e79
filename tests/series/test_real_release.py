"""One real release: the wheel of unsloth_zoo, whose files have CRLF, patched as installed and put back to the byte."""

import os
import shutil
import subprocess

import pytest
from made_up import World, commit, git, snapshot, write

from unsloth_ext.errors import UnslothExtError
from unsloth_ext.series.base import pristine_repository, pristine_tree

VERSION = "2026.10.9"


@pytest.fixture
def release():
    """The release, from this user's own cache or from PyPI."""
    try:
        return pristine_tree("unsloth_zoo", VERSION)
    except UnslothExtError as error:
        pytest.skip(f"unsloth_zoo {VERSION} is neither cached nor downloadable: {str(error).splitlines()[0]}")


def test_a_real_release_goes_there_and_back(release, tmp_path, capsys):
    world = World(tmp_path / "root")
    (world.root / "patches" / "unsloth-zoo").mkdir(parents=True)
    assert world.run("base", "unsloth-zoo", VERSION)[0] == 0

    checkout = tmp_path / "checkout"
    git(tmp_path, "clone", "-q", str(pristine_repository("unsloth_zoo", VERSION)), str(checkout))
    content = (checkout / "unsloth_zoo" / "log.py").read_text()
    assert "\r" not in content
    trailers = {"Forwarded": "no", "Applies_To": f"unsloth_zoo >={VERSION}", "License": "x", "Unsloth_Ext_Patch": "a.b"}
    other = checkout / "unsloth_zoo" / "loss_utils.py"
    write(checkout, {"unsloth_zoo/loss_utils.py": other.read_text() + "\n# More.\n", "unsloth_zoo/added.py": "x = 1\n"})
    commit(checkout, "Change something", {"unsloth_zoo/log.py": content + "\n# More.\n"}, **trailers)
    assert world.run("export", "--zoo", checkout)[0] == 0
    write(world.root, {"pr_descriptions/Change-something.md": "x\n"})
    capsys.readouterr()
    assert world.problems(capsys) == ""

    tree = tmp_path / "site-packages"
    shutil.copytree(release, tree, ignore=shutil.ignore_patterns("__pycache__"))
    before = snapshot(tree)
    assert world.run("apply", "--zoo", tree)[0] == 0
    after = snapshot(tree)
    changed = {path for path in after if after[path] != before.get(path) and not path.startswith(".unsloth-ext")}
    assert changed == {"unsloth_zoo/log.py", "unsloth_zoo/loss_utils.py", "unsloth_zoo/added.py"}
    loss = after["unsloth_zoo/loss_utils.py"]
    assert loss == before["unsloth_zoo/loss_utils.py"] + b"\r\n# More.\r\n", "the tree's own line endings"
    assert world.run("unapply", "--zoo", tree)[0] == 0
    assert snapshot(tree) == before


def test_the_base_has_the_blobs_that_git_makes_of_the_files(release):
    repository = pristine_repository("unsloth_zoo", VERSION)
    path = release / "unsloth_zoo" / "loss_utils.py"
    env = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull}
    command = ["git", "hash-object", "--stdin"]
    done = subprocess.run(
        command, input=path.read_bytes().replace(b"\r\n", b"\n"), env=env, capture_output=True, cwd=repository
    )
    assert git(repository, "rev-parse", "base:unsloth_zoo/loss_utils.py").encode() == done.stdout
