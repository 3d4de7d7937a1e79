"""One compiled layer: what its forward and backward graphs take, give and keep, read where AOTAutograd hands them to Inductor.

AOTAutograd's own call of the two graphs is an autograd function that cannot be in another graph. Here they are two functions of plain
tensors, for operators. Saved values are known by name: a value of the forward graph has the name of the backward graph's input.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

__all__ = ["Leaf", "Region", "RegionBackend", "Unsuitable"]


class Unsuitable(Exception):
    """Why these layers cannot be operators."""


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
        given = _Given(frozenset(words))
        self.words = given.numbers  # of the calls' numbers, those that the graphs want
        symbols = _Symbols([value for _, value in self._inputs if isinstance(value, torch.Tensor)], given)
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
        symbols = _Symbols(tensors, given)
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


class _Given:
    """What the two graphs of a layer know beside their tensors. words: of numbers that could be asked for."""

    def __init__(self, words: frozenset[str]):
        self.words = words
        self.numbers: list[str] = []  # words that are
        self.symbols: dict = {}  # symbol -> its number in `numbers`
        self.constants: dict = {}  # symbol -> (its value, an expression for it), of the layer


class _Symbols:
    """Sizes of a graph as functions of its tensors' and of numbers. values: fake tensors."""

    def __init__(self, values, given: _Given):
        self._tensors, self.places = values, {}  # symbol -> (tensor, dimension)
        self.given = given
        self.shape_env = None
        for number, value in enumerate(values):
            for dimension, size in enumerate(value.shape):
                if isinstance(size, torch.SymInt):
                    self.shape_env = size.node.shape_env
                    if (expression := size.node.expr).is_Symbol:
                        self.places.setdefault(expression, (number, dimension))
        self._order = list(self.places)
        self._where = list(self.places.values())

    def values(self, tensors, numbers) -> list:
        return [*(tensors[number].shape[dimension] for number, dimension in self._where), *numbers]

    def function(self, expressions) -> Callable:
        """f(values) -> [sizes]. Raises Unsuitable for sizes of which nothing tells."""
        names = {symbol: f"v[{i}]" for i, symbol in enumerate(self._order)}
        texts = [self._text(x, names, lambda number: f"v[{len(names) + number}]") for x in expressions]
        return eval(f"lambda v: [{', '.join(texts)}]", {"sym_max": torch.sym_max, "sym_min": torch.sym_min})

    def template(self, value) -> _Template:
        n = value.ndim
        return _Template(self.function([*value.shape, *value.stride()]), n, value.dtype, value.device)

    def _text(self, size, names, of_number: Callable[[int], str]) -> str:
        if isinstance(size, int):
            return str(size)
        expression = size.node.expr if isinstance(size, torch.SymInt) else size
        if self.shape_env is None and isinstance(size, torch.SymInt):
            self.shape_env = size.node.shape_env
        others = {x: self._other(x, of_number) for x in expression.free_symbols - names.keys()}
        return _print(expression, names | others)

    def _other(self, symbol, of_number: Callable[[int], str]) -> str:
        """A number that calls bring along; or the value of one that the graph read from the layer, as a count of heads: a symbol too, as
        the layer is an argument of its graph."""
        given = self.given
        if symbol not in given.constants and symbol not in given.symbols:
            sources = self.shape_env.var_to_sources.get(symbol, ())
            values = getattr(self.shape_env, "backed_var_to_val", None) or self.shape_env.var_to_val
            words = [source.name if isinstance(source.name, str) else source.name() for source in sources]
            own = [_plain_words(text) for text in words if "L['self']" in text]
            brought = [word for word in words if word in given.words]
            if brought:
                if brought[0] not in given.numbers:
                    given.numbers.append(brought[0])
                given.symbols[symbol] = given.numbers.index(brought[0])
            elif own and symbol in values:
                given.constants[symbol] = int(values[symbol]), own[0]
            else:
                raise Unsuitable(f"a layer's graph depends on {' or '.join(words) or symbol}")
        return of_number(given.symbols[symbol]) if symbol in given.symbols else str(given.constants[symbol][0])

    def conditions(self, tensors: list[str], numbers: dict[str, str]) -> list[str]:
        def of_number(number: int) -> str:
            return numbers[self.given.numbers[number]]

        names = {symbol: f"{tensors[number]}.shape[{dimension}]" for symbol, (number, dimension) in self.places.items()}
        found = []
        for text, value in zip(tensors, self._tensors, strict=True):
            if text.startswith("self"):
                continue  # the layer's own: guards look at them
            for dimension, size in enumerate(value.shape):
                wanted = self._text(size, names, of_number)
                if wanted != f"{text}.shape[{dimension}]":
                    found.append(f"{text}.shape[{dimension}] == {wanted}")
            for dimension, stride in enumerate(value.stride()):
                found.append(f"{text}.stride({dimension}) == {self._text(stride, names, of_number)}")
        if self.shape_env is not None:
            ranges = self.shape_env.var_to_range
            brought = {symbol: of_number(number) for symbol, number in self.given.symbols.items()}
            for symbol, name in (names | brought).items():
                if symbol in ranges and (least := ranges[symbol].lower) > 0:
                    found.append(f"{name} >= {int(least)}")
                if symbol in ranges and (most := ranges[symbol].upper) < 2**31:
                    found.append(f"{name} <= {int(most)}")
            for guard in self.shape_env.guards:
                expression = self.shape_env.replace(guard.expr)
                if expression in (True, False):
                    continue
                found.append(self._text(expression, names, of_number))
        found += [f"{text} == {value}" for value, text in self.given.constants.values()]
        return list(dict.fromkeys(found))


@dataclass
class _Template:
    """A tensor without contents: sizes and strides from a graph's symbols."""

    function: Callable
    ndim: int
    dtype: torch.dtype
    device: torch.device

    def __call__(self, sizes) -> torch.Tensor:
        numbers = self.function(sizes)
        return torch.empty_strided(numbers[: self.ndim], numbers[self.ndim :], dtype=self.dtype, device=self.device)

    def laid_out(self, tensor: torch.Tensor, sizes) -> torch.Tensor:
        """`tensor`, with these strides."""
        if list(tensor.stride()) == self.function(sizes)[self.ndim :]:
            return tensor
        return self(sizes).copy_(tensor)


def _print(expression, names) -> str:
    from torch.utils._sympy.printers import PythonPrinter

    class Printer(PythonPrinter):
        def _print_Symbol(self, symbol):
            return names[symbol]

        def _print_Max(self, expression):
            return self._nested("sym_max", expression.args)

        def _print_Min(self, expression):
            return self._nested("sym_min", expression.args)

        def _nested(self, name, args):
            text = self._print(args[0])
            for other in args[1:]:
                text = f"{name}({text}, {self._print(other)})"
            return text

    return Printer().doprint(expression)


def _plain_words(source: str) -> str:
    """Dynamo's name of a number in a layer, as an expression after `self`."""
    while (found := re.search(r"object\.__getattribute__\(((?:[^()]|\([^()]*\))*), '(\w+)'\)", source)) is not None:
        source = source[: found.start()] + f"{found[1]}.{found[2]}" + source[found.end() :]
    return source.replace("L['self']", "self")


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
