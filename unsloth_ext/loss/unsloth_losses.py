"""Unsloth's fused losses by `linear_cross_entropy` and `linear_logprobs`: wrappers that keep its contracts.

The seams are the innermost functions that serve all of Unsloth's callers:

* 2026.10.9: `fused_linear_cross_entropy` and `fused_linear_logprobs` of unsloth_zoo.fused_losses.fused_linear. What the outer
  functions do (shift, mask, counts, the scale of fp16, which keywords go where) stays Unsloth's.
* before: `unsloth_fused_ce_loss`, and `chunked_hidden_states_selective_log_softmax` with its recomputing twin. GRPO trainers
  carry the latter as a copy of their source, so the source that they copy becomes a call of the function itself.

Rows without a label are left out, as Unsloth leaves them out, but in eager mode only and where it pays (labelled_rows.py); a
compiler, and the capture of a CUDA graph, get all rows and no waiting.
"""

from __future__ import annotations

import functools
import inspect

import torch

from .heads import autocast_dtype
from .labelled_rows import LabelledRows
from .routes import compute_dtype, is_dense, logit_scale

# -- cross entropy -----------------------------------------------------------------------------------------------------------


def summed_cross_entropy(hidden, weight, bias, targets, divisor, dtype, **options):
    """sum(cross entropy of the rows) / divisor, fp32. hidden [T, D], targets [T]; divisor a number or a tensor of one.

    Unsloth's `scaling`, which keeps gradients taken in forward above what fp16 can hold, has no counterpart: those of
    `linear_cross_entropy` are scaled by constants of their own.
    """
    from .cross_entropy import linear_cross_entropy

    device, ignore_index = weight.device, options["ignore_index"]
    labelled = LabelledRows.of(targets != ignore_index)
    check_targets(targets, weight.shape[0], ignore_index)
    with torch.autocast(device.type, enabled=False):
        return linear_cross_entropy(
            hidden.to(dtype),
            weight.to(dtype),
            targets,
            None if bias is None else bias.to(dtype),
            num_items_in_batch=_divisor(divisor, device),
            labelled=labelled,
            **options,
        ).float()


def _divisor(value, device):
    """A tensor [] of fp32, 1 in the place of 0: a batch without labels has loss 0."""
    if isinstance(value, torch.Tensor):
        value = value.reshape(-1)[0].to(device=device, dtype=torch.float32)  # DataParallel repeats the count
    else:
        value = torch.full((), float(value), dtype=torch.float32, device=device)
    return torch.where(value == 0, torch.ones_like(value), value)


def check_targets(targets, vocab_size, ignore_index) -> None:
    """A label out of range is an IndexError on a CPU and a failed assertion on a card, as in Unsloth and torch."""
    bad = ((targets < 0) | (targets >= vocab_size)) & (targets != ignore_index)
    if targets.device.type == "cpu":
        if not torch.compiler.is_compiling() and bool(bad.any()):
            first = int(targets[bad][0])
            raise IndexError(f"label {first} is out of bounds for a vocabulary of {vocab_size}")
    else:
        torch._assert_async(~bad.any(), f"a label is out of bounds for a vocabulary of {vocab_size}")


def cross_entropy(original):
    """For `fused_linear_cross_entropy` of 2026.10.9."""

    @functools.wraps(original)
    def fused_linear_cross_entropy(hidden, weight, bias, targets, **keywords):
        options = _cross_entropy_options(keywords, allowed=("divisor", "scaling", "fp32_head_grad"))
        dtype = None if options is None else compute_dtype("cross_entropy", hidden, weight, bias)
        if dtype is None or targets.device != weight.device:
            return original(hidden, weight, bias, targets, **keywords)
        return summed_cross_entropy(
            hidden.reshape(-1, hidden.shape[-1]),
            weight,
            bias,
            targets.reshape(-1),
            keywords["divisor"],
            dtype,
            logits_dtype=torch.float32,  # as upstream's
            **options,
        )

    return fused_linear_cross_entropy


def fused_ce_loss(original, is_limited):
    """For `unsloth_fused_ce_loss` before 2026.10.9. is_limited: () -> whether the environment sets a chunk size."""
    names = tuple(inspect.signature(original).parameters)[:-1]
    defaults = {name: p.default for name, p in inspect.signature(original).parameters.items()}

    @functools.wraps(original)
    def unsloth_fused_ce_loss(*args, **keywords):
        given = {**defaults, **dict(zip(names, args, strict=False)), **keywords}
        options = _cross_entropy_options({name: value for name, value in keywords.items() if name not in names})
        hidden, weight, bias = given["hidden_states"], given["lm_head_weight"], given["lm_head_bias"]
        dtype = None
        if options is not None and given["target_gb"] is None and not given["overwrite"] and not is_limited():
            # Its product is in the weight's dtype, or autocast's
            dtype = compute_dtype("cross_entropy", hidden, weight, bias)
        if dtype is None:
            return original(*args, **keywords)
        device, ignore_index = weight.device, options["ignore_index"]
        targets = _shifted(given["labels"].to(device), given["mask"], given["shift_labels"], ignore_index)
        n_items = given["n_items"]
        divisor = (targets != ignore_index).sum() if n_items is None else n_items
        hidden = hidden.reshape(-1, hidden.shape[-1])
        return summed_cross_entropy(hidden, weight, bias, targets, divisor, dtype, **options)

    return unsloth_fused_ce_loss


