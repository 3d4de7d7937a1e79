"""`Team`: the processes that load, shard or save together, which may be one process that has no process group.

An error that only one rank meets must not leave the others waiting in a collective. So checks that can fail come before the
collectives, and their outcome is exchanged: every rank raises the same message, which says on which rank it happened. Every
exchange begins with a barrier that names who is missing, and goes over gloo whatever the training uses.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from ..errors import UnslothExtError
from .processes import meet, over_gloo

__all__ = ["Team"]


class Team:
    """what: for messages, such as "saving checkpoint-5"; timeout: how long to wait for a rank (10 minutes)."""

    def __init__(self, what: str, timeout: datetime.timedelta | None = None):
        self.what, self.timeout = what, timeout
        self.alone = not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1
        self.rank, self.world = (0, 1) if self.alone else (dist.get_rank(), dist.get_world_size())
        self.group = None
        if not self.alone:
            self.meet()
            self.group = over_gloo()

    @property
    def first(self) -> bool:
        return self.rank == 0

    def meet(self) -> None:
        """Wait for all. Raises `UnslothExtError` on all ranks, with the missing ones, once rank 0 has waited for `timeout`."""
        if not self.alone:
            meet(self.what, self.timeout)

    def gather(self, value: Any) -> list:
        """`value` of every rank, on every rank."""
        if self.alone:
            return [value]
        self.meet()
        found: list = [None] * self.world
        with self.noticing():
            dist.all_gather_object(found, value, group=self.group)
        return found

    def agree(self, error: BaseException | None = None) -> None:
        """Raise on every rank if any rank has an error, with the messages of all that have one. One process raises its own."""
        if self.alone:
            if error is not None:
                raise error
            return
        # Kinds of our own only: another's class may be one that no other process can import, and the exchange would break.
        kind = type(error) if isinstance(error, UnslothExtError) else UnslothExtError
        found = self.gather(None if error is None else (kind, str(error) or type(error).__name__))
        failed = {rank: pair for rank, pair in enumerate(found) if pair is not None}
        if not failed:
            return
        kinds, messages = (
            {kind for kind, _ in failed.values()},
            dict.fromkeys(message for _, message in failed.values()),
        )
        kind = kinds.pop() if len(kinds) == 1 else UnslothExtError
        lines = [f"rank {', '.join(str(r) for r, (_, m) in failed.items() if m == text)}: {text}" for text in messages]
        raise kind(f"{self.what} failed on {len(failed)} of {self.world} ranks; " + "; ".join(lines)) from error

    def together(self, job: Callable[..., Any], *arguments: Any) -> Any:
        """What `job` returns here; if it raises on any rank, every rank raises. The job may not wait for another rank."""
        error = result = None
        try:
            result = job(*arguments)
        except Exception as problem:
            error = problem
        self.agree(error)
        return result

    def on_first(self, job: Callable[..., Any], *arguments: Any) -> Any:
        """What `job` returns on rank 0, on every rank. Raises on every rank what it raises there."""
        error = result = None
        if self.first:
            try:
                result = job(*arguments)
            except Exception as problem:
                error = problem
        self.agree(error)
        return result if self.alone else self.gather(result)[0]

    def on_first_only(self, job: Callable[..., Any], *arguments: Any) -> Any:
        """The same, where the result stays on rank 0; None on the others."""
        return self.together(job, *arguments) if self.first else self.agree()

    def noticing(self):
        """Turns the failure of a collective within it into an `UnslothExtError` that names the ranks that are gone."""
        return _Noticing(self)


class _Noticing:
    def __init__(self, team: Team):
        self.team = team

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if self.team.alone or not isinstance(error, RuntimeError) or isinstance(error, torch.OutOfMemoryError):
            return
        text = str(error).splitlines()[0] if str(error) else kind.__name__
        try:
            meet(self.team.what, datetime.timedelta(seconds=5))  # all are there: the error is this rank's own
        except UnslothExtError as missing:
            raise UnslothExtError(
                f"{self.team.what}: another rank stopped while this one waited for it: "
                f"{str(missing).splitlines()[0]} ({text})"
            ) from error
