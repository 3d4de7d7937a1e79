"""`on_card(script, tmp_path, *options)`: a script of this folder in a process of its own, and the JSON of its last line."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

NEEDS = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        any(find_spec(name) is None for name in ("unsloth", "peft", "bitsandbytes")), reason="make setup"
    ),
]


def on_card(script, tmp_path, *options):
    env = {name: value for name, value in os.environ.items() if not name.startswith("UNSLOTH")}
    env |= {"UNSLOTH_COMPILE_LOCATION": str(tmp_path / "unsloth_compiled_cache"), "HF_HUB_OFFLINE": "1"}
    # Else, in a container with pinned cards, Unsloth has Inductor compile one kernel after the other.
    env["UNSLOTH_FORCE_SINGLE_COMPILE_WORKER"] = "0"
    env["PYTHONPATH"] = os.pathsep.join((str(Path(__file__).parents[2]), env.get("PYTHONPATH", "")))
    command = [sys.executable, str(Path(__file__).with_name(script)), *options]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-6000:]
    return json.loads(done.stdout.splitlines()[-1])
