"""The Kaggle notebook runs, cell by cell, with two CPU processes and the tiny model: on one, on two, resumed with offload."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "notebooks/kaggle_2xT4_fsdp2_qlora.ipynb"


@pytest.mark.extended
def test_the_notebook_runs_and_its_losses_agree(tmp_path):
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    code = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("UNSLOTH", "RANK", "LOCAL_RANK", "WORLD"))}
    environment |= {
        "FSDP2_STEPS": "4", "FSDP2_MODEL": "embedded-tiny", "FSDP2_LENGTH": "48", "FSDP2_WORK": str(tmp_path / "runs"),
        "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"), "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "largest difference" in done.stdout and "is read in parts, by each of 2 ranks" in done.stdout
    two, offload = (json.loads((tmp_path / "runs" / name / "result.json").read_text()) for name in ("two", "offload"))
    assert two["ranks"] == 2 and len(two["losses"]) == len(offload["losses"]) == 4
