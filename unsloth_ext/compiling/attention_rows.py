"""Plain causal attention of a batch's rows in a graph, by FlashAttention 4 where the package flash-attn-4 is installed.

SDPA takes cuDNN's attention on Hopper, which makes a plan for each new length, a sixth of a second; Unsloth therefore pads lengths to
multiples of 128, copies of query, key, value and of what comes out. FlashAttention 4 takes any length as it is, and less time: on an H200
0.91 of cuDNN's at 2 x 4096 tokens, 0.87 at 32768 (benchmarks/NOTES.md). A call costs the host more than SDPA's, 0.2 ms, so small batches
are left to SDPA.

UNSLOTH_EXT_ROW_ATTENTION=0 turns it off.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch

from ..switches import OFF, said
from . import attention
from .as_traced import as_traced

# In plain transformers; in Unsloth the patch of that switch is in or not.
ON = said("UNSLOTH_EXT_ROW_ATTENTION") not in OFF
LEAST = 4096  # tokens of a batch: fewer take the card less time than the host


def refusal(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None = None) -> str:
    """Why `row_attention` cannot take these, or had better not; "" where it can. Shapes as there. In a graph whose sizes are symbols it
    makes two graphs of batches with more and with fewer tokens than LEAST."""
    if not as_traced():
        return "outside a graph each call waits for the host"
    if "flash4" not in attention.PREFERRED or attention._another_flash():
        return "other kernels are asked for"
    if not _may_be_there():
        return "flash-attn-4 is not installed"
    if why := attention.refusal("flash4", query, ever=True):
        return why  # asked first: what comes next is a guard, and then seconds of compiling
    if query.shape[0] * query.shape[1] < LEAST:
        return f"fewer than {LEAST} tokens"
    if query.shape[1] != key.shape[1] or value.shape != key.shape or query.shape[3] != key.shape[3]:
        return "lengths or head sizes differ"
    if query.shape[2] % key.shape[2] or not query.dtype == key.dtype == value.dtype:
        return "heads do not share keys evenly, or dtypes differ"
    return attention.refusal("flash4", query, kv_heads=key.shape[2], window=window)


@torch.compiler.assume_constant_result
def _may_be_there() -> bool:
    try:
        return find_spec("flash_attn.cute") is not None
    except ImportError:  # no flash_attn, or a module of that name
        return False


def row_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """Causal attention inside each row. query: [B, T, H, D]; key, value: [B, T, H_kv, D], of 16 bits. -> [B, T, H, D].

    scale: of the scores; 1 / sqrt(D) where None. window: a token reads itself and the window - 1 before it. To be asked for with `refusal`.
    """
    from .attention_flash4 import flash4_attention

    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return flash4_attention(query, key, value, None, query.shape[1], scale, window)[0]
