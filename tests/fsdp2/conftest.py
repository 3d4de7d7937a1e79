"""`ranks(n, job, **arguments)`: run a function in n processes that are connected by gloo, and get what each returned.
`cuda_ranks`: the same, each with a card of its own, connected by NCCL.

The processes are started once for all tests (importing torch and transformers costs seconds) and form a new process group for
each job. A job is a function of a test module, called as job(rank, world, **arguments).
"""

import multiprocessing
import os
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

MISSING = [n for n in ("torch", "bitsandbytes", "transformers", "peft", "accelerate") if find_spec(n) is None]
collect_ignore_glob = ["test_*.py"] if MISSING else []
_PRELOAD = ["torch", "transformers.models.llama.modeling_llama", "peft", "bitsandbytes", "unsloth_ext.fsdp2.sharding",
            "unsloth_ext.fsdp2.sharded_load", "torch.distributed.checkpoint", "fsdp2_ranks", "fsdp2_models"]  # fmt: skip


def pytest_report_header():
    return f"tests/fsdp2 left out: {', '.join(MISSING)} not installed" if MISSING else None


class Ranks:
    def __init__(self, context, cuda=False):
        self.context, self.cuda, self.workers, self.scratch = context, cuda, [], tempfile.TemporaryDirectory()

    def _worker(self, index):
        import fsdp2_ranks

        while len(self.workers) <= index:
            mine, theirs = self.context.Pipe()
            process = self.context.Process(target=fsdp2_ranks.serve, args=(theirs, self.cuda), daemon=True)
            with pytest.MonkeyPatch.context() as patch:
                if not self.cuda:
                    patch.setenv("CUDA_VISIBLE_DEVICES", "")
                patch.setenv("GLOO_SOCKET_IFNAME", os.environ.get("GLOO_SOCKET_IFNAME", "lo"))
                for name, value in (
                    ("OMP_NUM_THREADS", "1"),
                    ("HF_HUB_OFFLINE", "1"),
                    ("TOKENIZERS_PARALLELISM", "false"),
                ):
                    patch.setenv(name, value)
                process.start()
            theirs.close()
            self.workers.append((process, mine))
        return self.workers[index][1]

    def __call__(self, n, job, *, timeout=600, may_die=(), **arguments):
        """What each rank returned. Now and then gloo's sockets do not find each other, and then not again in those processes: they are
        started once more."""
        for patience in (60, 300):
            answers = self._answers(n, job, timeout, may_die, arguments, patience)
            if any(kind == "alone" for kind, _ in answers):
                self.close_workers()
                if patience == 60:
                    continue
            failed = [f"rank {r}: {v}" for r, (kind, v) in enumerate(answers) if kind != "ok" and r not in may_die]
            if failed:
                raise AssertionError("\n".join(failed))
            return [value for _, value in answers]

    def _answers(self, n, job, timeout, may_die, arguments, patience):
        store = Path(self.scratch.name, f"store-{os.urandom(6).hex()}")
        pipes = [self._worker(i) for i in range(n)]
        for rank, pipe in enumerate(pipes):
            pipe.send((rank, n, str(store), job, arguments, patience))
        answers = []
        for rank, pipe in enumerate(pipes):
            try:
                if not pipe.poll(timeout):
                    self.close_workers()  # else the next test would wait for the same ones
                    raise AssertionError(f"rank {rank} of {n} did not finish {job.__name__} in {timeout} s")
                answers.append(pipe.recv())
            except (EOFError, ConnectionResetError):
                answers.append(("died", None))
        if any(kind == "died" for kind, _ in answers) or may_die:
            self.close_workers()
        return answers

    def close_workers(self):
        for process, pipe in self.workers:
            pipe.close()
            process.kill()
            process.join()
        self.workers.clear()


@pytest.fixture(scope="session")
def ranks():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    pool = Ranks(context)
    yield pool
    pool.close_workers()
    pool.scratch.cleanup()


@pytest.fixture(scope="session")
def cuda_ranks():
    import torch

    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA cards")
    pool = Ranks(multiprocessing.get_context("spawn"), cuda=True)
    yield pool
    pool.close_workers()
    pool.scratch.cleanup()


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """{"16 bit": folder, "nf4": folder, ...} of one tiny Llama."""
    import fsdp2_models

    return fsdp2_models.save_all(tmp_path_factory.mktemp("checkpoints"))
