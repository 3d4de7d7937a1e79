"""Arithmetic of symbolic sizes, done once.

A trace with dynamic lengths makes tens of thousands of tensors without data, and for each of them torch multiplies and compares its sizes
and strides anew: 190 thousand operations on expressions for four decoder layers, of which a few hundred are different. A quarter of the
time of a first step of step scope (torch 2.11) went there. In this scope an operation on the same two expressions gives what it gave
before, in a node of its own (a trace tells sizes apart by their nodes), as long as the ShapeEnv has learnt no equality: it has a version
counter, by which torch's own caches go too. `mod` is left as it is: what it gives depends on ranges too, which are not counted.
"""

from __future__ import annotations

import threading
import types
from contextlib import contextmanager

from torch.fx.experimental import sym_node
from torch.fx.experimental.proxy_tensor import get_proxy_mode

__all__ = ["remembered_arithmetic"]

_scopes = types.SimpleNamespace(lock=threading.Lock(), count=0, originals={})  # of all threads
# (ShapeEnv, its version, results) of the last operation. Replaced as a whole: a thread that has read it writes to its own env's results.
_results: list[tuple | None] = [None]


@contextmanager
def remembered_arithmetic():
    """In this scope, in all threads. Where torch's classes are not as known, nothing changes."""
    with _scopes.lock:
        _scopes.count += 1
        if _scopes.count == 1:
            _scopes.originals = {name: vars(sym_node.SymNode)[name] for name in _replacements()}
            for name, replacement in _replacements().items():
                setattr(sym_node.SymNode, name, replacement)
    try:
        yield
    finally:
        with _scopes.lock:
            _scopes.count -= 1
            if _scopes.count == 0:
                for name, original in _scopes.originals.items():
                    setattr(sym_node.SymNode, name, original)
                _results[0] = None


def _replacements() -> dict:
    """What SymNode gets, by attribute. Made once."""
    if _made is None:
        _make()
    return _made


_made: dict | None = None


def _make() -> None:
    global _made
    _made = {}
    methods = vars(sym_node.SymNode)
    for name in sorted(set(sym_node.magic_methods) - set(sym_node.unary_methods) - {"sym_ite", "round", "mod"}):
        attribute = f"_{name}_" if name in sym_node.magic_methods_on_operator_with_trailing_underscore else f"_{name}"
        if isinstance(methods.get(attribute), types.FunctionType):
            _made[attribute] = _remembered(attribute, methods[attribute])
    # torch 2.13 has learnt to keep them.
    if isinstance(methods.get("expr"), property) and "_expr_cache" not in methods["__init__"].__code__.co_names:
        _made["expr"] = property(_expression)


def _remembered(name: str, original):
    def operation(self, other):
        env = self.shape_env
        if env is None or self._hint is None or other._hint is None or get_proxy_mode() is not None:
            return original(self, other)  # what is recorded, or has no value to check, is done each time
        version = env._version_counter
        state = _results[0]
        if state is None or state[0] is not env or state[1] != version:
            state = _results[0] = env, version, {}
        key = name, self._expr, self.pytype, other._expr, other.pytype
        result = state[2].get(key)
        if result is None:
            result = original(self, other)
            if env._version_counter == version:
                state[2][key] = _like(result)
            return result
        return _like(result)

    return operation


def _like(node):
    other = object.__new__(type(node))
    other.__dict__.update(node.__dict__)
    return other


def _expression(self):
    """SymNode.expr: with what is known to be equal put in."""
    version = self.shape_env._version_counter
    known = self.__dict__.get("_unsloth_ext_expr")
    if known is None or known[0] != version:
        found = self.shape_env.replace(self._expr)
        known = self.__dict__["_unsloth_ext_expr"] = self.shape_env._version_counter, found
    return known[1]
