"""Applying to installed packages without git: refusals, kills in the middle, and the way back to the very bytes."""

import shutil

import pytest
from made_up import BASE, FIRST, LOSS, release, snapshot, write

from unsloth_ext.errors import UsageError
from unsloth_ext.series.apply import open_target
from unsloth_ext.series.layout import Repository

SQUARED = FIRST[1].strip().encode()


@pytest.fixture
def zoo(world):
    """A series on the made-up unsloth_zoo, whose wheel has CRLF: the first patch of the other series, for another path."""
    assert world.run("base", "unsloth-zoo", BASE)[0] == 0
    patch = (world.series / "0001-Square-the-loss.patch").read_text().replace("unsloth/", "unsloth_zoo/")
    patch = patch.replace("Applies-To: unsloth ", "Applies-To: unsloth_zoo ")
    write(
        world.root / "patches" / "unsloth-zoo",
        {"0001-Square-the-loss.patch": patch, "series": "0001-Square-the-loss.patch\n"},
    )


def test_apply_then_unapply_is_the_identity(world, plain, capsys):
    tree = plain()
    before = snapshot(tree)
    code, said = world.run("apply", "--unsloth", tree, capsys=capsys)
    assert code == 0 and f"applied to {BASE}" in said and "plain tree" in said
    assert SQUARED in (tree / "unsloth" / "loss.py").read_bytes()
    assert (tree / "unsloth" / "new" / "part.py").is_file()
    assert not (tree / "tests").exists(), "upstream's tests are not installed"
    patched = snapshot(tree)
    code, said = world.run("apply", "--unsloth", tree / "unsloth", capsys=capsys)
    assert code == 0 and "already applied, nothing to do" in said and snapshot(tree) == patched
    code, said = world.run("unapply", "--unsloth", tree, capsys=capsys)
    assert code == 0 and "taken out" in said
    assert snapshot(tree) == before and not (tree / "unsloth" / "new").exists()
    code, said = world.run("unapply", "--unsloth", tree, capsys=capsys)
    assert code == 0 and "nothing to do" in said


def test_a_windows_wheel_keeps_its_line_endings(world, zoo, plain):
    tree = plain(package="unsloth_zoo")
    before = snapshot(tree)
    assert world.run("apply", "--zoo", tree) == (0, "")
    content = (tree / "unsloth_zoo" / "loss.py").read_bytes()
    assert SQUARED + b"\r\n" in content and content.count(b"\r\n") == content.count(b"\n")
    assert world.run("unapply", "--zoo", tree) == (0, "")
    assert snapshot(tree) == before


def refused(world, tree, *words, command="apply"):
    before = snapshot(tree)
    code, said = world.run(command, "--unsloth", tree)
    assert code == 3, said
    assert snapshot(tree) == before and "nothing was changed" in said
    for word in words:
        assert word in said, said


@pytest.mark.parametrize("change", ["edit", "delete", "elsewhere", "in the way"])
def test_a_tree_that_is_not_the_release_is_refused(world, plain, change):
    tree = plain()
    if change == "edit":
        write(tree, {"unsloth/loss.py": LOSS + "mine = 1\n"})
    elif change == "delete":
        (tree / "unsloth" / "loss.py").unlink()
    elif change == "elsewhere":
        write(tree, {"unsloth/__init__.py": "mine = 1\n"})
    else:
        write(tree, {"unsloth/new/part.py": "mine = 1\n"})
    path = {"elsewhere": "unsloth/__init__.py", "in the way": "unsloth/new/part.py"}.get(change, "unsloth/loss.py")
    refused(world, tree, f"\n    {path}\n", f"pip install --force-reinstall --no-deps unsloth=={BASE}")


def test_extra_files_do_not_matter(world, plain):
    tree = plain()
    write(tree, {"unsloth/mine.py": "mine = 1\n"})
    assert world.run("apply", "--unsloth", tree) == (0, "")


