"""Challenge A: NF4 weights, dequantised at the speed of memory, and multiplied by straight from their bytes.

`dequantize`, `linear` and `generate` are the public functions; each is imported when it is first asked for, because this package
must not import torch.
"""

_HOME = {"dequantize": "dequantization", "generate": "generation", "linear": "matmul"}


def __getattr__(name):
    if name in _HOME:
        from importlib import import_module

        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
