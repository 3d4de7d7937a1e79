"""The patches on the real, installed Unsloth, each time in a fresh process (an import takes seconds: few, full processes)."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(find_spec("unsloth") is None, reason="Unsloth is not installed: make setup")

# What can be imported without a GPU.
TARGETS = "unsloth_zoo.fused_losses.cross_entropy_loss", "unsloth_zoo.cpu.loader", "unsloth.chat_templates"
IMPORT_TARGETS = f"import importlib\nfor name in {TARGETS!r}: importlib.import_module(name)\n"

# Every global of every Unsloth module and every attribute of its classes, by identity.
SNAPSHOT = """
import sys, types
def snapshot():
    found = {}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] not in ("unsloth", "unsloth_zoo", "unsloth_compiled_cache") or not isinstance(module, types.ModuleType):
            continue
        for attribute, value in vars(module).items():
            if attribute != "__warningregistry__":
                found[name, attribute] = value
            if isinstance(value, type):
                found.update({(name, attribute, key): entry for key, entry in vars(value).items()})
    templates = sys.modules["unsloth.chat_templates"].CHAT_TEMPLATES
    found.update({("CHAT_TEMPLATES", key): value for key, value in templates.items()})
    return found
def difference(a, b):
    return sorted(str(key) for key in a.keys() | b.keys() if a.get(key) is not b.get(key))
