"""`patches pull-requests`: mails that `git am` takes in a fork of upstream, without what only we need, and their pages."""

import pytest
from made_up import BASE, FIRST, git, write

STEMS = ("Square-the-loss", "Read-the-keywords")


@pytest.fixture
def configured(tmp_path, monkeypatch):
    def configure(text):
        (tmp_path / "gitconfig").write_text(text)
        monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "gitconfig"))

    return configure


def test_a_fork_gets_a_clean_commit_by_the_user(world, clone, configured, tmp_path, capsys):
    configured('[user]\n\tname = "Zoë, Dev"\n\temail = zoe@example.org\n')
    page = "# Square the loss\n\nText.\n\n<!-- generated: square -->\n| a |\n| --- |\n<!-- end -->\n\nMore.\n"
    write(world.root, {"pr_descriptions/Square-the-loss.md": page})
    code, said = world.run("pull-requests", tmp_path / "out", capsys=capsys)
    assert code == 0 and said.count("wrote ") == 4
    fork = clone()
    for number, stem in enumerate(STEMS, 1):
        folder = tmp_path / "out" / "unsloth" / stem
        assert sorted(path.name for path in folder.iterdir()) == [f"000{number}-{stem}.patch", "PR.md"]
        git(fork, "am", "-q", "-3", str(folder / f"000{number}-{stem}.patch"))
        message = git(fork, "log", "-1", "--format=%an <%ae>%n%B").strip()
        assert message == (
            f"Zoë, Dev <zoe@example.org>\n{stem.replace('-', ' ')}\n\nWhy it is needed.\n\n"
            "Applies-To: unsloth >=2026.1.1\nLicense: Apache-2.0"
        )
    loss = (fork / "unsloth" / "loss.py").read_text()
    assert FIRST[1] in loss and "follow_wrapped" in loss and (fork / "tests" / "test_loss.py").is_file()
    made = (tmp_path / "out" / "unsloth" / STEMS[0] / "PR.md").read_text()
    assert made == f"Made against unsloth {BASE}.\n\n# Square the loss\n\nText.\n\n| a |\n| --- |\n\nMore.\n"


def test_without_an_identity_the_author_stays(world, configured, tmp_path, capsys):
    configured("[user]\n\tname = Zoe\n")
    code, said = world.run("pull-requests", tmp_path / "out", capsys=capsys)
    assert code == 0 and "the author is the series' own" in said
    mail = (tmp_path / "out" / "unsloth" / STEMS[0] / f"0001-{STEMS[0]}.patch").read_text()
    assert "\nFrom: Dev <dev@example.org>\n" in mail


def test_a_patch_without_a_page_is_refused(world, tmp_path):
    (world.root / "pr_descriptions" / "Read-the-keywords.md").unlink()
    code, said = world.run("pull-requests", tmp_path / "out")
    assert code == 2 and "0002-Read-the-keywords.patch has no page" in said and not (tmp_path / "out").exists()
