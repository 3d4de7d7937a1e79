"""The decoder layers of a model under a memory budget: their forwards are wrapped, and each layer obeys its `Level`.

Three kinds of modules get an instance `forward`: the layer, its MLP (whose insides are the widest tensors) and its norms, where
the layer calls them as modules. The wrapped code is whatever stood there: Unsloth's fused forward, a block that Unsloth compiles,
transformers' own. Inside a graph (`torch.compile`) there are no hooks; there the same levels are expressed by activation
checkpointing of the MLP or of the layer, which the compiler's partitioner turns into recomputation of what is needed and no
more. Around a block that is compiled by itself the hooks see what its graph saves; how that is computed again is found from the
block's uncompiled forward (retrace.py). Offloading belongs to the world outside the graph: inside a graph of the whole step
there is none.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import time
import types
import weakref

import torch

from . import recompute
from .recompute import LEVELS, Frame, Level, Stop, Value
from .recompute_recipes import (
    Products,
    Script,
    copy_recipe,
    examine,
    norm_functions,
    norm_recipe,
    norms_of,
    trained,
    view,
    whole,
)
from .retrace import Outline, Part, Retrace, look, mlp_input, uncompiled

_SEAT = "_unsloth_ext_memory"
_SEARCHES = 3  # for each kind of layer
FEW_ROWS = 256  # up to as many, a kernel is chosen by the count (nf4/matmul_table.py), and with it the order of a sum


class UnsupportedModel(ValueError):
    """The model has no decoder layers that a memory budget could be applied to. Nothing was changed."""


def decoder_layers(model: torch.nn.Module) -> tuple[str, list[torch.nn.Module]]:
    """(path, layers) of the text decoder: the ModuleList with the most parameters whose members all hold an attention.

    Raises UnsupportedModel if there is none.
    """
    best, most = None, -1
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.ModuleList) or not len(module):
            continue
        if not all(any("attn" in n or "attention" in n for n, _ in layer.named_children()) for layer in module):
            continue
        size = sum(p.numel() for p in module.parameters())
        if size > most:
            best, most = (name, list(module)), size
    if best is None:
        raise UnsupportedModel(
            f"{type(model).__name__} has no list of decoder layers with an attention in each, so there is nothing to plan"
        )
    return best


class LayerState:
    """One decoder layer under a keeper (`memory_controller.MemoryBudget`)."""

    def __init__(self, keeper, index: int, path: str, layer: torch.nn.Module):
        self.keeper, self.index, self.path = keeper, index, path
        self.level: Level = LEVELS["keep"]
        mlp = getattr(layer, "mlp", None)
        self.mlp = mlp if all(hasattr(mlp, f"{name}_proj") for name in ("gate", "up", "down")) else None
        self.looked = 0  # how often its saved tensors were examined
        self.outside = (
            False  # whether the layer runs under `MemoryBudget.run`: a graph inside it then has no levels of its own
        )
        self.intermediate = getattr(getattr(self.mlp, "gate_proj", None), "out_features", 0)

    @contextlib.contextmanager
    def at(self, level: Level):
        """A run of the layer, now or again in the backward, when the layer may stand at another level for the next batch."""
        before, self.level = self.level, level
        try:
            yield
        finally:
            self.level = before


class Seat:
    """What stands behind the forward of one wrapped module. In a copy of the module (copy.deepcopy, pickle) it has no state."""

    def __init__(self, state: LayerState | None, role: str, before):
        self.state, self.role, self.before = state, role, before

    def call(self, module, *args, **kwargs):
        """What stood in the wrapper's place; looked up each time, so that a class patched later counts."""
        if self.before is not None:
            return self.before(*args, **kwargs)
        return type(module).forward(module, *args, **kwargs)

    def __deepcopy__(self, memo):
        return Seat(None, self.role, copy.deepcopy(self.before, memo))

    def __reduce__(self):
        return Seat, (None, self.role, self.before)


def state_of(module: torch.nn.Module) -> LayerState | None:
    seat = module.__dict__.get(_SEAT)
    return None if seat is None else seat.state


def stack_of(model: torch.nn.Module) -> torch.nn.Module:
    """The module that calls the decoder layers."""
    return model.get_submodule(decoder_layers(model)[0].rpartition(".")[0])


