"""More behaviour for one tokenizer or processor object, by a subclass of its own class that is made for it.

A class and not attributes of the object: `copy.copy` then binds the copy and not the original, transformers' saving does not see
it, and what the object is (`isinstance`, the class's name in tokenizer_config.json) stays. Several extensions lie on one object
side by side, and each can be taken off by itself.
"""

from __future__ import annotations

from functools import cache


class Extension:
    """A base for extensions, which come before the object's own class. They hold no state of their own."""

    def __reduce_ex__(self, protocol):
        # The class is made at run time, so a pickle cannot name it: it names the object's own class and the extensions.
        construct, (_, *arguments), *rest = super().__reduce_ex__(2)
        return _make, (construct, *type(self)._parts, *arguments), *rest


def extend(thing, extension: type):
    """Put the extension on the object, which is changed in place and given back. Twice is as once."""
    if not isinstance(thing, extension):
        own, extensions = _parts_of(thing)
        thing.__class__ = _extended_class(own, tuple(sorted((*extensions, extension), key=lambda one: one.__name__)))
    return thing


def take_off(thing, extension: type):
    """Take the extension off again; gives the object. Nothing happens to one that does not have it."""
    if isinstance(thing, extension):
        own, extensions = _parts_of(thing)
        thing.__class__ = _extended_class(own, tuple(one for one in extensions if one is not extension))
    return thing


def _parts_of(thing) -> tuple[type, tuple[type, ...]]:
    return type(thing)._parts if isinstance(thing, Extension) else (type(thing), ())


def _make(construct, own, extensions, *arguments):
    return construct(_extended_class(own, extensions), *arguments)


@cache
def _extended_class(own: type, extensions: tuple[type, ...]) -> type:
    if not extensions:
        return own
    # The same name, since save_pretrained writes it down.
    names = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
    return type(own.__name__, (*extensions, own), {**names, "_parts": (own, extensions)})
