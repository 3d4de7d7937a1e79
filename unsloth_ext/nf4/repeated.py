"""The kernel's launch for fields like those of an earlier call: an operator in a graph has no quant_state that a plan could hang on.

What `check` and the choice of a variant look at, but for the addresses, is a key; what passed once with a key passes again. So a call
of the operator costs the host about half, and weights that move, as sharded ones do with each gather, need nothing new.
"""

from __future__ import annotations

import torch

__all__ = ["again", "forget", "remember", "without_overrides"]

_MOST = 4096
# layout -> (go, programs, elements, address of the codes, alignment of the packed bytes minus one, Triton's hooks)
_known: dict = {}
# A parameter of bitsandbytes sends each method call through Python.
without_overrides = torch._C.DisableTorchFunctionSubclass


def _layout(packed, absmax, code2, absmax2, offset, blocksize, blocksize2, out):
    nested = None
    if code2 is not None:
        nested = (
            code2.dtype, code2.numel(), code2.get_device(), code2.is_contiguous(),
            absmax2.dtype, absmax2.numel(), absmax2.get_device(), absmax2.is_contiguous(),
            offset.dtype, offset.numel(), offset.get_device(),
        )  # fmt: skip
    return (
        packed.dtype, packed.numel(), packed.get_device(), packed.is_contiguous(),
        absmax.dtype, absmax.numel(), absmax.get_device(), absmax.is_contiguous(),
        blocksize, blocksize2, out.dtype, out.shape, out.stride(), out.get_device(), nested,
    )  # fmt: skip


def again(packed, absmax, code2, absmax2, offset, blocksize: int, blocksize2: int, out) -> bool:
    """Launch, if such fields have been launched before. offset: a tensor, or None with `code2`. False: nothing has been done."""
    if not _known or (code2 is not None and (absmax2 is None or offset is None)):
        return False
    with without_overrides():
        known = _known.get(_layout(packed, absmax, code2, absmax2, offset, blocksize, blocksize2, out))
        if known is None:
            return False
        go, programs, elements, codes, misaligned, (enter, leave) = known
        packed_at, absmax_at, out_at, index = packed.data_ptr(), absmax.data_ptr(), out.data_ptr(), out.get_device()
        nested = (absmax_at,) * 3
        if code2 is not None:
            nested = code2.data_ptr(), absmax2.data_ptr(), offset.data_ptr()
        if (
            not (packed_at and absmax_at and all(nested))  # freed: who checks says which
            or packed_at & misaligned
            or out_at & 15
            or torch._C._cuda_getDevice() != index
            or enter.calls
            or leave.calls
        ):
            return False
        stream = torch._C._cuda_getCurrentRawStream(index)
        go(programs, stream, packed_at, absmax_at, *nested, codes, out_at, elements)
        return True


def remember(packed, state, offset, out, go, programs: int, codes: int) -> None:
    """After a launch by `go` (launch.direct) of a wide variant on checked fields; offset: the tensor that it read, or None."""
    if (offset is None) != (state.code2 is None) or (offset is not None and offset is not state.offset):
        return  # what the next call brings is not what the kernel reads
    from ..direct_launch import hooks  # which needs Triton; it has launched by now

    if len(_known) >= _MOST:
        _known.clear()
    with without_overrides():
        layout = _layout(
            packed, state.absmax, state.code2, state.absmax2, offset, state.blocksize, state.blocksize2, out
        )
        _known[layout] = go, programs, out.numel(), codes, 1 if out.dtype is torch.float32 else 3, hooks()


def forget() -> None:
    _known.clear()