def install(keeper, model: torch.nn.Module) -> list[LayerState]:
    """Wrap the forwards. Raises UnsupportedModel, or ValueError if a budget is installed already."""
    path, layers = decoder_layers(model)
    for index, layer in enumerate(layers):
        if state_of(layer) is not None:
            raise ValueError(f"{path}.{index} is under a memory budget already: call its remove() first")
    for name, module in model.named_modules():
        seat = module.__dict__.get(_SEAT)
        # A copy of a model under a budget still has our forwards: wrapped once more, they would call themselves.
        if seat is not None and seat.state is None and not _take_off(module, seat):
            raise ValueError(
                f"the forward of {name} was replaced under a memory budget that is gone, by {module.forward!r}: undo that first"
            )
    states = []
    for index, layer in enumerate(layers):
        state = LayerState(keeper, index, f"{path}.{index}", layer)
        wrapped = [("layer", layer, forward)] + [(name, norm, norm_forward) for name, norm in norms_of(layer).items()]
        if state.mlp is not None:
            wrapped.append(("mlp", state.mlp, mlp_forward))
        for role, module, function in wrapped:
            module.__dict__[_SEAT] = Seat(state, role, module.__dict__.get("forward"))
            module.__dict__["forward"] = types.MethodType(function, module)
        states.append(state)
    stack_of(model).__dict__[_SEAT] = Seat(states[0], "stack", None)
    return states


def uninstall(model: torch.nn.Module) -> None:
    """Give every module its forward back. Where somebody has replaced ours since, ours stays below and only passes on."""
    for module in model.modules():
        seat = module.__dict__.get(_SEAT)
        if seat is not None and not _take_off(module, seat):
            seat.state = None


def _take_off(module: torch.nn.Module, seat: Seat) -> bool:
    """False, with nothing changed, where the module's forward is not ours any more: then it may still call ours."""
    if seat.role != "stack":
        if getattr(module.__dict__.get("forward"), "__func__", None) not in (forward, mlp_forward, norm_forward):
            return False
        del module.__dict__["forward"]
        if seat.before is not None:
            module.__dict__["forward"] = seat.before
    del module.__dict__[_SEAT]
    return True


# -- the wrapped forwards ----------------------------------------------------------------------------------------------------


def forward(self, *args, **kwargs):
    seat = self.__dict__[_SEAT]
    state = seat.state
    if state is None or not self.training or not torch.is_grad_enabled():
        return seat.call(self, *args, **kwargs)
    if torch.compiler.is_compiling():
        return _in_graph(seat, self, args, kwargs) if state.level.layer else seat.call(self, *args, **kwargs)
    if not _without_cache(kwargs, state.index):
        return seat.call(self, *args, **kwargs)
    return state.keeper.run(state, self, functools.partial(seat.call, self), args, kwargs)


def _without_cache(kwargs: dict, index: int) -> bool:
    """Take an empty key-value cache out of a training call, as transformers' own checkpointing does: running the layer again
    would append to it. False if there is something in it (a learned prefix): such a layer is left alone."""
    for name in ("past_key_values", "past_key_value", "layer_past"):
        cache = kwargs.get(name)
        if cache is None:
            continue
        if not hasattr(cache, "get_seq_length") or cache.get_seq_length(index):
            return False
        kwargs[name] = None
    return True


def mlp_forward(self, *args, **kwargs):
    seat = self.__dict__[_SEAT]
    state = seat.state
    if state is None or not torch.is_grad_enabled() or not args:
        return seat.call(self, *args, **kwargs)
    if torch.compiler.is_compiling():
        checkpointed = not state.outside and self.training and state.level.mlp_in_graph
        return _in_graph(seat, self, args, kwargs) if checkpointed else seat.call(self, *args, **kwargs)
    again = recompute.replaying()
    if again is not None and again.where == state.path:
        if isinstance(again, Retrace):
            again.at_mlp(args[0])
        return _mlp_replayed(again, seat, self, args, kwargs)
    frame = recompute.current()
    if frame is None or frame.where != state.path or not state.level.inside_mlp:
        return seat.call(self, *args, **kwargs)
    rest = args[1:]
    own = Frame(f"{state.path}.mlp", args[0], lambda tensor: seat.call(self, tensor, *rest, **kwargs), owner=frame)
    frame.mlp = own
    with own.recording():
        return seat.call(self, *args, **kwargs)


def _mlp_replayed(frame: Frame, seat: Seat, mlp, args, kwargs):
    """The layer runs again. Its MLP's insides have recipes of their own: what they need is the MLP's input."""
    value = frame.mlp_input()
    if value is not None and value.storage is None and value.restored is None:
        value.restored = args[0].untyped_storage()
    if frame.seen_all:
        raise Stop
    with torch.no_grad():
        out = seat.call(mlp, *args, **kwargs)
    return out.requires_grad_()


