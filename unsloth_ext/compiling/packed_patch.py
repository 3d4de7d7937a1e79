"""What the room changes in Unsloth for packed batches, and for Gemma 2's softcap.

Unsloth finds a packed batch's boundaries inside each attention layer (`get_packed_info_from_kwargs`), behind caches that are
written while a graph is traced, and asks there whether tokens are left over, which depends on data. So its block compile
leaves packed layers out. Here the boundaries are found before the first layer, in `LlamaModel_fast_forward`, and travel under
transformers' names (`packed.py`); a layer reads them and nothing else, traced or not, and block compile takes the layer.

`packed_seq_lengths` stays a key of what the layers are given, with None in it: that is how the model knows that a row may be
longer than max_seq_length, and how block compile knows that no layer will read lengths on the host.

Packed layers are on by themselves where all cards are Hopper, with UNSLOTH_EXT_PACKED=1 elsewhere, and Gemma 2's softcap with
UNSLOTH_EXT_PACKED=1 only. Families whose layers read lengths for more than attention (Falcon-H1's state space) are left as they are.
"""

from __future__ import annotations

import functools
import os
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

from ..patching import Patch, SetAttribute, Target
from .attention_patch import is_plain, scale_and_window
from .measured_cards import refuse_where_not_measured

if TYPE_CHECKING:
    import torch

_PACKING, _DISPATCH, _LLAMA = "unsloth.utils.packing", "unsloth.utils.attention_dispatch", "unsloth.models.llama"
_SINCE = ">=2026.10.9"
_SWITCH = "UNSLOTH_EXT_PACKED"
# In _PACKING, as long as packed_metadata, packed_attention and packed_layers are in: one without the others makes graphs of each packing.
_MARKS = _READ, _ATTENDED, _GIVEN = tuple(
    f"_unsloth_ext_boundaries_are_{done}" for done in ("read", "attended", "given")
)
# Whose layers want a packed batch's boundaries for their attention and nothing else; by themselves, and where the switch asks for it.
# (Granite's and Cohere's have run on no card; on torch 2.11 Cohere's break once. Gemma 2's want flex_softcap.)
_FAMILIES, _ASKED_FOR = ("llama", "mistral", "qwen2", "qwen3"), ("granite", "cohere", "gemma2")
_NOT_YET = "it goes upstream when it has been measured on a card"
# The git patches of packed_metadata and packed_layers do the same with Unsloth's own attention, so both stay in beside them: each
# list begins with upstream's source, then with the first of the two, then with both.
_GET_INFO = Target(
    _PACKING,
    "get_packed_info_from_kwargs",
    _SINCE,
    ("bb2a6b53c88e78c0", "95a9cc95b762b49b", "c5c8729cd5fb7da6"),
)
_COVER = Target(
    _PACKING, "cover_padded_cu_seqlens", _SINCE, ("f463d69cd1b46d03", "cf293294edc6fdf5", "9c09f1cbb60aa923")
)
_RUN = Target(_DISPATCH, "_run_attention", _SINCE, ("f200d79cdd77b591", "e952cc7d7aaf1f7b"))
_LENGTHS = Target(_PACKING, "_normalize_packed_lengths", _SINCE, ("995c9fc0a205e043",), patched=("f1ba2d923dc66be3",))
_MODEL = Target(_LLAMA, "LlamaModel_fast_forward", _SINCE, ("0290956913cf0a15",))


class SeqInfo(NamedTuple):
    """Unsloth's (lengths, cu_seqlens, max_seqlen) of a row that the boundaries cover to its end."""

    lengths: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int


_latest: dict[Any, SeqInfo] = {}  # by device: outside a graph all layers share one object, which Unsloth's caches know


