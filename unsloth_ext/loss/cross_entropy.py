"""Cross entropy of hidden @ weight.T without the logits: `linear_cross_entropy`.

A frozen head costs two matmuls and about 100 MiB beside the gradient itself, a trained one three ("fast") or four ("lean").
"""

from __future__ import annotations

import torch

from .labelled_rows import LabelledRows
from .linear_inputs import checked, shifted

REDUCTIONS = ("mean", "sum", "none")


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items_in_batch: int | float | torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    shift: bool = False,
    logits_dtype: torch.dtype | None = None,
    memory: str = "auto",
    labelled: LabelledRows | None = None,
) -> torch.Tensor:
    """Cross entropy of softcap(logit_scale * (hidden @ weight.T + bias)) against labels, in fp32, exact.

    hidden [..., D], weight [V, D], bias [V], labels [...] of an integer dtype. -> a scalar, or one value a label with
    reduction="none". fp32, or fp64 for fp64 inputs. Gradients for hidden, weight and bias, as each requires.

    shift: hidden[..., i, :] predicts labels[..., i + 1].
    num_items_in_batch: divides the sum, instead of the number of labels that are not ignored (gradient accumulation).
    z_loss: adds z_loss * logsumexp(logits)² a row (PaLM, arXiv 2204.02311).
    logits_dtype: what the tile of logits is held in. None: what the head itself would give, hidden's dtype; rounding logits of
        standard deviation 4 to bf16 changes the gradient by 0.7 %, as it does in full logits. torch.float32: 0.17 %, for 3 % of time.
    memory: "fast"; "lean" (trained head: the logits twice, and no fp32 sum of weight's gradient); "auto" takes lean when little is free.
    labelled: `LabelledRows` of the labels that are not ignored, shifted if `shift`. Only these rows are computed: it costs a copy
        of them and a wait for the card. For a sum or a mean, and not inside torch.compile or the capture of a CUDA graph.

    An ignored row has no part in loss or gradient; with all ignored both are 0. A label outside [0, V) makes its row's loss and
    gradient NaN: a card cannot raise without waiting for it. NaN logits give NaN. A second backward over a retained graph computes anew.

    Raises ValueError for shapes, dtypes or settings that do not fit, TypeError for quantized or distributed weights.
    """
    from . import cross_entropy_op as op

    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if num_items_in_batch is not None and reduction == "none":
        raise ValueError('num_items_in_batch divides a sum; it has no meaning with reduction="none"')
    if labelled is not None and reduction == "none":
        raise ValueError('labelled rows are summed; reduction="none" has a value for each row')
    if shift:
        labels = shifted(labels, hidden, ignore_index)
    inputs = checked(
        hidden, weight, labels, bias, softcap=softcap, logit_scale=logit_scale, label_smoothing=label_smoothing,
        logits_dtype=logits_dtype, memory=memory,
    )  # fmt: skip
    rows, targets = inputs.hidden, inputs.labels
    if labelled is not None and labelled.total != rows.shape[0]:
        raise ValueError(f"labelled was made for {labelled.total} rows, hidden has {rows.shape[0]}")
    options = (int(ignore_index), float(logit_scale), float(softcap or 0.0), 1.0, float(label_smoothing), float(z_loss))
    divisor = None
    if num_items_in_batch is not None:
        divisor = torch.as_tensor(num_items_in_batch, device=rows.device, dtype=inputs.value_dtype)
    elif reduction == "mean":
        divisor = (targets != ignore_index).sum().clamp(min=1)
    grad = torch.is_grad_enabled()
    need = [grad and x is not None and x.requires_grad for x in (rows, inputs.weight, inputs.bias)]
    if labelled is not None and memory == "auto":
        memory = op.memory_ahead(rows, inputs.weight, need[1] or need[2])
    if reduction != "none" and any(need):
        coefficient = torch.ones((), device=rows.device, dtype=inputs.value_dtype)
        if divisor is not None:
            coefficient = coefficient / divisor
        options = (coefficient, *options, *need, inputs.logits_dtype, memory)
        if labelled is not None:
            return op.SummedLossOfRows.apply(rows, inputs.weight, inputs.bias, targets, labelled, *options)
        return op.summed_loss(rows, inputs.weight, inputs.bias, targets, *options)[0]
    if labelled is not None and (chosen := labelled.indices()) is not None:
        rows, targets = rows.index_select(0, chosen), targets.index_select(0, chosen)
    value = op.token_losses(
        rows, inputs.weight, inputs.bias, targets, *options, False, need[0], inputs.logits_dtype, memory
    )[0]
    if reduction == "none":
        return value.view(inputs.lead)
    return value.sum() if divisor is None else value.sum() / divisor
