"""Challenge E: memory-efficient backprop through the language-model head.

`chunked_loss` takes any loss on logits and runs it with the head a few rows at a time; `functions` and `objectives` hold
ready-made ones. `linear_cross_entropy` and `linear_logprobs` are the two losses that everybody needs, with kernels of their
own. All are imported when they are first asked for, because this package must not import torch.
"""

_WHERE = {
    "chunked_loss": ("chunked", "chunked_loss"),
    "functions": ("functions", None),
    "linear_cross_entropy": ("cross_entropy", "linear_cross_entropy"),
    "linear_logprobs": ("logprobs", "linear_logprobs"),
    "objectives": ("objectives", None),
    "vocabulary_parallel_cross_entropy": ("vocabulary_parallel", "vocabulary_parallel_cross_entropy"),
}


def __getattr__(name):
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    module, attribute = _WHERE[name]
    module = import_module(f".{module}", __name__)
    return module if attribute is None else getattr(module, attribute)
