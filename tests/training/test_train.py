"""The job itself, as a person starts it: fresh processes, the tiny embedded base, Unsloth's CPU backend (or a GPU if there is one)."""

import hashlib
import json
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from unsloth_ext.training.recorder import read_steps

pytestmark = pytest.mark.skipif(find_spec("unsloth") is None, reason="the job needs Unsloth")

STEPS = 12
JOB = ("--model=embedded-tiny", f"--steps={STEPS}", "--max-seq-length=96", "--batch-size=2", "--save-steps=2")


def records(folder):
    return read_steps(folder / "steps.jsonl")


def course(folder):
    """What has to be the same in two runs of one job."""
    return [(record["step"], record["loss"], record["grad_norm"], record["batch"]) for record in records(folder)]


@pytest.fixture(scope="session")
def comparison(unsloth_ext, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "comparison"
    return unsloth_ext("train", "--compare", "--json", f"--output={folder}", *JOB), folder


@pytest.mark.slow
def test_compare(comparison, current_folder):
    done, folder = comparison
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["verdict"]["holds"] and result["verdict"]["same_data"]
    pristine, patched = (json.loads((folder / side / "run.json").read_text()) for side in ("pristine", "patched"))
    assert {row["state"] for row in pristine["patches"]} == {"disabled"}
    assert "applied" in {row["state"] for row in patched["patches"]}
    for run in (pristine, patched):
        assert run["model"]["linear_4bit"] == 14  # seven projections in each of two layers
        assert run["sample"]["same_tokens"] and run["sample"]["tokens"]
        assert [record["step"] for record in run["steps"]] == list(range(1, STEPS + 1))
        assert run["environment"].keys() >= {"unsloth", "unsloth_zoo", "torch", "python", "cores"}
    assert (folder / "report.html").stat().st_size > 10_000
    assert not list(current_folder.iterdir()), "unsloth_compiled_cache and the like belong into the run's folder"


@pytest.mark.slow
def test_resume_after_sigkill_repeats_the_same_steps(comparison, environment, unsloth_ext, tmp_path):
    folder = tmp_path / "killed"
    words = ["train", f"--output={folder}", *JOB]
    process = subprocess.Popen(
        [sys.executable, "-m", "unsloth_ext", *words], env=environment, stderr=subprocess.DEVNULL
    )
    while process.poll() is None and len(records(folder)) < 5:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "run.json").exists()

    newest = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    (newest / "complete.json").unlink(missing_ok=True)  # as if the kill had come while it was being written
    done = unsloth_ext(*words, "--resume")
    assert done.returncode == 0, done.stderr
    run = json.loads((folder / "run.json").read_text())
    assert run["resumed_from"] and run["resumed_from"] != newest.name
    assert course(folder) == course(comparison[1] / "patched")

    assert unsloth_ext(*words).returncode == 3  # a finished run is not overwritten
    assert unsloth_ext(*words, "--resume", "--lora-rank=4").returncode == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.extended)]
)
def test_an_interrupted_comparison_leaves_its_records_and_no_process(comparison, environment, tmp_path, number, code):
    words = ["train", "--compare", f"--output={tmp_path}", *JOB, "--steps=100000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "unsloth_ext", *words],
        env=environment,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    while process.poll() is None and not records(tmp_path / "pristine"):
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(300) == code
    count = len(records(tmp_path / "pristine"))
    time.sleep(1)
    assert count == len(records(tmp_path / "pristine")) > 0
    assert not (tmp_path / "patched").exists()


@pytest.mark.slow
def test_the_embedded_base_is_the_same_every_time(comparison, environment, tmp_path):
    from unsloth_ext.training.embedded import build

    (first,) = Path(environment["UNSLOTH_EXT_CACHE"]).glob("embedded-tiny-*")  # another process built it
    again = tmp_path / "again"
    build("embedded-tiny", again)
    for name in ("model.safetensors", "tokenizer.json"):
        digests = [hashlib.sha256((folder / name).read_bytes()).hexdigest() for folder in (first, again)]
        assert digests[0] == digests[1], name
    assert "pad_token" not in json.loads((first / "tokenizer_config.json").read_text())


@pytest.mark.parametrize(
    ("words", "code", "complaint"),
    [
        (["train", "--batch-size=0"], 2, "--batch-size must be at least 1, got 0"),
        (["train", "--dataset=/no/such/file"], 2, "--dataset"),
        (["train", "--resume"], 2, "--output"),
        (["train", "--tolerance=-1"], 2, "--tolerance"),
        (["report", "/no/such/file"], 2, "holds no run"),
    ],
)
def test_bad_usage_is_quick_and_named(unsloth_ext, words, code, complaint):
    done = unsloth_ext(*words, PYTHONPROFILEIMPORTTIME="1")
    assert (done.returncode, "Traceback" in done.stderr) == (code, False)
    assert complaint in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}
    assert "unsloth_ext" in imported and not imported & {"torch", "transformers", "unsloth"}  # what takes seconds
