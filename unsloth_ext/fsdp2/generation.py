"""`generate` of a sharded model: ranks stay in step, and code that reads weights without a forward finds them.

Each new token is a forward, and so a gather, on every rank. transformers lets ranks that have finished go on with the others
where a model says that it is managed by FSDP (`synced_gpus`); a sharded one says so here. Unsloth's fast decoding reads the
layers' weights itself, past the hooks that gather them: there all units stay gathered for as long as `generate` runs, which takes
the memory of the whole 4-bit model.
"""

from __future__ import annotations

import contextlib
import functools

from torch import nn
from torch.distributed.fsdp import FSDPModule

from .sharding import gathered, units_of

__all__ = ["all_gathered", "serve_generation"]


def serve_generation(model: nn.Module) -> None:
    """Prepare every module with a `generate` of its own within a sharded model."""
    for module in model.modules():
        if hasattr(type(module), "generate") and hasattr(type(module), "prepare_inputs_for_generation"):
            module._is_fsdp_managed_module = True
    if _reads_weights_itself(model):
        causal = model.get_base_model() if hasattr(model, "get_base_model") else model
        generate = causal.generate

        @functools.wraps(generate)
        def whole(*args, **kwargs):
            with all_gathered(model):
                return generate(*args, **kwargs)

        causal.generate = whole


def _reads_weights_itself(model: nn.Module) -> bool:
    layers, _ = units_of(model)
    return any(str(getattr(type(layer).forward, "__module__", "")).startswith("unsloth.") for layer in layers)


@contextlib.contextmanager
def all_gathered(model: nn.Module):
    """Within it every unit is whole and stays so after its forward. A collective; takes the memory of the whole model."""
    units = [m for m in model.modules() if isinstance(m, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
    before, model._unsloth_ext_all_gathered = getattr(model, "_unsloth_ext_all_gathered", False), True
    try:
        with gathered(*units):
            yield
    finally:
        model._unsloth_ext_all_gathered = before
        for unit in units:
            keeps = unit in model._unsloth_ext_resident or not model._unsloth_ext_reshards
            unit.set_reshard_after_forward(not keeps, recurse=False)