def test_a_conflict_and_an_excluded_release_are_refused(world, plain):
    refused(world, plain("2026.1.5"), "0001-Square-the-loss.patch: conflict", "return abs(x - y)")
    patch = world.series / "0001-Square-the-loss.patch"
    patch.write_text(patch.read_text().replace(">=2026.1.1", f">={BASE}"))
    refused(world, plain("2026.1.1", name="older"), "patches exclude", "2026.1.1")


def test_another_release_is_merged(world, plain, capsys):
    tree = plain("2026.1.3")
    code, said = world.run("apply", "--unsloth", tree, capsys=capsys)
    assert code == 0 and f"merged onto 2026.1.3 (series made for {BASE})" in said
    content = (tree / "unsloth" / "loss.py").read_bytes()
    assert SQUARED in content and b"def later" in content


def test_what_upstream_has_already_is_left_out(world, plain, capsys):
    code, said = world.run("apply", "--unsloth", plain("2026.1.4"), capsys=capsys)
    assert code == 0 and "already there    0001-Square-the-loss.patch" in said


def test_unapply_refuses_edited_files(world, plain):
    tree = plain()
    world.run("apply", "--unsloth", tree)
    write(tree, {"unsloth/text.py": "TEXT = 3\n"})
    refused(world, tree, "edited since", "unsloth/text.py", command="unapply")
    refused(world, tree, "edited since", "unsloth/text.py")


def test_a_patched_copy_without_notes_is_recognised(world, plain, tmp_path, capsys):
    tree = plain()
    before = snapshot(tree / "unsloth")
    world.run("apply", "--unsloth", tree)
    shutil.copytree(tree / "unsloth", tmp_path / "copy" / "unsloth")
    code, said = world.run("apply", "--unsloth", tmp_path / "copy", capsys=capsys)
    assert code == 0 and "already applied" in said
    assert world.run("unapply", "--unsloth", tmp_path / "copy")[0] == 0
    assert snapshot(tmp_path / "copy" / "unsloth") == before


def test_a_partly_patched_copy_gets_the_rest(world, plain, capsys):
    tree = plain()
    write(tree, {"unsloth/loss.py": LOSS.replace(*FIRST)})
    code, said = world.run("apply", "--unsloth", tree, capsys=capsys)
    assert code == 0 and "the rest" in said
    assert "already applied  0001-Square-the-loss.patch" in said and "clean            0002" in said
    assert (tree / "unsloth" / "new" / "part.py").is_file()
    assert world.run("unapply", "--unsloth", tree)[0] == 0
    assert (tree / "unsloth" / "loss.py").read_text() == LOSS


def test_an_older_form_of_the_series_is_replaced(world, plain):
    tree = plain()
    before = snapshot(tree)
    world.run("apply", "--unsloth", tree)
    patch = world.series / "0001-Square-the-loss.patch"
    patch.write_text(patch.read_text().replace("+    return (x - y) ** 2", "+    return (x - y) ** 4"))
    (world.series / "series").write_text("0001-Square-the-loss.patch\n")
    assert world.run("apply", "--unsloth", tree) == (0, "")
    assert b"** 4" in (tree / "unsloth" / "loss.py").read_bytes()
    assert not (tree / "unsloth" / "new").exists()
    assert world.run("unapply", "--unsloth", tree) == (0, "")
    assert snapshot(tree) == before


def test_notes_of_a_release_that_was_installed_over_are_ignored(world, plain):
    tree = plain()
    world.run("apply", "--unsloth", tree)
    for version in (BASE, "2026.1.3"):
        for name, content in release(version).items():
            write(tree, {f"unsloth/{name}": content})
        shutil.rmtree(tree / "unsloth" / "new", ignore_errors=True)
        assert world.run("apply", "--unsloth", tree) == (0, "")
        assert SQUARED in (tree / "unsloth" / "loss.py").read_bytes()
    assert world.run("unapply", "--unsloth", tree) == (0, "")
    assert (tree / "unsloth" / "loss.py").read_text() == release("2026.1.3")["loss.py"]


