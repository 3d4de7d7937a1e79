"""How a layer is called, noted where Dynamo comes to it, and its forward as a call of the operator for calls of that form.

The forward is text: Dynamo traces it, and each comparison in it becomes a guard of the step's graph. All names in it are made here or
are words of Dynamo's and attributes of the layer; values that are no numbers or strings go in by reference.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch._dynamo.comptime import comptime

from .layer_region import Leaf, Number, Region, leaves_of
from .layer_symbols import Unsuitable

__all__ = ["Form", "asked", "as_operator", "entry", "form_state", "unknown"]


class _Asked(threading.local):
    """What the trace that goes on in this thread came to and did not know."""

    form: Form | Unsuitable | None = None


asked = _Asked()


@dataclass(frozen=True)
class Form:
    """How a layer is called. args, kwargs: with a `Leaf` for each tensor and a `Number` for what is a symbol."""

    args: tuple
    kwargs: tuple[tuple[str, Any], ...]
    grad: bool
    autocast: tuple  # (device type, whether it is on, dtype)


@contextmanager
def form_state(form: Form):
    kind, on, dtype = form.autocast
    with torch.set_grad_enabled(form.grad), torch.autocast(kind, dtype=dtype, enabled=on):
        yield


_FIRST = """
def forward(self, *args, **kwargs):
    if torch.compiler.is_compiling():
        return following[0](self, *args, **kwargs)
    return plain(self, *args, **kwargs)
"""


def _function(text: str, names: dict[str, Any]) -> Callable:
    exec(compile(text, "<a layer as an operator>", "exec"), names)
    return names["forward"]


def entry(plain: Callable, following: list) -> Callable:
    """A layer's forward: `plain`, and where it is traced the function that `following` holds."""
    return _function(_FIRST, {"torch": torch, "plain": plain, "following": following})


def as_operator(
    region: Region, places: list[int], number: int, form: Form, texts: list, words: dict[str, Number], result, following
) -> Callable:
    """The layer's forward for calls of this form; for others the function that `following` holds.

    places: of each of the region's tensor inputs among `texts`. number: the operator's call. texts: expressions for the operator's
    tensors, None for those of the form. words: of the form's numbers. result: what the layer returns, with one tensor in it.
    """
    names: dict[str, Any] = {"torch": torch, "following": following, "sym_max": max, "sym_min": min}
    names |= {"comptime": comptime, "unchanged": _unchanged}
    kind, on, dtype = form.autocast
    conditions = [f"torch.is_grad_enabled() == {form.grad}", f"torch.is_autocast_enabled({kind!r}) == {on}"]
    if on:
        conditions.append(f"torch.get_autocast_dtype({kind!r}) == {_constant(dtype, names)}")
    texts, numbers = list(texts), [""] * len(words)
    _same_form("args", form.args, conditions, texts, numbers, names)
    _same_form("kwargs", dict(form.kwargs), conditions, texts, numbers, names)
    of_words = {word: numbers[one.index] for word, one in words.items()}
    sizes = region.conditions([texts[i] for i in places], of_words)
    return _function(
        "\n".join(
            [
                "def forward(self, *args, **kwargs):",
                f"    if {_all(conditions)}:",
                f"        if {_all(sizes)}:",
                "            comptime(unchanged)",
                f"            made = torch.ops.unsloth_ext.layer_forward([{', '.join(texts)}], "
                f"[{', '.join(numbers)}], {number})",
                f"            return {_returned(result)}",
                "    return following[0](self, *args, **kwargs)",
            ]
        ),
        names,
    )


def _all(conditions: list[str]) -> str:
    return " and ".join(f"({condition})" for condition in conditions) or "True"