def _cross_entropy_options(keywords, allowed=()):
    """`linear_cross_entropy`'s options for Unsloth's keywords, or None where one is not covered."""
    keywords = {name: value for name, value in keywords.items() if name not in allowed}
    scale = logit_scale(keywords.pop("logit_scale_multiply", None), keywords.pop("logit_scale_divide", None))
    softcap, smoothing = keywords.pop("logit_softcapping", None), keywords.pop("label_smoothing", None)
    ignore_index = keywords.pop("ignore_index", -100)
    if scale is None or isinstance(softcap, torch.Tensor) or any(value is not None for value in keywords.values()):
        return None
    smoothing = float(smoothing or 0.0)
    if not 0.0 <= smoothing <= 1.0:
        return None  # upstream has its own answer to it
    return {
        "ignore_index": int(ignore_index),
        "label_smoothing": smoothing,
        "softcap": float(softcap) if softcap else None,
        "logit_scale": scale,
    }


def _shifted(labels, mask, shift, ignore_index):
    """Flat targets of the rows: the next label where `shift`, and ignore_index where there is none or the mask is 0."""
    if not shift:
        return labels.reshape(-1)  # before 2026.10.9 a mask counts only beside a shift
    targets = torch.full_like(labels, ignore_index)
    targets[..., :-1] = labels[..., 1:]
    if mask is not None:
        targets[..., :-1].masked_fill_(mask.to(labels.device)[..., 1:] == 0, ignore_index)
    return targets.reshape(-1)


# -- log-probabilities -------------------------------------------------------------------------------------------------------


def masked_log_probs(hidden, weight, bias, targets, mask, dtype, *, entropy=False, **options):
    """`linear_logprobs` in Unsloth's words: rows outside of the mask, or with a label out of range, are 0. fp32, like targets."""
    from .logprobs import linear_logprobs

    keep = _kept(targets, mask, weight.shape[0]).reshape(-1)
    labelled = LabelledRows.of(keep)
    hidden, labels = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    rows = None if labelled is None else labelled.indices()
    if rows is not None:
        hidden, labels = hidden.index_select(0, rows), labels.index_select(0, rows)
    with torch.autocast(weight.device.type, enabled=False):
        found = linear_logprobs(
            hidden.to(dtype),
            weight,
            labels,
            bias,
            mask=keep if rows is None else None,
            entropy=entropy,
            **options,
        )
    found = [x.float() for x in (found if entropy else (found,))]
    if rows is not None:
        found = [x.new_zeros(keep.shape).index_copy(0, rows, x) for x in found]
    found = tuple(x.reshape(targets.shape) for x in found)
    return found if entropy else found[0]


def _kept(targets, mask, vocab_size):
    inside = (targets >= 0) & (targets < vocab_size)
    return inside if mask is None else inside & mask.to(torch.bool)


def _log_prob_options(keywords):
    """`linear_logprobs`' options for Unsloth's keywords, which are taken out of `keywords`; None where one is not covered."""
    scale = logit_scale(keywords.pop("logit_scale_multiply", None), keywords.pop("logit_scale_divide", None))
    softcap, temperature = keywords.pop("logit_softcapping", None), keywords.pop("temperature", 1.0)
    if scale is None or isinstance(softcap, torch.Tensor) or isinstance(temperature, torch.Tensor):
        return None
    return {"temperature": float(temperature), "softcap": float(softcap) if softcap else None, "logit_scale": scale}


def linear_log_probs(original):
    """For `fused_linear_logprobs` of 2026.10.9."""

    @functools.wraps(original)
    def fused_linear_logprobs(hidden, weight, targets, **keywords):
        rest = dict(keywords)
        options = _log_prob_options(rest)
        bias, mask = rest.pop("bias", None), rest.pop("mask", None)
        entropy, wanted = rest.pop("return_entropy", False), rest.pop("entropy_requires_grad", True)
        mean = rest.pop("return_mean_logits", False)
        ours = options is not None and not any(rest.values()) and not (mean and options["softcap"])
        dtype = compute_dtype("logprobs", hidden, weight, bias) if ours else None
        if dtype is None or targets.device != weight.device or (mask is not None and mask.device != weight.device):
            return original(hidden, weight, targets, **keywords)
        found = masked_log_probs(hidden, weight, bias, targets, mask, dtype, entropy=bool(entropy), **options)
        result = list(found) if entropy else [found]
        if entropy and wanted is False:
            result[1] = result[1].detach()
        if mean:
            result.append(_mean_logits(hidden, weight, bias, targets, mask, options["logit_scale"]))
        return result[0] if len(result) == 1 else tuple(result)

    return fused_linear_logprobs


