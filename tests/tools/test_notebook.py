"""The notebook runs, cell by cell, in a process of its own with the tiny model; and it is what its source says."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from unsloth_ext.training.embedded import POLITE_THREADS

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
RUN = """
import json, sys
cells = json.load(open(sys.argv[1]))["cells"]
names = {"__name__": "__main__"}
for number, cell in enumerate(cells):
    if cell["cell_type"] == "code":
        exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
tokenizer, trainer = names["tokenizer"], names["trainer"]
first = trainer.data_collator([trainer.train_dataset[0]])
found = {
    "steps": trainer.state.global_step,
    "loss": names["history"].training_loss,
    "before": names["before"],
    "after": names["after"],
    "trained": names["trained"],
    "read": tokenizer.decode(first["input_ids"][0]),
    "shown": tokenizer.decode(names["encoded"]["input_ids"]),
    "learned": tokenizer.decode([label for label in first["labels"][0].tolist() if label != -100]),
    "roles": [message["role"] for message in names["conversation"]],
    "streamed": [call.as_message() for call in names["parser"].finish().tool_calls],
    "wanted": names["tests"][0][1]["tool_calls"],
    "markers": tokenizer.chat_template.count("generation %}"),
}
json.dump(found, open(sys.argv[2], "w"))
"""


def built():
    spec = importlib.util.spec_from_file_location("build_notebooks", NOTEBOOKS / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("source", built().sources(), ids=lambda source: source.stem)
def test_notebooks_are_built_from_their_sources(source):
    assert source.with_suffix(".ipynb").read_text() == built().notebook(source), "run: python notebooks/build.py"


def test_the_cell_for_colab_says_what_it_needs(tmp_path):
    """On Colab, without this package and without an address it stops, and says so; elsewhere it does nothing."""
    cells = json.loads((NOTEBOOKS / "llama31_tool_calling.ipynb").read_text())["cells"]
    (cell,) = ("".join(cell["source"]) for cell in cells if "REPOSITORY =" in "".join(cell["source"]))
    colab = "import sys, types; sys.modules['google.colab'] = types.ModuleType('google.colab')\n"
    kept = {name: value for name, value in os.environ.items() if name not in ("UNSLOTH_EXT", "PYTHONPATH")}

    def run(code):  # -S: without site-packages, so this package is not installed
        return subprocess.run(
            [sys.executable, "-S", "-c", code], cwd=tmp_path, env=kept, capture_output=True, text=True
        )

    assert run(cell).returncode == 0
    assert "ValueError: Put the address of this repository into REPOSITORY" in run(colab + cell).stderr


@pytest.mark.extended
def test_llama31_tool_calling(tmp_path):
    for needed in ("unsloth", "trl", "bitsandbytes"):  # not imported here: Unsloth has to come before trl
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"{needed} is not installed")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("UNSLOTH_", "TOOL_"))}
    environment = {
        **POLITE_THREADS,
        **kept,
        **{"TOOL_MODEL": "embedded-tiny", "TOOL_STEPS": "4", "TOOL_EXAMPLES": "16", "TOOL_TESTS": "2"},
        **{"TOOL_OUTPUT": str(tmp_path / "out"), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
    }
    command = [sys.executable, "-c", RUN, str(NOTEBOOKS / "llama31_tool_calling.ipynb"), str(tmp_path / "found.json")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["steps"] == 4 and 0 < found["loss"] < 100
    assert 0 <= found["before"] <= 1 and 0 <= found["after"] <= 1
    assert found["trained"].count("<|eot_id|>") == 2 and "<|start_header_id|>" not in found["trained"]
    assert (
        found["read"] == found["shown"] and found["learned"] == found["trained"]
    )  # the trainer's rows are what was shown
    assert found["roles"][:2] == ["user", "assistant"]
    assert found["streamed"] == found["wanted"] and found["markers"] == 0
    saved = tmp_path / "out" / "adapter"
    assert (saved / "adapter_model.safetensors").is_file()
    config = json.loads((saved / "tokenizer_config.json").read_text())
    assert config["response_template"]["start_anchor"].startswith("<|start_header_id|>assistant")
