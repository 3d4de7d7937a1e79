"""Patches that are on by themselves only on the cards they were measured on; elsewhere a person asks for them by the patch's switch."""

from __future__ import annotations

import os

from ..patching import NotHere

# Compute capabilities: Hopper, on an H200 (benchmarks/NOTES.md). All patches that ask were measured on all of these.
MEASURED = frozenset({(9, 0)})


def refuse_where_not_measured(switch: str) -> None:
    """Raises NotHere unless all cards are of a kind in MEASURED, or the environment variable `switch` is set."""
    if not os.environ.get(switch) and not are_measured():
        raise NotHere(f"not measured on this card: {switch}=1 has it here")


def are_measured() -> bool:
    """Whether there are cards, all of a kind in MEASURED."""
    import torch

    cards = range(torch.cuda.device_count())
    return (
        torch.version.hip is None
        and len(cards) > 0
        and all(torch.cuda.get_device_capability(card) in MEASURED for card in cards)
    )
