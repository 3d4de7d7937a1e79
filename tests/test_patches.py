"""The repository's own series, README and claims."""

import subprocess
import sys
from pathlib import Path

import pytest

from unsloth_ext.__main__ import main

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_series_applies_to_the_pristine_wheels_and_exports_without_a_difference():
    assert main(["patches", "check"]) == 0


def test_generated_parts_are_up_to_date():
    done = subprocess.run([sys.executable, "benchmarks/readme.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_claims_that_are_expected_hold_and_the_command_tells_the_truth():
    import json

    data = [json.loads(file.read_text()) for file in sorted((ROOT / "benchmarks" / "data").glob("*.json"))]
    held = {claim["id"]: claim["holds"] for benchmark in data for claim in benchmark["claims"]}
    expected = [
        id for id in held if id.startswith(("foundation.", "loss.unread_keywords.", "nf4.dequantize.", "nf4.step_8b."))
    ]
    assert len(expected) >= 22 and all(held[id] for id in expected)
    done = subprocess.run([sys.executable, "benchmarks/claims.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == (0 if all(held.values()) else 1), done.stdout + done.stderr
