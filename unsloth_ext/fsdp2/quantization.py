"""One rank's part of an NF4 weight, read from a checkpoint: cut out of a quantised one, or quantised from a 16-bit one.

Both give bit for bit what bitsandbytes gives for the whole weight on one device. Blocks and groups are independent of each other,
and ranks hold whole groups. Only the offset of double quantisation depends on all of them: it is torch's mean over the block
maxima, whose order of additions depends on their number. So the ranks exchange their maxima (a 64th of the weight's elements, as
float32) and each takes the mean of all of them.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from bitsandbytes import functional
from bitsandbytes.utils import unpack_tensor_to_dict

from ..errors import UsageError
from .checkpoint_index import CheckpointIndex
from .nf4_cut import NF4Cut, NF4Fields, shared
from .nf4_parameter import NF4Shard
from .reference import offset_of

__all__ = ["check_quantised", "is_quantised", "quantise_slice", "read_quantised"]

_STATE = ".quant_state.bitsandbytes__"


def is_quantised(index: CheckpointIndex, name: str) -> bool:
    """Is weight `name` stored in 4 bit by bitsandbytes?"""
    return f"{name}{_STATE}nf4" in index or f"{name}{_STATE}fp4" in index


def check_quantised(index: CheckpointIndex, name: str, shape: tuple[int, int], world: int) -> tuple[NF4Cut, dict]:
    """How weight `name`, quantised by bitsandbytes, is cut, and the numbers of its state. Reads only a few hundred bytes.

    Raises `UsageError`, naming file and tensor, where a part is missing or has another size or dtype than the state says.
    """
    if f"{name}{_STATE}nf4" not in index:
        raise UsageError(f"{name!r} in {index.folder} is quantised as fp4; only nf4 can be sharded")
    facts = unpack_tensor_to_dict(index.whole(f"{name}{_STATE}nf4"))
    nested = f"{name}.nested_absmax" in index
    where = index.where(name)
    if tuple(facts["shape"]) != tuple(shape):
        raise UsageError(f"{where} was quantised from shape {tuple(facts['shape'])}, the model has {tuple(shape)}")
    cut = NF4Cut(
        torch.Size(facts["shape"]), getattr(torch, facts["dtype"]), facts["blocksize"],
        facts["nested_blocksize"] if nested else 0, world,
    )  # fmt: skip
    expected = {f"{name}.absmax": (cut.absmax_dtype, cut.blocks), f"{name}.quant_map": (torch.float32, 16)}
    if nested:
        expected |= {
            f"{name}.nested_absmax": (torch.float32, cut.groups),
            f"{name}.nested_quant_map": (torch.float32, 256),
        }
    for part, (dtype, numel) in expected.items():
        if part not in index:
            raise UsageError(
                f"{part!r} is missing beside {where}", "The checkpoint is incomplete or of mixed quantisation."
            )
        if index.dtype(part) != dtype or index.numel(part) != numel:
            raise UsageError(
                f"{index.where(part)} must have {numel} entries of {dtype}, got {index.shape(part)} of {index.dtype(part)}"
            )
    stored = index.numel(name) * index.dtype(name).itemsize
    if not cut.n_bytes <= stored < cut.n_bytes + index.dtype(name).itemsize:
        raise UsageError(f"{where} must have {cut.n_bytes} packed bytes for shape {tuple(shape)}, got {stored}")
    if cut.group_bytes % index.dtype(name).itemsize:
        raise UsageError(f"{where} is stored as {index.dtype(name)}, whose elements straddle blocks")
    return cut, facts


def read_quantised(index: CheckpointIndex, name: str, cut: NF4Cut, facts: dict, rank: int, device) -> NF4Shard:
    """This rank's part of a weight that the checkpoint has in NF4. Reads those bytes and no others."""
    start, stop = cut.real(rank)

    def part(name, per_group, dtype):
        width = index.dtype(name).itemsize // dtype.itemsize or 1  # packed bytes stored as a wider type
        per_group //= width
        numel = index.numel(name)
        out = torch.zeros(cut.chunk * per_group * width, dtype=dtype, device=device)
        rows = index.rows(name, min(start * per_group, numel), min(stop * per_group, numel))
        flat = rows.reshape(-1).view(dtype)
        out[: flat.numel()] = flat.to(device)
        return out

    nested = cut.blocksize2 > 0
    fields = NF4Fields(
        packed=part(name, cut.group_bytes, torch.uint8),
        absmax=part(f"{name}.absmax", cut.group_blocks, cut.absmax_dtype),
        absmax2=part(f"{name}.nested_absmax", 1, torch.float32) if nested else None,
        offset=torch.tensor(float(facts["nested_offset"]), device=device) if nested else None,
        code2=_code(index, f"{name}.nested_quant_map", device) if nested else None,
        code=_code(index, f"{name}.quant_map", device),
    )
    return NF4Shard.of_fields(cut, rank, fields)


