"""What the loss room changes in Unsloth and in TRL."""

import functools
import os
from importlib import import_module

from ..patching import Patch, SetAttribute, SetItem, Target
from ..patching.fingerprint import of_object

_LOSS = "unsloth_zoo.fused_losses.cross_entropy_loss"
_LINEAR = "unsloth_zoo.fused_losses.fused_linear"
_RL = "unsloth_zoo.rl_replacements"

# `_use_chunked_ce`: as released, then with the git patches that change it, in their order.
_USE_CHUNKED_CE = ("21f30ab299cc16d6",)
_USE_CHUNKED_CE_PATCHED = ("6a6107df580ab61c", "8f60134e884414f0")


def _ours(module: str, name: str):
    """The replacement `name` of one of this room's modules, imported when a patch goes in: they import torch."""

    def replace(original):
        return getattr(import_module(f".{module}", __package__), name)(original)

    return replace


# -- bugs --------------------------------------------------------------------------------------------------------------------


def _ask_about_read_keywords(use_chunked_ce):
    # transformers hands every keyword of model(...) on to the loss. What the fast path can do, upstream has in a set; n_chunks is
    # the one keyword that only the old path reads. Any other changes nothing on either path.
    read = use_chunked_ce.__globals__["_FUSED_LINEAR_CE_KWARGS"] | {"n_chunks"}

    @functools.wraps(use_chunked_ce)
    def _use_chunked_ce(kwargs, target_gb):
        return use_chunked_ce({name: value for name, value in kwargs.items() if name in read}, target_gb)

    return _use_chunked_ce


def _sum_head_gradient_in_fp32(module, target):
    inner = module._chunked_logprob
    original, wanted = inner.unsloth_chunked_ce_loss, os.environ.get("UNSLOTH_CE_FP32_HEAD_GRAD") != "0"

    @functools.wraps(original)
    def unsloth_chunked_ce_loss(*args, fp32_head_grad=False, **keywords):
        fp32_head_grad = fp32_head_grad or (wanted and inner._FUSED_LINEAR)  # only the fused kernel can
        return original(*args, fp32_head_grad=fp32_head_grad, **keywords)

    return [SetAttribute(inner, "unsloth_chunked_ce_loss", unsloth_chunked_ce_loss)]


def _scale_in_place(module, target):
    ours = import_module(".fused_backward", __package__)
    return [
        SetAttribute(op, "_backward_fn", make(op._backward_fn))
        for op, make in ((module._ce_op, ours.cross_entropy_backward), (module._lp_op, ours.logprobs_backward))
    ]


# -- routes ------------------------------------------------------------------------------------------------------------------

_OLD_COMPUTE = {
    "5215bf21157aabd1": "2026.9.9",
    "91391b5d8639d856": "2026.10.1 to 2026.10.5",
    "6a071bbc3331a647": "2026.10.6 and 2026.10.7",
    "39a1565594378ef8": "2026.10.8",
}


def _route_cross_entropy(module, target):
    ours = import_module(".unsloth_losses", __package__)
    if target.module == _LINEAR:
        name = "fused_linear_cross_entropy"
        return [SetAttribute(module, name, ours.cross_entropy(vars(module)[name]))]
    if (found := of_object(module.compute_fused_ce_loss)) not in _OLD_COMPUTE:
        raise RuntimeError(f"upstream changed: compute_fused_ce_loss is {found}, known are {', '.join(_OLD_COMPUTE)}")
    original = module.unsloth_fused_ce_loss
    limited = functools.partial(_is_limited, vars(module))
    return [SetAttribute(module, "unsloth_fused_ce_loss", ours.fused_ce_loss(original, limited))]


def _is_limited(names):
    return bool(names["TARGET_GB"] or names["N_CHUNKS"])


def _route_logprobs(module, target):
    import sys

    ours = import_module(".unsloth_losses", __package__)
    if target.module == _LINEAR:
        name = "fused_linear_logprobs"
        return [SetAttribute(module, name, ours.linear_log_probs(vars(module)[name]))]
    if "unsloth.models.rl" in sys.modules:
        # The trainers hold copies of the old source by now: they would score the policy one way and its reference another.
        raise RuntimeError("Unsloth has written its trainers already: import unsloth_ext before unsloth")
    forwarders = import_module(".rl_forwarders", __package__)
    made = []
    for key in ("grpo_selective_log_softmax", "grpo_selective_log_softmax_recompute"):
        name = f"chunked_hidden_states_{key.removeprefix('grpo_')}"
        if name in vars(module):
            made.append(SetAttribute(module, name, ours.selective_log_softmax(vars(module)[name])))
            made.append(SetItem(module.RL_REPLACEMENTS, key, vars(forwarders)[name]))
    return made


def _route_trl(module, target):
    ours = import_module(".trl_hooks", __package__)
    return [SetAttribute(module, "_ChunkedLogProbFunction", ours.served_by(module._ChunkedLogProbFunction))]


