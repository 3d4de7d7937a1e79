"""What a pipeline's step is given: the same whole batch on every rank, checked, compared, and filled up to whole microbatches.

Every rank needs all of it, masks and positions for its layers, ids or labels for its end. So a rank that was given another batch is
found here, before a tensor travels, and the ranks say it together.
"""

from __future__ import annotations

import zlib

import torch
import torch.distributed as dist

from ..errors import UnslothExtError, UsageError

__all__ = ["agreed"]

IGNORED = -100
_NAMES = ("input_ids", "labels", "attention_mask", "position_ids")


def agreed(
    batch, items, failed: str | None, microbatches: int, device: torch.device, group
) -> tuple[tuple, torch.Tensor]:
    """The batch on `device` with all its rows, and the divisor, after every rank has said over `group` that its batch is good and what it is.

    batch: input_ids, labels, attention_mask or None, position_ids or None. failed: why an earlier step failed on this rank. Raises
    `UsageError` for a batch that does not fit or is another rank's, `UnslothExtError` where a step has failed or a rank is gone.
    """
    error = prepared = mark = None
    try:
        prepared = _checked(*batch)
        if items is None:
            items = (prepared[1][:, 1:] != IGNORED).sum()
            if not items:
                raise UsageError("labels has nothing to learn: every label after the first of a row is ignored")
        items = torch.as_tensor(items, dtype=torch.float32, device="cpu")
        if items.numel() != 1 or not items > 0:
            raise UsageError(f"num_items_in_batch must be a positive number, got {items}")
        mark = (tuple(prepared[0].shape), float(items), [None if t is None else _checksum(t) for t in prepared])
    except Exception as problem:
        error = str(problem) or type(problem).__name__
    everyone: list = [None] * dist.get_world_size()
    try:
        dist.all_gather_object(everyone, (error, mark, failed), group=group)
    except RuntimeError as problem:
        raise UnslothExtError(
            f"a rank did not come to the step: {problem}",
            "Look at the output of the rank that is missing: it failed first.",
        ) from problem
    for rank, (_, _, text) in enumerate(everyone):
        if text is not None:
            raise UnslothExtError(
                f"this pipeline cannot go on: a step failed on rank {rank}: {text}",
                "Save what is to be kept (save_adapter), and start all processes again.",
            )
    unfit = {rank: text for rank, (text, _, _) in enumerate(everyone) if text is not None}
    if unfit:
        rank, text = next(iter(unfit.items()))
        raise UsageError(f"the batch of rank {rank} does not fit ({len(unfit)} of {len(everyone)} ranks): {text}")
    for rank, (_, other, _) in enumerate(everyone):
        if other != everyone[0][1]:
            differs = [n for n, a, b in zip(_NAMES, other[2], everyone[0][1][2], strict=True) if a != b]
            raise UsageError(
                f"rank {rank} was given another batch than rank 0: {other[0]} and {everyone[0][1][0]} tokens, "
                f"{', '.join(differs) or 'num_items_in_batch'} differ",
                "Every rank must be given the whole batch: no DistributedSampler, and the same seed for the order.",
            )
    filled = [None if t is None else _filled(n, t, microbatches) for n, t in zip(_NAMES, prepared, strict=True)]
    return tuple(None if t is None else t.to(device) for t in filled), items


def _checked(*batch) -> tuple:
    """On the CPU. Raises `UsageError`, which names the tensor."""
    shape = getattr(batch[0], "shape", None)
    for name, tensor in zip(_NAMES, batch, strict=True):
        if tensor is None and name not in ("input_ids", "labels"):
            continue
        if not isinstance(tensor, torch.Tensor) or tensor.ndim != 2 or 0 in tensor.shape:
            found = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise UsageError(f"{name} must be a tensor [rows, length], got {found}")
        if tensor.shape != shape:
            raise UsageError(f"{name} must have the shape {tuple(shape)} of input_ids, got {tuple(tensor.shape)}")
        if tensor.is_floating_point():
            raise UsageError(f"{name} must be of an integer dtype, got {tensor.dtype}")
    return tuple(None if t is None else t.detach().to("cpu", torch.int64) for t in batch)


def _checksum(tensor: torch.Tensor) -> int:
    return zlib.crc32(tensor.contiguous().numpy())


def _filled(name: str, tensor: torch.Tensor, microbatches: int) -> torch.Tensor:
    """With copies of the last row up to a multiple of `microbatches`; their labels are ignored."""
    more = -tensor.shape[0] % microbatches
    rows = tensor[-1:].expand(more, -1)
    return torch.cat([tensor, torch.full_like(rows, IGNORED) if name == "labels" else rows]) if more else tensor
