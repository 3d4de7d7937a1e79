"""What is taken for off, in whatever case and with blanks around it."""

import pytest

from unsloth_ext.switches import OFF, said


@pytest.mark.parametrize(
    ("word", "off"), [("0", True), (" OFF\n", True), ("No", True), ("false", True), ("1", False), ("", False)]
)
def test_what_was_said(monkeypatch, word, off):
    monkeypatch.setenv("UNSLOTH_EXT_SOMETHING", word)
    assert (said("UNSLOTH_EXT_SOMETHING") in OFF) == off and said("UNSLOTH_EXT_SOMETHING") == word.strip().lower()
    monkeypatch.delenv("UNSLOTH_EXT_SOMETHING")
    assert said("UNSLOTH_EXT_SOMETHING") == ""
