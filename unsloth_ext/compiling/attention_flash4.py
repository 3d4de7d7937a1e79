"""Causal attention by FlashAttention 4, of packed documents or of rows, from the package flash-attn-4: `unsloth_ext::flash4_attention`.

On an H200 its variable-length kernels take five sixths of the time of cuDNN's and little more than half of flash attention 2's, those for
rows 0.82 to 0.98 of cuDNN's (benchmarks/NOTES.md), and they sum the gradients of grouped key heads in fp32. They are written in CuTe DSL and
compiled when first called: some six seconds to import, six more for a forward and its backward.

The package is a beta: its functions are called by the names of their arguments, a version whose signature is another is not taken, nor
one whose first results differ from attention computed in fp32. torch's own way to it, `activate_flash_attention_impl("FA4")`, unpacks two
results in torch 2.11 where it now returns five, and refuses windows in the backward.

FlashAttention: https://github.com/Dao-AILab/flash-attention, folder flash_attn/cute (BSD-3-Clause).
"""

# no `from __future__ import annotations`: torch.library reads these annotations
import functools
import inspect
import logging
import threading
import warnings

import torch

from .attention_gradients import differentiable

_log = logging.getLogger(__name__)
_lock = threading.Lock()  # a first call of a kind compiles; autograd has threads of its own
_FORWARD, _BACKWARD = ("q", "k", "v"), ("q", "k", "v", "out", "dout", "lse")  # the tensors
_NAMES = {"softmax_scale", "causal", "window_size_left", "window_size_right"}
_SIDES = {name: (f"{name}_q", f"{name}_k") for name in ("cu_seqlens", "max_seqlen")}
_NEAR = 2e-2  # of the largest value, bf16: what a first result may be off


def lacking(
    index: int | None,
    packed: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    width: int = 128,
    group: int = 4,
    windowed: bool = False,
) -> str:
    """Why flash-attn-4 cannot be had on card `index` for packed documents, or for rows, of heads of this kind, `group` of which share a key, and
    a window; "" where it can. It is asked by a forward and a backward, once a process for each kind, which compiles what the call will
    need; where it is installed and does not do that, or wrongly, the log says so."""
    if why := another_card(index):
        return why
    try:
        _kernels()
    except Exception as error:  # a package of its many is missing, or another one has its name
        return f"it needs flash-attn-4 ({' '.join(str(error).split())[:200]})"
    if torch.cuda.is_current_stream_capturing():
        return "it cannot be tried while a CUDA graph is captured"
    # What is left of a window where all documents are shorter is another kernel.
    return _tried(index, packed, dtype, width, group, False) or (
        _tried(index, packed, dtype, width, group, True) if windowed else ""
    )


def another_card(index: int | None) -> str:
    """Why card `index` is not one that it is taken on; "" where it is."""
    if torch.cuda.device_count() == 0 or torch.version.hip is not None:
        return "there is no NVIDIA card"
    return "" if torch.cuda.get_device_capability(index)[0] == 9 else "it was measured on Hopper only"


@functools.cache
def _tried(index: int | None, packed: bool, dtype: torch.dtype, width: int, group: int, windowed: bool) -> str:
    try:
        device = torch.device("cuda", torch.cuda.current_device() if index is None else index)
        _try(device, packed, dtype, width, group, windowed)
    except torch.OutOfMemoryError:  # says nothing about it
        raise
    except Exception as error:
        why = f"flash-attn-4 does not do it ({' '.join(str(error).split())[:200]})"
        _log.warning(
            "unsloth_ext: attention %s is left to other kernels: %s",
            "of packed documents" if packed else "of rows",
            why,
        )
        return why
    return ""


@torch.library.custom_op("unsloth_ext::flash4_attention", mutates_args=(), device_types="cuda")
def flash4_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int,
    scale: float,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """query [T, H, D], key and value [T, H_kv, D], cu_seqlens [n + 1] int32 from 0 to T -> [T, H, D] and the log-sum-exp [H, T] in
    fp32. Without cu_seqlens rows of max_seqlen tokens: [B, T, H, D], [B, T, H_kv, D] -> [B, T, H, D], [B, H, T]."""
    if query.numel() == 0:
        return _empty(query)
    forward, _ = _kernels()
    tensors = dict(zip(_FORWARD, (query, key, value), strict=True))
    found = _call(forward, tensors, cu_seqlens, max_seqlen, scale, window, return_lse=True)
    return found[0], found[1]


