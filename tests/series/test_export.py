"""Exporting: byte for byte the same from anywhere, with our code and tests brought up to date."""

import pytest
from made_up import BASE, FIRST, LOSS, ROOM, TEST, commit, git, usual, write


@pytest.fixture
def checkout(world, clone):
    folder = clone()
    assert world.run("apply", "--unsloth", folder) == (0, "")
    return folder


def patches(world):
    return {path.name: path.read_bytes() for path in world.series.iterdir() if path.name != "BASE"}


def test_the_patches_carry_our_code_and_tests(world):
    second = (world.series / "0002-Read-the-keywords.patch").read_text()
    assert (
        "+    return set(inspect.signature(loss, follow_wrapped = True).parameters)" in second
    ), "in upstream's format"
    assert '+    assert True, "a = b"' in second
    assert second.startswith("From 0000000000000000000000000000000000000000 ")


def test_exporting_what_nobody_touched_changes_nothing(world, checkout, capsys):
    before = patches(world)
    for paths in ([], ["--unsloth", checkout]):
        code, said = world.run("export", *paths, capsys=capsys)
        assert code == 0 and "zero difference in 2 patches" in said
        assert patches(world) == before


def test_no_configuration_changes_the_bytes(world, checkout, monkeypatch, tmp_path, capsys):
    """In the user's file, in the checkout's own file, in attributes and hooks, and in the environment."""
    hostile = {
        "diff.noprefix": "true",
        "diff.mnemonicPrefix": "true",
        "diff.algorithm": "patience",
        "diff.context": "9",
        "diff.interHunkContext": "9",
        "diff.renames": "copies",
        "diff.suppressBlankEmpty": "true",
        "diff.external": "false",
        "core.abbrev": "5",
        "core.autocrlf": "true",
        "core.quotePath": "true",
        "color.ui": "always",
        "commit.gpgSign": "true",
        "format.signOff": "true",
        "format.signature": "me",
        "format.subjectPrefix": "MINE",
        "format.numbered": "true",
        "format.attach": "x",
        "format.headers": "X-Mine: 1",
        "format.to": "list@example.org",
        "i18n.commitEncoding": "latin1",
        "log.showSignature": "true",
        "user.useConfigOnly": "true",
        "core.hooksPath": str(tmp_path / "hooks"),
    }
    write(tmp_path, {"hooks/pre-commit": "#!/bin/sh\nexit 1\n", "attributes": "*.py diff=python -text\n"})
    (tmp_path / "hooks" / "pre-commit").chmod(0o755)
    for key, value in {**hostile, "core.attributesFile": str(tmp_path / "attributes")}.items():
        git(tmp_path, "config", "--file", str(tmp_path / "gitconfig"), key, value)
        if not key.startswith("core."):
            git(checkout, "config", key, value)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "gitconfig"))
    monkeypatch.setenv("GIT_DIFF_OPTS", "--unified=0")
    monkeypatch.setenv("COLUMNS", "20")
    for paths in ([], ["--unsloth", checkout]):
        code, said = world.run("export", *paths, capsys=capsys)
        assert code == 0 and "zero difference in 2 patches" in said


def test_changed_code_and_tests_come_along(world, capsys):
    write(world.root, {"unsloth_ext/loss/keywords.py": ROOM.replace("follow_wrapped=True", "follow_wrapped=False")})
    write(world.root, {"upstream_tests/unsloth/tests/test_loss.py": TEST + "\n\n# more\n"})
    first = (world.series / "0001-Square-the-loss.patch").read_bytes()
    code, said = world.run("export", capsys=capsys)
    assert code == 0 and said == "unsloth: wrote 0002-Read-the-keywords.patch\n"
    second = (world.series / "0002-Read-the-keywords.patch").read_text()
    assert "follow_wrapped = False" in second and "+# more" in second
    assert (world.series / "0001-Square-the-loss.patch").read_bytes() == first
    assert "zero difference" in world.run("export", capsys=capsys)[1]


def test_a_reordered_renamed_or_dropped_commit_moves_the_files(world, checkout, capsys):
    commit(checkout, "Another text", {"unsloth/text.py": "TEXT = 3\n"}, **usual("text.three"))
    code, said = world.run("export", "--unsloth", checkout, capsys=capsys)
    assert code == 0 and "wrote 0003-Another-text.patch" in said
    git(checkout, "reset", "-q", "--hard", "HEAD~3")
    commit(checkout, "Another text", {"unsloth/text.py": "TEXT = 3\n"}, **usual("text.three"))
    assert world.run("export", "--unsloth", checkout)[0] == 0
    assert (world.series / "series").read_text() == "0001-Another-text.patch\n"
    assert [path.name for path in world.series.glob("*.patch")] == ["0001-Another-text.patch"]


def refused(world, checkout, code, *words):
    before = patches(world)
    got, said = world.run("export", "--unsloth", checkout)
    assert got == code, said
    for word in words:
        assert word in said, said
    assert patches(world) == before


