"""The states of this process's random number generators, in plain values that `torch.load(weights_only=True)` reads."""

from __future__ import annotations

import random

import numpy as np
import torch

__all__ = ["restore", "states"]


def states() -> dict:
    kind, keys, *rest = np.random.get_state()
    found = {
        "python": random.getstate(),
        "numpy": (str(kind), torch.from_numpy(keys.astype(np.int64)), *rest),
        "cpu": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_rng_state()
    return found


def restore(saved: dict, local_rank: int = 0) -> None:
    """saved: of `states`, or of transformers' Trainer, which under DDP keeps the states of all cards of a host in a list."""
    version, internal, gauss = saved["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = saved["numpy"]
    np.random.set_state((kind, np.asarray(keys).astype(np.uint32), *rest))
    torch.set_rng_state(saved["cpu"].cpu())
    if "cuda" in saved and torch.cuda.is_available():
        of_card = saved["cuda"]
        if isinstance(of_card, (list, tuple)):
            of_card = of_card[local_rank] if local_rank < len(of_card) else None
        if of_card is not None:
            torch.cuda.set_rng_state(of_card.cpu())
