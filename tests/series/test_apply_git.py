"""Applying to git checkouts: what lands, what is refused, and that a refusal or a kill changes nothing at all."""

import json

import pytest
from made_up import BASE, FIRST, LOSS, TEST, commit, git, release, snapshot, usual, write

SUBJECTS = ["Read the keywords", "Square the loss"]  # newest first


def subjects(checkout, count):
    return git(checkout, "log", "--format=%s", f"-{count}").splitlines()


def test_apply_makes_the_commits_and_leaves_nothing_else(world, clone, capsys):
    checkout = clone()
    before = git(checkout, "rev-parse", "HEAD").strip()
    code, said = world.run("apply", "--unsloth", checkout, capsys=capsys)
    assert code == 0 and f"applied to {BASE}" in said
    assert subjects(checkout, 3) == [*SUBJECTS, f"Release {BASE}"]
    assert git(checkout, "rev-parse", "HEAD~2").strip() == before
    assert git(checkout, "status", "--porcelain", "--ignored") == ""
    assert git(checkout, "symbolic-ref", "HEAD").strip() == "refs/heads/main"
    assert FIRST[1] in (checkout / "unsloth" / "loss.py").read_text()
    assert (checkout / "tests" / "test_loss.py").read_text() == TEST
    git(checkout, "fsck", "--strict")
    assert not (checkout / ".git" / "objects" / "info" / "alternates").exists()
    assert not (checkout / ".git" / "FETCH_HEAD").exists() and not (checkout / ".git" / "unsloth-ext").exists()
    assert git(checkout, "log", "-1", "--format=%an").strip() == "Dev"


def test_a_second_apply_says_so_and_changes_nothing(world, clone, capsys):
    checkout = clone()
    world.run("apply", "--unsloth", checkout)
    before = snapshot(checkout)
    code, said = world.run("apply", "--unsloth", checkout, capsys=capsys)
    assert code == 0 and "already applied, nothing to do" in said
    assert snapshot(checkout) == before


def test_the_missing_rest_is_applied(world, clone, capsys):
    checkout = clone()
    world.run("apply", "--unsloth", checkout)
    git(checkout, "reset", "-q", "--hard", "HEAD~1")
    commit(checkout, "Later work", {"other.txt": "x\n"})
    code, said = world.run("apply", "--unsloth", checkout, capsys=capsys)
    assert code == 0 and "the rest" in said
    assert subjects(checkout, 3) == ["Read the keywords", "Later work", "Square the loss"]


def test_the_package_folder_and_a_detached_head_will_do(world, clone):
    checkout = clone()
    git(checkout, "checkout", "-q", "--detach")
    assert world.run("apply", "--unsloth", checkout / "unsloth")[0] == 0
    assert subjects(checkout, 2) == SUBJECTS
    assert git(checkout, "symbolic-ref", "-q", "HEAD", check=False) == ""
    assert subjects_of_main(checkout) == f"Release {BASE}"


def subjects_of_main(checkout):
    return git(checkout, "log", "-1", "--format=%s", "main").strip()


def test_a_shallow_clone_and_a_worktree_will_do(world, clone, tmp_path):
    checkout = clone()
    git(tmp_path, "clone", "-q", "--depth=1", f"file://{checkout}", "shallow")
    git(checkout, "worktree", "add", "-q", str(tmp_path / "tree"))
    for place in (tmp_path / "shallow", tmp_path / "tree"):
        assert world.run("apply", "--unsloth", place) == (0, "")
        assert subjects(place, 2) == SUBJECTS
        git(place, "fsck", "--strict")
    assert subjects_of_main(checkout) == f"Release {BASE}"


def test_another_release_is_merged_and_says_so(world, clone, capsys):
    for version in ("2026.1.1", "2026.1.3"):
        checkout = clone(version, version)
        code, said = world.run("apply", "--unsloth", checkout, capsys=capsys)
        assert code == 0 and f"merged onto {version} (series made for {BASE})" in said
        merged = (checkout / "unsloth" / "loss.py").read_text()
        assert FIRST[1] in merged and ("import sys" in merged or "def later" in merged)


def test_context_that_moved_needs_the_base_blobs(world, clone, capsys):
    """Lines beside the change differ, so only a three-way merge with blobs that this clone never had can place it."""
    checkout = clone()
    moved = LOSS.replace(f"{FIRST[0]}\n\n# line 0", f"{FIRST[0]}\n\n# first line")
    commit(checkout, "Upstream moves on", {"unsloth/loss.py": moved})
    code, said = world.run("apply", "--unsloth", checkout, capsys=capsys)
    assert code == 0 and "merged           0001-Square-the-loss.patch" in said
    assert (checkout / "unsloth" / "loss.py").read_text().count(FIRST[1]) == 1


