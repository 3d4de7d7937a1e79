"""Which of the CUDA C++ kernels of `cuda/` multiplies, and how it is cut up: for sm_90, bitsandbytes' usual states, 1 to 128 rows.

The choices follow two sweeps on an H200, over 14336x4096, 4096x4096, 1024x4096, 4096x14336, 8192x2048 and 2048x8192. Where None is
returned, the Triton kernels or dequantise + cuBLAS were as fast, or nothing fits.
"""

from __future__ import annotations

from typing import NamedTuple

ROWS = 128  # of x at most
COUNTERS = 4096  # sums that programs can share in one call
_LIMIT = 0x400 + 232448  # the end of a program's shared memory, as addresses count


class FewRows(NamedTuple):
    """A launch of `few_stream` or `few_async`: one program a processor, up to 8 * groups rows of x."""

    kernel: str
    groups: int
    kw: int  # warps across K, each for 256 columns
    rg: int  # warps across the weight's rows, each for 16
    slices: int = 1  # of K
    stages: int = 3
    ahead: int = 0  # scales come as early as weights
    inner: int = 0  # a program takes all slices of its rows

    @property
    def threads(self) -> int:
        extra = 0 if self.kernel == "few_async" else 128 if self.kw * self.rg == 16 else 64
        return 32 * self.kw * self.rg + extra

    @property
    def end(self) -> int:
        rows, columns = 16 * self.rg, 256 * self.kw
        stage = self.kw * self.rg * 2048 if self.kernel == "few_async" else rows * (columns // 2 + 32)
        return 0x10000 + self.stages * stage + 2 * self.groups * self.kw * self.rg * 512

    @property
    def shared_sums(self) -> bool:
        return self.slices > 1 and not self.inner

    @property
    def rows(self) -> int:
        return 8 * self.groups

    def macros(self, k: int) -> dict:
        found = {"GROUPS": self.groups, "KW": self.kw, "RG": self.rg, "SLICES": self.slices, "STAGES": self.stages}
        found["AHEAD"] = self.ahead
        return found | ({"INNER": self.inner} if self.kernel == "few_async" else {})


class Tiles(NamedTuple):
    """A launch of `tile_wgmma`: a program for each 64 * nwg rows of the weight, `rows` rows of x and a part of K."""

    rows: int  # 16, 32, 64 or 128
    nwg: int = 2
    parts: int = 4  # of 64 columns in a stage
    stages: int = 3
    split: int = 1  # of K
    buffers: int = 2
    words: int = 0
    lean: int = 0  # two programs a processor
    decoded: int = 2

    kernel = "tile_wgmma"

    @property
    def threads(self) -> int:
        return 128 * self.nwg + 32

    @property
    def end(self) -> int:
        weights = 0 if self.lean else 64 * self.nwg * (32 * self.parts + 32)
        return 0x10000 + self.stages * (self.parts * self.rows * 128 + weights)

    @property
    def shared_sums(self) -> bool:
        return self.split > 1

    def macros(self, k: int) -> dict:
        found = {"MT": self.rows, "NWG": self.nwg, "PARTS": self.parts, "STAGES": self.stages, "KDIM": k}
        found |= {"SPLIT": self.split, "BUFFERS": self.buffers, "WORDS": self.words, "LEAN": self.lean}
        return found | {"DECODED": self.decoded}


def cut(k: int) -> tuple[int, int, int] | None:
    """(kw, rg, slices) for K columns: as few slices as 16 warps allow. None where that leaves fewer than 4 warps across K."""
    if k % 256:
        return None
    units = k // 256
    slices = next(s for s in range(1, units + 1) if units % s == 0 and units // s <= 16)
    kw = units // slices
    if kw < 4:
        return None
    rg = {1: 1, 2: 2, 3: 2}.get(16 // kw, 4)
    return kw, rg, slices


def shape_for(rows: int, n: int, k: int, processors: int) -> FewRows | Tiles | None:
    """The launch for [N, K] and so many rows of x."""
    if not 0 < rows <= ROWS or n < 256:
        return None
    if rows <= 16 and (shape := _few(rows, n, k, processors)) is not None:
        return shape
    return _tiles(rows, n, k, processors) if rows > 8 else None


def _few(rows, n, k, processors):
    if (found := cut(k)) is None:
        return None
    kw, rg, slices = found
    groups = 1 if rows <= 8 else 2
    tiles = -(-n // (16 * rg))
    if slices == 1:
        if kw == 16 and tiles >= 5 * processors:
            return FewRows("few_stream", groups, kw, rg, stages=2)
        return FewRows("few_async", groups, kw, rg, stages=2, ahead=1)
    # What programs share costs them half a microsecond an item. Where they have two tiles at most, each does its own from end to
    # end for up to 4 rows of x; with more of both Triton's kernel is ahead at up to 4 rows, tiles from 9 on.
    if rows <= 4 and processors < tiles < 2 * processors:
        return FewRows("few_async", groups, kw, rg, slices, stages=2, inner=1)
    if tiles > COUNTERS or (tiles * slices > 4 * processors and (rows <= 4 or groups == 2)):
        return None
    return FewRows("few_async", groups, kw, rg, slices, stages=2, ahead=1)


def _tiles(rows, n, k, processors):
    of_x = 16 if rows <= 16 else 32 if rows <= 32 else 64 if rows <= 64 else 128
    if k % 128 or k < 1024:
        return None
    if n * k < (1 << 22) or (of_x == 64 and n * k <= 1 << 22) or (of_x == 128 and (n * k < 1 << 24 or k < 4096)):
        return None  # dequantise + cuBLAS
    nwg = 1 if of_x == 64 and n * k <= 1 << 24 and n <= 4096 else 2
    parts, stages = (4, 3) if k % 256 == 0 and of_x < 128 else (2, 4 if of_x < 128 else 3)
    split = _split(-(-n // (64 * nwg)), k // (64 * parts), parts, processors)
    return Tiles(of_x, nwg, parts, stages, split, 2 if of_x < 128 else 1, words=nwg - 1)


def _split(tiles: int, steps: int, parts: int, processors: int) -> int:
    """In how many parts K is cut: what gives the shortest time, counting what a program costs besides its steps as 1280 columns."""

    def cost(split):
        return -(-tiles * split // processors) * (-(-steps // split) + 20 // parts)

    return min((s for s in (1, 2, 4, 8) if steps >= 2 * s and tiles <= COUNTERS), key=cost, default=1)