def _metadata(module, target):
    import torch

    refuse_where_not_measured(_SWITCH)
    original, cover = module.get_packed_info_from_kwargs, module.cover_padded_cu_seqlens
    is_compiling = torch.compiler.is_compiling

    @functools.wraps(original)
    def get_packed_info_from_kwargs(kwargs, device, position_ids=None):
        if "_unsloth_packed_row" in kwargs:  # block compile with its git patch has found them
            return original(kwargs, device, position_ids)
        cu_seqlens = kwargs.get("cu_seq_lens_q")
        ours = kwargs.get("packed_seq_lengths", cu_seqlens) is None  # a key, with None in it
        if not ours or cu_seqlens is None or kwargs.get("max_length_q") is None:
            return original(kwargs, device, position_ids)
        if position_ids is not None:
            return None  # the model asks whether its positions hide documents; they are known
        if is_compiling():
            return SeqInfo(torch.diff(cu_seqlens), cu_seqlens, kwargs["max_length_q"])
        info = _latest.get(device)
        if info is None or info.cu_seqlens is not cu_seqlens:
            lengths, _, longest = original({"packed_seq_lengths": torch.diff(cu_seqlens)}, device)
            info = _latest[device] = SeqInfo(lengths, cu_seqlens, longest)
        return info

    @functools.wraps(cover)
    def cover_padded_cu_seqlens(seq_info, total_tokens):
        if isinstance(seq_info, SeqInfo):
            return seq_info.cu_seqlens, seq_info.max_seqlen
        return cover(seq_info, total_tokens)

    return [
        SetAttribute(module, "get_packed_info_from_kwargs", get_packed_info_from_kwargs),
        SetAttribute(module, "cover_padded_cu_seqlens", cover_padded_cu_seqlens),
        SetAttribute(module, _READ, True),
    ]


def _attention(module, target):
    from .as_traced import as_traced
    from .attention import packed_attention, refusal

    refuse_where_not_measured(_SWITCH)
    original = module._run_attention
    sdpa, xformers, has_varlen = module.SDPA, module.XFORMERS, module._TORCH_VARLEN_ATTN is not None

    def takes(config, context, Q, K):
        if context.bsz != 1 or not is_plain(module, config, context):
            return False
        if as_traced():  # elsewhere the graph would break, or depend on the number of documents
            return config.backend in (sdpa, xformers)
        # torch 2.11's varlen_attn takes no grouped heads, and Unsloth falls to one SDPA call a document.
        return config.backend == sdpa and not has_varlen and Q.is_cuda and not refusal("flash", Q)

    @functools.wraps(original)
    def _run_attention(*, config, context, Q, K, V):
        info = context.seq_info
        if info is None or not isinstance(info, SeqInfo) or not takes(config, context, Q, K):
            return original(config=config, context=context, Q=Q, K=K, V=V)
        scale, window = scale_and_window(config, context)
        if not Q.dtype == K.dtype == V.dtype:  # DoRA leaves some of the three in fp32
            Q, K = Q.to(V.dtype), K.to(V.dtype)
        rows = (t.squeeze(0).transpose(0, 1) for t in (Q, K, V))
        return packed_attention(*rows, info.cu_seqlens, info.max_seqlen, scale=scale, window=window).unsqueeze(0)

    packing = sys.modules[_PACKING]  # the dispatch imports it
    return [SetAttribute(module, "_run_attention", _run_attention), SetAttribute(packing, _ATTENDED, True)]


def _layers(module, target):
    refuse_where_not_measured(_SWITCH)
    families = _FAMILIES + (_ASKED_FOR if os.environ.get(_SWITCH) else ())
    forward = _with_boundaries(module.LlamaModel_fast_forward, families)
    return [
        SetAttribute(module, "LlamaModel_fast_forward", forward),
        SetAttribute(sys.modules[_PACKING], _GIVEN, True),  # a model that was loaded keeps the forward
    ]


def _with_boundaries(original, families):
    import torch

    @functools.wraps(original)
    def LlamaModel_fast_forward(
        self,
        input_ids=None,
        causal_mask=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        *args,
        **kwargs,
    ):
        tokens = inputs_embeds if input_ids is None else input_ids
        if (
            tokens is not None
            and tokens.shape[0] == 1
            and attention_mask is None
            and past_key_values is None
            and kwargs.get("prefix_seg_info") is None
            and (self.training or torch.compiler.is_compiling())
            and self.config.model_type in families
            and not (self.config.model_type == "granite" and self.config.attention_dropout)
            and _whole_row()
            and all(hasattr(sys.modules[_PACKING], mark) for mark in _MARKS)
        ):
            kwargs |= _boundaries(kwargs, tokens.shape[1], tokens.device)
        return original(
            self, input_ids, causal_mask, attention_mask, position_ids, past_key_values, inputs_embeds, *args, **kwargs
        )

    return LlamaModel_fast_forward


