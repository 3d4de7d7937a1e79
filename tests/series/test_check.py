"""`patches check` finds each thing that can be wrong, says which file, and what to do."""

import json

import pytest
from made_up import ROOM, TEST, write

from unsloth_ext.errors import UsageError
from unsloth_ext.series import layout

FIRST_PATCH, SECOND_PATCH = "0001-Square-the-loss.patch", "0002-Read-the-keywords.patch"


def test_a_good_series_has_no_problems(world, capsys):
    code, said = world.run("check", capsys=capsys)
    assert code == 0 and said == "patches are in order: 2 on unsloth 2026.1.2\n"
    code, said = world.run("check", "--json", capsys=capsys)
    assert json.loads(said) == {"ok": True, "problems": []}


def test_list_shows_what_each_patch_is_for(world, capsys):
    code, said = world.run("list", capsys=capsys)
    assert code == 0 and "loss.square" in said and "not-yet" in said and "unsloth >=2026.1.1" in said
    rows = json.loads(world.run("list", "--json", capsys=capsys)[1])
    assert [(row["patch"], row["id"]) for row in rows] == [
        (FIRST_PATCH, "loss.square"),
        (SECOND_PATCH, "loss.keywords"),
    ]


def edited(name, old, new):
    def change(world):
        path = world.root / name
        content = path.read_text()
        assert old in content
        path.write_text(content.replace(old, new))

    return change


def patch(name, old, new):
    return edited(f"patches/unsloth/{name}", old, new)


def added(name, content=""):
    return lambda world: write(world.root, {name: content})


def removed(name):
    return lambda world: (world.root / name).unlink()


PROBLEMS = {
    "an orphan patch": (added("patches/unsloth/0003-More.patch", "x"), ["0003-More.patch is not listed"]),
    "a missing patch": (removed(f"patches/unsloth/{FIRST_PATCH}"), ["lists files that do not exist", FIRST_PATCH]),
    "a patch listed twice": (
        edited("patches/unsloth/series", f"{FIRST_PATCH}\n", f"{FIRST_PATCH}\n{FIRST_PATCH}\n"),
        ["listed twice"],
    ),
    "no series file": (removed("patches/unsloth/series"), ["cannot read", "series"]),
    "a wrong checksum": (edited("patches/unsloth/BASE", "tree: ", "tree: 0"), ["BASE says 0"]),
    "an order that does not apply": (
        edited("patches/unsloth/series", f"{FIRST_PATCH}\n{SECOND_PATCH}", f"{SECOND_PATCH}\n{FIRST_PATCH}"),
        ["should be named 0001-Read-the-keywords.patch"],
    ),
    "no Forwarded": (patch(FIRST_PATCH, "Forwarded: not-yet\n", ""), [FIRST_PATCH, "no Forwarded: trailer"]),
    "a strange Forwarded": (patch(FIRST_PATCH, "not-yet", "soon"), ["Forwarded: soon is none of"]),
    "no Applies-To": (patch(FIRST_PATCH, "Applies-To: unsloth >=2026.1.1\n", ""), ["no Applies-To: trailer"]),
    "an Applies-To without the base": (patch(FIRST_PATCH, ">=2026.1.1", ">=2027"), ["Applies-To excludes the base"]),
    "an Applies-To of another package": (
        patch(FIRST_PATCH, "unsloth >=", "torch >="),
        ["no Applies-To line speaks of unsloth"],
    ),
    "no License": (patch(FIRST_PATCH, "License: Apache-2.0\n", ""), ["no License: trailer"]),
    "no id": (patch(FIRST_PATCH, "Unsloth-Ext-Patch: loss.square\n", ""), ["no Unsloth-Ext-Patch: trailer"]),
    "an id twice": (patch(FIRST_PATCH, "loss.square", "loss.keywords"), ["both have Unsloth-Ext-Patch: loss.keywords"]),
    "no reason": (patch(FIRST_PATCH, "Why it is needed.\n\n", ""), ["does not say why it exists"]),
    "a patch edited by hand": (
        patch(FIRST_PATCH, "+    return (x - y) ** 2", "+    return (x - y) ** 3"),
        ["does not export to itself", "+index"],
    ),
    "a patch that does not apply": (
        patch(FIRST_PATCH, "-    return x - y", "-    return y - x"),
        ["conflict", "on its own base"],
    ),
    "code that moved on": (
        edited("unsloth_ext/loss/keywords.py", "=True", "=False"),
        [SECOND_PATCH, "behind this repository", "follow_wrapped = False"],
    ),
    "a test that moved on": (
        added("upstream_tests/unsloth/tests/test_loss.py", TEST + "\n\nX = 1\n"),
        ["behind this", "+X = 1"],
    ),
    "a test that no patch carries": (
        added("upstream_tests/unsloth/tests/test_more.py"),
        ["test_more.py travels in no patch"],
    ),
    "a patch without its page": (
        removed("pr_descriptions/Square-the-loss.md"),
        ["has no pr_descriptions/Square-the-loss.md"],
    ),
    "a page without its patch": (added("pr_descriptions/Another.md"), ["Another.md describes no patch"]),
    "a new file in another format": (
        added("upstream_tests/unsloth/tests/test_loss.py", "def test_loss():\n    assert f(a=1)\n"),
        ["tests/test_loss.py is not in upstream's format", "+    assert f(a = 1)", "F821"],
    ),
}


