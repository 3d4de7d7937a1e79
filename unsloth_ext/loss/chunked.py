"""`chunked_loss(function, hidden, head, *targets)`: any loss on logits, without the logits.

The logits of T tokens over V words are the largest tensor of a training step: 4 GiB in bf16 at T = 16384, V = 128256,
and six times that with an fp32 upcast, its softmax and the gradients. Here the head and the loss run on a few rows at a
time, and what leaves a chunk is its value and its gradients.

Nothing is differentiated by hand. A chunk of `hidden` becomes a detached leaf, the head and the user's function run on
it as written, upcast included, and `torch.autograd.grad` gives the chunk's gradients:

* A result that is one number takes its gradients in forward, where the logits are. Backward only scales them, by the
  incoming gradient and by 1 / weight. The sum is differentiated, not the mean, so fp16 gradients do not underflow on
  the way.
* Values of each row cannot know their incoming gradient in forward. Backward runs each chunk again, with the autocast
  and the random numbers of forward: one more matmul, for any later arithmetic. Where the only gradient wanted is that
  of `hidden` and each value depends on its row alone (`rowwise`), dy/dx is taken in forward after all, and backward
  scales its rows.
* While torch.compile traces, each chunk is `torch.utils.checkpoint`: plain operations, no graph break. (A custom
  operator cannot take a Python function.) In eager code the loss alone is compiled: `compile_function`.

The gradients of the head's weights are summed over the chunks in fp32 and rounded once.

What others cannot do, read in their sources (Liger-Kernel, torchtune, TRL 1.15, Unsloth 2026.10.9), and what therefore
is tested here:

* Their heads are a weight and a bias. Liger, TRL and Unsloth multiply with `lm_head.weight`, so a LoRA adapter on the
  head is left out of the loss, and a quantised head does not fit. Here the head is called, whatever it is.
* Their losses are a list, or a function given to `torch.func`, which cannot differentiate through bitsandbytes' layers
  or hooks.
* Liger and Unsloth add a half-precision weight's gradients over chunks in half precision, each chunk one more rounding.
* torchtune chunks under plain autograd: every chunk's logits live until backward, unless compiled away.
* Under FSDP2, `weight.full_tensor()` without gradient placements leaves each rank's shard with that rank's gradient
  alone.
* A mean is divided by one global count. Masks of one's own, weights of classes or tokens need the pair (sum, weight).

    from unsloth_ext.loss import chunked_loss, functions

    loss = chunked_loss(functions.cross_entropy(), hidden, model.lm_head, labels, num_items_in_batch=n)

    def my_loss(logits, labels):                        # logits [n, V] in the head's dtype
        logits = logits.float()
        return F.cross_entropy(logits, labels, reduction="sum"), (labels != -100).sum()

    logps = chunked_loss(functions.token_logprobs(), hidden, model.lm_head, ids)    # [B, S], then GRPO, DPO, ...

A loss written as `forward_function(batch, linear, labels)`, which projects the batch itself and returns the mean over
its rows, is served by handing it logits and an identity:

    class MemoryEfficientLinear:
        @staticmethod
        def apply(X, linear, labels, forward_function):
            function = lambda logits, y: forward_function(logits, nn.Identity(), y)
            return chunked_loss(function, X, linear, labels, reduction="mean")
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

from . import eager, traced
from .chunk_size import rows_per_chunk
from .heads import Head, is_dtensor
from .job import Job

__all__ = ["chunked_loss"]


def chunked_loss(
    function: Callable,
    hidden: torch.Tensor,
    head: nn.Module | torch.Tensor,
    *targets,
    reduction: str | None = None,
    num_items_in_batch: torch.Tensor | int | float | None = None,
    chunk_size: int | str = "auto",
    parameters: Iterable[torch.Tensor] = (),
    rowwise: bool | None = None,
    compile_function: bool | None = None,
):
    """`function(head(hidden), *targets)`, a few rows at a time.

    function: (logits [n, V], *targets of these n rows) -> a scalar, a pair (sum, weight), or values [n, ...] of each row,
        one tensor or a tuple; `outputs.py` has the table. The logits come in the head's dtype; upcast as you like. It must
        treat each chunk alike: a mean over the chunk is right only as a scalar with reduction="mean", and a state kept from
        chunk to chunk is not seen. What spans rows (a sequence's sum, a group's advantage) is computed from values after.
    hidden: floating point [..., D]. It may be frozen.
    head: a module from [n, D] to [n, V], such as `model.lm_head`: linear with or without bias, LoRA or DoRA of peft, 4 or 8
        bit of bitsandbytes, sharded by FSDP2; or a weight [V, D], such as a tied embedding's. Whatever of it wants a
        gradient gets it.
    targets: tensors with the leading dimensions of `hidden`, cut into the same rows (labels [...], a teacher's states
        [..., D2]); anything else (numbers, None, tensors without dimensions) is handed on as it is. Other tensors belong
        into the function's closure. A target that wants a gradient gets it.
    reduction: "mean", "sum", "none"; None is "mean" for a pair, "none" for values. A weight of zero gives 0, not NaN.
    num_items_in_batch: divides the sum, as in transformers' gradient accumulation: the result is a part of the batch's mean.
    chunk_size: rows at a time; "auto" as in `chunk_size.py`.
    parameters: trainable tensors that `function` closes over (a temperature, another head). They are used as they are, so
        tensor hooks on them run once a chunk.
    rowwise: each returned value [n] depends on its own row alone, which saves a matmul where the head is frozen. None asks
        `function.rowwise`. Saying so wrongly gives wrong gradients. In fp16 the values should be of the order of one.
    compile_function: put `function` through torch.compile, once for all calls: its upcast, its softmax and the gradient then exist
        in registers only, which saves most of the memory and of the time that is not the head's. None: on a CUDA card, for
        functions that say `function.compiles` (the ready-made ones do). The first call takes some seconds.

    Returns a scalar (at least fp32), or values [..., *] for `hidden` [..., D] in the function's dtypes. Values that have no
    path to a gradient do not want one. No tokens give a sum of 0. NaN is passed on.

    Raises TypeError or ValueError that name the argument; RuntimeError on a second derivative, which is not available.
    Runs without waiting for the device unless `function` or `head` does.
    """
    if not callable(function):
        raise TypeError(f"function must be callable, got {type(function).__name__}")
    if reduction not in (None, "mean", "sum", "none"):
        raise ValueError(f'reduction must be "mean", "sum", "none" or None, got {reduction!r}')
    _check_hidden(hidden)
    head = Head(head)
    lead = hidden.shape[:-1]
    flat = hidden.reshape(-1, hidden.shape[-1])
    rows, arguments = [flat], []
    for i, target in enumerate(targets):
        if isinstance(target, torch.Tensor) and target.dim() > 0:
            _check_target(i, target, hidden, lead)
            arguments.append((True, len(rows)))
            rows.append(target.reshape(flat.shape[0], *target.shape[len(lead) :]))
        else:
            arguments.append((False, target))
    vocab_size = head.vocabulary()
    if vocab_size is None and chunk_size == "auto":
        raise ValueError("chunk_size must be a number of rows for a head without out_features")
    weight = head.tensors.get("weight")
    if weight is not None and weight.dim() == 2 and weight.is_floating_point() and weight.shape[1] != flat.shape[1]:
        raise ValueError(f"hidden has {flat.shape[1]} features, but the head's weight is {list(weight.shape)}")
    if isinstance(parameters, (torch.Tensor, nn.Module)):
        raise TypeError(f"parameters must be a list of tensors, got {type(parameters).__name__}")
    extra = tuple(tensor for tensor in parameters if tensor.requires_grad)
    size = rows_per_chunk(
        chunk_size,
        flat.shape[0],
        vocab_size or 0,
        flat.shape[1],
        bool(head.trainable) and torch.is_grad_enabled(),
        flat.device,
    )
    compiles = getattr(function, "compiles", False) and flat.is_cuda if compile_function is None else compile_function
    job = Job(
        function=_compiled(function) if compiles and not torch.compiler.is_compiling() else function,
        head=head,
        arguments=tuple(arguments),
        lead=lead,
        size=size,
        reduction=reduction,
        num_items=_number_of_items(num_items_in_batch, flat.device),
        rowwise=bool(getattr(function, "rowwise", False) if rowwise is None else rowwise),
        extra=extra,
    )
    if torch.compiler.is_compiling():
        return traced.run(job, rows)
    return eager.run(job, rows)


def _compiled(function):
    """torch.compile(function), kept with it. (Dynamo's own cache is by code: a factory's functions share what is compiled.)"""
    own = getattr(function, "__dict__", None)
    if own is None:
        return torch.compile(function)
    if "_compiled_function" not in own:
        own["_compiled_function"] = torch.compile(function)
    return own["_compiled_function"]


def _check_hidden(hidden) -> None:
    if not isinstance(hidden, torch.Tensor):
        raise TypeError(f"hidden must be a tensor, got {type(hidden).__name__}")
    if is_dtensor(hidden):
        raise TypeError("hidden is a DTensor: pass this rank's rows, hidden.to_local() or hidden.full_tensor()")
    if hidden.dim() < 2 or not hidden.is_floating_point():
        raise ValueError(f"hidden must be floating point [..., D], got {list(hidden.shape)} of {hidden.dtype}")


def _check_target(i, target, hidden, lead) -> None:
    if is_dtensor(target):
        raise TypeError(f"targets[{i}] is a DTensor: pass this rank's rows")
    if target.shape[: len(lead)] != lead:
        raise ValueError(
            f"targets[{i}] has shape {list(target.shape)}, which does not start with {list(lead)}, the leading dimensions of hidden "
            f"{list(hidden.shape)}. A tensor that is not one of rows belongs into the function's closure"
        )
    if target.device != hidden.device:
        raise ValueError(f"targets[{i}] is on {target.device}, but hidden is on {hidden.device}")


def _number_of_items(number, device):
    if isinstance(number, torch.Tensor):
        if number.numel() != 1:
            raise ValueError(f"num_items_in_batch must be one number, got a tensor of shape {list(number.shape)}")
        return number.reshape(()).to(device, non_blocking=True)
    if number is not None and number < 0:
        raise ValueError(f"num_items_in_batch must not be negative, got {number}")
    return number
