"""Which of a layer's tensors a graph's inputs are: the words that lead from the layer to each."""

from __future__ import annotations

import keyword
from collections import deque

import torch

__all__ = ["find_tensors", "same_tensor"]

_DEPTH = 14


def same_tensor(a: torch.Tensor, b: torch.Tensor) -> bool:
    """The same memory in the same form: AOTAutograd hands on some inputs detached."""
    if a is b:
        return True
    return (
        a.untyped_storage()._cdata == b.untyped_storage()._cdata
        and a.storage_offset() == b.storage_offset()
        and a.shape == b.shape
        and a.stride() == b.stride()
        and a.dtype == b.dtype
    )


def find_tensors(root: torch.nn.Module, wanted: list[torch.Tensor]) -> list[str] | None:
    """For each tensor a text like `.mlp.gate_proj.weight` that, after the name of `root`, is an expression for it. None where one is
    reached by attributes, lists and dictionaries of plain keys nowhere."""
    places: dict[int, list[int]] = {}
    for index, tensor in enumerate(wanted):
        places.setdefault(tensor.untyped_storage()._cdata, []).append(index)
    found: list[str | None] = [None] * len(wanted)
    left, seen, queue = len(wanted), {id(root)}, deque([(root, "", 0)])
    while queue and left:
        value, path, depth = queue.popleft()
        if isinstance(value, torch.Tensor):
            for index in places.get(value.untyped_storage()._cdata, ()):
                if found[index] is None and same_tensor(wanted[index], value):
                    found[index], left = path, left - 1
        if depth == _DEPTH:
            continue
        for child, word in _children(value):
            if id(child) not in seen:
                seen.add(id(child))
                queue.append((child, path + word, depth + 1))
    return None if left else found  # type: ignore[return-value]


def _children(value):
    if isinstance(value, torch.nn.Module):
        containers = torch.nn.ModuleDict | torch.nn.ParameterDict
        for name, child in (*value._parameters.items(), *value._buffers.items()):
            yield from _named(child, name, isinstance(value, containers))
        for name, child in value._modules.items():
            if isinstance(value, torch.nn.ModuleList | torch.nn.Sequential):
                yield child, f"[{name}]"
            else:
                yield from _named(child, name, isinstance(value, containers))
        hidden = ("_parameters", "_buffers", "_modules")
        for name, child in vars(value).items():
            if name not in hidden:
                yield from _named(child, name, False)
    elif isinstance(value, list | tuple):
        yield from ((child, f"[{i}]") for i, child in enumerate(value))
    elif isinstance(value, dict):
        yield from ((child, f"[{key!r}]") for key, child in value.items() if type(key) in (str, int))
    elif not isinstance(value, type) and hasattr(value, "__dict__") and not callable(value):
        for name, child in vars(value).items():
            yield from _named(child, name, False)


def _named(child, name: str, item: bool):
    if child is None or isinstance(child, str | int | float | bool):
        return
    if item:
        yield child, f"[{name!r}]"
    elif name.isidentifier() and not keyword.iskeyword(name):
        yield child, f".{name}"