@pytest.mark.parametrize("change, words", PROBLEMS.values(), ids=PROBLEMS)
def test_a_problem_is_found_and_named(world, capsys, change, words):
    change(world)
    if words[0].startswith("tests/test_loss.py"):
        assert world.run("export")[0] == 0
        capsys.readouterr()
    said = world.problems(capsys)
    for word in words:
        assert word in said, said


def test_exporting_repairs_what_moved_on(world, capsys):
    edited("unsloth_ext/loss/keywords.py", "=True", "=False")(world)
    added("upstream_tests/unsloth/tests/test_loss.py", TEST + "\n\nX = 1\n")(world)
    assert world.problems(capsys)
    assert world.run("export")[0] == 0
    capsys.readouterr()
    assert world.problems(capsys) == ""


def test_a_file_that_was_not_clean_before_need_not_be(world, capsys):
    """loss.py is in upstream's format until the first patch, which is told; the second one then need not clean it up."""
    patch(FIRST_PATCH, "+    return (x - y) ** 2", "+    return (x  -  y) ** 2")(world)
    world.run("export")
    capsys.readouterr()
    said = world.problems(capsys)
    assert f"{FIRST_PATCH}: unsloth/loss.py is not in upstream's format" in said
    assert SECOND_PATCH not in said, "the file was not clean any more when the second patch came"


def test_format_puts_files_into_upstreams_format(world, tmp_path, capsys):
    write(tmp_path, {"a.py": "f(a=1)\n", "b.py": "f(a = 1)\n"})
    assert world.run("format", tmp_path / "a.py", tmp_path / "b.py", capsys=capsys) == (
        0,
        f"formatted {tmp_path}/a.py\n",
    )
    assert (tmp_path / "a.py").read_text() == "f(a = 1)\n"
    assert world.run("format", tmp_path / "missing.py")[0] == 2


def test_the_repository_is_found_or_asked_for(world, tmp_path, monkeypatch):
    from unsloth_ext.errors import UsageError
    from unsloth_ext.series import layout

    monkeypatch.setattr(layout, "__file__", str(tmp_path / "installed" / "unsloth_ext" / "series" / "layout.py"))
    with pytest.raises(UsageError, match="give --root PATH"):
        layout.find_repository()
    monkeypatch.chdir(world.root / "unsloth_ext" / "loss")
    assert layout.find_repository().root == world.root.resolve()
    with pytest.raises(UsageError, match="holds no patches"):
        layout.find_repository(str(tmp_path / "nowhere"))


def test_our_code_is_only_read(world, capsys):
    write(world.root, {"unsloth_ext/loss/keywords.py": 'raise SystemExit("imported")\n' + ROOM})
    assert world.problems(capsys) == ""


def test_a_folder_without_patches_is_said_plainly(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="holds no patches/unsloth folder"):
        layout.find_repository(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(layout, "__file__", str(tmp_path / "a" / "b" / "layout.py"))
    with pytest.raises(
        UsageError, match="neither this installation nor the current folder holds a patches/unsloth folder"
    ):
        layout.find_repository()
