"""What the Makefile asks before it does anything."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@pytest.fixture
def make(tmp_path):
    """make(*words) with a .venv of its own: (exit code, standard output, standard error)."""
    kept = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "UNSLOTH", "ZOO")}

    def run(*words):
        command = ["make", "--no-print-directory", f"VENV={tmp_path / 'venv'}", *words]
        done = subprocess.run(command, cwd=ROOT, env=kept, capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    return run


def script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("target", ["apply-patches", "unapply-patches"])
def test_either_checkout_will_do(make, tmp_path, target):
    script(tmp_path / "venv" / "bin" / "python", 'echo "$@"')  # says what it would run
    code, said, _ = make(target)
    assert (
        code == 2 and said == f"make: UNSLOTH= or ZOO= is missing. For example: make {target} UNSLOTH=~/src/unsloth\n"
    )
    command = f"-m unsloth_ext patches {target.removesuffix('-patches')}"
    for words, options in ((["ZOO=a b"], "--zoo a b"), (["UNSLOTH=~/x"], "--unsloth ~/x")):
        code, said, _ = make(target, *words)
        assert code == 0 and said.splitlines()[-1] == f"{command} {options}"


def test_an_old_python_makes_no_environment(make, tmp_path):
    pretend = "import sys; sys.version_info = (3, 9, 18)"
    old = script(
        tmp_path / "python-old",
        f'[ "$1" = -c ] || exec {sys.executable} "$@"\nexec {sys.executable} -c "{pretend}\n$2"',
    )
    code, _, said = make("setup", f"PYTHON={old}")
    assert code == 2 and said.startswith(f"make: {old} is Python 3.9, 3.10 or newer is needed")
    assert not (tmp_path / "venv").exists()
