"""Layers that are alike, compiled once within the one graph of a step.

A graph of a whole step has each layer's operations anew, and each costs Dynamo, AOTAutograd and Inductor as much as the first one's:
three minutes for 32 layers. Here a layer is one operator in that graph, `layer_forward`, and one in its backward, whose kernels come
from a compile of the layer alone, as in block scope, and are every like layer's. (torch has the idea as `nested_compile_region`, which
with symbolic lengths takes each layer for another one on 2.11 and fails on 2.13: benchmarks/NOTES.md.)

How it goes: Dynamo traces the step and comes to a layer with arguments of a form that is not known. It stops there, and all layers are
compiled by torch.compile with stand-ins for such arguments, tensors without contents, as nothing is run. A reader around Inductor's compiler notes
what a graph wants, gives and keeps for its backward, and which of the layer's tensors each input is. Then the step is traced again,
and where the form is known the layer's forward is a call of the operator with those tensors.

What the small graph took for granted is asked for again in the large one: forms and sizes of arguments by branches that Dynamo guards,
everything else by the small graph's own guards, which `_holds` checks after each step's forward, while the card works: a scale or an
adapter that was changed in between is noticed before the loss is given out, and the step is traced anew.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import logging
import os
import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from .compile_failure import CompileError
from .layer_form import Form, as_operator, asked, entry, form_state, unknown
from .layer_region import Leaf, Number, Region, RegionBackend, leaves_of, map_leaves, words_of
from .layer_symbols import Unsuitable
from .layer_tensors import find_tensors, same_tensor

__all__ = ["SharedLayers"]

logger = logging.getLogger(__name__)

_library = torch.library.Library("unsloth_ext", "FRAGMENT")
for _schema in (
    "layer_forward(Tensor[] tensors, SymInt[] numbers, int call) -> Tensor[]",
    "layer_backward(Tensor[] inputs, Tensor[] made, Tensor gradient, SymInt[] numbers, int call) -> Tensor[]",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))

_calls: dict[int, _Call] = {}  # all that were: a loss may be kept for longer than its model
# Another's number in every process: a step's graph says no more of a layer, and compiled graphs that are kept on disk are found by theirs.
_numbers = itertools.count(int.from_bytes(os.urandom(6), "big"))
_MOST_FORMS = 16  # of calls, of one model
_MOST_CHANGES = 4  # of layers, by what their graphs took for granted


@dataclass(eq=False)
class _Call:
    """A layer with one form of arguments: its region, and where the region's inputs come from."""

    layer: weakref.ref
    region: Region
    places: list[int]  # of each of the region's tensor inputs among the operator's
    numbers: list[int]  # of each of the region's words among the operator's numbers
    guards: Any  # Dynamo's, of the layer compiled alone
    self_name: str
    names: dict[str, Any]  # the locals that they look at, without the layer, with a `Leaf` for each tensor
    form: Form
    used: bool = False
    number: int = field(default_factory=_numbers.__next__)

    def __post_init__(self):
        _calls[self.number] = self


def _forward(tensors, numbers, call):
    one = _calls[call]
    one.used = True
    return one.region.run([tensors[i] for i in one.places], [numbers[i] for i in one.numbers])


def _forward_fake(tensors, numbers, call):
    one = _calls[call]
    return one.region.shapes([tensors[i] for i in one.places], [numbers[i] for i in one.numbers])


def _backward(inputs, made, gradient, numbers, call):
    one = _calls[call]
    return one.region.run_backward(inputs, made, gradient, [numbers[i] for i in one.numbers])


def _backward_fake(inputs, made, gradient, numbers, call):
    one = _calls[call]
    return one.region.shapes_backward(inputs, made, gradient, [numbers[i] for i in one.numbers])


def _setup_context(ctx, inputs, output):
    tensors, ctx.numbers, ctx.call = inputs
    one = _calls[ctx.call]
    given = [tensors[one.places[i]] for i in one.region.inputs_for_backward]
    ctx.given, ctx.tensors = len(given), len(tensors)
    ctx.save_for_backward(*given, *(output[i] for i in one.region.made_for_backward))
    ctx.set_materialize_grads(False)


