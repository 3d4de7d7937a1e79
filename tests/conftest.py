"""Shared fixtures: running a piece of Python in a fresh process, as a user's script would run."""

import os
import subprocess
import sys

import pytest


def pytest_collection_modifyitems(items):
    import importlib.util

    reason = None
    if importlib.util.find_spec("torch") is None:
        reason = "torch is not installed"
    for item in items:
        if "gpu" in item.keywords:
            if reason is None:
                import torch

                reason = None if torch.cuda.is_available() else "needs a CUDA card"
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def python(tmp_path):
    """python(code, *, path=(), check=True, **environment) runs `code` in a fresh interpreter and gives the finished process."""

    def run(code, *, path=(), check=True, **environment):
        env = {k: v for k, v in os.environ.items() if not k.startswith(("UNSLOTH", "RANK", "LOCAL_RANK"))}
        env |= {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(map(str, path)), "PYTHONWARNINGS": "ignore"}
        env |= {"UNSLOTH_COMPILE_LOCATION": str(tmp_path / "unsloth_compiled_cache")}
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=env | environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )
        if check and done.returncode:
            raise AssertionError(f"exit {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    return run
