"""Which of two ways an operation goes: ours where a graph is traced, and where a compiled layer's uncompiled forward must give its bits."""

from __future__ import annotations

import threading
from contextlib import contextmanager

import torch


class _Thread(threading.local):
    asked = False


_thread = _Thread()


def as_traced() -> bool:
    """Whether the patched operations (projections, rope, attention) are to be those of a compiled layer."""
    return torch.compiler.is_compiling() or _thread.asked


@contextmanager
def like_compiled():
    """In this scope eager code goes the way that a trace takes: retrace.py's runs of a compiled layer's own forward."""
    before, _thread.asked = _thread.asked, True
    try:
        yield
    finally:
        _thread.asked = before