def test_a_file_that_upstream_renamed_is_found(world, clone, capsys):
    checkout = clone()
    git(checkout, "mv", "unsloth/loss.py", "unsloth/losses.py")
    git(checkout, "mv", "unsloth/text.py", "unsloth/texts.py")
    commit(checkout, "Rename")
    code, _ = world.run("apply", "--unsloth", checkout)
    assert code == 0 and FIRST[1] in (checkout / "unsloth" / "losses.py").read_text()


def test_what_upstream_has_already_is_left_out(world, clone, capsys):
    checkout = clone("2026.1.4")
    code, said = world.run("apply", "--unsloth", checkout, capsys=capsys)
    assert code == 0 and "already there    0001-Square-the-loss.patch" in said and "already in release 2026.1.4" in said
    assert subjects(checkout, 2) == ["Read the keywords", "Release 2026.1.4"]


def refused(world, checkout, *words, command="apply"):
    before = snapshot(checkout)
    code, said = world.run(command, "--unsloth", checkout)
    assert code == 3, said
    assert snapshot(checkout) == before
    assert "nothing was changed" in said.lower()
    for word in words:
        assert word in said, said
    assert len(said.splitlines()[-1]) > 20 and said.splitlines()[-1].startswith("  "), "the last line says what to do"


def test_a_conflict_shows_patch_file_hunk_and_lines(world, clone):
    refused(
        world,
        clone("2026.1.5"),
        "0001-Square-the-loss.patch: conflict",
        "unsloth/loss.py:",
        "@@ -",
        "return abs(x - y)",
        "return (x - y) ** 2",
    )


def test_a_file_that_is_gone_is_a_conflict(world, clone):
    checkout = clone()
    git(checkout, "rm", "-q", "unsloth/loss.py")
    commit(checkout, "Drop it")
    refused(
        world,
        checkout,
        "0001-Square-the-loss.patch: conflict",
        "unsloth/loss.py",
        "deleted",
        "+    return (x - y) ** 2",
    )


@pytest.mark.parametrize("staged", [False, True])
def test_uncommitted_changes_are_refused(world, clone, staged):
    checkout = clone()
    write(checkout, {"README.md": "edited\n"})
    if staged:
        git(checkout, "add", "README.md")
    refused(world, checkout, "README.md")


@pytest.mark.parametrize("path", ["tests/test_loss.py", "unsloth/new", "ignored/part.py"])
def test_untracked_files_in_the_way_are_refused(world, clone, path):
    checkout = clone()
    if path.startswith("ignored"):  # git itself would overwrite an ignored file without a word
        commit(checkout, "Ignore", {".gitignore": "unsloth/new/\n"})
        path = "unsloth/new/part.py"
    write(checkout, {path: "mine\n"})
    refused(world, checkout, "unsloth/new/part.py" if "new" in path else path)
    assert (checkout / path).read_text() == "mine\n"


def test_untracked_files_elsewhere_do_not_matter(world, clone):
    checkout = clone()
    write(checkout, {"notes.txt": "mine\n"})
    assert world.run("apply", "--unsloth", checkout) == (0, "")
    assert git(checkout, "status", "--porcelain") == "?? notes.txt\n"


@pytest.mark.parametrize("what", ["merge", "rebase", "am", "cherry-pick", "index.lock"])
def test_unfinished_business_is_refused(world, clone, what, tmp_path):
    checkout = clone()
    git(checkout, "checkout", "-q", "-b", "side")
    commit(checkout, "Side", {"README.md": "side\n"})
    patch = git(checkout, "format-patch", "-1", "--stdout")
    git(checkout, "checkout", "-q", "main")
    commit(checkout, "Main", {"README.md": "main\n"})
    if what == "am":
        write(tmp_path, {"side.patch": patch})
        git(checkout, "am", str(tmp_path / "side.patch"), check=False)
    elif what == "index.lock":
        write(checkout, {".git/index.lock": ""})
    else:
        git(checkout, what, "side", check=False)
    refused(world, checkout, "in the middle of")


def test_a_release_that_a_patch_excludes_is_refused(world, clone):
    first = world.series / "0001-Square-the-loss.patch"
    first.write_text(first.read_text().replace("unsloth >=2026.1.1", f"unsloth >={BASE}"))
    refused(world, clone("2026.1.1"), "0001-Square-the-loss.patch: unsloth >=2026.1.2", "patches rebase 2026.1.1")


def test_bad_targets_are_usage_errors(world, clone, tmp_path):
    assert world.run("apply")[0] == 2
    code, said = world.run("apply", "--unsloth", tmp_path)
    assert code == 2 and "holds no package unsloth" in said
    assert world.run("apply", "--unsloth", tmp_path / "missing")[0] == 2
    code, said = world.run("apply", "--zoo", clone())
    assert code == 2 and "patches base unsloth-zoo" in said