def _code(index: CheckpointIndex, name: str, device) -> torch.Tensor:
    return shared(index.whole(name).to(device))


def quantise_slice(
    index: CheckpointIndex, name: str, dtype: torch.dtype, rank: int, world: int, device, group,
    *, blocksize: int = 64, nested: bool = True,
) -> NF4Shard:  # fmt: skip
    """This rank's part of the NF4 form of a 16-bit (or float32) weight [out, in]. A collective over `group`.

    Reads the rows that hold this rank's blocks. `dtype` is what the weight is converted to before it is quantised, and what it
    dequantises to. Equal bit for bit to `bitsandbytes.functional.quantize_4bit(weight.to(dtype), quant_type="nf4", ...)`.
    """
    shape = torch.Size(index.shape(name))
    cut = NF4Cut(shape, dtype, blocksize, 256 if nested else 0, world)
    start, stop = (min(at * cut.group_weights, cut.n_weights) for at in cut.real(rank))
    columns = shape[1:].numel()
    first = start // columns
    rows = index.rows(name, first, -(-stop // columns))
    weights = rows.reshape(-1)[start - first * columns : stop - first * columns].to(device).to(dtype)
    packed = torch.zeros(cut.chunk * cut.group_bytes, dtype=torch.uint8, device=device)
    absmax = torch.zeros(cut.chunk * cut.group_blocks, dtype=torch.float32, device=device)
    if weights.numel():
        bytes_, state = functional.quantize_4bit(weights, blocksize=blocksize, quant_type="nf4")
        packed[: bytes_.numel()] = bytes_.reshape(-1)
        blocks = state.absmax.numel()
        absmax[:blocks] = state.absmax.reshape(-1)
        del bytes_, state
    else:
        blocks = 0
    del rows, weights
    code = shared(functional.get_4bit_type("nf4", device=device))
    if not nested:
        return NF4Shard.of_fields(cut, rank, NF4Fields(packed, absmax, None, None, None, code))
    everywhere = absmax.new_empty(world * absmax.numel())
    # Its name from torch 2.13 on, which warns of the old one.
    gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor
    gather(everywhere, absmax, group=group)
    offset = offset_of(everywhere[: cut.blocks])
    del everywhere
    small = torch.zeros(absmax.numel(), dtype=torch.uint8, device=device)
    absmax2 = torch.zeros(cut.chunk, dtype=torch.float32, device=device)
    # With no block of its own a rank still needs the codebook.
    codes, state2 = functional.quantize_blockwise(absmax[: max(blocks, 1)] - offset, blocksize=256)
    if blocks:
        small[:blocks] = codes.reshape(-1)
        absmax2[: state2.absmax.numel()] = state2.absmax.reshape(-1)
    return NF4Shard.of_fields(cut, rank, NF4Fields(packed, small, absmax2, offset, shared(state2.code), code))
