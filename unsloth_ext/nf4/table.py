"""How a launch is cut up: the table of launch shapes by card and size, and what a compiled kernel depends on."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from .kernel import room


class Shape(NamedTuple):
    """How one launch is cut up."""

    units: int  # 16-byte stores a lane
    warps: int  # a program
    overlap: bool = False  # programmatic dependent launch, sm_90 and later
    ahead: int = 0  # how far ahead packed bytes are prefetched into L2, in KiB, sm_90 and later
    room: int = 0  # bytes of shared memory a program that only limit how many an SM runs at a time


class Table(NamedTuple):
    """Launch shapes by size: the first row whose limit is not below the weight's, in elements of 16 bits. None is for any."""

    origin: str
    rows: tuple[tuple[int | None, Shape], ...]


# One unit a lane fills the card soonest; several keep more loads in flight and spread what a warp does once. The rows of a
# measured card come from benchmarks/sweep_nf4_launch.py. The others are reasoned from the compiled code (the ptxas of
# Triton 3.9; SASS instructions an element at 1 / 4 units, registers at 4 units) and have not been run:
#   sm_75 fp16 12.0 / 7.3, bf16 (rounded by hand) 16.0 / 11.4, 53 and 64 registers: full occupancy (1024 threads an SM)
#   sm_80 11.6 / 6.5, 32 registers; sm_86, sm_89 11.6 / 6.5, 40 registers: full occupancy (1536 threads); sm_100 12.5 / 6.8, 32
#   sm_90 12.6 / 6.8, 32. No shared memory, no barrier, no spill, 16-byte stores on all of them.
_SMALL, _LARGE = Shape(units=1, warps=4), Shape(units=4, warps=4)
_REASONED = Table("not measured", ((1 << 22, _SMALL), (None, _LARGE)))
TABLES: dict[tuple[int, int], Table] = {
    (7, 5): Table("not measured", ((1 << 21, _SMALL), (None, _LARGE._replace(units=2)))),
    (8, 0): _REASONED,
    (8, 6): _REASONED,
    (8, 9): _REASONED,
    (9, 0): Table(
        "H200, sweep_nf4_launch.py in bfloat16 and float32",
        (
            (1 << 20, Shape(units=2, warps=8, overlap=True, ahead=2048)),
            (40 << 20, Shape(units=4, warps=8, overlap=True, ahead=4096)),
            (150 << 20, Shape(units=2, warps=8, overlap=True, ahead=2048, room=36800)),
            (None, Shape(units=4, warps=8, overlap=True, ahead=4096, room=36800)),
        ),
    ),
    (10, 0): Table("not measured", ((1 << 22, _SMALL._replace(overlap=True)), (None, _LARGE._replace(overlap=True)))),
}
_PLAIN = Shape(units=1024, warps=4)  # elements a program on the plain path


@functools.cache
def capability(device_index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device_index)


def supported(device: torch.device) -> bool:
    """Can the kernel run there at all? NVIDIA cards from Turing on."""
    return device.type == "cuda" and torch.version.hip is None and capability(_index(device)) >= (7, 5)


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def shape_for(device_index: int, n_elements: int, blocksize: int, unit_elements: int) -> Shape:
    size = n_elements * 8 // unit_elements  # fp32 has twice the bytes
    for limit, shape in TABLES.get(capability(device_index), _REASONED).rows:
        if limit is None or size <= limit:
            # A warp holds 32 scales, so its tile has at most 32 blocks.
            return shape._replace(units=min(shape.units, blocksize // unit_elements))
    raise AssertionError("a launch table must end with a row for any size")


class Variant(NamedTuple):
    """What a compiled kernel depends on."""

    device_index: int
    dtype: torch.dtype
    blocksize: int
    blocksize2: int  # 0: absmax is not quantised
    wide: bool
    rest: bool
    shape: Shape

    @property
    def tile(self) -> int:
        """Elements a program."""
        unit = 4 if self.dtype == torch.float32 else 8
        return self.shape.units * 32 * self.shape.warps * unit if self.wide else self.shape.units


def variant_for(
    device_index: int, dtype, blocksize: int, blocksize2: int, n: int, packed_address: int, out_address: int
):
    """The variant for a weight of n elements at these addresses."""
    unit = 4 if dtype == torch.float32 else 8
    wide = packed_address % (unit // 2) == 0 and out_address % 16 == 0 and n >= unit
    shape = shape_for(device_index, n, blocksize, unit) if wide else _PLAIN
    return Variant(device_index, dtype, blocksize, blocksize2, wide, wide and n % unit != 0, shape)


def constexprs(variant: Variant) -> dict:
    tile_bytes = variant.tile // 2
    return {
        "BLOCK_SHIFT": variant.blocksize.bit_length() - 1,
        "BLOCK2_SHIFT": max(0, variant.blocksize2.bit_length() - 1),
        "NESTED": variant.blocksize2 > 0,
        "WIDE": variant.wide,
        "REST": variant.rest,
        "UNITS": variant.shape.units,
        "THREADS": 32 * variant.shape.warps,
        "PTX": True,
        "BEFORE_SM80": capability(variant.device_index) < (8, 0),
        "OVERLAP": variant.shape.overlap,
        "AHEAD": variant.shape.ahead * 1024 // tile_bytes,
        "ROOM": room(variant.shape.room),
    }


def options(variant: Variant) -> dict:
    """Triton's launch options."""
    found = {"num_warps": variant.shape.warps, "enable_fp_fusion": False}
    return found | {"launch_pdl": True} if variant.shape.overlap else found


@functools.cache
def measured(device: torch.device) -> bool:
    """Has the card of a device a row of its own that was measured?"""
    return supported(device) and not TABLES.get(capability(_index(device)), _REASONED).origin.startswith("not measured")
