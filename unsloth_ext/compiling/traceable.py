"""Replacements that let a whole-model torch.compile through Unsloth's fast path. Each changes nothing outside of a trace."""

from __future__ import annotations

import functools
import types


def without_disable(original):
    """A function from under `torch._disable_dynamo`, which breaks every graph that reaches it."""
    return original.__wrapped__


def with_plain_hook_entry(install):
    """Dynamo rebuilds a dictionary that a traced hook wrote to, and cannot rebuild a RemovableHandle in it. An object with the
    handle's `remove`, which is all that Unsloth asks of it, is taken over as it is."""

    @functools.wraps(install)
    def _unsloth_install_pretrain_detector(model):
        from torch.utils.hooks import RemovableHandle

        model = install(model)
        marker = getattr(model, "_unsloth_pretrain_marker", None)
        handle = marker.get("hook") if isinstance(marker, dict) else None
        if isinstance(handle, RemovableHandle):
            marker["hook"] = types.SimpleNamespace(remove=handle.remove)
        return model

    return _unsloth_install_pretrain_detector


def with_traced_layers_plain(wrap):
    """Inside somebody else's graph a layer of Unsloth's own runs without the flags that Unsloth's compile of the layers sets
    around it: it reads none of them, and a checkpoint's body may not write to what is outside of it."""

    @functools.wraps(wrap)
    def _wrap(cls, *args, **kwargs):
        import torch

        original = cls.forward
        result = wrap(cls, *args, **kwargs)
        wrapped, is_compiling = cls.forward, torch.compiler.is_compiling
        if wrapped is original or not getattr(original, "__module__", "").startswith("unsloth.models."):
            return result

        @functools.wraps(wrapped)
        def forward(self, hidden_states, *args, **kwargs):
            return (original if is_compiling() else wrapped)(self, hidden_states, *args, **kwargs)

        cls.forward = forward
        return result

    return _wrap


def without_row_count(forward):
    """`if bsz * q_len <= 1024 and not RETURN_LOGITS: RETURN_LOGITS = False` changes nothing, but splits a dynamic graph in
    two. Against -1 a product of sizes is decided without a guard."""
    copy = types.FunctionType(
        _with_constant(forward.__code__, 1024, -1),
        forward.__globals__,
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    copy.__kwdefaults__, copy.__dict__ = forward.__kwdefaults__, dict(forward.__dict__)
    return copy


def with_forwards_without_row_count(make):
    """The same for `CausalLM_fast_forward`, which makes such a forward."""

    @functools.wraps(make)
    def CausalLM_fast_forward(fast_forward_inference):
        return without_row_count(make(fast_forward_inference))

    return CausalLM_fast_forward


def _with_constant(code, old, new):
    found = [value for value in code.co_consts if type(value) is int and value == old]
    if len(found) != 1:
        raise RuntimeError(f"upstream changed: {code.co_name} holds the constant {old} {len(found)} times, not once")
    return code.replace(
        co_consts=tuple(new if type(value) is int and value == old else value for value in code.co_consts)
    )
