"""The same change as a run-time patch and as a git patch: `upstream_tests/` holds for both, and fails without either."""

import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from importlib.util import find_spec
from pathlib import Path

import pytest

from unsloth_ext.__main__ import main
from unsloth_ext.series.base import pristine_tree

pytestmark = pytest.mark.skipif(find_spec("unsloth") is None, reason="Unsloth is not installed: make setup")

ROOT = Path(__file__).parent.parent
UPSTREAM = {"unsloth": "unsloth", "unsloth-zoo": "unsloth_zoo"}
RELEASE = "2026.10.9"
FILES = sorted((ROOT / "upstream_tests").rglob("test_*.py"))
STEMS = {file.stem for file in FILES}
# Of the git patch alone: what it leaves out, its switch, how it fails apart, and where Unsloth's own copy has the boundaries.
BY_THE_GIT_PATCH = (
    "test_left_out or test_a_failure_with_packed_rows_is_theirs_alone or test_boundaries_begin_their_storage"
)


@pytest.fixture(scope="session")
def patched(tmp_path_factory):
    """Both wheels' trees, side by side in one folder, with both series applied by the command a user types."""
    folder = tmp_path_factory.mktemp("patched")
    for package in UPSTREAM.values():
        shutil.copytree(pristine_tree(package, RELEASE) / package, folder / package)
    assert main(["patches", "apply", "--unsloth", str(folder), "--zoo", str(folder)]) == 0
    return folder


def outcomes(folder, files, *options, path=()):
    """{test id: passed, skipped or failed} of pytest over `files`, in a fresh process that imports Unsloth from `path` first."""
    found = {}
    for alone in (False, True):  # files that import the GPU modules on a CPU need a process of their own
        these = [file for file in files if ("UNSLOTH_ALLOW_CPU" in file.read_text()) is alone]
        if these:
            found |= _outcomes(folder / ("gpu_modules" if alone else "cpu"), these, options, path)
    return found


def _outcomes(folder, files, options, path):
    folder.mkdir()
    report = folder / "report.xml"
    for file in files:  # side by side under pytest's root, which names the cases after their files
        shutil.copy(file, folder / file.name)
    env = {k: v for k, v in os.environ.items() if not k.startswith("UNSLOTH")}
    env |= {"PYTHONPATH": os.pathsep.join(map(str, path)), "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    if "unsloth_ext" in options:  # some patches wait for a measured card or for their switch
        env["UNSLOTH_EXT_PACKED"] = "1"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        f"--rootdir={folder}",
        f"--junitxml={report}",
        *options,
        ".",
    ]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stdout[-4000:] + done.stderr[-4000:]
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case} & {"failure", "error", "skipped"}
        if "skipped" in kinds:  # nothing else may keep a test from saying what it has to say
            assert "CUDA" in case.find("skipped").get("message"), ElementTree.tostring(case, "unicode")
        found[f"{case.get('classname').rpartition('.')[2]}::{case.get('name')}"] = (
            "failed" if kinds & {"failure", "error"} else "skipped" if kinds else "passed"
        )
    return found


def names(found, outcome):
    return sorted(name for name, what in found.items() if what == outcome)


@pytest.mark.extended
def test_every_upstream_test_file_fails_on_pristine_unsloth(tmp_path):
    pristine = outcomes(tmp_path, FILES)
    for file in FILES:
        here = {name: what for name, what in pristine.items() if name.startswith(f"{file.stem}::")}
        assert names(here, "failed"), f"{file.name} passes without the patch: it proves nothing"
        assert names(here, "passed"), f"{file.name} only fails: it may be failing for another reason"


@pytest.mark.slow
def test_they_pass_on_pristine_unsloth_with_unsloth_ext(tmp_path):
    found = outcomes(tmp_path, FILES, "-p", "unsloth_ext", "-k", f"not ({BY_THE_GIT_PATCH})")
    assert names(found, "failed") == [] and {name.partition("::")[0] for name in names(found, "passed")} == STEMS


@pytest.mark.slow
def test_they_pass_on_the_patched_tree_without_it(tmp_path, patched):
    guard = patched / "test_patched_tree.py"
    guard.write_text(
        "import sys, unsloth, unsloth_zoo\n"
        "def test_this_is_the_patched_tree():\n"
        f"    assert unsloth.__file__.startswith({str(patched)!r}) and unsloth_zoo.__file__.startswith({str(patched)!r})\n"
        "    assert 'unsloth_ext' not in sys.modules\n"
    )
    found = outcomes(tmp_path, [guard, *FILES], path=[patched])
    passed = {name.partition("::")[0] for name in names(found, "passed")}
    assert names(found, "failed") == [] and passed == STEMS | {"test_patched_tree"}
    assert found["test_patched_tree::test_this_is_the_patched_tree"] == "passed"


def test_the_template_edit_of_both_faces_is_the_same(patched):
    from unsloth_ext.tools.llama_template import EDIT_NAMES, apply_edits

    def template(tree):
        text = (tree / "unsloth" / "chat_templates.py").read_text(encoding="utf-8")
        return text.partition("llama31_template = \\\n")[2].partition(
            "# Ollama from https://ollama.com/library/llama3.1"
        )[0]

    assert apply_edits(template(pristine_tree("unsloth", RELEASE)), EDIT_NAMES) == template(patched)


def test_on_the_patched_tree_the_run_time_face_steps_aside(patched):
    import unsloth_ext
    from unsloth_ext.patching.release import folder_of
    from unsloth_ext.patching.survey import survey

    others = ("trl", "transformers", "bitsandbytes")
    folders = {package: patched / package for package in UPSTREAM.values()} | {
        other: folder_of(other) for other in others
    }
    rows = survey(unsloth_ext.patches(), folders)
    alone = {patch.id for patch in unsloth_ext.patches() if patch.run_time_only}
    # nf4.dequantize replaces another function than its git patch changes: with both in, the same kernel runs. The other two go on
    # to the package's own attention, where their git patches stop at Unsloth's.
    beside = {"nf4.dequantize", "compiling.packed_metadata", "compiling.packed_layers"}
    expected = dict.fromkeys(alone | beside, "applied")
    assert {row.id: row.state for row in rows if row.state != "superseded"} == expected


def test_every_run_time_patch_has_its_git_patch():
    import unsloth_ext

    texts = [file.read_text(encoding="utf-8") for file in (ROOT / "patches").glob("*/*.patch")]
    git = sorted(
        line.partition(": ")[2]
        for text in texts
        for line in text.splitlines()
        if line.startswith("Unsloth-Ext-Patch: ")
    )
    assert git == sorted(patch.id for patch in unsloth_ext.patches() if not patch.run_time_only)
