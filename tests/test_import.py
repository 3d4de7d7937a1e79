"""`import unsloth_ext` by itself: what it costs and what it must not do."""

import json

import pytest

HEAVY = ("torch", "transformers", "trl", "peft", "unsloth", "unsloth_zoo", "triton", "numpy", "rich")


def test_imports_nothing_heavy(python):
    done = python("import unsloth_ext, sys, json; print(json.dumps(sorted(sys.modules)))")
    assert not set(json.loads(done.stdout)) & set(HEAVY)
    assert done.stderr == ""


def test_costs_less_than_50_ms(python, tmp_path):
    """Of the processor's time, in one of up to 40 runs: what other processes do to it meanwhile is not the import's cost.

    Compiling the package's text to byte code is not either: Python keeps that after the first import, as it does here whatever
    the environment says.
    """
    code = "import time; start = time.process_time(); import unsloth_ext; print(time.process_time() - start)"
    kept = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(tmp_path / "byte_code")}
    python(code, **kept)
    assert any(float(python(code, **kept).stdout) < 0.050 for _ in range(40))


@pytest.mark.parametrize("environment, said", [
    ({"UNSLOTH_EXT_DISABLE": "nf5"}, "names nf5, which does not exist"),
    ({"UNSLOTH_EXT_DISABLE": "nf5", "UNSLOTH_EXT_QUIET": "1"}, "names nf5, which does not exist"),
    ({"UNSLOTH_EXT_DISABLE": "nf5", "RANK": "1"}, ""),
    ({"UNSLOTH_EXT_DISABLE": "LOSS; tools"}, ""),
])  # fmt: skip
def test_what_it_says(python, environment, said):
    done = python("import unsloth_ext", **environment)
    assert (said in done.stderr) if said else (done.stderr == "")


def test_a_name_that_does_not_exist_is_strictly_an_error(python):
    done = python("import unsloth_ext", check=False, UNSLOTH_EXT_DISABLE="nf5", UNSLOTH_EXT_STRICT="True")
    assert done.returncode == 1 and "PatchError: UNSLOTH_EXT_DISABLE names nf5" in done.stderr


def test_a_broken_stderr_is_no_reason_to_fail(python):
    python(
        "import sys\nclass Broken:\n    def write(self, text):\n        raise BrokenPipeError\n"
        "for sys.stderr in (Broken(), None): import unsloth_ext, importlib; importlib.reload(unsloth_ext)",
        UNSLOTH_EXT_DISABLE="nf5",
    )


def test_reloading_leaves_one_hook(python):
    python(
        "import importlib, sys, unsloth_ext; count = len(sys.meta_path); importlib.reload(unsloth_ext)\n"
        "assert len(sys.meta_path) == count"
    )


@pytest.mark.parametrize("everything", ["all", "ALL", "1", "true"])
def test_disabled_entirely_it_installs_no_hook(python, everything):
    done = python(
        "import sys; before = list(sys.meta_path); import unsloth_ext\n"
        "assert sys.meta_path == before, sys.meta_path\n"
        "assert {row.state for row in unsloth_ext.status()} == {'disabled'}\n"
        "print(unsloth_ext.status())",
        UNSLOTH_EXT_DISABLE=everything,
    )
    assert "by UNSLOTH_EXT_DISABLE" in done.stdout
