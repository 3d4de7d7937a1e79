"""TRL's per-token log-probabilities by `linear_logprobs`, with TRL alone or beside Unsloth.

TRL 1.15 gives every trainer that needs log-probabilities (GRPO, RLOO, DPO, KTO, and SFT with its chunked loss) the same fused
head, and that head calls one function, `trl.trainer.utils._ChunkedLogProbFunction`. That name is replaced; its contract
(trl/kernels/chunked_logprob.py) is kept: rows that are labelled, five results, of which the last three have no gradient.

TRL's kernel computes the logits in forward and again in backward, so a frozen head costs three matmuls; `linear_logprobs`
needs two. It needs Triton and a card; here a CPU will do, so a GRPO or DPO run can be tried on a laptop.

What DPO logs beside the log-probabilities (the mean logit, whether the label is the argmax, and for WPO the sum of squares)
takes one more pass over the logits, without gradient (`statistics`). So does nothing of GRPO.
"""

from __future__ import annotations

import math

import torch

from .routes import compute_dtype

_ROWS, _COLUMNS = 2048, 16384


def served_by(theirs):
    """What stands in for `theirs`, TRL's autograd function or None: a class with an `apply` like its own."""

    class ChunkedLogProbs:
        @staticmethod
        def apply(hidden, weight, bias, targets, temperature, chunk_size, softcap=None, logit_scale=1.0, outputs=()):
            result = log_probs(hidden, weight, bias, targets, temperature, softcap, logit_scale, outputs)
            if result is not None:
                return result
            if theirs is None:
                raise RuntimeError(
                    f"TRL's fused head needs Triton, which is not installed, and a head of {type(weight).__name__} in {weight.dtype} "
                    f"on {weight.device} is not one that unsloth_ext serves"
                )
            return theirs.apply(hidden, weight, bias, targets, temperature, chunk_size, softcap, logit_scale, outputs)

    return ChunkedLogProbs


def log_probs(hidden, weight, bias, targets, temperature, softcap, logit_scale, outputs):
    """(log_probs [N], entropy, log_sum_sq_probs, mean_logits, is_top1) of hidden [N, D], None for those not in `outputs`.

    None instead where the call is not ours to serve. temperature, softcap and logit_scale are numbers; the results are fp32,
    but for is_top1.
    """
    if isinstance(logit_scale, torch.Tensor) or isinstance(softcap, torch.Tensor):
        return None
    # TRL's product is in the dtype of its input, also for a head of another one
    dtype = compute_dtype("trl", hidden, weight, bias, dtype=_product_dtype(hidden))
    if dtype is None:
        return None
    from .logprobs import linear_logprobs

    hidden, weight = hidden.to(dtype), weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    options = {"temperature": temperature, "softcap": softcap, "logit_scale": logit_scale}
    with torch.autocast(hidden.device.type, enabled=False):
        entropy = None
        if "entropy" in outputs:
            logps, entropy = linear_logprobs(hidden, weight, targets, bias, entropy=True, **options)
        else:
            logps = linear_logprobs(hidden, weight, targets, bias, **options)
        extra = {"log_sum_sq_probs", "mean_logits", "is_top1"}.intersection(outputs)
        found = statistics(hidden, weight, bias, targets, extra, **options) if extra else {}
    names = ("log_sum_sq_probs", "mean_logits", "is_top1")
    return logps.float(), None if entropy is None else entropy.float(), *map(found.get, names)


def _product_dtype(hidden):
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


@torch.no_grad()
def statistics(hidden, weight, bias, targets, names, *, temperature=1.0, softcap=None, logit_scale=1.0):
    """{name: [N]} of the distributions' log sum of squared probabilities, mean logit, and whether the label is the (first) argmax.

    The logits are softcap * tanh(scale * (hidden @ weight.T + bias) / softcap) / temperature, a tile of [2048, 16384] at a time.
    """
    rows, vocab_size = hidden.shape[0], weight.shape[0]
    found = {}
    for name in names:
        found[name] = torch.empty(rows, device=hidden.device, dtype=torch.bool if name == "is_top1" else torch.float32)
    for start in range(0, rows, _ROWS):
        part = slice(start, start + _ROWS)
        x = hidden[part]
        best = torch.full((x.shape[0],), -math.inf, device=x.device)
        where = torch.zeros(x.shape[0], dtype=torch.long, device=x.device)
        total = torch.zeros_like(best)
        lse, squares = torch.full_like(best, -math.inf), torch.full_like(best, -math.inf)
        for column in range(0, vocab_size, _COLUMNS):
            z = x @ weight[column : column + _COLUMNS].t()
            if bias is not None:
                z += bias[column : column + _COLUMNS]
            if softcap is not None or logit_scale < 0 or "log_sum_sq_probs" in names:
                z = z.float() * logit_scale
                if softcap is not None:
                    z = softcap * torch.tanh(z / softcap)
                factor = 1 / temperature
            else:
                factor = logit_scale / temperature
            if "is_top1" in names:
                index = z.argmax(-1)
                top = z.gather(-1, index[:, None])[:, 0].float()
                better = top > best  # not >=: the first of equals, as in TRL
                where = torch.where(better, index + column, where)
                best = torch.where(better, top, best)
            if "mean_logits" in names:
                total += z.sum(-1, dtype=torch.float32) * factor
            if "log_sum_sq_probs" in names:
                z = z / temperature
                lse = torch.logaddexp(lse, z.logsumexp(-1))
                squares = torch.logaddexp(squares, (2 * z).logsumexp(-1))
        if "is_top1" in names:
            found["is_top1"][part] = where == targets[part]
        if "mean_logits" in names:
            found["mean_logits"][part] = total / vocab_size
        if "log_sum_sq_probs" in names:
            found["log_sum_sq_probs"][part] = squares - 2 * lse
    return found
