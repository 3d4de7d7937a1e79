"""One tiny embedded base for all tests of the job, in a cache of the session's own."""

import os
import subprocess
import sys

import pytest


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    """The variables of a job's process: an own cache, and nobody else's choice of patches."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("UNSLOTH_")}
    return {**kept, "UNSLOTH_EXT_CACHE": str(tmp_path_factory.mktemp("cache")), "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="session")
def current_folder(tmp_path_factory):
    """Where commands run: a job must leave nothing there."""
    return tmp_path_factory.mktemp("current")


@pytest.fixture(scope="session")
def unsloth_ext(environment, current_folder):
    """Run the command line in a fresh process: `unsloth_ext("train", ...)` returns the completed process."""

    def call(*words, **changes):
        command = [sys.executable, "-m", "unsloth_ext", *map(str, words)]
        return subprocess.run(
            command,
            env={**environment, **changes},
            cwd=current_folder,
            capture_output=True,
            text=True,
            timeout=900,
        )

    return call
