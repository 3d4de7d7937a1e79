"""What the room changes in Unsloth so that a whole model traces. The behaviour is tested in upstream_tests, on both faces."""

from importlib.util import find_spec

import pytest

from unsloth_ext.compiling.patch import PATCHES
from unsloth_ext.compiling.traceable import with_forwards_without_row_count, without_row_count

OURS = ("compiling.peft_forward", "compiling.pretrain_hook", "compiling.traced_layers", "compiling.row_count")


@pytest.mark.skipif(find_spec("unsloth") is None, reason="Unsloth is not installed: make setup")
def test_on_the_installed_unsloth():
    from unsloth_ext.patching.release import folder_of
    from unsloth_ext.patching.survey import survey

    rows = {row.id: row for row in survey(PATCHES, {"unsloth": folder_of("unsloth")})}
    assert {rows[id].state for id in OURS} == {"applied"}, rows


def test_row_count_is_the_only_thing_that_changes():
    calls = []

    def make(inner):
        def forward(self, rows, *, keyword=7):
            if rows <= 1024:
                calls.append("small")
            return self, inner, rows, keyword

        return forward

    forward = with_forwards_without_row_count(make)("inside")
    assert forward("me", 5, keyword=8) == ("me", "inside", 5, 8) and forward("me", 5)[3] == 7
    assert calls == []
    assert make("inside")("me", 5) and calls == ["small"]


def test_a_forward_that_upstream_changed_is_refused():
    with pytest.raises(RuntimeError, match="upstream changed: .* holds the constant 1024 0 times"):
        without_row_count(lambda rows: rows <= 2048)
