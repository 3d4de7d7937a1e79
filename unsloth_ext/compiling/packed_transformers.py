"""Packed attention for plain transformers + peft: an attention implementation of its own, "unsloth_ext_varlen".

    model = AutoModelForCausalLM.from_pretrained(...)
    use_packed_attention(model)              # before or after peft, before or after torch.compile

From then on a padding-free batch (TRL's `padding_free=True` or `packing=True`, `DataCollatorWithFlattening`) runs
`packed_attention` in every layer, eager or compiled, and no [T, T] mask is made. Padded batches, evaluation and generation
run as they did, by SDPA, in compiled layers on Hopper also by flash-attn-4 (`attention_rows.py`). A model with a softcap (Gemma 2), which SDPA would ignore, gets it in both.
"""

from __future__ import annotations

import torch

from . import attention_rows
from .as_traced import as_traced
from .attention import BACKENDS, packed_attention
from .attention_flex import block_masks
from .packed import _in_packed_forward, packed_arguments

_NAMES = {
    "auto": "unsloth_ext_varlen",
    "flash": "unsloth_ext_varlen_fa",
}  # "flash" in a name means more to transformers


def register(backend: str = "auto") -> str:
    """Make packed attention known to transformers, and give the name for `attn_implementation=`.

    backend: one of `attention.BACKENDS` or "auto". A model loaded by name needs `use_packed_attention` all the same: it is
    what finds the boundaries once a batch. Raises ValueError for another backend.
    """
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend must be auto or one of {', '.join(BACKENDS)}, got {backend!r}")
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = _NAMES.get(backend, f"unsloth_ext_varlen_{backend}")
    if name not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        ALL_ATTENTION_FUNCTIONS.register(name, _attention(backend))
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, packed_mask)
    return name


def use_packed_attention(model: torch.nn.Module, backend: str = "auto") -> torch.nn.Module:
    """Give a transformers causal model (or a PeftModel around one) packed attention. Returns the model; idempotent.

    Raises ValueError for an unknown backend, TypeError for a module that has no attention implementation to set.
    """
    name = register(backend)
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not hasattr(inner, "set_attn_implementation"):
        raise TypeError(f"use_packed_attention needs a transformers model, got {type(model).__name__}")
    inner.set_attn_implementation(name)
    # On the stack of layers: peft calls the model around it by its forward, where no hook would run.
    stack = inner.base_model
    if "_unsloth_ext_packed_hooks" not in stack.__dict__:
        stack._unsloth_ext_packed_hooks = (
            stack.register_forward_pre_hook(_before, with_kwargs=True),
            stack.register_forward_hook(_after, always_call=True),
        )
    return model


def remove_packed_attention(model: torch.nn.Module, implementation: str = "sdpa") -> torch.nn.Module:
    """Take the hooks out and set another implementation. Returns the model."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    for hook in inner.base_model.__dict__.pop("_unsloth_ext_packed_hooks", ()):
        hook.remove()
    inner.set_attn_implementation(implementation)
    return model


def _before(stack, args, kwargs):
    if args and "input_ids" not in kwargs:
        args, kwargs = args[1:], {"input_ids": args[0], **kwargs}
    kwargs = packed_arguments(kwargs)
    cu_seqlens = kwargs.get("cu_seq_lens_q")
    _in_packed_forward[0] = cu_seqlens is not None
    if cu_seqlens is not None and "packed_masks" not in kwargs:
        tokens = kwargs.get("input_ids")
        tokens = kwargs["inputs_embeds"] if tokens is None else tokens
        if windows := _flex_windows(stack.config, tokens.device):
            kwargs["packed_masks"] = block_masks(cu_seqlens, tokens.shape[1], windows)
    return args, kwargs


def _after(stack, args, output):
    _in_packed_forward[0] = False


def _flex_windows(config, device):
    """The windows of the layers that will run flex: their block masks are made here, once a batch."""
    name = config._attn_implementation
    softcapped = getattr(config, "attn_logit_softcapping", None) is not None
    if name != "unsloth_ext_varlen_flex" and not (name == _NAMES["auto"] and softcapped and device.type == "cuda"):
        return ()
    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    if window is None or kinds == {"full_attention"}:
        return (None,)
    return (None, window) if "full_attention" in kinds else (window,)


def packed_mask(*args, **kwargs):
    """transformers' mask of a batch: none for a packed one whose boundaries travel beside it, else SDPA's."""
    if _in_packed_forward[0]:
        return None
    from transformers.masking_utils import sdpa_mask

    return sdpa_mask(*args, **kwargs)


def _attention(backend):
    def unsloth_ext_varlen(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
        """query [B, H, T, D], key and value [B, H_kv, T', D] -> ([B, T, H, D], None), as transformers wants it."""
        cu_seqlens, window = kwargs.get("cu_seq_lens_q"), kwargs.get("sliding_window")
        softcap = kwargs.get("softcap")
        is_causal = kwargs.get("is_causal")
        is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if cu_seqlens is not None and attention_mask is None and query.shape[0] == 1:
            if dropout or not is_causal:
                raise ValueError(
                    f"packed attention is causal and has no dropout; {type(module).__name__} asks for "
                    f"{'dropout ' + str(dropout) if dropout else 'bidirectional attention'}: set attention_dropout to 0"
                )
            if kwargs.get("s_aux") is not None or kwargs.get("position_bias") is not None:
                raise ValueError(f"packed attention has no sinks and no position bias; {type(module).__name__} has one")
            out = packed_attention(
                *(t.squeeze(0).transpose(0, 1) for t in _one_dtype(query, key, value)),
                cu_seqlens,
                kwargs["max_length_q"],
                scale=scaling,
                window=window,
                softcap=softcap,
                backend=backend,
                masks=kwargs.get("packed_masks"),
            )
            return out.unsqueeze(0), None
        if softcap is not None:
            return _softcapped(query, key, value, attention_mask, dropout, scaling, softcap, is_causal, module.training)
        if (
            attention_rows.ON
            and as_traced()
            and backend in ("auto", "flash4")
            and attention_mask is None
            and is_causal
            and not dropout
        ):
            rows = [t.transpose(1, 2) for t in _one_dtype(query, key, value)]
            if (
                not attention_rows.refusal(*rows, window)
                and kwargs.get("s_aux") is None
                and kwargs.get("position_bias") is None
            ):
                return attention_rows.row_attention(*rows, scaling, window), None
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )

    return unsloth_ext_varlen


def _one_dtype(query, key, value):
    """The kernels want one dtype; a norm or an adapter in fp32 (DoRA) leaves some of the three behind."""
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
    else:
        dtype = value.dtype
    return tuple(t if t.dtype == dtype else t.to(dtype) for t in (query, key, value))


def _softcapped(query, key, value, mask, dropout, scaling, softcap, is_causal, training):
    """A padded or cached batch of a model with a softcap: all the scores at once, in fp32 where it matters."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores + mask
    elif is_causal and query.shape[2] > 1:
        length, before = query.shape[2], key.shape[2] - query.shape[2]
        hidden = torch.ones(length, key.shape[2], dtype=torch.bool, device=query.device).triu(before + 1)
        scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
    weights = torch.nn.functional.softmax(scores, -1, dtype=torch.float32).to(query.dtype)
    weights = torch.nn.functional.dropout(weights, dropout, training)
    return (weights @ value).transpose(1, 2).contiguous(), None
