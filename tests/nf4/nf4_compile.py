"""Compiles the kernels that test_gpu.py is going to launch: `python nf4_compile.py PART PARTS` does its share of them.

There are some hundred, about a second each. They end up in Triton's cache on disk, where the tests find them.
"""

import itertools
import sys
import warnings

import torch
from nf4_states import Spec

from unsloth_ext.nf4.launch import Shape
from unsloth_ext.nf4.quant_state import BLOCKSIZES, DTYPES

LAUNCH_SHAPES = [
    Shape(units, warps, overlap, ahead, room)
    for units, warps, (overlap, ahead, room) in itertools.product(
        (1, 2, 4, 8), (1, 4, 8), ((False, 0, 0), (True, 0, 0), (False, 8, 28000), (True, 32, 0))
    )
]
BLOCKSIZE_SHAPES = [Shape(8, 4), Shape(8, 4, overlap=True, ahead=8, room=20000)]
SOME_BLOCKSIZES = (32, 64, 256, 1024, 4096)


def runs_here(shape: Shape) -> bool:
    return torch.cuda.get_device_capability() >= (9, 0) or not (shape.overlap or shape.ahead)


def shape_specs(dtype, blocksize):
    """Weights that meet every case of one launch shape: whole, with a rest, less than a unit, longer than a tile."""
    for rows, columns in ((64, 512), (37, 333), (1, 8), (1, 3), (129, 1000)):
        yield Spec(rows, columns, dtype, blocksize, 64, nested=rows != 37, magnitude="special")


def everything():
    """(launch shape or None for the table's, Spec)."""
    for shape in filter(runs_here, LAUNCH_SHAPES):
        yield from ((shape, spec) for spec in shape_specs(torch.bfloat16, 64))
    for shape in filter(runs_here, BLOCKSIZE_SHAPES):
        for dtype, blocksize in itertools.product(DTYPES, SOME_BLOCKSIZES):
            yield from ((shape, spec) for spec in shape_specs(dtype, blocksize))
    for dtype, blocksize, (nested, blocksize2) in itertools.product(
        DTYPES, BLOCKSIZES, ((False, 64), (True, 64), (True, 256))
    ):
        for columns in (1024, 1025, 1):  # whole units, a rest, the plain path
            yield None, Spec(1, columns, dtype, blocksize, blocksize2, nested)


def with_table(shape: Shape):
    from unsloth_ext.nf4 import launch

    return torch.cuda.get_device_capability(), launch.Table("test", ((None, shape),))


def main(part: int, parts: int) -> None:
    from unsloth_ext.nf4 import dequantize, launch

    warnings.simplefilter("error", RuntimeWarning)
    table = dict(launch.TABLES)
    cases = {}
    for shape, spec in everything():
        n = spec.rows * spec.columns
        unit = 4 if spec.dtype == torch.float32 else 8
        kind = "plain" if n < unit else "rest" if n % unit else "whole"
        used = None if kind == "plain" else shape
        cases[used, spec.dtype, spec.blocksize, spec.nested and spec.blocksize2, kind] = spec
    for (shape, *_), spec in itertools.islice(cases.items(), part, None, parts):
        launch.TABLES.clear()
        launch.TABLES.update(table if shape is None else dict([with_table(shape)]))
        dequantize(*spec.make("cuda"))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
