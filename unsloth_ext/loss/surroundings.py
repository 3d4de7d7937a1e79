"""What a recomputation must find as the first run did: random numbers and autocast, as `torch.utils.checkpoint` keeps them."""

from __future__ import annotations

import contextlib

import torch


class Surroundings:
    """Remembered where it is made; `restored()` brings them back for a while."""

    def __init__(self, device: torch.device):
        self.device = device
        kinds = {"cpu", device.type}
        self.autocast = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds]
        self.cache = torch.is_autocast_cache_enabled()
        self.cpu = self.own = None
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return  # a captured graph has its own generator, whose state cannot be read here
        self.cpu = torch.get_rng_state()
        if device.type != "cpu":
            self.own = torch.get_device_module(device).get_rng_state(device)

    @contextlib.contextmanager
    def restored(self):
        with contextlib.ExitStack() as stack:
            for kind, enabled, dtype in self.autocast:
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=self.cache))
            if self.cpu is not None:
                own = self.own is not None
                kind = self.device.type if own else "cuda"
                stack.enter_context(torch.random.fork_rng([self.device] if own else [], device_type=kind))
                torch.set_rng_state(self.cpu)
                if own:
                    torch.get_device_module(self.device).set_rng_state(self.own, self.device)
            yield
