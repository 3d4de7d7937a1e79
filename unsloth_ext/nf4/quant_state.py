"""What bitsandbytes knows about a 4-bit weight, read into one tuple and checked before any launch.

There are two forms: `bitsandbytes.functional.QuantState`, and the nested list that it replaced
(`[absmax, shape, dtype, blocksize, [offset, [absmax2, code2, blocksize2, ...]], quant_type, code]`), which old checkpoints and
peft versions still hand around.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class NF4State(NamedTuple):
    """One NF4 weight. `code2`, `absmax2` and `offset` are None and `blocksize2` is 0 where absmax is not quantised itself."""

    absmax: torch.Tensor  # uint8 [blocks] if quantised, else float32 [blocks]
    shape: torch.Size
    dtype: torch.dtype
    blocksize: int
    code2: torch.Tensor | None  # float32 [256]
    absmax2: torch.Tensor | None  # float32 [ceil(blocks / blocksize2)]
    offset: torch.Tensor | float | None
    blocksize2: int


def quant_type(state) -> str:
    """ "nf4", "fp4", or "" for something that is no 4-bit state of bitsandbytes."""
    if type(state) is list:
        return state[5] if len(state) == 7 else ""
    return getattr(state, "quant_type", "") or ""


def read(state) -> NF4State:
    """The fields of either form. Raises ValueError for a state that is not NF4."""
    if (kind := quant_type(state)) != "nf4":
        raise ValueError(f"quant_state must be of quant type 'nf4', got {kind or type(state).__name__!r}")
    if type(state) is list:
        absmax, shape, dtype, blocksize, nested, _, _ = state
        offset, inner = nested if nested is not None else (None, None)
    else:
        absmax, shape, dtype, blocksize = state.absmax, state.shape, state.dtype, state.blocksize
        offset, inner = state.offset, state.state2
    if inner is None:
        return NF4State(absmax, shape, dtype, blocksize, None, None, None, 0)
    if type(inner) is list:
        absmax2, code2, blocksize2 = inner[:3]
    else:
        absmax2, code2, blocksize2 = inner.absmax, inner.code, inner.blocksize
    return NF4State(absmax, shape, dtype, blocksize, code2, absmax2, offset, blocksize2)


def check(packed: torch.Tensor, state: NF4State, out: torch.Tensor | None, dtype: torch.dtype) -> None:
    """Raise TypeError or ValueError, naming the argument, its value and what is expected, unless the kernel can run on it."""
    if not isinstance(packed, torch.Tensor):
        raise TypeError(f"packed must be a tensor, got {type(packed).__name__}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be float16, bfloat16 or float32, got {dtype}")
    if state.blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize must be a power of two from 32 to 4096, got {state.blocksize}")
    n = state.shape.numel() if isinstance(state.shape, torch.Size) else torch.Size(state.shape).numel()
    n_bytes, blocks = (n + 1) // 2, -(-n // state.blocksize)
    if not packed.is_contiguous():
        raise ValueError(
            f"packed must be contiguous, got strides {tuple(packed.stride())} for shape {tuple(packed.shape)}"
        )
    # A storage type wider than a byte pads the last one.
    if not n_bytes <= packed.numel() * packed.element_size() < n_bytes + packed.element_size():
        raise ValueError(
            f"packed must hold {n_bytes} bytes for shape {tuple(state.shape)}, got {packed.numel() * packed.element_size()}"
        )
    if state.code2 is None:
        _check_tensor("absmax", state.absmax, torch.float32, blocks, packed.device)
    else:
        if not (
            isinstance(state.blocksize2, int)
            and state.blocksize2 > 0
            and state.blocksize2 & (state.blocksize2 - 1) == 0
        ):
            raise ValueError(f"state2.blocksize must be a power of two, got {state.blocksize2}")
        if state.offset is None:
            raise ValueError("quant_state.offset must be given where absmax is quantised, got None")
        if isinstance(state.offset, torch.Tensor) and state.offset.numel() != 1:
            raise ValueError(f"quant_state.offset must be one number, got shape {tuple(state.offset.shape)}")
        _check_tensor("absmax", state.absmax, torch.uint8, blocks, packed.device)
        _check_tensor("state2.absmax", state.absmax2, torch.float32, -(-blocks // state.blocksize2), packed.device)
        _check_tensor("state2.code", state.code2, torch.float32, 256, packed.device)
    if out is not None:
        if not isinstance(out, torch.Tensor):
            raise TypeError(f"out must be a tensor, got {type(out).__name__}")
        if out.dtype != dtype:
            raise ValueError(f"out must be {dtype}, got {out.dtype}")
        if tuple(out.shape) != tuple(state.shape):
            raise ValueError(f"out must have shape {tuple(state.shape)}, got {tuple(out.shape)}")
        if out.device != packed.device:
            raise ValueError(f"out must be on {packed.device}, got {out.device}")
        if not out.is_contiguous():
            raise ValueError(f"out must be contiguous, got strides {tuple(out.stride())}")


def _check_tensor(name, tensor, dtype, at_least, device):
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"quant_state.{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype != dtype:
        raise ValueError(f"quant_state.{name} must be {dtype}, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"quant_state.{name} must be on {device} like the packed weight, got {tensor.device}")
    if tensor.numel() < at_least:
        raise ValueError(f"quant_state.{name} must have {at_least} entries, got {tensor.numel()}")
    if not tensor.is_contiguous():
        raise ValueError(f"quant_state.{name} must be contiguous, got strides {tuple(tensor.stride())}")


def offset_on(device: torch.device, offset: torch.Tensor | float) -> torch.Tensor:
    """The offset as float32 on `device`: itself where it is that already."""
    if isinstance(offset, torch.Tensor):
        return offset.to(device=device, dtype=torch.float32)
    return torch.tensor(offset, dtype=torch.float32, device=device)
