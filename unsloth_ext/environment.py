"""What a measurement was made on: without it the numbers are an anecdote."""

import importlib.metadata
import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path

PACKAGES = (
    "torch",
    "triton",
    "bitsandbytes",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "unsloth",
    "unsloth_zoo",
    "unsloth_ext",
    "nvidia-cudnn-frontend",
    "flash-attn-4",
    "xformers",
)


def describe() -> dict:
    """Card, driver, versions, processor, commit and date, as strings; what does not exist here is left out. Imports torch."""
    import torch

    facts = {"date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")}
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        facts["card"] = f"{card.name}, {card.total_memory / 2**30:.0f} GiB"
        facts["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
        facts["cuda"] = torch.version.cuda
    facts["cpu"] = _cpu_name()
    facts["cores"] = str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    facts["python"] = platform.python_version()
    facts["system"] = f"{platform.system()} {platform.machine()}"
    for package in PACKAGES:
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    facts["commit"] = _commit(Path(__file__).parent)
    return {name: value for name, value in facts.items() if value}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit(folder: Path) -> str:
    """The commit of the checkout that `folder` is tracked in, with `+` if the work tree differs; empty for an installed package."""
    if not _output("git", "-C", str(folder), "ls-files", "--error-unmatch", Path(__file__).name):
        return ""
    changed = _output("git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no")
    return _output("git", "-C", str(folder), "rev-parse", "--short=12", "HEAD") + ("+" if changed else "")


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
