"""A compiled layer's saved tensors without its graph: from the layer's own uncompiled forward, ended where its MLP begins.

A graph runs from end to end: to bring back what a compiled layer saved, all of it would run again, the down projection and the
sum after it included, whose results nobody needs. And what the MLP saves cannot be told from the graph. So the layer's uncompiled
forward is run once beside it, up to the MLP's input, and each tensor that the graph saved is looked for, bit for bit, among
those that the uncompiled run saves. Where all are found (gate and up among the MLP's products, see recompute_recipes.py), a
replay is that run: about three quarters of the graph's time. Where one is not, the graph is replayed.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable

import torch

from .as_traced import like_compiled
from .recompute import Frame, Saved, Stop, Value, again
from .recompute_recipes import Script, dense, find_products, lasting, norm_functions, norm_recipe, view, whole

MLP_INPUT = -1  # stands for the index of a saved tensor


def uncompiled(layer: torch.nn.Module) -> Callable:
    """The forward of the layer's class, from under Unsloth's compile of the class (models/_block_compile.py) or torch.compile."""
    forward = getattr(type(layer).forward, "_unsloth_block_original", type(layer).forward)
    return functools.partial(getattr(forward, "_torchdynamo_orig_callable", forward), layer)


class Retrace:
    """One uncompiled run. `take(index, tensor)` gets what it saves, in order, and the MLP's input as MLP_INPUT."""

    def __init__(self, where: str, take: Callable[[int, torch.Tensor], None]):
        self.where, self.take, self.count, self.arrived = where, take, 0, False

    def pack(self, tensor: torch.Tensor) -> None:
        self.take(self.count, tensor)
        self.count += 1

    def at_mlp(self, tensor: torch.Tensor) -> None:
        self.arrived = True
        self.take(MLP_INPUT, tensor)
        raise Stop

    def run(self, frame: Frame, tensor: torch.Tensor, plain: Callable) -> None:
        with again(self, frame.surroundings, self.pack), like_compiled():
            frame.run(tensor, plain)


class Part:
    """The MLP's part of a compiled layer's frame, as `Products` reads it: its input, and events that are as wide as it."""

    def __init__(self, frame: Frame, source: Saved, intermediate: int):
        self.input, self.surroundings = source, frame.surroundings
        self.events = [
            event if event[2] and event[2][-1] == intermediate else (None, event[1], ()) for event in frame.events
        ]


class Outline:
    """How to fill the values of a compiled layer's frame. wanted: index in the uncompiled run -> the views that it fills."""

    def __init__(self, frame: Frame, script: Script, plain: Callable):
        self.plain, self.wanted = plain, {}
        for event, (index, flat) in script.outline.items():
            saved = view(frame, event)
            self.wanted.setdefault(index, []).append((weakref.ref(saved.value), saved.shape, saved.stride, flat))

    def values(self):
        return (ref for views in self.wanted.values() for ref, *_ in views)

    def fill(self, frame: Frame, tensor: torch.Tensor) -> None:
        def take(index, made):
            for ref, shape, stride, flat in self.wanted.get(index, ()):
                value = ref()
                if value is not None and value.storage is None and value.restored is None:
                    value.restored = placed(made, shape, stride, value.nbytes, flat)

        run = Retrace(frame.where, take)
        run.run(frame, tensor, self.plain)
        if not run.arrived:
            raise RuntimeError(f"{frame.where} did not come to its MLP when it was run again")


def placed(made: torch.Tensor, shape, stride, nbytes: int, flat: bool) -> torch.UntypedStorage:
    """The storage of `made`, or of a copy in the layout that was saved. flat: as `match` found it."""
    made = made.detach()
    if flat:
        shape, stride, made = (made.numel(),), (1,), _in_memory(made)
    if made.stride() == stride and made.storage_offset() == 0 and made.untyped_storage().nbytes() == nbytes:
        return made.untyped_storage()
    return torch.empty_strided(shape, stride, dtype=made.dtype, device=made.device).copy_(made).untyped_storage()


def match(made: torch.Tensor, saved: torch.Tensor) -> bool | None:
    """Whether two tensors are equal: False where they are by index, True where they are in the order of memory alone (a graph may save
    what it read as rows and columns the other way round), None where they are not."""
    if made.dtype != saved.dtype or made.numel() != saved.numel():
        return None
    if made.shape == saved.shape and torch.equal(made, saved):
        return False
    made, saved = _in_memory(made), _in_memory(saved)
    return True if made is not None and saved is not None and torch.equal(made, saved) else None


def _in_memory(tensor: torch.Tensor) -> torch.Tensor | None:
    """Its elements as they lie in memory, or None where they are not all next to each other."""
    if not dense(tensor.shape, tensor.stride()):
        return None
    return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())


