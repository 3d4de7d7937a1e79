"""Attention over packed documents, in a graph that does not depend on how they were packed: `packed_attention`.

A packed row is described by two things, both computed once a batch and outside the layers (`packed.py`): the boundaries
`cu_seqlens` and a bound of the longest document. Both are graph inputs, so 64 packings are one graph. Six backends:

- "flash4": FlashAttention 4's, where the package flash-attn-4 is installed (`attention_flash4.py`): the quickest on an H200. fp16 and
  bf16, head sizes of 64, 96 and 128, Hopper; no softcap, not deterministic.
- "cudnn": cuDNN's ragged kernels by NVIDIA's cudnn-frontend, where that is installed (`attention_cudnn.py`): quicker than flash attention 2
  on an H200. fp16 and bf16, head sizes to 128, Hopper and data-center Blackwell; no softcap, not deterministic.
- "flash": aten's variable-length flash kernel, called as the native operator that it is. It takes grouped key and value heads
  on every torch served (torch 2.11's `varlen_attn` refuses them above it), has a C++ backward, and costs none of the 37
  microseconds that a Python operator costs. fp16 and bf16, head sizes to 256, Ampere or newer; no softcap.
  `torch.nn.attention.activate_flash_attention_impl` swaps FlashAttention 3 or 4 in under it; "auto" takes that before the two above.
- "efficient": aten's memory-efficient kernel over the same boundaries (`attention_efficient.py`): older cards (a T4), fp32,
  head sizes to 512.
- "flex": torch's flex attention with block masks made from the boundaries (`attention_flex.py`). Softcap, any dtype.
- "exact": a document at a time in fp32 (`attention_exact.py`). What a CPU runs; the others are tested against it.

"auto" takes the first of PREFERRED that can do the call; UNSLOTH_EXT_PACKED_ATTENTION=flash,efficient names others. It never falls to
"exact" on a card by itself.
"""

from __future__ import annotations

import os
from operator import index

import torch

BACKENDS = ("flash4", "cudnn", "flash", "efficient", "flex", "exact")

_SWITCH = "UNSLOTH_EXT_PACKED_ATTENTION"


def _preferred(named: str) -> tuple[str, ...]:
    backends = tuple(filter(None, (name.strip() for name in named.split(","))))
    if unknown := [name for name in backends if name not in BACKENDS]:
        raise ValueError(f"{_SWITCH}={named}: there are {', '.join(BACKENDS)}, not {', '.join(unknown)}")
    return backends or ("flash4", "cudnn", "flash", "efficient", "flex")


PREFERRED = _preferred(os.environ.get(_SWITCH, ""))  # what "auto" tries, in this order

# What int32 indices reach. Flash attention 2's variable-length backward has them for a buffer of (T + 128 n) * H * D elements.
_INT32 = 2**31


def packed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    backend: str = "auto",
    masks: dict | None = None,
) -> torch.Tensor:
    """Causal attention inside each document of a packed row. Traceable; gradients for query, key and value.

    query: [T, H, D]; key, value: [T, H_kv, D], H a multiple of H_kv. -> [T, H, D] in query's dtype.
    cu_seqlens: [n + 1] int32 on query's device, from 0 to T, never falling (FlashAttention's convention); a document may be empty.
    max_seqlen: the length of the longest document or any number above it.
    scale: of the scores; 1 / sqrt(D) where None. softcap: scores become softcap * tanh(scores / softcap) (Gemma 2).
    window: a token reads itself and the window - 1 before it.
    masks: `attention_flex.block_masks(...)` of this batch, used by "flex"; made on the spot where None.
    Raises ValueError for shapes that do not belong together or a backend that cannot do the call.
    """
    _check(query, key, value, cu_seqlens, window, softcap)
    if backend == "auto":
        backend = choose(query, softcap, key.shape[1], window)
    elif reason := refusal(backend, query, softcap, key.shape[1], window):
        raise ValueError(f"backend={backend!r} cannot do this call: {reason}")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if backend == "flash":
        return _flash(query, key, value, cu_seqlens, max_seqlen, scale, window)
    if backend == "flash4":
        from .attention_flash4 import flash4_attention

        return flash4_attention(query, key, value, cu_seqlens, max_seqlen, scale, window)[0]
    if backend == "cudnn":
        from .attention_cudnn import cudnn_attention

        return cudnn_attention(query, key, value, cu_seqlens, max_seqlen, scale, window)[0]
    if backend == "efficient":
        from .attention_efficient import efficient_attention

        return efficient_attention(query, key, value, cu_seqlens, max_seqlen, scale, window)[0]
    if backend == "flex":
        from .attention_flex import block_masks, flex_packed_attention

        mask = (masks or {}).get(window)
        if mask is None:
            mask = block_masks(cu_seqlens, query.shape[0], (window,))[window]
        return flex_packed_attention(query, key, value, mask, scale=scale, window=window, softcap=softcap)
    from .attention_exact import packed_attention as exact

    return exact(query, key, value, cu_seqlens, scale, window, softcap)[0]


def choose(
    query: torch.Tensor, softcap: float | None = None, kv_heads: int | None = None, window: int | None = None
) -> str:
    """The backend that "auto" means for this query."""
    if query.device.type == "cpu":
        return "exact"
    reasons = {}
    for backend in PREFERRED:
        if backend in ("flash4", "cudnn") and "flash" in PREFERRED and _another_flash():
            continue
        reason = refusal(backend, query, softcap, kv_heads, window)
        if not reason:
            return backend
        reasons[backend] = reason
    raise ValueError(
        "no backend can do this call: "
        + "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        + ". backend='exact' can, slowly"
    )


