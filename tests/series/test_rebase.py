"""The series on other releases: what becomes of each patch, and moving the base."""

import json

import pytest
from made_up import BASE, FIRST, git, snapshot, write


def outcomes(world, capsys, version, *more):
    code, said = world.run("rebase", version, "--json", *more, capsys=capsys)
    (trial,) = json.loads(said)
    return code, [patch["result"] for patch in trial["patches"]]


def test_each_patch_is_judged(world, capsys):
    before = snapshot(world.root)
    assert outcomes(world, capsys, BASE) == (0, ["clean", "clean"])
    assert outcomes(world, capsys, "2026.1.1") == (0, ["clean", "clean"])
    assert outcomes(world, capsys, "2026.1.4") == (0, ["already there", "clean"])
    assert outcomes(world, capsys, "2026.1.5") == (1, ["conflict", "clean"])
    first = world.series / "0001-Square-the-loss.patch"
    first.write_text(first.read_text().replace(">=2026.1.1", f">={BASE}"))
    assert outcomes(world, capsys, "2026.1.1") == (1, ["not for this release", "clean"])
    world.run("rebase", "2026.1.5")
    assert "return abs(x - y)" in capsys.readouterr().out
    first.write_text(first.read_text().replace(f">={BASE}", ">=2026.1.1"))
    assert snapshot(world.root) == before


def test_write_moves_the_series_to_the_release(world, capsys):
    code, said = world.run("rebase", "2026.1.3", "--write", capsys=capsys)
    assert code == 0, said
    assert "version: 2026.1.3" in (world.series / "BASE").read_text()
    assert world.problems(capsys) == ""
    assert outcomes(world, capsys, BASE) == (0, ["clean", "clean"]), "and back again"


def test_write_drops_what_upstream_has(world, capsys):
    code, said = world.run("rebase", "2026.1.4", "--write", capsys=capsys)
    assert code == 0 and "0001-Square-the-loss.patch left the series" in said
    assert (world.series / "series").read_text() == "0001-Read-the-keywords.patch\n"
    (world.root / "pr_descriptions" / "Square-the-loss.md").unlink()
    assert world.problems(capsys) == ""


def test_write_refuses_when_anything_conflicts(world):
    before = snapshot(world.root)
    code, said = world.run("rebase", "2026.1.5", "--write")
    assert code == 3 and "nothing was written" in said and "return abs(x - y)" in said
    assert snapshot(world.root) == before


def test_a_merge_needs_what_earlier_patches_made(world, clone, capsys):
    """The second patch's own base is a blob that only the first patch, on its own base, makes."""
    checkout = clone()
    assert world.run("apply", "--unsloth", checkout) == (0, "")
    changed = (checkout / "unsloth" / "loss.py").read_text()
    assert FIRST[1] in changed and "follow_wrapped" in changed
    older = clone("2026.1.1", "older")
    text = (older / "unsloth" / "loss.py").read_text().replace("SCALE = 1\n", "SCALE = 2\n")
    write(older, {"unsloth/loss.py": text.replace("\n\n# line 0\n# line 1\n", "\n\n# first\n# line 1\n")})
    git(older, "commit", "-q", "-a", "-m", "Upstream moves on")
    code, said = world.run("apply", "--unsloth", older, capsys=capsys)
    assert code == 0 and said.count("merged  ") == 2, said


def test_the_zoo_release_that_goes_with_a_release(world):
    from unsloth_ext.series.rebase import zoo_version_for

    assert zoo_version_for("2026.1.3") == BASE, "the newest that is not newer"
    assert zoo_version_for("2026.1.1") == "2026.1.1"
    assert zoo_version_for("2026.1.5") == "2026.1.4"


def test_the_matrix_has_a_row_for_each_release_and_patch(world, tmp_path, capsys):
    assert world.run("base", "unsloth-zoo", BASE)[0] == 0
    capsys.readouterr()
    code, said = world.run(
        "matrix", "--releases", "3", "--out", tmp_path / "out" / "matrix.json", "--json", capsys=capsys
    )
    rows = json.loads((tmp_path / "out" / "matrix.json").read_text())["rows"]
    assert code == 0 and json.loads(said)["rows"] == rows
    assert [(row["release"], row["result"]) for row in rows] == [
        ("2026.1.5", "conflict"),
        ("2026.1.5", "clean"),
        ("2026.1.4", "already there"),
        ("2026.1.4", "clean"),
        ("2026.1.3", "clean"),
        ("2026.1.3", "clean"),
    ]
    assert rows[0]["conflicts"][0]["file"] == "unsloth/loss.py" and rows[0]["base"] == BASE
    assert world.run("matrix", "--releases", "0")[0] == 2


@pytest.mark.parametrize(
    "words", [("rebase", "abc"), ("rebase", BASE, "--zoo-version", "abc"), ("base", "unsloth", "abc")]
)
def test_what_is_no_version_is_named(world, words):
    code, said = world.run(*words)
    assert code == 2 and said.startswith("'abc' is not a version")


def test_an_unknown_release_is_one_line_with_the_newest(world):
    newest = "2026.1.5, 2026.1.4, 2026.1.3, 2026.1.2, 2026.1.1"
    assert world.run("rebase", "2099.1.1") == (2, f"there is no release 2099.1.1 of unsloth; the newest are {newest}")
