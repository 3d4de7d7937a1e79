"""What the ranks agree on: who they are, that nobody failed, that everybody is still there.

An error that only one rank meets must not leave the others waiting in a collective. So checks that can fail come before the
collectives, and their outcome is exchanged: every rank raises the same message, which says on which rank it happened.
"""

from __future__ import annotations

import datetime
import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ..errors import UnslothExtError, UsageError

__all__ = ["agree", "default_mesh", "device_of", "meet", "position"]

LIMIT = datetime.timedelta(minutes=10)


def default_mesh(device: torch.device | str | None = None, timeout: datetime.timedelta | None = None) -> DeviceMesh:
    """A one-dimensional mesh over all processes, on `device` (the local CUDA card if there is one, else the CPU).

    Starts torch.distributed if torchrun's variables are there and it is not running. `timeout`: of its collectives (10 minutes),
    after which a rank that waits for a dead one raises. Raises `UsageError` without torchrun.
    """
    kind = torch.device(device).type if device is not None else "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda" and "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        if "WORLD_SIZE" not in os.environ or "RANK" not in os.environ:
            raise UsageError(
                "sharding needs one process a rank, and this process was started alone",
                "Start it with torchrun: `torchrun --nproc-per-node 2 your_script.py`.",
            )
        # gloo beside NCCL: norms of offloaded gradients are reduced on the host.
        dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo", timeout=timeout or LIMIT)
    return init_device_mesh(kind, (dist.get_world_size(),))


def position(mesh: DeviceMesh) -> tuple[int, int]:
    """(rank, world) along the dimension that parameters are sharded over: the mesh's last."""
    return mesh.get_local_rank(mesh.ndim - 1), mesh.size(mesh.ndim - 1)


def device_of(mesh: DeviceMesh) -> torch.device:
    if mesh.device_type == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(mesh.device_type)


def agree(error: Exception | None, what: str) -> None:
    """Raise on every rank if any rank has an error, with the messages of all that have one. A collective of all processes."""
    if dist.get_world_size() == 1:
        if error is not None:
            raise error
        return
    text = None if error is None else (str(error) or type(error).__name__)
    found: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, text)
    failed = {rank: message for rank, message in enumerate(found) if message is not None}
    if not failed:
        return
    distinct = dict.fromkeys(failed.values())
    lines = [f"rank {', '.join(str(r) for r, m in failed.items() if m == message)}: {message}" for message in distinct]
    raise UnslothExtError(f"{what} failed on {len(failed)} of {len(found)} ranks; " + "; ".join(lines)) from error


_control: list = []  # [the process group of all ranks, one of all ranks over gloo]


def meet(what: str, timeout: datetime.timedelta | None = None) -> None:
    """Wait until all ranks are here, at most `timeout` (10 minutes). Raises `UnslothExtError`, on rank 0 with the missing ranks.

    Goes over gloo, whatever the backend of the training: it alone can say who is missing.
    """
    timeout = timeout or LIMIT
    world = dist.group.WORLD
    if not _control or _control[0] is not world:
        over_gloo = dist.get_backend() == "gloo"
        _control[:] = [world, world if over_gloo else dist.new_group(backend="gloo", timeout=timeout)]
    try:
        dist.monitored_barrier(_control[1], timeout=timeout, wait_all_ranks=True)
    except RuntimeError as error:
        raise UnslothExtError(
            f"{what}: not every rank arrived within {timeout.total_seconds():g} s: {error}",
            "Look at the output of the rank that is missing: it failed first.",
        ) from error
