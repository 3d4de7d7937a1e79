"""The gate: Unsloth's Llama training step, forward and loss, in one graph, counted over random batches and packings.

Dynamo differs from torch to torch: what 2.13 traces, 2.11 may refuse. UNSLOTH_EXT_OTHER_TORCH names folders (as PATH does), each made
with `pip install --target FOLDER torch==...`; the gate runs once more with each.
"""

import json
import os
import random
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from unsloth_ext.compiling import packed_patch

NEEDED = ("unsloth", "peft", "bitsandbytes", "triton")
pytestmark = [
    pytest.mark.skipif(
        any(find_spec(name) is None for name in NEEDED), reason=f"{', '.join(NEEDED)} are needed: make setup"
    ),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a card is there: test_compile_gpu.py runs on it"),
]


TORCHES = ["", *filter(None, os.environ.get("UNSLOTH_EXT_OTHER_TORCH", "").split(os.pathsep))]


def gate(tmp_path, *options, torch_in="", packed=""):
    env = {name: value for name, value in os.environ.items() if not name.startswith("UNSLOTH")}
    env |= {"UNSLOTH_EXT_STRICT": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    env |= {"UNSLOTH_COMPILE_LOCATION": str(tmp_path / "unsloth_compiled_cache"), "UNSLOTH_EXT_PACKED": packed}
    path = (torch_in, str(Path(__file__).parents[2]), env.get("PYTHONPATH", ""))
    env["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    seed = str(random.randrange(10**6))  # the test's own is said where it fails
    command = [sys.executable, str(Path(__file__).with_name("compile_gate.py")), "--seed", seed, *options]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-6000:]
    return json.loads(done.stdout.splitlines()[-1]), done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("torch_in", TORCHES)
def test_the_step_is_one_graph_for_batches_and_one_for_packings(tmp_path, torch_in):
    found, output = gate(tmp_path, torch_in=torch_in)
    batches, packings = found["batches"], found["packings"]
    assert batches["calls"] == packings["calls"] == 64 and batches["plain"] == packings["plain"] == {}
    assert batches["breaks"] == packings["breaks"] == 0, output
    assert batches["graphs"] <= 2, output  # a batch of one row is a graph of its own
    assert packings["graphs"] <= 4, output


@pytest.mark.parametrize("torch_in", TORCHES)
@pytest.mark.parametrize(
    "family",
    [
        "llama",
        *(pytest.param(f, marks=pytest.mark.extended) for f in ("mistral", "qwen2", "qwen3", "granite", "cohere")),
    ],
)
def test_unsloths_own_compile_of_packed_layers_comes_to_an_end(tmp_path, torch_in, family):
    """The first packing, then any length; once more if the bound of the longest document was the first's by chance."""
    options = "--batches", "0", "--packings", "0", "--own", "16", "--layers", "2", "--family", family
    found, output = gate(tmp_path, *options, torch_in=torch_in, packed="1" if family in packed_patch._ASKED_FOR else "")
    assert (
        1 <= found["own"] <= (12 if family == "cohere" else 4)
    ), output  # torch 2.11 makes three parts of Cohere's layer


@pytest.mark.extended
@pytest.mark.parametrize("checkpointing", ["True", "unsloth"])
def test_checkpointed(tmp_path, checkpointing):
    found, output = gate(tmp_path, "--checkpointing", checkpointing, "--batches", "4", "--packings", "2")
    assert found["batches"]["breaks"] == found["packings"]["breaks"] == 0, output
    assert found["batches"]["graphs"] <= 2 and found["packings"]["graphs"] <= 2, output