def _boundaries(kwargs, total, device):
    """What the layers are told of a packed row; {} for a row that is not said to be packed."""
    import torch

    from .packed import _bound, traced_packing

    cu_seqlens, longest = kwargs.get("cu_seq_lens_q"), kwargs.get("max_length_q")
    lengths = kwargs.get("packed_seq_lengths")
    if cu_seqlens is not None and longest is not None:
        if torch.compiler.is_compiling() or getattr(cu_seqlens, "_unsloth_ext_covers", None) == (total, device):
            return {"packed_seq_lengths": None}  # found before the graph, by packed_arguments
        lengths = torch.diff(cu_seqlens.reshape(-1))
    if not isinstance(lengths, torch.Tensor):
        return {}
    if torch.compiler.is_compiling():
        cu_seqlens, longest = traced_packing(lengths, total, device)
    else:
        _, cu_seqlens, longest = _found(lengths, total, device)
        longest = _bound(longest)
        torch._dynamo.maybe_mark_dynamic(cu_seqlens, 0)
    told = {"packed_seq_lengths": None}
    for side in "qk":
        told |= {f"cu_seq_lens_{side}": cu_seqlens, f"max_length_{side}": longest}
    return told


def _found(lengths, total, device):
    """Unsloth's triple for a row, to its end, and Unsloth's caches filled with it, so that no layer reads a length back."""
    import torch
    from unsloth.utils import packing

    host = [int(n) for n in lengths.reshape(-1).tolist() if n]
    if sum(host) > total:
        raise ValueError(
            f"packed_seq_lengths sum to {sum(host)}, more than the row's {total} tokens: was the batch cut after packing?"
        )
    if sum(host) < total:
        host.append(total - sum(host))  # the row was padded to a multiple of something
    lengths, cu_seqlens, longest = packing.get_packed_info_from_kwargs(
        {"packed_seq_lengths": torch.tensor(host, dtype=torch.int32)}, device
    )
    if cu_seqlens.storage_offset():  # behind the lengths: unaligned to Inductor, and so is what attention gives
        cu_seqlens = cu_seqlens.clone()
    made = _latest[device] = SeqInfo(lengths, cu_seqlens, longest)
    return made


def _lengths(original):
    import torch

    around, is_compiling = original.__globals__, torch.compiler.is_compiling

    @functools.wraps(original)
    def _normalize_packed_lengths(seq_lengths, *, device):
        if isinstance(seq_lengths, torch.Tensor) and not is_compiling():
            if seq_lengths.device.type == "cpu" and torch.device(device).type == "cuda":
                seq_lengths = around["_pinned_to_device"](seq_lengths, device)
        return original(seq_lengths, device=device)

    return _normalize_packed_lengths


def _whole_row():
    """Context parallelism shards the row: the boundaries of the whole are wrong for a shard."""
    manager = getattr(sys.modules[_LLAMA], "get_cp_manager", None)
    return manager is None or manager() is None


class SoftcapMask(NamedTuple):
    """What stands where Unsloth has a [T, T] mask of Gemma 2: a flex block mask and its window."""

    mask: Any
    window: int | None