def _empty(query):
    *rows, tokens, heads, _ = query.shape
    return query.new_empty(query.shape), query.new_empty((*rows, heads, tokens), dtype=torch.float32)


flash4_attention.register_fake(lambda query, *rest: _empty(query))


@torch.library.custom_op("unsloth_ext::flash4_attention_backward", mutates_args=(), device_types="cuda")
def flash4_attention_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int,
    scale: float,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of query, key and value, in their dtypes and contiguous."""
    if query.numel() == 0:
        return tuple(t.new_empty(t.shape) for t in (query, key, value))
    _, backward = _kernels()
    tensors = dict(zip(_BACKWARD, (query, key, value, out, grad, logsumexp), strict=True))
    found = _call(backward, tensors, cu_seqlens, max_seqlen, scale, window)
    return found[0], found[1], found[2]


differentiable(flash4_attention, flash4_attention_backward)


@functools.cache
def _kernels():
    """(the forward, the backward) of flash-attn-4. Raises ImportError, or whatever its import raises, where they cannot be had."""
    from flash_attn.cute import interface

    # CuTe DSL's at each compile, about an argument of FlashAttention's own.
    warnings.filterwarnings("ignore", message="Argument aux_data", category=UserWarning)
    found = interface._flash_attn_fwd, interface._flash_attn_bwd
    for function, more in zip(found, ({*_FORWARD, "return_lse"}, _BACKWARD), strict=True):
        if unknown := sorted(_NAMES.union(more, *_SIDES.values()) - set(inspect.signature(function).parameters)):
            raise ImportError(f"this version's {function.__name__} has no {', '.join(unknown)}")
    return found


def _call(function, tensors, cu_seqlens, max_seqlen, scale, window, **more):
    """One of the two. Raises RuntimeError, with what may do it instead, where flash-attn-4 raises anything but a lack of memory."""
    query = tensors["q"]
    longest = min(max_seqlen, query.shape[-3])
    left = None if window is None or window >= longest else window - 1
    if cu_seqlens is not None:
        for name, given in (("cu_seqlens", cu_seqlens.contiguous()), ("max_seqlen", longest)):
            more |= dict.fromkeys(_SIDES[name], given)
    more |= {name: tensor.contiguous() for name, tensor in tensors.items()}
    more |= {"window_size_left": left, "window_size_right": None if left is None else 0}
    with torch.cuda.device(query.device), _lock:
        try:
            return function(softmax_scale=scale, causal=left is None, **more)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise RuntimeError(
                f"flash-attn-4 refuses attention of {list(query.shape)} {query.dtype}: {error}\nbackend='cudnn' or 'flash' may do "
                "it; for every model of a process: UNSLOTH_EXT_PACKED_ATTENTION=cudnn,flash, for rows alone UNSLOTH_EXT_ROW_ATTENTION=0"
            ) from error


def _try(device: torch.device, packed: bool, dtype: torch.dtype, width: int, group: int, windowed: bool) -> None:
    """Raises RuntimeError if a forward and a backward do not give what fp32 gives."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    from .attention_exact import packed_attention, packed_attention_backward

    plain = torch.inference_mode(False), torch.no_grad(), torch.autocast("cuda", enabled=False)
    with unset_fake_temporarily(), plain[0], plain[1], plain[2]:
        generator = torch.Generator(device).manual_seed(0)  # leaves the user's random state alone
        heads = 2 * group, 2, 2, 2 * group
        row = [torch.randn(400, n, width, device=device, generator=generator).to(dtype) for n in heads]
        ends = torch.tensor([0, 150 if packed else 200, 400], dtype=torch.int32, device=device)
        rest = width**-0.5, 100 if windowed else None
        given, where = (row, (ends, 250)) if packed else ([t.unflatten(0, (2, 200)) for t in row], (None, 200))
        out, logsumexp = flash4_attention(*given[:3], *where, *rest)
        found = out, *flash4_attention_backward(given[3], *given[:3], out, logsumexp, *where, *rest)
        exact = packed_attention(*row[:3], ends, *rest, None)
        wanted = exact[0], *packed_attention_backward(row[3], *row[:3], *exact, ends, *rest, None)
        for name, ours, theirs in zip(("out", "dq", "dk", "dv"), found, wanted, strict=True):
            ours = ours.view(theirs.shape)
            off = ((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max()).item()
            if not off < _NEAR:
                raise RuntimeError(f"its first {name} was off by {off:.1e}")