def test_a_users_hooks_signing_and_identity_do_not_matter(world, clone, monkeypatch, tmp_path):
    """Every hook fails, signing is on with no key, and there is no identity."""
    checkout = clone()
    hooks = tmp_path / "hooks"
    for name in (
        "applypatch-msg",
        "pre-applypatch",
        "commit-msg",
        "pre-commit",
        "post-checkout",
        "reference-transaction",
    ):
        write(hooks, {name: "#!/bin/sh\nexit 1\n"})
        (hooks / name).chmod(0o755)
    configuration = (
        f"[core]\n hooksPath = {hooks}\n autocrlf = false\n[commit]\n gpgSign = true\n[user]\n useConfigOnly = true\n"
    )
    write(
        tmp_path,
        {"gitconfig": configuration + "[merge]\n ff = false\n verifySignatures = true\n[log]\n showSignature = true\n"},
    )
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "gitconfig"))
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "nowhere"))
    before = (checkout / ".git" / "config").read_bytes()
    assert world.run("apply", "--unsloth", checkout) == (0, "")
    assert world.run("unapply", "--unsloth", checkout) == (0, "")
    assert world.run("apply", "--unsloth", checkout) == (0, "")
    assert (checkout / ".git" / "config").read_bytes() == before


def test_a_checkout_with_crlf_files_keeps_them(world, clone, tmp_path):
    checkout = clone()
    commit(checkout, "No attributes", {".gitattributes": ""})
    git(tmp_path, "clone", "-q", "-c", "core.autocrlf=true", str(checkout), "windows")
    windows = tmp_path / "windows"
    assert world.run("apply", "--unsloth", windows) == (0, "")
    content = (windows / "unsloth" / "loss.py").read_bytes()
    assert content.count(b"\r\n") == content.count(b"\n") and b"** 2\r\n" in content
    assert git(windows, "status", "--porcelain") == ""


def test_if_the_second_target_fails_the_first_is_put_back(world, clone, plain, monkeypatch):
    """A zoo tree that turns out unwritable after the checkout of unsloth was moved."""
    from unsloth_ext.series import plain_tree

    checkout, zoo = clone(), plain(package="unsloth_zoo")
    assert world.run("base", "unsloth-zoo", BASE)[0] == 0
    series = world.root / "patches" / "unsloth-zoo"
    patch = (world.series / "0001-Square-the-loss.patch").read_text()
    patch = patch.replace("unsloth/loss.py", "unsloth_zoo/loss.py").replace(
        "Applies-To: unsloth ", "Applies-To: unsloth_zoo "
    )
    write(series, {"0001-Square-the-loss.patch": patch, "series": "0001-Square-the-loss.patch\n"})
    before = snapshot(checkout), snapshot(zoo)

    def unwritable(self, path, content):
        raise PermissionError(13, "Permission denied", path)

    with monkeypatch.context() as patched:
        patched.setattr(plain_tree.PlainTree, "_put", unwritable)
        patched.setattr(plain_tree.PlainTree, "recover", lambda self: None)
        code, said = world.run("apply", "--unsloth", checkout, "--zoo", zoo)
    assert code == 1 and "cannot write" in said
    assert snapshot(checkout) == before[0]
    assert world.run("apply", "--unsloth", checkout, "--zoo", zoo) == (0, "")
    assert b"** 2\r\n" in (zoo / "unsloth_zoo" / "loss.py").read_bytes()


@pytest.mark.parametrize("command", ["apply", "unapply"])
def test_a_kill_at_any_step_leaves_all_or_nothing(world, clone, killed_at, command):
    """Before each of the last runs of git, which are those that change the checkout; earlier ones only rehearse."""
    checkout = clone()
    if command == "unapply":
        world.run("apply", "--unsloth", checkout)
    start, head = snapshot(checkout), git(checkout, "rev-parse", "HEAD").strip()
    calls = killed_at(world, [command, "--unsloth", checkout], "subprocess.run", 999)
    end, seen = snapshot(checkout), []
    assert start != end
    for step in range(calls - 7, calls + 1):
        git(checkout, "reset", "-q", "--hard", head)
        assert killed_at(world, [command, "--unsloth", checkout], "subprocess.run", step) is None
        assert snapshot(checkout) in (start, end), f"killed at step {step} of {calls}"
        seen.append(snapshot(checkout) == end)
    assert seen[0] is False
    assert world.run(command, "--unsloth", checkout)[0] == 0 and snapshot(checkout) == end


