"""Wheels, trees and base repositories in the cache: made once, checked always, rebuilt when damaged."""

import json
import subprocess
import sys

import pytest
from made_up import BASE, git, make_wheel, release

from unsloth_ext.errors import UnslothExtError, UsageError
from unsloth_ext.series.base import Base, make_base, pristine_repository, pristine_tree, tree_hash


@pytest.fixture
def cache(world, tmp_path, monkeypatch):
    """A cache of one's own to damage."""
    monkeypatch.setenv("UNSLOTH_EXT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nothing"))


def test_a_release_is_downloaded_once_and_holds_only_the_package(cache, monkeypatch, tmp_path):
    tree = pristine_tree("unsloth", BASE)
    assert {path.name for path in tree.iterdir()} == {"unsloth"}
    assert (tree / "unsloth" / "loss.py").read_text() == release(BASE)["loss.py"]
    offline(monkeypatch, tmp_path)
    assert pristine_tree("unsloth", BASE) == tree
    assert pristine_repository("unsloth", BASE).is_dir()
    with pytest.raises(UnslothExtError, match="could not download"):
        pristine_tree("unsloth", "2026.1.1")


def test_the_base_commit_depends_on_the_files_alone(cache, monkeypatch, tmp_path):
    first = git(pristine_repository("unsloth", BASE), "rev-parse", "base", "base^{tree}").split()
    monkeypatch.setenv("UNSLOTH_EXT_CACHE", str(tmp_path / "second"))
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    assert git(pristine_repository("unsloth", BASE), "rev-parse", "base", "base^{tree}").split() == first
    assert tree_hash(pristine_tree("unsloth", BASE)) == first[1]


def test_a_windows_wheel_has_lf_in_git_and_crlf_as_installed(cache):
    tree = pristine_tree("unsloth_zoo", BASE)
    assert b"\r\n" in (tree / "unsloth_zoo" / "loss.py").read_bytes()
    repository = pristine_repository("unsloth_zoo", BASE)
    for name in ("loss.py", "page.html"):
        blob = subprocess.run(["git", "show", f"base:unsloth_zoo/{name}"], cwd=repository, capture_output=True).stdout
        assert blob == (tree / "unsloth_zoo" / name).read_bytes().replace(b"\r\n", b"\n")


def test_one_crlf_file_in_an_lf_wheel_stays_as_it_is(cache, index, monkeypatch, tmp_path):
    make_wheel(tmp_path / "index", "mixed", "1.0", {"__init__.py": "a = 1\n", "LICENSE": "x\r\n"})
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    repository = pristine_repository("mixed", "1.0")
    shown = subprocess.run(["git", "show", "base:mixed/LICENSE"], cwd=repository, capture_output=True).stdout
    assert shown == b"x\r\n"


@pytest.mark.parametrize("damage", ["edited", "deleted", "half", "wheel", "record"])
def test_a_damaged_cache_is_rebuilt(cache, damage):
    base = make_base("unsloth", BASE)
    tree = pristine_tree("unsloth", BASE, base)
    wheel = cache / "wheels" / base.wheel
    if damage == "edited":
        (tree / "unsloth" / "loss.py").write_text("broken")
    elif damage == "deleted":
        (tree / "unsloth" / "loss.py").unlink()
    elif damage == "half":
        (tree / "unsloth" / "stray.py").write_text("")
    elif damage == "wheel":
        wheel.write_bytes(wheel.read_bytes()[:100])
        (tree / "unsloth" / "loss.py").unlink()
    else:
        (cache / "wheels" / f"unsloth-{BASE}.json").write_text('{"wheel": "half')
    again = pristine_tree("unsloth", BASE, base)
    assert tree_hash(again) == base.tree
    assert make_base("unsloth", BASE) == base
    assert not [path for path in cache.rglob(".*") if path.name.startswith((".unpack", ".build", ".download", ".lf"))]


@pytest.mark.parametrize("damage", ["object", "ref", "empty"])
def test_a_damaged_repository_is_rebuilt(cache, damage):
    repository = pristine_repository("unsloth", BASE)
    commit = git(repository, "rev-parse", "base")
    if damage == "object":
        blob = git(repository, "rev-parse", "base:unsloth/loss.py").strip()
        path = repository / "objects" / blob[:2] / blob[2:]
        path.chmod(0o644)
        path.write_bytes(b"broken")
    elif damage == "ref":
        (repository / "refs" / "heads" / "base").write_text("")
    else:
        (repository / "HEAD").unlink()
    assert pristine_repository("unsloth", BASE) == repository
    assert git(repository, "rev-parse", "base") == commit
    git(repository, "fsck", "--strict")


def test_python_caches_do_not_count(cache):
    tree = pristine_tree("unsloth", BASE)
    (tree / "unsloth" / "__pycache__").mkdir()
    (tree / "unsloth" / "__pycache__" / "loss.pyc").write_bytes(b"x")
    pristine_tree("unsloth", BASE)
    assert (
        tree / "unsloth" / "__pycache__" / "loss.pyc"
    ).exists(), "somebody imports from it: it was not to be rebuilt"


def test_another_wheel_than_base_names_is_refused(cache):
    base = make_base("unsloth", BASE)
    other = Base(base.package, base.version, base.wheel, "0" * 64, "1" * 40)
    with pytest.raises(UnslothExtError, match="BASE says 0000"):
        pristine_tree("unsloth", BASE, other)


def test_what_was_seen_of_another_release_is_recorded(cache, index):
    pristine_tree("unsloth", "2026.1.1")
    record = json.loads((cache / "wheels" / "unsloth-2026.1.1.json").read_text())
    assert record["wheel"] == "unsloth-2026.1.1-py3-none-any.whl" and len(record["sha256"]) == 64


def test_processes_at_once_do_not_disturb_each_other(cache):
    code = f"from unsloth_ext.series.base import *; print(tree_hash(pristine_tree('unsloth', '{BASE}')), pristine_repository('unsloth', '{BASE}'))"
    running = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = {process.communicate()[0] for process in running}
    assert len(said) == 1 and all(process.returncode == 0 for process in running)


def test_base_files_say_what_is_wrong(tmp_path):
    path = tmp_path / "BASE"
    with pytest.raises(UsageError, match="patches base"):
        Base.read(path)
    path.write_text("package: unsloth\ncolour: red\n")
    with pytest.raises(UsageError, match=r"missing \['version'.*unknown \['colour'\]"):
        Base.read(path)
    base = Base("unsloth", "1", "w.whl", "a", "b")
    base.write(path)
    assert Base.read(path) == base


def test_base_does_not_pull_the_release_from_under_patches(world):
    code, said = world.run("base", "unsloth", "2026.1.3")
    assert code == 3 and "rebase 2026.1.3 --write" in said
    assert f"version: {BASE}" in (world.series / "BASE").read_text()
    assert world.run("base", "unsloth_zoo", BASE)[0] == 0
    assert (world.root / "patches" / "unsloth-zoo" / "series").read_text() == ""
    assert world.run("base", "numpy", "1")[0] == 2


@pytest.mark.parametrize(("name", "value"), [("HOME", "file"), ("UNSLOTH_EXT_CACHE", "file/cache")])
def test_a_cache_that_cannot_be_made_says_what_to_set(world, tmp_path, monkeypatch, name, value):
    (tmp_path / "file").write_text("")
    for variable in ("UNSLOTH_EXT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv(name, str(tmp_path / value))
    code, said = world.run("base", "unsloth", BASE)
    assert code == 2 and str(tmp_path / value) in said and "Set UNSLOTH_EXT_CACHE" in said