def norm_forward(self, *args, **kwargs):
    seat = self.__dict__[_SEAT]
    state = seat.state
    if state is None or torch.compiler.is_compiling() or not torch.is_grad_enabled() or len(args) != 1 or kwargs:
        return seat.call(self, *args, **kwargs)
    frame = recompute.current()
    if frame is None or frame.where != state.path or not state.level.norms:
        return seat.call(self, *args, **kwargs)
    own = Frame(f"{state.path}.{seat.role}", args[0], functools.partial(seat.call, self), owner=frame, rng=False)
    frame.norms.append(own)
    with own.recording():
        out = seat.call(self, *args)
    frame.adopt(out)  # held until the layer ends: a freed address would come back under another tensor
    frame.outputs[recompute.address(out)] = (self, own.input)
    return out


def _in_graph(seat: Seat, module, args, kwargs):
    """Activation checkpointing inside a graph. The operator itself: torch.utils.checkpoint may be replaced by somebody's own."""
    from torch._higher_order_ops.wrap import tag_activation_checkpoint

    def run(*args, **kwargs):
        return seat.call(module, *args, **kwargs)

    return tag_activation_checkpoint(run, *args, use_reentrant=False, **kwargs)


mlp_forward.__name__ = norm_forward.__name__ = "forward"  # a pickled method is looked up on its module by this name


# -- one layer's run ---------------------------------------------------------------------------------------------------------

_HERE = object()  # stands for the hidden states in the arguments that a replay holds


def hidden_states(args, kwargs) -> torch.Tensor:
    return args[0] if args else kwargs["hidden_states"]


def run_layer(state: LayerState, layer, inner, args, kwargs, level: Level, scripts: dict):
    """(output, frame or None) of the layer's own forward at `level`. The frame is open: `settle` decides."""
    if level.name == "keep":
        with state.at(level):
            return inner(*args, **kwargs), None
    x = hidden_states(args, kwargs)
    outside = set()
    rest = [_HERE if a is x else a for a in args]
    others = {k: _HERE if a is x else a for k, a in kwargs.items()}
    _addresses((rest, others), outside)

    def run(tensor, function=inner):
        with state.at(level):
            return function(
                *(tensor if a is _HERE else a for a in rest),
                **{k: tensor if a is _HERE else a for k, a in others.items()},
            )

    frame = Frame(state.path, x, run, outside)
    with state.at(level), recompute.inside(frame), frame.recording():
        return inner(*args, **kwargs), frame


def _addresses(tree, found: set) -> None:
    if isinstance(tree, torch.Tensor):
        if tree.layout == torch.strided and tree.device.type != "meta":
            found.add(recompute.address(tree))
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            _addresses(item, found)
    elif isinstance(tree, dict):
        for item in tree.values():
            _addresses(item, found)