def _gradients(ctx, gradients):
    result: list = [None] * ctx.tensors
    no_numbers = None if ctx.numbers else []  # torch takes an empty list for one of tensors
    if gradients[0] is None:
        return result, no_numbers, None
    saved, one = ctx.saved_tensors, _calls[ctx.call]
    found = torch.ops.unsloth_ext.layer_backward(
        list(saved[: ctx.given]), list(saved[ctx.given :]), gradients[0], ctx.numbers, ctx.call
    )
    for input, gradient in zip(one.region.inputs_with_gradient, found, strict=True):
        place = one.places[input]
        result[place] = gradient if result[place] is None else result[place] + gradient
    return result, no_numbers, None


_library.impl("layer_forward", _forward, "CompositeExplicitAutograd")
_library.impl("layer_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("unsloth_ext::layer_forward", _forward_fake, lib=_library)
torch.library.register_fake("unsloth_ext::layer_backward", _backward_fake, lib=_library)
torch.library.register_autograd("unsloth_ext::layer_forward", _gradients, setup_context=_setup_context, lib=_library)


class SharedLayers:
    """The layers of one model, as operators of whatever graph they are in.

    plain: {class of layers: its own forward}. compile_alone(function, name, backend) -> (compiled, its code object), as compile_model does.
    checkpointed(): whether the model computes layers again in the backward.
    """

    def __init__(self, layers, plain: dict[type, Callable], options, dynamic, compile_alone, checkpointed):
        self._layers, self._plain, self._checkpointed = list(layers), plain, checkpointed
        self._backends = {kind: RegionBackend(options, dynamic) for kind in plain}
        self._compiled = {kind: compile_alone(own, kind.__name__, self._backends[kind]) for kind, own in plain.items()}
        self.given_up: str | None = None  # why
        self._changes = 0
        self._chains: dict[torch.nn.Module, list] = {}  # what each layer's forward goes on with where it is traced
        for layer in self._layers:
            self._chains[layer] = following = [unknown]
            layer.__dict__["forward"] = types.MethodType(entry(self._plain[type(layer)], following), layer)
        self.forget()

    @property
    def count(self) -> int:
        """Layers that are operators."""
        return len({call.layer for call in self._calls})

    def forget(self) -> None:
        """As at the beginning: no form is known."""
        self._calls: list[_Call] = []
        self._forms: list[Form] = []
        self._names: dict[tuple[type, int], dict] = {}  # by class and form
        self._ends = dict(self._chains)  # the end of each layer's chain of forms
        for following in self._chains.values():
            following[0] = unknown

    def step(self, run: Callable[[], Any]) -> Any:
        """run(), a call of the compiled step, once the forms of its layers are known. Where they cannot be operators it is run without."""
        while self.given_up is None:
            asked.form = None
            for call in self._calls:
                call.used = False
            try:
                result = run()
                if self._holds():
                    return result
                del result
                self._changes += 1
                if self._changes > _MOST_CHANGES:
                    self._give_up("what the layers are compiled for changes again and again")
                else:
                    self.forget()
            except CompileError as error:
                form, asked.form = asked.form, None
                if form is None and not self._calls:
                    raise
                try:
                    if form is None:
                        raise error
                    self._learn(form)
                except (Unsuitable, CompileError) as reason:
                    # What no graph can hold at all is an error again without operators, and then the one to read.
                    self._give_up(str(reason).partition("\n")[0])
        return run()

    def _give_up(self, reason: str) -> None:
        self.given_up = reason
        logger.warning("compile_model compiles each layer by itself, which takes longer: %s", reason)
        self.forget()
        for layer, following in self._chains.items():
            following[0] = self._plain[type(layer)]

    def _learn(self, form: Form | Unsuitable) -> None:
        if isinstance(form, Unsuitable):
            raise form
        if form in self._forms:
            raise Unsuitable("a layer was compiled for a call that then was not found to be such a call")
        if len(self._forms) == _MOST_FORMS:
            raise Unsuitable(f"the layers are called in more than {_MOST_FORMS} forms")
        for layer in self._layers:
            self._compile(layer, form)
        self._forms.append(form)

    def _compile(self, layer: torch.nn.Module, form: Form) -> None:
        kind = type(layer)
        run, code = self._compiled[kind]
        given = {leaf: leaf.stand_in() for leaf in leaves_of((form.args, form.kwargs))}
        stand_in = functools.partial(_stand_in, given)
        # Of the function itself: Dynamo's names are those of its code, also where it says that it wraps another.
        signature = inspect.signature(self._plain[kind], follow_wrapped=False)
        bound = signature.bind(layer, *form.args, **dict(form.kwargs))
        bound.apply_defaults()
        words = [found for name, value in bound.arguments.items() for found in words_of(f"L[{name!r}]", value)]
        args, kwargs = map_leaves(stand_in, (form.args, dict(form.kwargs)))
        with form_state(form), self._backends[kind].listening([word for word, _ in words]) as heard:
            result = run(layer, *args, **kwargs)
            if len(heard) != 1:
                raise Unsuitable(f"{kind.__name__} is {len(heard)} graphs")
            region, flat = heard[0]
            if region.random and self._checkpointed():
                raise Unsuitable("dropout in a layer that is computed again in the backward must be the same there")
            names = {**bound.arguments, **_closed_over(self._plain[kind])}
            guards = _guards(code, map_leaves(stand_in, names))
        arguments = list(given.values())
        own = [x for x in flat if isinstance(x, torch.Tensor) and not any(same_tensor(x, t) for t in arguments)]
        if (paths := find_tensors(layer, own)) is None:
            raise Unsuitable(f"{kind.__name__} uses tensors that are not its own")
        tensors, texts = arguments + own, [None] * len(arguments) + [f"self{path}" for path in paths]
        places = [
            next(i for i, t in enumerate(tensors) if same_tensor(x, t)) for x in flat if isinstance(x, torch.Tensor)
        ]
        names = self._names.setdefault((kind, id(form)), {name: x for name, x in names.items() if x is not layer})
        if any(word not in dict(words) for word in region.words):
            raise Unsuitable(f"{kind.__name__} is called with numbers of other names")
        numbers = [dict(words)[word].index for word in region.words]
        call = _Call(weakref.ref(layer), region, places, numbers, guards, next(iter(bound.arguments)), names, form)
        self._calls.append(call)
        following = [unknown]
        self._ends[layer][0] = as_operator(region, places, call.number, form, texts, dict(words), result, following)
        self._ends[layer] = following

    def _holds(self) -> bool:
        """Whether all that the layers' graphs took for granted of the model is still so."""
        for form in self._forms:
            calls = [call for call in self._calls if call.used and call.form is form]
            given = {leaf: leaf.stand_in() for leaf in leaves_of((form.args, form.kwargs))} if calls else {}
            names: dict[int, dict] = {}  # of each kind of layer
            stand_in = functools.partial(_stand_in, given)
            with form_state(form):
                for call in calls:
                    layer = call.layer()
                    mine = names.get(id(call.names)) or map_leaves(stand_in, call.names)
                    names[id(call.names)] = mine
                    mine[call.self_name] = layer
                    mine |= _closed_over(self._plain[type(layer)]) if layer is not None else {}
                    if layer is None or not call.guards.check(mine):
                        return False
        return True


def _stand_in(given: dict[Leaf, torch.Tensor], one: Leaf | Number):
    return one.value if isinstance(one, Number) else given[one]


def _closed_over(function) -> dict[str, Any]:
    return dict(zip(function.__code__.co_freevars, (c.cell_contents for c in function.__closure__ or ()), strict=True))


def _guards(code, names):
    for compiled in torch._dynamo.eval_frame._debug_get_cache_entry_list(code):
        if compiled.guard_manager.check(names):
            return compiled.guard_manager
    raise Unsuitable("the guards of a layer's graph cannot be asked")