def _flex(module, target):
    import torch
    from unsloth.kernels import flex_attention as kernels

    from .attention_flex import block_masks, flex_attention_rows

    original, dense = module.LlamaModel_fast_forward, kernels.slow_attention_softcapping

    @functools.wraps(dense)
    def slow_attention_softcapping(Q, K, V, causal_mask, self, bsz, q_len):
        if not isinstance(causal_mask, SoftcapMask):
            return dense(Q, K, V, causal_mask, self, bsz, q_len)
        config = self.config
        out = flex_attention_rows(
            Q,
            K,
            V,
            causal_mask.mask,
            scale=config.query_pre_attn_scalar**-0.5,
            window=causal_mask.window,
            softcap=config.attn_logit_softcapping,
        )
        return out.transpose(1, 2).reshape(bsz, q_len, -1)

    @functools.wraps(original)
    def LlamaModel_fast_forward(
        self,
        input_ids=None,
        causal_mask=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        *args,
        **kwargs,
    ):
        tokens = inputs_embeds if input_ids is None else input_ids

        def run():
            return original(
                self,
                input_ids,
                causal_mask,
                attention_mask,
                position_ids,
                past_key_values,
                inputs_embeds,
                *args,
                **kwargs,
            )

        if (
            not self.training
            or not self.config.model_type.startswith("gemma2")
            or module.HAS_FLASH_ATTENTION_SOFTCAPPING
            or tokens is None
            or tokens.device.type != "cuda"
            or attention_mask is not None
            or past_key_values is not None
        ):
            return run()
        cu_seqlens = kwargs.get("cu_seq_lens_q")
        if cu_seqlens is None:
            cu_seqlens = torch.zeros(2, dtype=torch.int32, device=tokens.device)
            cu_seqlens[1:] = tokens.shape[1]
        window = self.config.sliding_window
        masks = block_masks(cu_seqlens, tokens.shape[1], (None, window))
        before = {name: self.__dict__[name] for name in ("SWA_mask", "GA_mask") if name in self.__dict__}
        self.SWA_mask, self.GA_mask = SoftcapMask(masks[window], window), SoftcapMask(masks[None], None)
        try:
            return run()
        finally:
            for name in ("SWA_mask", "GA_mask"):
                if name in before:
                    setattr(self, name, before[name])
                else:
                    delattr(self, name)

    return [
        SetAttribute(module, "LlamaModel_fast_forward", LlamaModel_fast_forward),
        SetAttribute(kernels, "slow_attention_softcapping", slow_attention_softcapping),
    ]


PATCHES = (
    Patch(
        id="compiling.packed_lengths",
        challenge="C",
        summary="the loss of a packed batch is queued behind the layers: its lengths go to the card without waiting for it",
        targets=(_LENGTHS,),
        relies_on=(Target(_PACKING, "_pinned_to_device", _SINCE, ("81bd6efbd5d94620",)),),
        replace=_lengths,
    ),
    Patch(
        id="compiling.packed_metadata",
        challenge="C",
        summary="a layer reads a packed batch's boundaries instead of finding them: no branch on data, no cache written in a graph",
        targets=(_GET_INFO,),
        relies_on=(_COVER,),
        changes=_metadata,
        switch=_SWITCH,
        on_unless_switched_off=True,
    ),
    Patch(
        id="compiling.packed_attention",
        challenge="C",
        summary="packed attention is one variable-length call inside a graph, with grouped heads on torch 2.11 too, on an H200 by FlashAttention 4 or cuDNN",
        targets=(_RUN,),
        relies_on=(_GET_INFO,),
        changes=_attention,
        run_time_only="the operators around cuDNN's and flash-attn-4's kernels that a graph needs would have to come with it",
        switch=_SWITCH,
        on_unless_switched_off=True,
    ),
    Patch(
        id="compiling.flex_softcap",
        challenge="C",
        summary="Gemma 2's softcap by flex attention in training: no [T, T] scores, packed documents kept apart",
        targets=(_MODEL,),
        relies_on=(Target("unsloth.models.gemma2", "Gemma2Attention_fast_forward", _SINCE, ("1bdaba65a57c5e89",)),),
        changes=_flex,
        run_time_only=_NOT_YET,
        switch=_SWITCH,
    ),
    Patch(
        id="compiling.packed_layers",
        challenge="C",
        summary="a packed batch's boundaries are found once, before the layers, and Unsloth's block compile takes its layers (by itself on Hopper)",
        targets=(_MODEL,),
        relies_on=(
            _GET_INFO,
            _RUN,
            Target(
                "unsloth.models._block_compile",
                "_wrap",
                _SINCE,
                ("370a8675ff63a08a", "b464d1c7a1cb8c2e", "99eb2af88a114e4d"),
            ),
        ),
        changes=_layers,
        switch=_SWITCH,
        on_unless_switched_off=True,
    ),
)