def refusal(
    backend: str,
    query: torch.Tensor,
    softcap: float | None = None,
    kv_heads: int | None = None,
    window: int | None = None,
    *,
    ever: bool = False,
) -> str:
    """Why `backend` cannot take this query, [T, H, D]; "" where it can. "flash4" also takes rows, [B, T, H, D]. kv_heads: of key and value; a
    quarter of the query's where None. ever: of "flash4", what no installation could mend, without a trial."""
    width, half = query.shape[-1], query.dtype in (torch.float16, torch.bfloat16)
    if backend == "exact":
        return ""
    if backend == "flex":
        return "" if query.dtype != torch.float64 else "no fp64"
    if backend not in BACKENDS:
        return f"there are {', '.join(BACKENDS)} and auto"
    if query.device.type != "cuda":
        return f"it needs a CUDA card, query is on {query.device.type}"
    if softcap is not None:
        return "it has no softcap; flex has"
    if width % 8:
        return f"the head size must be a multiple of 8, it is {width}"
    if backend == "efficient":
        if not half and query.dtype != torch.float32:
            return f"fp16, bf16 or fp32, not {query.dtype}"
        return "" if width <= 512 else f"head sizes to 512, this is {width}"
    if not half:
        return f"fp16 or bf16, not {query.dtype}"
    if backend in ("flash4", "cudnn"):
        if width % 16 or width > 128:
            return f"head sizes to 128, multiples of 16, this is {width}"
        if backend == "flash4" and width not in (64, 96, 128):
            return f"it was tried with head sizes of 64, 96 and 128, this is {width}"
        if query.numel() >= _INT32:
            return "the query has 2**31 elements or more"  # cuDNN's offsets are int32
        if torch.are_deterministic_algorithms_enabled():
            return "its backward is not deterministic"  # cuDNN has one, with memory for every pair of tokens
        if backend == "cudnn":
            return _lacking(backend, query.device.index)
        if ever:
            return _another_card(query.device.index)
        group = 4 if kv_heads is None else query.shape[-2] // kv_heads
        kind = query.dim() == 3, query.dtype, index(width), index(group), window is not None
        return _lacking(backend, query.device.index, *kind)
    if width > 256:
        return f"head sizes to 256, this is {width}"
    return "it needs Ampere or newer, this card is older" if _too_old(query.device.index) else ""


@torch.compiler.assume_constant_result
def _too_old(index: int | None) -> bool:
    """A plain bool: torch 2.11 cannot trace a comparison with a tuple that came up as a constant."""
    return torch.cuda.device_count() > 0 and torch.cuda.get_device_capability(index) < (8, 0)


@torch.compiler.assume_constant_result
def _another_flash() -> bool:
    """Whether the user has put another FlashAttention under aten's."""
    current = getattr(torch.nn.attention, "current_flash_attention_impl", None)
    return current is not None and current() not in (None, "FA2")


@torch.compiler.assume_constant_result
def _another_card(index: int | None) -> str:
    from . import attention_flash4

    return attention_flash4.another_card(index)


@torch.compiler.assume_constant_result
def _lacking(backend: str, index: int | None, *kind) -> str:
    from . import attention_cudnn, attention_flash4

    return attention_flash4.lacking(index, *kind) if backend == "flash4" else attention_cudnn.lacking(index)


def _flash(query, key, value, cu_seqlens, max_seqlen, scale, window):
    total, heads, width = query.shape
    kv_heads = key.shape[1]
    held = (total + 128 * cu_seqlens.shape[0]) * heads * ((width + 31) // 32 * 32)
    if held < _INT32:
        return _flash_call(query, key, value, cu_seqlens, max_seqlen, scale, window)
    if kv_heads == 1:
        raise ValueError(
            f"a row of {total} tokens in {cu_seqlens.shape[0] - 1} documents is too long for the flash backward "
            "(an int32 index): pack shorter rows, or use backend='flex'"
        )
    # Heads do not meet in attention: one call a group of them.
    parts = zip(*(t.chunk(kv_heads, 1) for t in (query, key, value)), strict=True)
    return torch.cat([_flash_call(*part, cu_seqlens, max_seqlen, scale, window) for part in parts], 1)


def _flash_call(query, key, value, cu_seqlens, max_seqlen, scale, window):
    # Else causal by the window, nothing to the right: FlashAttention 4 under aten's name refuses a window without an end.
    causal = window is None
    return torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        0.0,
        causal,
        False,
        scale=scale,
        window_size_left=None if causal else window - 1,
        window_size_right=None if causal else 0,
    )[0]


def _check(query, key, value, cu_seqlens, window, softcap):
    if query.dim() != 3 or key.dim() != 3 or value.shape != key.shape:
        raise ValueError(
            "query must be [T, H, D] and key and value [T, H_kv, D], got "
            f"{tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
        )
    if query.shape[0] != key.shape[0] or query.shape[2] != key.shape[2] or query.shape[1] % key.shape[1]:
        raise ValueError(
            f"query {tuple(query.shape)} and key {tuple(key.shape)} must have the same T and D, and H a multiple of H_kv"
        )
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(
            f"query, key and value must have one dtype, got {query.dtype}, {key.dtype}, {value.dtype}: cast them before"
        )
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype != torch.int32 or cu_seqlens.device != query.device:
        raise ValueError(
            f"cu_seqlens must be [n + 1] int32 on {query.device}, got {list(cu_seqlens.shape)} {cu_seqlens.dtype} on "
            f"{cu_seqlens.device}"
        )
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 (or None for none), got {window}")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap must be positive (or None for none), got {softcap}")