def test_commits_that_cannot_be_exported_are_refused(world, checkout, clone, tmp_path):
    write(checkout, {"README.md": "edited\n"})
    refused(world, checkout, 3, "uncommitted changes")
    git(checkout, "checkout", "-q", "README.md")
    commit(checkout, "No trailers", {"unsloth/text.py": "TEXT = 7\n"})
    refused(world, checkout, 3, "No trailers", "Unsloth-Ext-Patch")
    refused(world, clone("2026.1.3", "later"), 3, "patches rebase")
    refused(world, tmp_path, 2, "no git checkout")


def test_an_empty_commit_is_refused(world, checkout):
    commit(checkout, "Nothing", **usual("nothing"))
    refused(world, checkout, 3, "change nothing")


@pytest.mark.parametrize(
    "change, words",
    [
        (("unsloth_ext/loss/keywords.py", "x = 1\n"), ("defines no read_keywords",)),
        (("unsloth_ext/loss/keywords.py", None), ("cannot be read", "unsloth_ext/loss/keywords.py")),
        (("upstream_tests/unsloth/tests/test_loss.py", None), ("cannot be read",)),
    ],
)
def test_a_missing_source_is_an_error(world, change, words):
    name, content = change
    if content is None:
        (world.root / name).unlink()
    else:
        write(world.root, {name: content})
    code, said = world.run("export")
    assert code == 2 and all(word in said for word in words)


def test_code_goes_only_where_its_name_is(world, checkout):
    trailers = usual("text.code", Room_Code="unsloth_ext.loss.keywords:read_keywords -> unsloth/text.py")
    commit(checkout, "Code without a place", {"unsloth/text.py": "TEXT = 8\n"}, **trailers)
    refused(world, checkout, 2, "unsloth/text.py has no top-level read_keywords", "Define read_keywords there once")


OUR_FILE = '''# SPDX-License-Identifier: Apache-2.0
# Ours.
"""A kernel."""

import inspect

from unsloth_ext.loss.keywords import read_keywords
from .constants import (
    SIZE,
)


def kernel(a, b=1):
    from ..loss import keywords as other  # noqa
    return read_keywords(kernel), SIZE, inspect, other
'''
THEIR_FILE = '''# SPDX-License-Identifier: AGPL-3.0-only
# Theirs.

"""A kernel."""

import inspect

from unsloth.loss import read_keywords
from .sizes import (
    SIZE,
)


def kernel(a, b = 1):
    from unsloth.whole import keywords as other  # noqa
    return read_keywords(kernel), SIZE, inspect, other
'''


def test_a_whole_file_keeps_their_header_and_gets_their_imports(world, checkout):
    write(world.root, {"unsloth_ext/nf4/kernel.py": OUR_FILE, "unsloth_ext/nf4/constants.py": "# Ours.\nSIZE = 1\n"})
    header = THEIR_FILE.split("\n\n")[0] + "\n"
    trailers = usual(
        "nf4.kernel",
        Room_File=[
            "unsloth_ext/nf4/kernel.py -> unsloth/kernels/kernel.py",
            "unsloth_ext/nf4/constants.py -> unsloth/kernels/sizes.py",
        ],
        Room_Import=["unsloth_ext.loss.keywords -> unsloth.loss", "unsloth_ext.loss -> unsloth.whole"],
    )
    files = {"unsloth/kernels/kernel.py": header, "unsloth/kernels/sizes.py": header}
    commit(checkout, "Add the kernel", files, **trailers)
    assert world.run("export", "--unsloth", checkout) == (0, "")
    fresh = checkout.parent / "fresh"
    git(checkout, "clone", "-q", ".", str(fresh))
    git(fresh, "reset", "-q", "--hard", "HEAD~3")
    assert world.run("apply", "--unsloth", fresh) == (0, "")
    assert (fresh / "unsloth" / "kernels" / "kernel.py").read_text() == THEIR_FILE
    assert (fresh / "unsloth" / "kernels" / "sizes.py").read_text() == header + "\nSIZE = 1\n"


def test_an_import_without_a_home_is_an_error(world, checkout):
    write(world.root, {"unsloth_ext/nf4/kernel.py": OUR_FILE})
    trailers = usual("nf4.kernel", Room_File="unsloth_ext/nf4/kernel.py -> unsloth/kernels/kernel.py")
    commit(checkout, "Add the kernel", {"unsloth/kernels/kernel.py": "# Theirs.\n"}, **trailers)
    refused(world, checkout, 2, "imports unsloth_ext.", "which has no home upstream", "Room-Import:")


def test_the_base_repository_is_a_checkout_to_work_in(world, shared, tmp_path, capsys):
    code, said = world.run("base", "unsloth", BASE, capsys=capsys)
    repository = said.split("git clone ")[1].split()[0]
    git(tmp_path, "clone", "-q", repository, "work")
    assert code == 0 and world.run("apply", "--unsloth", tmp_path / "work") == (0, "")
    changed = (tmp_path / "work" / "unsloth" / "loss.py").read_text()
    assert changed.count(FIRST[1]) == 1 and len(changed) > len(LOSS)
    assert "zero difference" in world.run("export", "--unsloth", tmp_path / "work", capsys=capsys)[1]