def mlp_input(layer: torch.nn.Module, frame: Frame, script: Script) -> Saved | None:
    """The MLP's input: what the graph saved, or a norm of something that it saved, computed when it is wanted."""
    if script.mlp_input is not None:  # contiguous in memory, whatever view of it was saved
        saved = view(frame, script.mlp_input)
        return Saved(saved.value, torch.empty(frame.input.shape, dtype=saved.dtype, device="meta"))
    if script.norm is None:
        return None
    name, event = script.norm
    source = frame.input if event is None else whole(frame, event)
    made = Value(frame, source.value.storage)  # of the same size
    made.storage, made.recipe = None, norm_recipe(norm_functions(layer)[name], source, frame.surroundings)
    return Saved(made, torch.empty(source.shape, dtype=source.dtype, device="meta"))


def _norm_of(layer: torch.nn.Module, frame: Frame, wanted: torch.Tensor) -> tuple[str, int | None] | None:
    handles = [(None, frame.input)] + [(i, h) for i in range(len(frame.events)) if (h := whole(frame, i)) is not None]
    fits = []
    for event, handle in handles:
        if handle.shape.numel() == wanted.numel() and handle.dtype == wanted.dtype:
            for name, norm in norm_functions(layer).items():
                if match(norm(handle.tensor().view(wanted.shape)), wanted) is not None:
                    fits.append((name, event, handle.value))
    return lasting(layer, fits)


def look(
    script: Script, layer, frame: Frame, mlp: torch.nn.Module, intermediate: int, plain: Callable, pattern=None
) -> None:
    """Fill script.products, .mlp_input and .outline for a compiled layer's open frame, as far as its tensors are found.

    pattern: what was found in another layer of the same kind; then only that is computed and compared."""
    if pattern is not None:
        _confirm(script, layer, frame, mlp, intermediate, plain, pattern)
        return
    seen = _uncompiled_run(script, frame, plain)
    outline, left, values = {}, [], {frame.input.value}
    with torch.no_grad():
        for event in range(len(frame.events)):
            saved = view(frame, event)
            if saved is None or saved.value in values or _wide(saved, intermediate):
                continue
            values.add(saved.value)
            tensor = saved.tensor()
            # From the back: the MLP's input first, which a norm may have saved too.
            found = ((i, match(seen[i], tensor)) for i in sorted(seen, key=lambda i: (i >= 0, -i)))
            index, flat = next((one for one in found if one[1] is not None), (None, None))
            if index is not None:
                outline[event] = index, flat
                if index == MLP_INPUT and seen[index].is_contiguous() and (flat or tensor.is_contiguous()):
                    script.mlp_input = event
            elif saved.value.nbytes > frame.input.value.nbytes // 8:  # less than that is kept
                left.append(f"{tuple(saved.shape)} {saved.dtype}")
        arrived = seen.get(MLP_INPUT)
        seen.clear()
        with frame.surroundings.again():
            if script.mlp_input is None and arrived is not None:
                script.norm = _norm_of(layer, frame, arrived)
            source = mlp_input(layer, frame, script)
            if source is not None:
                find_products(script, mlp, Part(frame, source, intermediate))
            else:
                script.why += "the MLP's input is not among what the graph saved, nor a norm of it; "
            # Where the two runs differ before it, still a norm of something other than the layer's input.
            for event in () if script.products else [i for i, (_, of) in script.norms.items() if of is not None]:
                find_products(script, mlp, Part(frame, whole(frame, event), intermediate))
                if script.products is not None:
                    script.mlp_input, script.norm = event, None
                    break
    if left:
        script.why += f"the uncompiled forward does not save {', '.join(left)}; "
    elif script.products is not None and outline:
        script.outline = outline


def _confirm(script: Script, layer, frame: Frame, mlp, intermediate: int, plain: Callable, pattern: Script) -> None:
    script.why, script.final = pattern.why, all(script.adapters or ())
    if pattern.products is None:
        return
    with torch.no_grad():
        if pattern.outline is not None:
            seen = _uncompiled_run(script, frame, plain)
            pairs = ((seen.get(index), view(frame, event), flat) for event, (index, flat) in pattern.outline.items())
            if all(
                made is not None and saved is not None and match(made, saved.tensor()) is flat
                for made, saved, flat in pairs
            ):
                script.outline = pattern.outline
            else:
                script.why += "the uncompiled forward saves other bits than in another layer of its kind; "
            seen.clear()
        script.mlp_input, script.norm = pattern.mlp_input, pattern.norm
        with frame.surroundings.again():
            find_products(script, mlp, Part(frame, mlp_input(layer, frame, script), intermediate), pattern)
    if script.products is None:
        script.outline = None


def _uncompiled_run(script: Script, frame: Frame, plain: Callable) -> dict[int, torch.Tensor]:
    """What it saved, by index; nothing where it does not come to the MLP."""
    seen: dict[int, torch.Tensor] = {}
    run = Retrace(frame.where, lambda index, tensor: seen.__setitem__(index, tensor.detach()))
    try:
        run.run(frame, frame.input.tensor().detach().requires_grad_(frame.requires_grad), plain)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a forward that only runs compiled
        script.why += f"uncompiled: {type(error).__name__}: {str(error)[:200]}; "
        return {}
    if not run.arrived:
        script.why += "the uncompiled forward does not call the MLP's; "
        return {}
    return seen


def _wide(saved: Saved, intermediate: int) -> bool:
    return bool(saved.shape) and saved.shape[-1] == intermediate
