"""Lets these tests import from beside them, and leaves them out, saying so, where torch is missing."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

# What deterministic algorithms on a card ask for; torch reads it once, before the first product of a process.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
sys.path.insert(0, str(Path(__file__).parent))

MISSING = [name for name in ("torch",) if find_spec(name) is None]
collect_ignore_glob = ["test_*.py"] if MISSING else []


def pytest_report_header():
    return f"tests/compiling left out: {', '.join(MISSING)} not installed" if MISSING else None
