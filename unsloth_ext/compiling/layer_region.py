"""One compiled layer: what its forward and backward graphs take, give and keep, read where AOTAutograd hands them to Inductor.

AOTAutograd's own call of the two graphs is an autograd function that cannot be in another graph. Here they are two functions of plain
tensors, for operators. Saved values are known by name: a value of the forward graph has the name of the backward graph's input.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from .layer_symbols import Given, Symbols, Unsuitable

__all__ = ["Leaf", "Region", "RegionBackend", "leaves_of", "map_leaves", "words_of"]


@dataclass(frozen=True)
class Leaf:
    """A tensor among a layer's arguments, without its contents. index: its place among them."""

    index: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool

    def stand_in(self) -> torch.Tensor:
        found = torch.empty_strided(self.sizes, self.strides, dtype=self.dtype, device=self.device)
        return found.requires_grad_(self.requires_grad)


@dataclass(frozen=True)
class Number:
    """A number among a layer's arguments that is another in each batch. index: its place among them. value: the first one's."""

    index: int
    value: int


class _Listening(threading.local):
    heard: list | None = None
    words: tuple = ()


class RegionBackend:
    """Of torch.compile: Inductor with a reader. While `listening`, compiled graphs are not run: they give tensors without contents."""

    def __init__(self, options: dict[str, Any], dynamic: bool | None):
        self.options = torch._TorchCompileInductorWrapper(None, options, dynamic).config
        self._listening = _Listening()

    @contextmanager
    def listening(self, words=()):
        """A list of (region, its inputs) of the calls within. words: Dynamo's names of the calls' numbers."""
        self._listening.heard = heard = []
        self._listening.words = words
        try:
            yield heard
        finally:
            self._listening.heard = None

    def __call__(self, graph, example_inputs):
        from torch._inductor import compile_fx

        region = Region()

        def inner_compile(graph, example_inputs, **kwargs):
            backward = kwargs.get("is_backward", False)
            (region.read_backward if backward else region.read_forward)(graph, example_inputs)
            compiled = compile_fx.compile_fx_inner(graph, example_inputs, **kwargs)
            if backward:
                region.backward = compiled
                return compiled
            region.forward = compiled

            def run(inputs):
                if self._listening.heard is None:
                    return compiled(inputs)
                self._listening.heard.append((region, list(inputs)))
                return region.without_contents(inputs, self._listening.words)

            run._boxed_call = True
            return run

        # A cached pair of graphs would come without being handed over, and so would a backward that is compiled later.
        with torch._functorch.config.patch(enable_autograd_cache=False, force_non_lazy_backward_lowering=True):
            return compile_fx.compile_fx(
                graph, example_inputs, inner_compile=inner_compile, config_patches=self.options
            )


