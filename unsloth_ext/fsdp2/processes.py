"""Who the ranks are, and that everybody is still there. What they exchange beyond that: team.py."""

from __future__ import annotations

import contextlib
import datetime
import os
import time

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ..errors import UnslothExtError, UsageError

__all__ = ["default_mesh", "device_of", "meet", "over_gloo", "position"]

LIMIT = datetime.timedelta(minutes=10)
_SHORT = datetime.timedelta(seconds=5)
_TAG = 0x75E2  # of the messages of `meet`


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


_control: list = []  # [the process group of all ranks, one of all ranks over gloo]


def over_gloo(timeout: datetime.timedelta | None = None):
    """A group of all ranks over gloo, made once: it alone can say who is missing, whatever the backend of the training."""
    world = dist.group.WORLD
    if not _control or _control[0] is not world:
        gloo = dist.get_backend() == "gloo"
        _control[:] = [world, world if gloo else dist.new_group(backend="gloo", timeout=timeout or LIMIT)]
    return _control[1]


def meet(what: str, timeout: datetime.timedelta | None = None) -> None:
    """Wait until all ranks are here, at most `timeout` (10 minutes). Raises `UnslothExtError` on every rank, with who is missing.

    Every rank tells rank 0 that it is there, and rank 0 tells all who is not. Unlike `torch.distributed.monitored_barrier`, whose
    other ranks learn nothing when one is missing and wait on.
    """
    group, timeout = over_gloo(timeout), timeout or LIMIT
    rank, world = dist.get_rank(), dist.get_world_size()
    missing = torch.zeros(world, dtype=torch.uint8)
    if rank != 0:
        try:
            dist.isend(missing[:1], 0, group=group, tag=_TAG).wait(timeout)
            # Rank 0 may come as late as is allowed, and then wait as long as is allowed.
            dist.irecv(missing, 0, group=group, tag=_TAG + 1).wait(2 * timeout + _SHORT)
        except RuntimeError as error:
            raise UnslothExtError(
                f"{what}: rank 0 did not answer: {str(error).splitlines()[0]}",
                "Look at its output: it failed first.",
            ) from error
    else:
        last, arriving = time.monotonic() + timeout.total_seconds(), {}
        for other in range(1, world):
            try:
                arriving[other] = dist.irecv(torch.zeros(1, dtype=torch.uint8), other, group=group, tag=_TAG)
            except RuntimeError:  # its connection is known to be closed
                missing[other] = 1
        for other, message in arriving.items():
            try:
                message.wait(datetime.timedelta(seconds=max(0.01, last - time.monotonic())))
            except RuntimeError:
                missing[other] = 1
        answers = []
        for other in range(1, world):
            if not missing[other]:
                with contextlib.suppress(RuntimeError):
                    answers.append(dist.isend(missing, other, group=group, tag=_TAG + 1))
        for answer in answers:
            with contextlib.suppress(RuntimeError):
                answer.wait(_SHORT)
    if missing.any():
        names = ", ".join(str(r) for r in missing.nonzero().flatten().tolist())
        raise UnslothExtError(
            f"{what}: not every rank arrived (waiting at most {timeout.total_seconds():g} s): missing {names} of {world}",
            "Look at the output of what is missing: it failed first.",
        )
