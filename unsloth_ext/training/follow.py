"""A process that trains, followed from here: its output in log.txt, its steps shown as they appear, ended when this one ends."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from .progress import Display
from .recorder import read_steps

__all__ = ["LOG", "follow"]

LOG = "log.txt"
POLL_SECONDS = 0.25
STOP_SECONDS = 10  # for it to end after SIGTERM


def follow(command: list[str], environment: dict[str, str], folder: Path, title: str, steps: int, resume: bool) -> int:
    """Run `command`, which writes folder/steps.jsonl, to its end, and return its exit code. Whatever ends this process ends it too."""
    # SIGTERM would end this process without unwinding it, and leave the other running. Only the main thread can ask for it.
    catches = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)) if catches else None
    process = None
    try:
        with (folder / LOG).open("a", encoding="utf-8") as log, Display(title, steps, "peak") as display:
            process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
            shown = len(read_steps(folder / "steps.jsonl")) if resume else 0
            while process.poll() is None:
                time.sleep(POLL_SECONDS)
                shown = _show_new(folder, shown, display)
            _show_new(folder, shown, display)
    finally:
        if catches:
            signal.signal(signal.SIGTERM, before)
        if process is not None:
            _stop(process)
    return process.returncode


def _show_new(folder: Path, shown: int, display: Display) -> int:
    records = read_steps(folder / "steps.jsonl")
    for record in records[shown:]:
        display.show(record)
    return max(shown, len(records))


def _stop(process: subprocess.Popen) -> None:
    """End it and whatever it started: it leads a process group of its own."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            try:
                os.killpg(process.pid, number)
                process.wait(STOP_SECONDS)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue
