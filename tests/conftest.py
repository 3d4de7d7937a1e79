"""Shared fixtures: the random inputs, and running a piece of Python in a fresh process, as a user's script would run.

Tests of accuracy draw other numbers on each run; their bounds hold for every draw. Tests that search texts for one that is
misread (by hypothesis, or with `fuzz`) try the same texts on each run, so that what they have to say is about the change at
hand; UNSLOTH_EXT_FUZZ=1 lets them look further. Each failure prints the UNSLOTH_EXT_TEST_SEED that draws the same again.
"""

import os
import random
import subprocess
import sys
import zlib

import pytest

SEED, FUZZ = "UNSLOTH_EXT_TEST_SEED", "UNSLOTH_EXT_FUZZ"  # both are inherited by pytest-xdist's workers


def pytest_configure(config):
    os.environ.setdefault(SEED, str(random.SystemRandom().randrange(2**32)))
    try:
        import hypothesis
        from hypothesis.internal.conjecture import providers
    except ImportError:
        return
    usual = {"deadline": None, "print_blob": True, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
    hypothesis.settings.register_profile("fixed", derandomize=True, database=None, **usual)
    hypothesis.settings.register_profile("fuzz", **usual)
    if os.environ.get(FUZZ):
        hypothesis.settings.load_profile("fuzz")
        hypothesis.core.global_force_seed = _seed_of("hypothesis")
    else:
        hypothesis.settings.load_profile("fixed")
        # It also tries constants of the modules that happen to be imported: another order of tests, other texts.
        providers._get_local_constants = lambda: providers._local_constants


def _seed_of(name, base=None):
    return zlib.crc32(f"{base or os.environ[SEED]} {name}".encode())


@pytest.fixture(autouse=True)
def fresh_numbers(request):
    """Other inputs on each run, the same for a test whatever runs before it."""
    seed = _seed_of(request.node.nodeid)
    random.seed(seed)
    if (torch := sys.modules.get("torch")) is not None:
        torch.manual_seed(seed)
    chosen = " ".join(f"{name}={os.environ[name]}" for name in (SEED, FUZZ) if os.environ.get(name))
    request.node.add_report_section(
        "setup", "random inputs", f"the same again: {chosen} pytest {request.node.nodeid!r}"
    )


@pytest.fixture
def fuzz(request):
    """random.Random for a search through texts: the same on each run, others with UNSLOTH_EXT_FUZZ=1."""
    return random.Random(_seed_of(request.node.nodeid, None if os.environ.get(FUZZ) else "fixed"))


def pytest_collection_modifyitems(items):
    import importlib.util

    # Files with slow tests first: a file runs in one worker, and what begins last decides when all is done.
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)

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
        env |= {"UNSLOTH_COMPILE_LOCATION": str(tmp_path / "unsloth_compiled_cache"), SEED: os.environ[SEED]}
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=env | environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=900,  # another process may have the processors
        )
        if check and done.returncode:
            raise AssertionError(f"exit {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    return run
