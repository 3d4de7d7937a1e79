"""How much memory a budget is, and how much of it is in use: of a card, or of a CPU where plans are only tried out."""

from __future__ import annotations

import contextlib
import os
import re
import time
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .. import card_memory
from ..card_memory import Counts

_UNITS = {"": 1, "B": 1, **{f"{p}{s}": b**i for i, p in enumerate("KMGT", 1) for s, b in (("B", 1000), ("iB", 1024))}}
_AMOUNT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*|%)\s*")
# What stays free of the budget. A card's free memory is also wanted by fragmentation, cuBLAS workspaces and NCCL; an amount
# given in bytes is what the allocator's own count must not exceed.
MARGIN_OF_CARD, MARGIN_OF_AMOUNT = 0.06, 0.02
RECENT = 1.0  # seconds for which what the driver said is taken for what is


def parse(budget) -> tuple[str, float]:
    """("share", of the card) or ("bytes", n) for "auto", "12GiB", "80%", 0.8 (a share) or 12 (GiB).

    Raises TypeError or ValueError naming the value.
    """
    if isinstance(budget, bool) or not isinstance(budget, (str, int, float)):
        raise TypeError(f'budget must be "auto", an amount such as "12GiB" or a share such as 0.8, got {budget!r}')
    if isinstance(budget, str):
        if budget.strip().lower() == "auto":
            return "share", 1.0
        match = _AMOUNT.fullmatch(budget)
        if match is None:
            raise ValueError(
                f'budget must be "auto", an amount such as "12GiB" or a share such as "80%", got {budget!r}'
            )
        number, unit = float(match[1]), match[2]
        if unit == "%":
            budget = number / 100
            if not 0 < budget <= 1:
                raise ValueError(f"budget must be more than 0% and at most 100% of the card, got {number:g}%")
            return "share", budget
        name = next((u for u in _UNITS if u.lower() == unit.lower()), None)
        if name is None or not unit:
            raise ValueError(f"budget {match[0].strip()!r} needs a unit: KiB, MiB, GiB, TiB, KB, MB, GB, TB or %")
        number *= _UNITS[name]
    elif 0 < budget <= 1:
        return "share", float(budget)
    else:
        number = float(budget) * 2**30
    if not 0 < number < float("inf"):
        raise ValueError(f"budget must be more than 0, got {budget!r}")
    return "bytes", number


class Card:
    """The memory of one CUDA device, as PyTorch's allocator counts it."""

    def __init__(self, device: torch.device):
        self.device = device
        self._looked = (float("-inf"), 0, 0)  # when the driver was asked, what it left to this process, all of the card

    def look(self) -> None:
        """Ask the driver, where the host has time for it: `limit` then need not ask at the start of the next step."""
        free, total = torch.cuda.mem_get_info(self.device)
        # What others have is not to be had. What this process allocates or frees meanwhile does not change the sum.
        mine = free + card_memory.counts(self.device).reserved
        self._looked = (time.monotonic(), mine, total)

    def limit(self, budget: tuple[str, float], margin: float | None) -> int:
        """Bytes that this process may have allocated under `budget`."""
        kind, amount = budget
        if time.monotonic() - self._looked[0] >= RECENT:
            self.look()
        _, mine, total = self._looked
        if kind == "bytes":
            return int(min(amount * (1 - (MARGIN_OF_AMOUNT if margin is None else margin)), mine))
        return int(min(amount * total, mine) * (1 - (MARGIN_OF_CARD if margin is None else margin)))

    def counts(self) -> Counts:
        return card_memory.counts(self.device)

    def allocated(self) -> int:
        return self.counts().allocated

    def peak(self) -> int:
        return self.counts().peak

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)

    @contextlib.contextmanager
    def counting(self):
        yield self

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)


class Ram(TorchDispatchMode):
    """The same of a CPU, where PyTorch counts nothing: storages that operators make while `counting()` are followed until they
    die. Slow (each operator passes through Python), so it serves the probe and tests; `base` stands for what was there before.
    """

    def __init__(self, device: torch.device, base: int = 0):
        super().__init__()
        self.device, self.base = device, base
        self.live, self.most, self._known = base, base, {}

    @classmethod
    def is_infra_mode(cls) -> bool:
        return True  # else torch.compile would leave functions uncompiled under it

    def look(self) -> None:
        pass

    def limit(self, budget: tuple[str, float], margin: float | None) -> int:
        kind, amount = budget
        if kind == "share":
            amount, usual = amount * host_memory_free(), MARGIN_OF_CARD
        else:
            usual = MARGIN_OF_AMOUNT
        return int(amount * (1 - (usual if margin is None else margin)))

    def counts(self) -> Counts:
        return Counts(self.live, self.most)

    def allocated(self) -> int:
        return self.live

    def peak(self) -> int:
        return self.most

    def reset_peak(self) -> None:
        self.most = self.live

    def synchronize(self) -> None:
        pass

    @contextlib.contextmanager
    def counting(self):
        with self:
            yield self

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        before = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if _counts(t)}
        out = func(*args, **kwargs)
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if (
                _counts(tensor) and tensor.untyped_storage()._cdata not in before
            ):  # a view of something older is not new
                self._follow(tensor.untyped_storage())
        return out

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if not size or key in self._known:
            return
        self._known[key] = size
        self.live += size
        self.most = max(self.most, self.live)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        if self._known.pop(key, None) is not None:
            self.live -= size


def _counts(tensor) -> bool:
    return isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu" and tensor.layout == torch.strided


def meter(device: torch.device, model: torch.nn.Module):
    if device.type == "cuda":
        return Card(device)
    tensors = {}
    for tensor in (*model.parameters(), *model.buffers()):
        with contextlib.suppress(RuntimeError):  # a wrapper has none
            storage = getattr(tensor, "_local_tensor", tensor).untyped_storage()
            tensors[storage.data_ptr()] = storage.nbytes()
    return Ram(device, sum(tensors.values()))


def host_memory_free() -> int:
    """Bytes of RAM that this process may still take: of the machine and of its control group, whichever is less."""
    if not os.path.exists("/proc/meminfo"):  # not Linux. peft and accelerate need psutil, so it is there
        import psutil

        return psutil.virtual_memory().available
    with open("/proc/meminfo") as file:
        free = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        if os.path.exists(limit):
            with open(limit) as a, open(used) as b:
                bound = a.read().strip()
                if bound != "max":
                    free = min(free, max(0, int(bound) - int(b.read())))
    return free
