"""`unsloth-ext train --nproc`: torchrun underneath, one folder of records, a killed rank named, a resume."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from unsloth_ext.training.ranks import why_ranks_ended
from unsloth_ext.training.recorder import read_steps

JOB = ("--model=embedded-tiny", "--steps=8", "--max-seq-length=64", "--batch-size=1", "--save-steps=2")
needs_unsloth = pytest.mark.skipif(find_spec("unsloth") is None, reason="the job needs Unsloth")


def _environment():
    kept = {
        k: v for k, v in os.environ.items() if not k.startswith(("UNSLOTH_EXT_FSDP2", "RANK", "LOCAL_RANK", "WORLD"))
    }
    lo = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    return kept | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": lo}


def _command(*words):
    return [sys.executable, "-m", "unsloth_ext", "train", *words]


def _process_of_rank(leader, rank):
    """The process id of a rank among the descendants of `leader`."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
    for pid in parents:
        above = pid
        while above in parents and above != leader:
            above = parents[above]
        if above == leader and pid != leader:
            try:
                words = (Path("/proc") / str(pid) / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if f"RANK={rank}".encode() in words:
                return pid
    return None


@pytest.mark.extended
@needs_unsloth
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the ranks in /proc")
def test_a_killed_rank_is_named_and_the_run_resumes(tmp_path):
    folder = tmp_path / "run"
    words = _command("--nproc=2", f"--output={folder}", *JOB)
    process = subprocess.Popen(
        words, env=_environment(), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    while process.poll() is None and len(read_steps(folder / "steps.jsonl")) < 3:
        time.sleep(0.02)
    if (victim := _process_of_rank(process.pid, 1)) is not None:
        os.kill(victim, signal.SIGKILL)
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 1, said
    assert "rank 1 was killed by SIGKILL" in said, said
    assert json.loads((folder / "run.json").read_text())["status"] == "failed"

    done = subprocess.run(
        [*words, "--resume", "--json"], env=_environment(), cwd=tmp_path, capture_output=True, text=True, timeout=600
    )
    assert done.returncode in (0, 1), done.stderr  # so few steps may not lower the loss
    run = json.loads((folder / "run.json").read_text())
    assert run["status"] == "finished" and run["resumed_from"], done.stderr + (folder / "log.txt").read_text()
    assert [record["step"] for record in run["steps"]] == list(range(1, 9))
    assert run["environment"]["processes"] == "2" and run["model"]["linear_4bit"] == 14
    assert run["sample"]["same_tokens"] and run["sample"]["tokens"]
    assert (folder / "report.html").stat().st_size > 10_000
    assert {p.name for p in folder.glob("checkpoint-*")} == {"checkpoint-6", "checkpoint-8"}
    assert (folder / "checkpoint-8/sharded_optimizer/manifest.json").is_file()


@pytest.mark.parametrize(("words", "complaint"), [
    (["--nproc=0"], "--nproc must be at least 1, got 0"),
    (["--nproc=2", "--compare"], "cannot be combined with --nproc"),
    (["--nproc=2", "--no-load-in-4bit"], "--nproc shards a 4-bit model"),
])  # fmt: skip
def test_what_cannot_be_run_is_said_before_anything_starts(tmp_path, words, complaint, monkeypatch, capsys):
    from unsloth_ext.__main__ import main

    monkeypatch.setattr("unsloth_ext.training.cli._require_stack", lambda: None)
    assert main(["train", f"--output={tmp_path / 'none'}", *words]) == 2
    assert complaint in capsys.readouterr().err and not (tmp_path / "none").exists()


_SUMMARY = """[rank0]: RuntimeError: [../gloo/transport/tcp/pair.cc] Connection closed by peer
============================================================
unsloth_ext FAILED
------------------------------------------------------------
Failures:
[1]:
  time      : 2026-01-01_00:00:00
  host      : here
  rank      : {first} (local_rank: {first})
  exitcode  : {one} (pid: 11)
  error_file: <N/A>
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-01-01_00:00:00
  host      : here
  rank      : {second} (local_rank: {second})
  exitcode  : {two} (pid: 12)
"""


@pytest.mark.parametrize(("facts", "expected"), [
    (dict(first=0, one=-15, second=1, two=-9), "rank 1 was killed by SIGKILL"),
    (dict(first=0, one=-9, second=1, two=-15), "rank 0 was killed by SIGKILL"),
    (dict(first=3, one=-11, second=3, two=-11), "rank 3 was killed by SIGSEGV"),
    (dict(first=2, one=2, second=1, two=-15), "rank 2 ended with exit code 2: [../gloo/transport/tcp/pair.cc] Connection closed"),
])  # fmt: skip
def test_the_first_that_failed_is_named(facts, expected):
    assert why_ranks_ended(_SUMMARY.format(**facts), 1).startswith(expected)
    consequence = "[rank0]: RuntimeError: a peer is gone\n[rank2]: ValueError: the cause\n"
    if "exit code" in expected:
        assert why_ranks_ended(consequence + _SUMMARY.format(**facts), 1).startswith(
            "rank 2 ended with exit code 2: the cause"
        )
    assert why_ranks_ended("nothing to be found", 7) == "torchrun ended with exit code 7; see log.txt"
