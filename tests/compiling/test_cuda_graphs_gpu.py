"""CUDA graphs on a card: the numbers of the same regions not recorded, through accumulation, changing shapes and evaluation."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        any(find_spec(name) is None for name in ("unsloth", "peft", "bitsandbytes")), reason="make setup"
    ),
]


def run(tmp_path, *options):
    env = {name: value for name, value in os.environ.items() if not name.startswith("UNSLOTH")}
    env |= {"UNSLOTH_COMPILE_LOCATION": str(tmp_path / "unsloth_compiled_cache"), "HF_HUB_OFFLINE": "1"}
    env["PYTHONPATH"] = os.pathsep.join((str(Path(__file__).parents[2]), env.get("PYTHONPATH", "")))
    command = [sys.executable, str(Path(__file__).with_name("graphs_on_card.py")), *options]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-6000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("kind, scope", [("unsloth", "block"), ("unsloth", "step"), ("plain", "block")])
def test_the_numbers_of_the_plain_regions(tmp_path, kind, scope):
    found = run(tmp_path, kind, scope)
    assert found["forwards"] >= 20 and found["nodes"] >= 1 and found["skips"] == 0, found
    assert found["breaks"] == 0, found
    # The same kernels: only atomics and the choice of a matmul may differ. A stale or doubled gradient is of the order of 1.
    assert found["recorded"]["gradients"] <= max(0.02, 4 * found["again"]["gradients"]), found
    assert found["recorded"]["loss"] <= max(0.005, 4 * found["again"]["loss"]), found


def test_dropout_draws_anew(tmp_path):
    assert run(tmp_path, "unsloth", "block", "--dropout")["dropout_differs"]