"""


def test_imported_after_unsloth_then_off_and_on_ten_times(python):
    done = python(
        f"import unsloth; TARGETS = {TARGETS!r}\n" + IMPORT_TARGETS + SNAPSHOT + "pristine = snapshot()\n"
        "from unsloth.chat_templates import llama31_template\n"
        "import unsloth_ext\n"
        "assert {row.state for row in unsloth_ext.status() if row.target.startswith(TARGETS)} == {'applied'}, unsloth_ext.status()\n"
        "changed = difference(pristine, snapshot())\n"
        "assert len(changed) >= 9, changed\n"
        "for _ in range(10):\n"
        "    unsloth_ext.disable()\n"
        "    assert difference(pristine, snapshot()) == []\n"
        "    unsloth_ext.enable()\n"
        "    assert difference(pristine, snapshot()) == changed\n"
    )
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("unsloth_ext "))
    assert "on Unsloth 2026.10.9, patches: " in line and " failed" not in line and " skipped" not in line
    assert " applied (loss." in line and ", tools.* (" in line, line


def test_disabled_by_the_environment_nothing_differs_from_pristine(python):
    # Recorded the moment each module has been executed, by a finder of the test's own, and compared at the end.
    code = (
        "import sys, unsloth_ext\n"
        "from unsloth_ext.patching.hooks import PostImportFinder\n"
        "seen = {}\n"
        "PostImportFinder(lambda m: seen.setdefault(m.__name__, dict(vars(m)))).watch(set(TARGETS))\n"
        "import unsloth\n" + IMPORT_TARGETS + "from unsloth_ext.patching import fingerprint\n"
        "from unsloth_ext.patching.registry import _resolve, choose_target\n"
        "from unsloth_ext.patching.release import installed_release\n"
        "assert set(seen) == set(TARGETS)\n"
        "for patch in unsloth_ext.patches():\n"
        "    _, target = choose_target(patch, installed_release(patch.package))\n"
        "    if target is None or target.module not in TARGETS: continue\n"
        "    module = sys.modules[target.module]\n"
        "    head = target.attribute.partition('.')[0]\n"
        "    assert vars(module)[head] is seen[target.module][head]\n"
        "    raw = _resolve(module, target.attribute)[0]\n"
        "    assert fingerprint.of_object(raw) in target.fingerprints\n"
        "    assert not hasattr(getattr(raw, '__func__', raw), '__wrapped__')\n"
    )
    done = python(f"TARGETS = {TARGETS!r}\n" + code, UNSLOTH_EXT_DISABLE="all")
    assert "unsloth_ext" not in done.stderr


def test_imported_before_unsloth_says_one_line_and_wraps_the_loader(python):
    done = python(
        "import unsloth_ext, unsloth, json\n"
        + IMPORT_TARGETS
        + "assert hasattr(unsloth.FastLanguageModel.from_pretrained, '__wrapped__')\n"
        "print(json.dumps([row.as_dict() for row in unsloth_ext.status()]))",
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("unsloth_ext")]
    assert len(lines) == 1 and "on Unsloth 2026.10.9, patches: " in lines[0] and "tools.* (" in lines[0], lines
    rows = json.loads(done.stdout.splitlines()[-1])
    assert {row["state"] for row in rows if row["target"].startswith(TARGETS)} == {"applied"}


@pytest.fixture
def changed_unsloth(tmp_path):
    """A copy of the installed unsloth_zoo in which one patched function is another one."""
    source = Path(find_spec("unsloth_zoo").origin).parent
    copy = tmp_path / "changed" / "unsloth_zoo"
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
    file = copy / "fused_losses" / "cross_entropy_loss.py"
    text = file.read_text()
    changed = text.replace(
        "def _use_chunked_ce(kwargs, target_gb):\n",
        "def _use_chunked_ce(kwargs, target_gb):\n    kwargs = dict(kwargs)\n",
    )
    assert changed != text
    file.write_text(changed)
    return copy.parent


def test_a_changed_upstream_function_is_skipped_and_so_is_a_patch_that_calls_one(python, changed_unsloth):
    called = changed_unsloth / "unsloth_zoo" / "pad_token.py"
    text = called.read_text()
    changed = text.replace("allow_add=True", "may_add=True").replace("if not allow_add:", "if not may_add:")
    assert changed != text
    called.write_text(changed)
    done = python(
        "import unsloth_ext, unsloth, json, unsloth_zoo\n"
        + IMPORT_TARGETS
        + f"assert unsloth_zoo.__file__.startswith({str(changed_unsloth)!r})\n"
        "load, names = unsloth.FastLanguageModel.from_pretrained, []\n"
        "while load is not None: names.append(load.__code__.co_name); load = getattr(load, '__wrapped__', None)\n"
        "assert 'loaded_with_pad_token' not in names and 'loaded_with_tool_tokens' in names, names\n"
        "print(json.dumps({row.id: (row.state, row.reason) for row in unsloth_ext.status()}))",
        path=[changed_unsloth],
    )
    rows = json.loads(done.stdout.splitlines()[-1])
    for name, function in (
        ("loss.unread_keywords", "unsloth_zoo.fused_losses"),
        ("tools.cpu_pad_token", "unsloth_zoo.pad_token.fix_pad_token"),
    ):
        state, reason = rows[name]
        assert state == "skipped" and reason.startswith(f"upstream changed: {function}"), rows[name]


@pytest.mark.extended
def test_a_changed_upstream_function_is_strictly_an_error(python, changed_unsloth):
    code = "import unsloth_ext, unsloth\n" + IMPORT_TARGETS
    done = python(code, path=[changed_unsloth], check=False, UNSLOTH_EXT_STRICT="1")
    assert done.returncode == 1
    assert "PatchError: patch loss.unread_keywords skipped: upstream changed: unsloth_zoo." in done.stderr


@pytest.mark.extended
def test_under_torchrun_one_rank_speaks(tmp_path, python):
    script = tmp_path / "script.py"
    script.write_text(
        "import unsloth_ext, unsloth, os\nswitched = {p.id for p in unsloth_ext.patches() if p.switch}\n"
        "assert {r.state for r in unsloth_ext.status() if r.id not in switched} <= {'applied', 'pending'}\n"
    )
    done = python(
        "import sys; from torch.distributed.run import main\n"
        f"main(['--standalone', '--nproc-per-node', '2', {str(script)!r}])",
        GLOO_SOCKET_IFNAME="lo",
    )
    assert done.stderr.count("unsloth_ext 0.1.0: on Unsloth") == 1, done.stderr