def settle(state: LayerState, layer, frame: Frame, level: Level, scripts: dict, send) -> list[weakref.ref]:
    """Decide about every storage of a finished run, and close its frames.

    `send(value, late)` offloads; late: it is wanted back only after gate and up have been computed. Returns the values of gate
    and up that will be computed.
    """
    mlp = frame.mlp
    inside = level.inside_mlp or level.layer
    plain = uncompiled(layer) if inside and mlp is None and state.mlp is not None else None  # the layer ran compiled
    script = Script()
    if level.norms or inside:
        # Of this layer: in another one two norms that are equal here need not be.
        rows, inner = frame.batch * frame.sequence, None if mlp is None else mlp.signature
        key = (state.index, level.norms, plain is None, frame.signature, inner, min(rows, FEW_ROWS + 1))
        script = scripts.get(key)
        if script is None or (not script.final and script.adapters != trained(state.mlp)):
            script = scripts[key] = _examined(state, layer, frame, plain, key)
    norms = norm_functions(layer) if script.norm or script.norms else {}
    recipes: dict[Value, object] = {}
    residual = {frame.input.value}
    for address, (norm, source) in frame.outputs.items():
        if address in frame.values:
            recipes[frame.values[address]] = norm_recipe(norm, source, frame.surroundings)
            residual.add(source.value)
    for index, (name, source) in script.norms.items():
        if (handle := whole(frame, index)) is not None:
            recipes.setdefault(handle.value, _norm(frame, norms[name], source))
            residual.add(_source(frame, source).value)
    if script.norm is not None:
        residual.add(_source(frame, script.norm[1]).value)
    for index, source in script.copies.items() if level.norms else ():
        recipes.setdefault(
            whole(frame, index).value, copy_recipe(view(frame, source), frame.sequence, frame.surroundings)
        )
    products: dict[Value, str] = {}
    part = mlp
    if mlp is not None:
        at = mlp.input.value
        if level.layer:
            frame.mlp_input = weakref.ref(at)
            recipes[at] = _from_replay(frame, weakref.ref(at))
        elif script.norm is not None:
            recipes.setdefault(at, _norm(frame, norms[script.norm[0]], script.norm[1]))
    elif plain is not None and script.products is not None and (script.outline is not None or not level.layer):
        part = Part(frame, mlp_input(layer, frame, script), state.intermediate)
        if level.layer:
            frame.outline = Outline(frame, script, plain)
    if part is not None:
        products = {part.events[i][0](): name for i, name in (script.products or {}).items()}
    wide = {v for v in mlp.values.values() if v is not mlp.input.value} if mlp is not None else set()
    wide |= _wide(frame, state.intermediate)
    if not products and level.gate != level.up and (mlp is None or "recompute" not in (level.gate, level.up)):
        # Not known which is which: the one half and the other.
        halves = [v for v in dict.fromkeys(_values(mlp or frame)) if v in wide]
        products = {v: ("gate", "up")[i % 2] for i, v in enumerate(halves)}
    make = Products(state.mlp, part, script) if script.products and part is not None else None
    computed = []
    for norm in frame.norms:
        for value in norm.values.values():
            if value is not norm.input.value:
                value.storage = None
    outlined = set() if frame.outline is None else {ref() for ref in frame.outline.values()}
    for value in {**dict.fromkeys(frame.values.values()), **dict.fromkeys(wide)}:
        if value.storage is None:
            continue
        if value in wide:
            name = products.get(value)
            if name is None and make is not None:
                continue  # x A^T and the like
            what = level.of(name) if name else level.gate if level.gate == level.up else "recompute"
            if what == "recompute" and make is not None:
                value.name, value.storage, value.recipe = name, None, functools.partial(make, name)
                computed.append(weakref.ref(value))
            elif what == "recompute" and (mlp is not None and value.frame is mlp or level.layer):
                value.storage = None  # replayed: `Value.get` asks its frame
            elif what == "offload":
                send(value, False)
        elif level.layer and frame.outline is not None:
            if value in outlined:
                value.storage = None
            elif value is frame.input.value and level.residual == "offload":
                send(value, False)
        elif value in recipes and (level.norms or level.layer):
            value.storage, value.recipe = None, recipes[value]
        elif level.layer and value is not frame.input.value:
            value.storage = None
        elif (level.residual if value in residual else level.attention) == "offload":
            send(value, level.late and make is not None and value not in residual)
    for one in (frame, mlp, *frame.norms):
        if one is not None:
            one.close()
    return computed


def _examined(state: LayerState, layer, frame: Frame, plain, key: tuple) -> Script:
    """The search, in the first layer of a kind; in its other layers what it found is computed once and compared."""
    state.looked += 1
    keeper, start = state.keeper, time.perf_counter()
    kind = (type(layer), key[1:], trained(state.mlp))
    try:
        pattern, searches = keeper.patterns.get(kind, (None, 0))
        for known in (pattern, None) if pattern is not None else (None,):
            script = examine(layer, frame, state.mlp, frame.mlp, known)
            if plain is not None:
                look(script, layer, frame, state.mlp, state.intermediate, plain, known)
            if known is None:
                keeper.searches += 1
                keeper.patterns[kind] = pattern or script, searches + 1
            # What is not confirmed is replayed or kept: more searches than these are not worth their time.
            if known is None or searches >= _SEARCHES or script.says_as_much_as(known):
                break
        keeper.looking += time.perf_counter() - start
        return script
    except torch.OutOfMemoryError as error:  # what is not known is replayed or kept; the next batch may leave more room
        return Script(final=False, why=f"out of memory: {str(error)[:200]}")
    except Exception as error:  # a layer of another make: a norm of another width, or one that takes more than a tensor
        return Script(why=f"not examined: {type(error).__name__}: {str(error)[:200]}")


def _values(part):
    return (value for ref, _, _ in part.events if ref is not None and (value := ref()) is not None)


def _source(frame: Frame, source: int | None):
    return frame.input if source is None else whole(frame, source)


def _norm(frame: Frame, norm, source: int | None):
    return norm_recipe(norm, _source(frame, source), frame.surroundings)


def _from_replay(frame: Frame, ref):
    def recipe():
        value = ref()
        frame.replay()
        return value.restored

    return recipe


def _wide(frame: Frame, intermediate: int) -> set[Value]:
    found = {ref() for ref, _, shape in frame.events if ref is not None and shape and shape[-1] == intermediate}
    return found - {frame.input.value, None}
