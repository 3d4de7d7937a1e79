"""The loss room's patches on real Unsloth: loss_routes.py in a process of its own, and the sources of older releases."""

import importlib.util
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("unsloth") is None, reason="Unsloth is not installed: make setup"
)


def _pytest(file):
    code = "import sys, pytest\nsys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', '-W', 'ignore', {!r}]))\n"
    return code.format(str(file))


@pytest.mark.slow
def test_routes_and_repairs(python):
    done = python(_pytest(HERE / "loss_routes.py"), UNSLOTH_ALLOW_CPU="1", check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.parametrize("release", ["2026.9.9", "2026.10.1", "2026.10.6", "2026.10.7", "2026.10.8"])
def test_the_patches_fit_older_releases(release):
    import unsloth_ext
    from unsloth_ext.patching.survey import survey

    folder = _tree(release) / "unsloth_zoo"
    states = {row.id: row.state for row in survey(unsloth_ext.patches(), {"unsloth_zoo": folder})}
    for name in ("linear_cross_entropy", "linear_logprobs", "adapted_lm_head"):
        assert states[f"loss.{name}"] == "applied"
    for name in ("unread_keywords", "scale_in_place", "fp32_head_grad", "z_loss"):
        assert states[f"loss.{name}"] == "skipped"


@pytest.mark.parametrize("release", ["2026.9.9", pytest.param("2026.10.8", marks=pytest.mark.extended)])
def test_older_functions_are_routed(release, python):
    tree = str(_tree(release) / "unsloth_zoo")
    python(_pytest(HERE / "loss_routes_older.py"), UNSLOTH_EXT_TEST_TREE=tree, UNSLOTH_COMPILE_DISABLE="1")


def _tree(release):
    from unsloth_ext.errors import UnslothExtError
    from unsloth_ext.series.base import pristine_tree

    try:
        return pristine_tree("unsloth_zoo", release)
    except UnslothExtError as error:
        pytest.skip(f"unsloth_zoo {release} cannot be had here: {error}")


def test_what_a_trainer_copies_calls_the_module(monkeypatch):
    import inspect
    import types

    from unsloth_ext.loss import rl_forwarders

    zoo = types.ModuleType("unsloth_zoo")
    zoo.rl_replacements = types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "unsloth_zoo", zoo)
    for name in (
        "chunked_hidden_states_selective_log_softmax",
        "chunked_hidden_states_selective_log_softmax_recompute",
    ):
        source = inspect.getsource(getattr(rl_forwarders, name))
        assert "unsloth_ext" not in source
        copied = {}
        exec(source, copied)
        setattr(zoo.rl_replacements, name, lambda *a, _name=name, **k: (_name, a, k))
        assert copied[name](1, 2, chunks=3) == (name, (1, 2), {"chunks": 3})
