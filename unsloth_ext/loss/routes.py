"""Which calls of somebody else's fused loss go to `linear_cross_entropy` and `linear_logprobs`.

A call is taken where three things hold. The head is one whose logits are hidden @ weight.T + bias: a plain dense tensor, not
quantised, not a shard. Its dtype is one that the kernels are made for. And on this card the function was measured to be better
than what stood there. Everything else goes back with its arguments as they came.

Nothing here waits for the device, and a compiler sees constants: dtypes, devices and shapes, never values.
"""

from __future__ import annotations

import torch

from .heads import autocast_dtype

ROUTES = frozenset(
    {
        "cross_entropy.frozen",
        "cross_entropy.trained",
        "logprobs.frozen",
        "logprobs.trained",
        "trl.frozen",
        "trl.trained",
    }
)

# Where ours was measured to be faster or smaller, and not worse in both: compute capability, or "cpu" -> routes.
# A card that is not listed keeps what it had. On a CPU TRL's own kernel does not run at all, and Unsloth's was not measured.
BETTER: dict[tuple[int, int] | str, frozenset[str]] = {
    (9, 0): ROUTES,
    "cpu": frozenset({"trl.frozen", "trl.trained"}),
}

_HALF = (torch.bfloat16, torch.float16)


@torch.compiler.assume_constant_result
def is_better(route: str, device_type: str, index: int | None) -> bool:
    """Whether `route` is listed for this device."""
    if device_type == "cuda" and torch.version.hip is None:
        return route in BETTER.get(torch.cuda.get_device_capability(index), ())
    return route in BETTER.get(device_type, ())


def is_dense(tensor: torch.Tensor) -> bool:
    """A tensor that a matmul can read as it is: no subclass (DTensor, Params4bit, torchao), no placeholder of ZeRO-3."""
    return (
        type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and tensor.is_floating_point()
        and not hasattr(tensor, "ds_id")  # DeepSpeed's mark. What it has gathered for forward is gone in backward
    )


def compute_dtype(route: str, hidden, weight, bias=None, dtype=None) -> torch.dtype | None:
    """The dtype in which to serve this call, or None where it is not ours. route: without ".frozen" or ".trained".

    dtype: of the product, instead of autocast's or the weight's.
    """
    if type(hidden) not in (torch.Tensor, torch.nn.Parameter) or not hidden.is_floating_point() or not is_dense(weight):
        return None
    if weight.dim() != 2 or hidden.shape[-1] != weight.shape[1] or hidden.device != weight.device:
        return None
    trained = weight.requires_grad
    if bias is not None:
        if not is_dense(bias) or bias.shape != weight.shape[:1] or bias.device != weight.device:
            return None
        trained = trained or bias.requires_grad
    device = weight.device
    if dtype is None:
        dtype = autocast_dtype(device.type) or weight.dtype
    if device.type != "cpu" and dtype not in _HALF:
        return None
    if trained and device.type != "cpu" and (weight.dtype != dtype or (bias is not None and bias.dtype != dtype)):
        return None  # the sum over rows would be rounded to the narrower dtype before it reaches the wider weight
    name = f"{route}.{'trained' if trained and torch.is_grad_enabled() else 'frozen'}"
    return dtype if is_better(name, device.type, device.index) else None


def logit_scale(multiply, divide) -> float | None:
    """Unsloth's two keywords as one factor, each off at 0 or None. None where a tensor is among them."""
    scale = 1.0
    for value, power in ((multiply, 1), (divide, -1)):
        if isinstance(value, torch.Tensor):
            return None
        if value:
            scale *= float(value) ** power
    return scale