class Region:
    """forward, backward: Inductor's. What is read of the graphs is turned into numbers by `finish`, when all symbols have settled."""

    def __init__(self):
        self.forward: Callable | None = None
        self.backward: Callable | None = None
        self.finished = False

    def read_forward(self, graph, example_inputs) -> None:
        self._inputs = _placeholders(graph)
        self._outputs = _outputs(graph)
        self._facts = torch._guards.TracingContext.get().fw_metadata
        self.random = any(map(_is_random, graph.graph.nodes))

    def read_backward(self, graph, example_inputs) -> None:
        # The inputs as Inductor has laid the forward's outputs out, which need not be as the graph has them.
        self._backward_inputs = [(name, x) for (name, _), x in zip(_placeholders(graph), example_inputs, strict=True)]
        self._gradients = _outputs(graph)

    def without_contents(self, inputs, words):
        """What the forward graph would return."""
        self.finish(words)
        # A number is an input of the graph where it is used; what sizes are made of without it does not matter here.
        sizes = self._symbols.values([x for x in inputs if isinstance(x, torch.Tensor)], [2] * len(self.words))
        found = []
        for kind, what in self._every_output:
            found.append(inputs[what] if kind == "input" else what(sizes)[0] if kind == "size" else what(sizes))
        return found

    def finish(self, words=()) -> None:
        """words: names of numbers that calls bring along. Raises Unsuitable."""
        if self.finished:
            return
        if self.forward is None:
            raise Unsuitable("Inductor was not asked for a layer's graph")
        facts = self._facts
        if facts is not None:  # None: no gradients were asked for
            kinds = {str(info.output_type) for info in facts.output_info}
            if facts.num_mutated_inp_runtime_indices or kinds != {"OutputType.non_alias"} or facts.tokens:
                raise Unsuitable(f"a layer's graph writes to its inputs or returns parts of them ({kinds})")
            if len(facts.output_info) != 1:  # one that it returns; what it puts into attributes is another
                raise Unsuitable(f"a layer's graph gives {len(facts.output_info)} tensors")
        given = Given(frozenset(words))
        self.words = given.numbers  # of the calls' numbers, those that the graphs want
        symbols = Symbols([value for _, value in self._inputs if isinstance(value, torch.Tensor)], given)
        self._symbols = symbols
        self.tensor_inputs = [i for i, (_, value) in enumerate(self._inputs) if isinstance(value, torch.Tensor)]
        self._input_sizes = {
            i: symbols.function([value])
            for i, (_, value) in enumerate(self._inputs)
            if not isinstance(value, torch.Tensor)
        }
        place = {name: i for i, (name, _) in enumerate(self._inputs)}
        laid_out = dict(self._backward_inputs) if self.backward is not None else {}
        self._every_output, self.made, made_at = [], [], {}
        for node in self._outputs:
            if not isinstance(node, torch.fx.Node):
                raise Unsuitable("a layer's graph returns what is no tensor")
            value = node.meta["val"]
            if node.name in place:
                self._every_output.append(("input", place[node.name]))
            elif isinstance(value, torch.Tensor):
                first = not self.made
                template = symbols.template(value if first else laid_out.get(node.name, value))
                made_at.setdefault(node.name, len(self.made))
                self.made.append((len(self._every_output), template))
                self._every_output.append(("made", template))
            else:
                self._every_output.append(("size", symbols.function([value])))
        if not self.made or self.made[0][0] != 0:
            raise Unsuitable("a layer's first output is no tensor of its own")
        self.inputs_for_backward: list[int] = []  # numbers of tensor inputs
        self.made_for_backward: list[int] = []  # of what `run` gives
        self.inputs_with_gradient: list[int] = []
        if self.backward is not None:
            self._finish_backward(place, made_at, given)
        elif len(self._outputs) != 1:
            raise Unsuitable("a layer gives more than one tensor")
        self.finished = True
        self._count = len(self._inputs)
        del self._inputs, self._outputs, self._facts  # with them go the graphs
        if self.backward is not None:
            del self._backward_inputs, self._gradients

    def _finish_backward(self, place, made_at, given) -> None:
        tensor_number = {i: n for n, i in enumerate(self.tensor_inputs)}
        tensors = [value for _, value in self._backward_inputs if isinstance(value, torch.Tensor)]
        symbols = Symbols(tensors, given)
        self._backward_symbols = symbols
        self._backward_order, tangents = [], 0
        for name, value in self._backward_inputs:
            if name in place and isinstance(value, torch.Tensor):
                self._backward_order.append(("input", len(self.inputs_for_backward)))
                self.inputs_for_backward.append(tensor_number[place[name]])
            elif not isinstance(value, torch.Tensor):
                self._backward_order.append(("size", symbols.function([value])))
            elif name.startswith("tangents"):
                tangents += 1
                self._backward_order.append(("gradient", symbols.template(value)))
            elif name in made_at:
                self._backward_order.append(("made", len(self.made_for_backward)))
                self.made_for_backward.append(made_at[name])
            else:
                raise Unsuitable(f"a layer's backward wants {name}, which its forward does not give")
        if tangents != 1:
            raise Unsuitable(f"a layer's backward wants {tangents} gradients")
        # Of the outputs, the first is the layer's; all others are there for the backward.
        if len(self._gradients) != len(self._inputs):
            raise Unsuitable("a layer's backward gives what is no gradient of an input")
        self._gradient_templates, self._gradient_places = [], []
        for i, node in enumerate(self._gradients):
            if isinstance(node, torch.fx.Node):
                self.inputs_with_gradient.append(tensor_number[i])
                self._gradient_places.append(i)
                self._gradient_templates.append(symbols.template(node.meta["val"]))

    # -- the operators' bodies -------------------------------------------------------------------------------------------------

    def run(self, tensors: list[torch.Tensor], numbers: list[int]) -> list[torch.Tensor]:
        """The layer's output, and what its backward will want of what the forward made. numbers: in the order of `words`."""
        found = self.forward(self._flat(tensors, numbers))
        return [found[i] for i, _ in self.made]

    def _flat(self, tensors, numbers):
        if not self._input_sizes:
            return list(tensors)
        sizes, rest = self._symbols.values(tensors, numbers), iter(tensors)
        return [self._input_sizes[i](sizes)[0] if i in self._input_sizes else next(rest) for i in range(self._count)]

    def shapes(self, tensors, numbers):
        """The same without contents, for a trace."""
        sizes = self._symbols.values(tensors, numbers)
        return [template(sizes) for _, template in self.made]

    def run_backward(self, inputs, made, gradient, numbers) -> list[torch.Tensor]:
        sizes, flat = self._sizes_in_backward(inputs, made, gradient, numbers), []
        for kind, what in self._backward_order:
            if kind == "input":
                flat.append(inputs[what])
            elif kind == "made":
                flat.append(made[what])
            elif kind == "size":
                flat.append(what(sizes)[0])
            else:
                flat.append(what.laid_out(gradient, sizes))
        found = self.backward(flat)
        return [found[i] for i in self._gradient_places]

    def shapes_backward(self, inputs, made, gradient, numbers):
        sizes = self._sizes_in_backward(inputs, made, gradient, numbers)
        return [template(sizes) for template in self._gradient_templates]

    def _sizes_in_backward(self, inputs, made, gradient, numbers):
        lists = {"input": inputs, "made": made}
        tensors = [
            lists[kind][what] if kind in lists else gradient for kind, what in self._backward_order if kind != "size"
        ]
        return self._backward_symbols.values(tensors, numbers)

    def conditions(self, tensors: list[str], numbers: dict[str, str]) -> list[str]:
        """What the graph took for granted of its inputs' sizes, as Python. tensors: expressions for its tensor inputs. numbers: for words."""
        return self._symbols.conditions(tensors, numbers)


def _is_random(node) -> bool:
    if "inductor_seed" in str(node.target):
        return True
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    for place, argument in enumerate(node.target._schema.arguments):
        if argument.name == "dropout_p":  # an attention
            given = node.args[place] if place < len(node.args) else node.kwargs.get("dropout_p", argument.default_value)
            return given != 0
    return True


def _placeholders(graph):
    return [(node.name, node.meta["val"]) for node in graph.graph.nodes if node.op == "placeholder"]


def _outputs(graph):
    return list(next(node for node in reversed(graph.graph.nodes) if node.op == "output").args[0])


def leaves_of(value) -> list[Leaf]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Leaf)]


def map_leaves(function: Callable, value):
    """function: of a `Leaf` or a `Number`."""
    return tree_map_only((Leaf, Number), function, value)


def words_of(name: str, value) -> list[tuple[str, Number]]:
    """Dynamo's names of the numbers in an argument."""
    if isinstance(value, Number):
        return [(name, value)]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, tuple | list) else ()
    return [found for key, item in items for found in words_of(f"{name}[{key!r}]", item)]