@torch.no_grad()
def _mean_logits(hidden, weight, bias, targets, mask, scale):
    # The mean over the vocabulary is linear: one row for the head's.
    mean = hidden.float() @ weight.mean(0, dtype=torch.float32)
    if bias is not None:
        mean += bias.float().mean()
    return (mean.reshape(targets.shape) * scale).masked_fill(~_kept(targets, mask, weight.shape[0]), 0.0)


# What the older functions take beyond hidden states, head and index: any value is covered, or only the one that changes nothing.
_ANY = ("chunks", "support_triton_sampler")
_OFF = {
    "max_rows_per_chunk": 0,
    "support_top_k": 0,
    "support_top_p": 1.0,
    "support_min_p": 0.0,
    "support_excluded_ids": None,
    "fp32_lm_head": False,
}


def selective_log_softmax(original):
    """For `chunked_hidden_states_selective_log_softmax`, and its `_recompute` twin, before 2026.10.9."""
    signature = inspect.signature(original)
    known = {*_ANY, *_OFF, "hidden_states", "lm_head", "index", "lm_head_bias", "temperature", "return_entropy"}
    known |= {"logit_scale_multiply", "logit_scale_divide", "logit_softcapping", "entropy_requires_grad"}
    covered = known.issuperset(signature.parameters)

    @functools.wraps(original)
    def log_softmax(*args, **keywords):
        found = _selective(args, keywords) if covered and args and args[0] is not None else None
        return original(*args, **keywords) if found is None else found

    names = tuple(signature.parameters)
    defaults = {name: p.default for name, p in signature.parameters.items()}

    def _selective(args, keywords):
        given = {**defaults, **dict(zip(names, args, strict=False)), **keywords}
        for name in _ANY:
            given.pop(name, None)
        for name, off in _OFF.items():
            value = given.pop(name, off)
            if isinstance(value, torch.Tensor) or value != off:
                return None
        hidden, weight, index = (given.pop(name) for name in ("hidden_states", "lm_head", "index"))
        bias, entropy = given.pop("lm_head_bias", None), given.pop("return_entropy", False)
        wanted = given.pop("entropy_requires_grad", True)
        options = _log_prob_options(given)
        dtype = None if options is None or given else compute_dtype("logprobs", hidden, weight, bias)
        if dtype is None or index.device != weight.device:
            return None
        found = masked_log_probs(hidden, weight, bias, index, None, dtype, entropy=entropy, **options)
        if entropy and not wanted:
            found = found[0], found[1].detach()
        return found

    return log_softmax


# -- the z-loss keyword --------------------------------------------------------------------------------------------------------


def z_loss(original):
    """For `unsloth_fused_ce_loss` of 2026.10.9: a keyword z_loss adds z_loss * logsumexp(logits)² to each labelled row's loss."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def unsloth_fused_ce_loss(*args, **keywords):
        if not keywords.get("z_loss"):
            keywords.pop("z_loss", None)
            return original(*args, **keywords)
        bound = signature.bind(*args, **keywords)
        bound.apply_defaults()
        given = bound.arguments
        hidden, weight, bias = given["hidden_states"], given["lm_head_weight"], given["lm_head_bias"]
        options = dict(given["kwargs"])
        factor, logits_bias = float(options.pop("z_loss")), options.pop("logits_bias", None)
        options = {name: value for name, value in options.items() if name in _READ}
        options = _cross_entropy_options(options)
        if options is None or not is_dense(weight):
            raise NotImplementedError(
                f"z_loss={factor} needs a dense lm_head and numbers as logit transforms, got a head of {type(weight).__name__}"
            )
        if logits_bias is not None:
            logits_bias = logits_bias.detach().reshape(-1).to(weight)
            bias = logits_bias if bias is None else bias + logits_bias
        hidden, labels = hidden.to(weight.device), given["labels"].to(weight.device)
        targets = _shifted(labels, given["mask"], given["shift_labels"], options["ignore_index"])
        n_items = given["n_items"]
        divisor = (targets != options["ignore_index"]).sum() if n_items is None else n_items
        dtype = autocast_dtype(weight.device.type) or weight.dtype
        hidden = hidden.reshape(-1, hidden.shape[-1])
        options |= {"z_loss": factor, "logits_dtype": torch.float32}
        return summed_cross_entropy(hidden, weight, bias, targets, divisor, dtype, **options)

    return unsloth_fused_ce_loss


_READ = ("ignore_index", "logit_scale_multiply", "logit_scale_divide", "logit_softcapping", "label_smoothing")
