"""Challenge A: NF4 weights, dequantised at the speed of memory.

`dequantize` is the public function; it is imported when it is first asked for, because this package must not import torch.
"""


def __getattr__(name):
    if name == "dequantize":
        from .dequantization import dequantize

        return dequantize
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