@pytest.mark.parametrize(
    "command, target", [("apply", "os.replace"), ("unapply", "os.replace"), ("unapply", "pathlib.Path.unlink")]
)
def test_a_kill_at_any_replacement_is_undone(world, plain, killed_at, command, target):
    """The child really dies by SIGKILL, before each rename or deletion in turn."""
    tree, other = plain(), {"apply": "unapply", "unapply": "apply"}[command]
    if command == "unapply":
        world.run("apply", "--unsloth", tree)

    def installed():
        return {path: content for path, content in snapshot(tree).items() if not path.startswith(".unsloth-ext")}

    start, steps = installed(), 0
    while killed_at(world, [command, "--unsloth", tree], target, steps + 1) is None:
        steps += 1
        # the way back begins with the recovery, whether or not the killed command had come to its end
        code, said = world.run(other, "--unsloth", tree)
        assert code == 0, said
        assert installed() == start, f"killed before {target} number {steps}"
    assert steps and installed() != start


def test_edits_made_after_a_kill_are_never_overwritten(world, plain, killed_at):
    tree = plain()
    step = 1
    while not (tree / ".unsloth-ext-unsloth" / "journal.json").exists():
        assert killed_at(world, ["apply", "--unsloth", tree], "os.replace", step) is None
        step += 1
    assert killed_at(world, ["apply", "--unsloth", tree], "os.replace", step + 3) is None
    write(tree, {"unsloth/loss.py": "my work\n"})
    code, said = world.run("apply", "--unsloth", tree)
    assert code in (1, 3) and "unsloth/loss.py" in said
    assert (tree / "unsloth" / "loss.py").read_text() == "my work\n"


def test_a_failed_write_changes_nothing(world, plain, monkeypatch):
    from unsloth_ext.series import plain_tree

    tree = plain()
    before = snapshot(tree)
    original, calls = plain_tree.write_atomically, []

    def full_disk(path, content):
        calls.append(path)
        if path.name == "text.py" and len([p for p in calls if p.name == "text.py"]) == 1:
            raise OSError(28, "No space left on device")
        return original(path, content)

    monkeypatch.setattr(plain_tree, "write_atomically", full_disk)
    code, said = world.run("apply", "--unsloth", tree)
    assert code == 1 and "No space left" in said
    assert snapshot(tree) == before


def test_two_commands_at_once_do_not_meet(world, plain):
    from unsloth_ext.series.journal import Journal

    tree = plain()
    with Journal(tree / ".unsloth-ext-unsloth").locked():
        code, said = world.run("apply", "--unsloth", tree)
    assert code == 3 and "another unsloth-ext works on" in said
    assert world.run("apply", "--unsloth", tree) == (0, "")


def test_the_version_is_read_as_the_run_time_patches_read_it(world, plain):
    tree = plain()
    series = Repository(world.root).series("unsloth")
    write(tree, {"unsloth/_version.py": f'__version__ = "{BASE}"\nsyntax of a later Python\n'})
    assert open_target(series, tree).version == BASE
    write(tree, {"unsloth/_version.py": ""})
    with pytest.raises(UsageError, match="says its __version__ nowhere"):
        open_target(series, tree)


def test_a_tilde_is_expanded_and_an_empty_path_is_refused(world, plain, tmp_path, monkeypatch, capsys):
    plain()
    monkeypatch.setenv("HOME", str(tmp_path))
    code, said = world.run("apply", "--unsloth", "~/site-packages", capsys=capsys)
    assert code == 0 and str(tmp_path / "site-packages") in said
    monkeypatch.chdir(tmp_path / "site-packages")
    before = snapshot(tmp_path / "site-packages")
    with pytest.raises(SystemExit) as exit:
        world.run("unapply", "--unsloth", "")
    assert exit.value.code == 2 and "argument --unsloth: the path is empty" in capsys.readouterr().err
    assert snapshot(tmp_path / "site-packages") == before