def _same_form(text: str, value, conditions: list[str], texts: list, numbers: list, names: dict[str, Any]) -> None:
    """Conditions under which the expression `text` has the form of `value`, and texts of its tensors and numbers."""
    if isinstance(value, Leaf):
        texts[value.index] = text
        dtype, device = _constant(value.dtype, names), _constant(value.device, names)
        conditions += [
            f"isinstance({text}, torch.Tensor)",
            f"{text}.ndim == {len(value.sizes)}",
            f"{text}.dtype == {dtype}",
            f"{text}.device == {device}",
            f"{text}.requires_grad == {value.requires_grad}",
        ]
    elif isinstance(value, Number):
        numbers[value.index] = text
        conditions.append(f"isinstance({text}, int)")
    elif isinstance(value, dict):
        conditions.append(f"len({text}) == {len(value)}")
        for key, item in value.items():
            conditions.append(f"{key!r} in {text}")
            _same_form(f"{text}[{key!r}]", item, conditions, texts, numbers, names)
    elif isinstance(value, tuple | list):
        conditions.append(f"len({text}) == {len(value)}")
        for i, item in enumerate(value):
            _same_form(f"{text}[{i}]", item, conditions, texts, numbers, names)
    elif value is None or isinstance(value, bool):
        conditions.append(f"{text} is {value}")
    else:
        conditions.append(f"{text} == {_constant(value, names)}")


def _constant(value, names: dict[str, Any]) -> str:
    if type(value) in (int, str):
        return repr(value)
    name = f"constant_{len(names)}"
    names[name] = value
    return name


def _returned(result) -> str:
    texts: list[str] = []

    def text(value) -> str:
        if isinstance(value, torch.Tensor):
            texts.append("made[0]")
            return texts[-1]
        if type(value) is tuple:
            return f"({''.join(text(x) + ', ' for x in value)})"
        if value is None:
            return "None"
        raise Unsuitable(f"a layer returns a {type(value).__name__}")

    found = text(result)
    if len(texts) != 1:
        raise Unsuitable(f"a layer returns {len(texts)} tensors")
    return found


def unknown(self, *args, **kwargs):
    """The end of each chain. Traced, it notes how the layer is called."""
    comptime(_note)
    raise RuntimeError("this layer has not been compiled for such a call")


def _unchanged(context) -> None:
    """Traced: the step has not changed the layer before it comes to it, by a hook say. It was compiled, and is looked at, as it is outside."""
    translator = context._i_will_not_complain_if_bc_breaks_InstructionTranslator()
    effects, layer = translator.output.side_effects, _words(translator.symbolic_locals["self"])
    for variable in effects.id_to_variable.values():
        if effects.is_modified(variable) and (name := _words(variable)) and layer and name.startswith(layer):
            asked.form = Unsuitable(f"the step changes a layer before it calls it: {name}")
            raise RuntimeError(str(asked.form))


def _words(variable) -> str | None:
    name = getattr(getattr(variable, "source", None), "name", None)
    return name() if callable(name) else name


def _note(context) -> None:
    try:
        counts = itertools.count(), itertools.count()
        args = _form_of(context.get_local("args")._ComptimeVar__variable, *counts)
        kwargs = _form_of(context.get_local("kwargs")._ComptimeVar__variable, *counts)
        devices = {leaf.device.type for leaf in leaves_of((args, kwargs))}
        if len(devices) != 1:
            raise Unsuitable(f"a layer's arguments are on {sorted(devices) or 'no device'}")
        kind = devices.pop()
        autocast = (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        asked.form = Form(args, tuple(kwargs.items()), torch.is_grad_enabled(), autocast)
    except Unsuitable as reason:
        asked.form = reason


def _form_of(variable, leaves, numbers):
    from torch._dynamo import variables

    if hasattr(variable, "realize"):
        variable = variable.realize()
    if isinstance(variable, variables.TensorVariable):
        fake = variable.as_proxy().node.meta["example_value"]
        return Leaf(
            next(leaves), _hints(fake.shape), _hints(fake.stride()), fake.dtype, fake.device, fake.requires_grad
        )
    if isinstance(variable, variables.SymNodeVariable) and isinstance(variable.sym_num, torch.SymInt):
        return Number(next(numbers), variable.sym_num.node.hint)
    if isinstance(variable, variables.ConstantVariable):
        if variable.value is None or isinstance(variable.value, bool | int | float | str | torch.dtype):
            return variable.value
    elif isinstance(variable, variables.ConstDictVariable):
        return {key.vt.as_python_constant(): _form_of(value, leaves, numbers) for key, value in variable.items.items()}
    elif type(variable) is variables.TupleVariable or type(variable) is variables.ListVariable:
        return tuple(_form_of(item, leaves, numbers) for item in variable.items)
    raise Unsuitable(f"a layer is called with a {type(variable).__name__}")


def _hints(sizes) -> tuple[int, ...]:
    return tuple(x if isinstance(x, int) else x.node.hint for x in sizes)
