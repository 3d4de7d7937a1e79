"""The memory of a CUDA card, asked for at little cost: at the start of a step and at its loss the card waits for the host.

`torch.cuda.memory_allocated` and its kin flatten and sort all of the allocator's statistics, some two hundred numbers, for one
of them. Here they are read once, where they are. cudaMemGetInfo goes to the driver, which takes longer still: it is called where
its answer can matter.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Counts(NamedTuple):
    """What PyTorch's allocator has counted on one device, in bytes; failures: how often it did not find enough at once."""

    allocated: int = 0
    peak: int = 0
    reserved: int = 0
    failures: int = 0


def counts(device: torch.device) -> Counts:
    """Zeros before CUDA is initialised."""
    stats = torch.cuda.memory_stats_as_nested_dict(device)
    if not stats:
        return Counts()
    allocated = stats["allocated_bytes"]["all"]
    failures = stats.get("num_ooms", 0) + stats.get("num_alloc_retries", 0)
    return Counts(allocated["current"], allocated["peak"], stats["reserved_bytes"]["all"]["current"], failures)


def free_bytes(device: torch.device, enough: float = float("inf")) -> int:
    """What this process may still allocate: the driver's free memory, and what the allocator holds unused.

    enough: more need not be known. Where the allocator alone holds as much, that is the answer, and the driver is not asked.
    """
    found = counts(device)
    unused = found.reserved - found.allocated
    return unused if unused >= enough else unused + torch.cuda.mem_get_info(device)[0]
