"""What `linear_cross_entropy` and `linear_logprobs` accept, and what they say about the rest."""

from __future__ import annotations

from dataclasses import dataclass

import torch

MEMORY = ("auto", "fast", "lean")
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass
class LinearInputs:
    hidden: torch.Tensor  # [T, D]
    weight: torch.Tensor  # [V, D]
    bias: torch.Tensor | None
    labels: torch.Tensor  # [T]
    lead: tuple[int, ...]
    logits_dtype: torch.dtype

    @property
    def value_dtype(self) -> torch.dtype:
        return torch.float64 if self.hidden.dtype == torch.float64 else torch.float32


def _plain(name: str, x: torch.Tensor) -> None:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if hasattr(x, "full_tensor"):
        raise TypeError(
            f"{name} is a DTensor: gather it with {name}.full_tensor(), or use vocabulary_parallel_cross_entropy"
        )
    if not x.is_floating_point():
        raise TypeError(f"{name} has dtype {x.dtype}: dequantize it first")


def shifted(labels: torch.Tensor, hidden: torch.Tensor, ignore_index: int) -> torch.Tensor:
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(f"labels has shape {list(labels.shape)}, hidden {list(hidden.shape)}")
    return torch.nn.functional.pad(labels[..., 1:], (0, 1), value=ignore_index)


def checked(
    hidden, weight, labels, bias, *, softcap, logit_scale, logits_dtype, memory, label_smoothing=0.0
) -> LinearInputs:
    """The inputs as rows of one dtype (autocast's where it is on, else hidden's); raises ValueError or TypeError."""
    _plain("hidden", hidden)
    _plain("weight", weight)
    if bias is not None:
        _plain("bias", bias)
    if weight.dim() != 2 or hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(f"hidden [..., D] and weight [V, D] do not fit: {list(hidden.shape)} and {list(weight.shape)}")
    if weight.shape[0] == 0:
        raise ValueError("weight has no rows")
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(f"labels has shape {list(labels.shape)}, hidden {list(hidden.shape)}")
    if labels.dtype not in INTEGERS:
        raise TypeError(f"labels must be of an integer dtype, got {labels.dtype}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {list(bias.shape)}, weight {list(weight.shape)}")
    if memory not in MEMORY:
        raise ValueError(f"memory must be one of {', '.join(MEMORY)}, got {memory!r}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive or None, got {softcap}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be from 0 to 1, got {label_smoothing}")
    if logit_scale == 0:
        raise ValueError("logit_scale must not be 0")
    dtype = hidden.dtype
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
    rows = hidden.reshape(-1, hidden.shape[-1]).to(dtype)
    rows = rows if rows.is_contiguous() else rows.contiguous()
    weight = weight.to(device=rows.device, dtype=dtype)
    weight = weight if weight.stride(-1) == 1 else weight.contiguous()
    if bias is not None:
        bias = bias.to(device=rows.device, dtype=dtype).contiguous()
    if logits_dtype is None or dtype in (torch.float32, torch.float64):
        logits_dtype = dtype
    if logits_dtype not in (dtype, torch.float32):
        raise ValueError(f"logits_dtype must be torch.float32, {dtype} or None, got {logits_dtype}")
    labels = labels.reshape(-1).to(rows.device).contiguous()
    return LinearInputs(rows, weight, bias, labels, tuple(hidden.shape[:-1]), logits_dtype)
