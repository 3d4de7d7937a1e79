"""Install the tested stack into the environment of the Python that runs this: `make setup` calls it with the .venv's.

Without a GPU, torch's CPU build comes first, then the pinned stack, then Unsloth and unsloth_zoo with --no-deps: their own
requirements would pull in xformers, torchvision and gigabytes of CUDA. With a GPU, Unsloth resolves its stack itself.
What has been installed is remembered in the environment, so that a second run does nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
TORCH = "torch==2.13.0"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# llama-models is what the tests of tool calling compare with: Meta's tokenizer and formats, under its community licence.
WITHOUT_DEPENDENCIES = (
    "unsloth==2026.10.9",
    "unsloth_zoo==2026.10.9",
    "cut_cross_entropy==25.1.1",
    "llama-models==0.3.0",
)


def pip(*arguments: str) -> str:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    if done.returncode:
        print(done.stdout[-4000:] + done.stderr[-8000:], file=sys.stderr)
        sys.exit(
            f"setup: this failed: {' '.join(command)}\n  Read pip's message above; `make setup` goes on from here."
        )
    return done.stdout


def install_torch_for_cpu() -> None:
    # Linux wheels on PyPI are CUDA builds. Where pip is set up with an index that has the CPU build, that is the one to take.
    report = json.loads(
        pip("install", "--quiet", "--dry-run", "--no-deps", "--ignore-installed", "--report", "-", TORCH)
    )
    version = report["install"][0]["metadata"]["version"]
    only_cuda = platform.system() == "Linux" and platform.machine() == "x86_64" and "+cpu" not in version
    pip("install", "--quiet", TORCH, *(("--index-url", TORCH_CPU_INDEX) if only_cuda else ()))


def has_gpu() -> bool:
    tool = shutil.which("nvidia-smi")
    return tool is not None and subprocess.run([tool], capture_output=True).returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--cpu", action="store_true", help="the pinned stack for a machine without a GPU")
    which.add_argument("--gpu", action="store_true", help="Unsloth with its own requirements")
    args = parser.parse_args()
    if sys.version_info < (3, 10):  # noqa: UP036 (this file runs before anything is installed)
        sys.exit(
            f"setup: Python 3.10 or newer is needed, this is {platform.python_version()}: make setup PYTHON=python3.12"
        )
    if sys.prefix == sys.base_prefix:
        sys.exit("setup: run this with the Python of a virtual environment (`make setup` makes .venv)")
    gpu = args.gpu or (not args.cpu and has_gpu())
    asked = [Path(__file__), ROOT / "requirements" / "cpu.txt", ROOT / "setup.cfg", ROOT / "pyproject.toml"]
    digest = hashlib.sha256(b"gpu" if gpu else b"cpu")
    for file in asked:
        digest.update(file.read_bytes())
    stamp = Path(sys.prefix, "unsloth_ext.installed")
    if stamp.is_file() and stamp.read_text() == digest.hexdigest():
        return
    print(
        f"setup: installing the {'GPU' if gpu else 'CPU'} stack into {sys.prefix} (some minutes the first time)",
        flush=True,
    )
    pip("install", "--quiet", "--upgrade", "pip", "setuptools", "wheel")
    if gpu:
        pip("install", "--quiet", "-e", ".[unsloth,dev]")
    else:
        install_torch_for_cpu()
        pip("install", "--quiet", "-r", "requirements/cpu.txt", "-e", ".[dev]")
        pip("install", "--quiet", "--no-deps", *WITHOUT_DEPENDENCIES)
    stamp.write_text(digest.hexdigest())


if __name__ == "__main__":
    main()
