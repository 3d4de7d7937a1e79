"""Challenge C: the training step compiled without a break, and memory spent where it buys speed.

All names are imported when they are first asked for, because this package must not import torch.
"""

_WHERE = {
    "compile_model": "compiled_model",
    "CompiledModel": "compiled_model",
    "CompileError": "compile_failure",
    "CompileReport": "compile_report",
    "keep_dense_weights": "dense_weights",
    "memory_budget": "memory_controller",
    "packed_arguments": "packed",
    "packed_attention": "attention",
    "step_together": "eight_bit_steps",
    "use_packed_attention": "packed_transformers",
}


def __getattr__(name):
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_WHERE[name]}", __name__), name)
