"""Sizes in a layer's graphs as functions of what the layer is called with, and as conditions on it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch

__all__ = ["Given", "Symbols", "Template", "Unsuitable"]


class Unsuitable(Exception):
    """Why these layers cannot be operators."""


class Given:
    """What the two graphs of a layer know beside their tensors. words: of numbers that could be asked for."""

    def __init__(self, words: frozenset[str]):
        self.words = words
        self.numbers: list[str] = []  # words that are
        self.symbols: dict = {}  # symbol -> its number in `numbers`
        self.constants: dict = {}  # symbol -> (its value, an expression for it), of the layer


class Symbols:
    """Sizes of a graph as functions of its tensors' and of numbers. values: fake tensors."""

    def __init__(self, values, given: Given):
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

    def template(self, value) -> Template:
        n = value.ndim
        return Template(self.function([*value.shape, *value.stride()]), n, value.dtype, value.device)

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
                if any("unknown_tensor" in word for word in words):  # of a tensor that torch made for itself
                    words = ["the random state of a dropout that is computed again"]
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
class Template:
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