PATCHES = (
    Patch(
        id="loss.unread_keywords",
        challenge="E",
        summary="an unknown keyword (packed_seq_lengths=, output_attentions=) no longer sends the fused loss to its slower, larger path",
        targets=(Target(_LOSS, "_use_chunked_ce", ">=2026.10.9", _USE_CHUNKED_CE, patched=_USE_CHUNKED_CE_PATCHED),),
        relies_on=(  # the old path reads these and n_chunks, and nothing else
            Target(_LOSS, "compute_fused_ce_loss", ">=2026.10.9", ("a2defc84bbf55b50",)),
            Target(_LOSS, "UnslothFusedLoss.forward", ">=2026.10.9", ("f0a7890410ca51c8",)),
            Target(_LOSS, "_FUSED_LINEAR_CE_KWARGS", ">=2026.10.9", ("9bae5dbf5639c52b",)),
            Target(_LOSS, "_CHUNKED_CE_KWARGS", ">=2026.10.9", ("31de56e5b50e47ad",)),
        ),
        replace=_ask_about_read_keywords,
    ),
    Patch(
        id="loss.scale_in_place",
        challenge="E",
        summary="the fused losses' backward scales the stored gradients where they are: one copy of dX and dW at the peak, not two",
        targets=(
            Target(_LINEAR, "_scale_rows_impl", ">=2026.10.9", ("c3158477a39c3b06",), patched=("03b4ebf8322b1ca3",)),
        ),
        changes=_scale_in_place,
    ),
    Patch(
        id="loss.fp32_head_grad",
        challenge="E",
        summary="a trained head's gradient is summed over the chunks in fp32, not rounded to bf16 after each",
        targets=(
            Target(_LOSS, "_chunked_ce_traced", ">=2026.10.9", ("98b8a85ae919b68c",), patched=("91302bcb15629bde",)),
        ),
        relies_on=(
            Target(
                "unsloth_zoo.fused_losses.chunked_logprob",
                "unsloth_chunked_ce_loss",
                ">=2026.10.9",
                ("786bcfb0f0e8ddf9",),
            ),
        ),
        changes=_sum_head_gradient_in_fp32,
    ),
    Patch(
        id="loss.z_loss",
        challenge="E",
        summary="z_loss= is part of the fused loss instead of being ignored",
        targets=(
            Target(_LOSS, "compute_fused_ce_loss", ">=2026.10.9", ("a2defc84bbf55b50",), patched=("b7bb03e751193726",)),
        ),
        relies_on=(Target(_LOSS, "unsloth_fused_ce_loss", ">=2026.10.9", ("540c2fa411c8002c",)),),
        changes=lambda module, target: [
            SetAttribute(
                module,
                "unsloth_fused_ce_loss",
                _ours("unsloth_losses", "z_loss")(module.unsloth_fused_ce_loss),
            )
        ],
    ),
    Patch(
        id="loss.adapted_lm_head",
        challenge="E",
        summary="the fused loss sees a LoRA adapter on lm_head, and trains it; a 4-bit lm_head works",
        targets=(
            Target(
                "unsloth_zoo.fused_losses.forward_adapter",
                "unsloth_fused_lm_head_loss",
                ">=2026.9.9",
                ("23db0268988cf778", "a24a3e49ea016c95", "e7e2018f61ce8d21", "54b31c3fcb49cc17", "3e0a1bb38112119a"),
                patched=("76102edd7668fdb7",),
            ),
        ),
        replace=_ours("adapted_head", "lm_head_loss"),
    ),
    Patch(
        id="loss.linear_cross_entropy",
        challenge="E",
        summary="SFT's loss by linear_cross_entropy, on the cards where that was measured faster or smaller",
        targets=(
            Target(_LINEAR, "fused_linear_cross_entropy", ">=2026.10.9", ("a81286f967d84751",)),
            Target(
                _LOSS,
                "unsloth_fused_ce_loss",
                ">=2026.9.9,<2026.10.9",
                ("35ac93a46bd46816", "7efb5bd05b8f8bd3", "f7f3007caea81d1c"),
            ),
        ),
        changes=_route_cross_entropy,
        run_time_only="the functions behind it are this package's own, too large for a patch",
    ),
    Patch(
        id="loss.linear_logprobs",
        challenge="E",
        summary="the log-probabilities of GRPO, DPO and KTO by linear_logprobs, on the cards where that was measured faster or smaller",
        targets=(
            Target(_LINEAR, "fused_linear_logprobs", ">=2026.10.9", ("7761c3897118d124",)),
            Target(
                _RL,
                "chunked_hidden_states_selective_log_softmax",
                ">=2026.9.9,<2026.10.9",
                ("021e8b7fffcd8eb6", "04e2d3df211f2639", "30559922d15d0ea1", "19cef84457e5280f"),
            ),
        ),
        changes=_route_logprobs,
        run_time_only="the functions behind it are this package's own, too large for a patch",
    ),
    Patch(
        id="loss.trl_logprobs",
        challenge="E",
        summary="TRL's fused head (GRPO, RLOO, DPO, KTO, SFT) by linear_logprobs, with or without Unsloth; it runs on a CPU too",
        targets=(Target("trl.trainer.utils", "add_fused_lm_head", ">=1.15", ("9d9076db31c368b6", "e8a1787b7227627d")),),
        relies_on=(
            Target(
                "trl.kernels.chunked_logprob",
                "ChunkedLogProbFunction.forward",
                ">=1.15",
                ("08d9428de6261188", "8f8cac699d52eddd"),
            ),
        ),
        changes=_route_trl,
        run_time_only="it is TRL that it changes, and the functions behind it are this package's own",
    ),
)