def test_a_half_done_move_is_undone_by_the_next_command(world, clone):
    """As if git itself was killed in the middle of writing files, with the index already new."""
    checkout = clone()
    world.run("apply", "--unsloth", checkout)
    new = git(checkout, "rev-parse", "HEAD").strip()
    after = (checkout / "unsloth" / "loss.py").read_text()
    git(checkout, "reset", "-q", "--hard", "HEAD~2")
    old, before = git(checkout, "rev-parse", "HEAD").strip(), snapshot(checkout)
    write(checkout, {".git/unsloth-ext/journal.json": json.dumps({"old": old, "new": new})})
    write(checkout, {"unsloth/loss.py": after[:200], "unsloth/new/part.py": "PART = 1\n", "tests/test_loss.py": ""})
    git(checkout, "read-tree", new)
    write(checkout, {"README.md": "edited\n"})  # so that the command itself refuses after it has tidied up
    code, said = world.run("apply", "--unsloth", checkout)
    assert code == 3 and "README.md" in said and "loss.py" not in said
    git(checkout, "checkout", "README.md")
    assert snapshot(checkout) == before


def test_edits_made_after_a_kill_are_never_overwritten(world, clone):
    checkout = clone()
    world.run("apply", "--unsloth", checkout)
    new = git(checkout, "rev-parse", "HEAD").strip()
    git(checkout, "reset", "-q", "--hard", "HEAD~2")
    old = git(checkout, "rev-parse", "HEAD").strip()
    write(
        checkout,
        {".git/unsloth-ext/journal.json": json.dumps({"old": old, "new": new}), "unsloth/loss.py": "my work\n"},
    )
    code, said = world.run("apply", "--unsloth", checkout)
    assert code == 1 and "unsloth/loss.py" in said
    assert (checkout / "unsloth" / "loss.py").read_text() == "my work\n"


def test_unapply_moves_back_when_our_commits_are_on_top(world, clone, capsys):
    checkout = clone()
    before = snapshot(checkout)
    world.run("apply", "--unsloth", checkout)
    code, said = world.run("unapply", "--unsloth", checkout, capsys=capsys)
    assert code == 0 and "taken out" in said and "brings it back" in said
    assert snapshot(checkout) == before
    code, said = world.run("unapply", "--unsloth", checkout, capsys=capsys)
    assert code == 0 and "nothing to do" in said


def test_unapply_reverts_below_later_commits_and_apply_works_again(world, clone, capsys):
    checkout = clone()
    files = {path: content for path, content in snapshot(checkout).items() if isinstance(path, str)}
    world.run("apply", "--unsloth", checkout)
    later = commit(checkout, "Later work", {"other.txt": "x\n"})
    code, said = world.run("unapply", "--unsloth", checkout, capsys=capsys)
    assert code == 0 and "reverted" in said
    assert git(checkout, "rev-parse", "HEAD~2").strip() == later
    assert {k: v for k, v in snapshot(checkout).items() if isinstance(k, str)} == {**files, "other.txt": b"x\n"}
    world.run("apply", "--unsloth", checkout)
    assert subjects(checkout, 2) == SUBJECTS
    assert (checkout / "unsloth" / "text.py").read_text() == "TEXT = 2\n"


def test_unapply_refuses_when_a_revert_conflicts(world, clone):
    checkout = clone()
    world.run("apply", "--unsloth", checkout)
    changed = (checkout / "unsloth" / "loss.py").read_text().replace(FIRST[1], "    return (x - y) ** 4\n")
    commit(checkout, "Another power", {"unsloth/loss.py": changed})
    refused(world, checkout, "0001-Square-the-loss.patch: conflict", "** 4", command="unapply")


def test_a_users_own_revert_counts(world, clone):
    checkout = clone()
    world.run("apply", "--unsloth", checkout)
    git(checkout, "revert", "--no-edit", "HEAD")
    assert world.run("apply", "--unsloth", checkout)[0] == 0
    assert subjects(checkout, 1) == ["Read the keywords"]


def test_an_older_form_of_a_patch_is_pointed_out(world, clone, capsys):
    checkout = clone()
    commit(checkout, "Square the loss", {"unsloth/text.py": "TEXT = 9\n"}, **usual("loss.square"))
    code, said = world.run("apply", "--unsloth", checkout, capsys=capsys)
    assert code == 3 or "has other lines than the series has now" in said


def test_json_reports_every_patch(world, clone, capsys):
    code, said = world.run("apply", "--json", "--unsloth", clone("2026.1.4"), capsys=capsys)
    (report,) = json.loads(said)
    assert code == 0 and report["version"] == "2026.1.4" and report["base"] == BASE and report["changed"]
    assert [(patch["patch"], patch["result"]) for patch in report["patches"]] == [
        ("0001-Square-the-loss.patch", "already there"),
        ("0002-Read-the-keywords.patch", "clean"),
    ]


def test_release_files_are_those_of_the_index():
    assert release(BASE)["loss.py"] == LOSS
