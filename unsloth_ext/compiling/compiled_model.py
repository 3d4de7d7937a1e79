"""A causal language model's training step through torch.compile, whole or layer by layer, with nothing left to chance.

    compiled = compile_model(model)                 # one region a decoder class: compiles in seconds
    compiled = compile_model(model, scope="step")   # forward and loss in one graph
    ... train as before, with `model` ...
    print(compiled.report())
    compiled.restore()

`model` stays the object that trainers know: only its forward, or its layers' forwards, are replaced. Compiled is what trains:
in evaluation mode and with a cache the model's own forward runs, so that logits and generation are what they were.

A graph break is an error and so is a failed compile, whatever the process has set: Dynamo's settings are ours for the length
of our calls and restored after. Each model gets a code object of its own to compile, so that no other model's graphs count
towards its limit.
"""

from __future__ import annotations

import functools
import threading
import types
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch

from ..errors import Refused, UsageError
from . import cuda_graphs as recording
from . import graph_passes
from .compile_failure import compiler_errors, explain, short_operators
from .compile_report import CompileReport, Ledger
from .constant_outputs import constants_among_outputs
from .input_gradients import trace_input_gradients
from .packed import packed_arguments
from .shared_layers import SharedLayers
from .symbolic_memo import remembered_arithmetic

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2")
SCOPES = ("block", "step")
LEAST_TORCH = (2, 11)  # before it Inductor miscompiles the backward of Unsloth's LoRA functions when it is traced
LIMIT = 32  # graphs of one region before a new kind of batch is an error

# Inductor's defaults, named because Unsloth changes some for the whole process.
OPTIONS = {"epilogue_fusion": True, "shape_padding": True, "triton.cudagraphs": False}


class CompiledModel:
    """What `compile_model` gives back: a report, and the way out. The model itself is used as before."""

    def __init__(self, model: torch.nn.Module, scope: str, ledger: Ledger, graphs: recording.CudaGraphs):
        self.model = model
        self.scope = scope
        self._ledger = ledger
        self._graphs = graphs
        self._replaced: list[tuple[torch.nn.Module, Any]] = []
        self._undo: Callable[[], None] | None = None
        self._shared: SharedLayers | None = None

    def report(self) -> CompileReport:
        """Graphs, breaks, recompiles with their reasons, seconds to compile, calls compiled and not."""
        return self._ledger.report(self.scope, self._graphs, self._shared)

    def restore(self) -> None:
        """Give the model its own forwards back. The graphs are freed with the last reference to this object."""
        while self._replaced:
            module, old = self._replaced.pop()
            if old is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = old
        if self._undo is not None:
            self._undo()
            self._undo = None
        self._graphs.unmark()
        self.model.__dict__.pop("_unsloth_ext_compiled", None)

    def __deepcopy__(self, memo):
        raise UsageError(
            "a compiled model cannot be copied: the copy would run the first one's layers", "Call restore() first."
        )

    def _replace(self, module: torch.nn.Module, forward: Callable) -> None:
        self._replaced.append((module, module.__dict__.get("forward")))
        module.__dict__["forward"] = forward


def compile_model(
    model: torch.nn.Module,
    scope: str = "block",
    *,
    dynamic: bool | None = True,
    fullgraph: bool = True,
    cuda_graphs: bool | str = False,
    backend: str | Callable = "inductor",
    options: dict[str, Any] | None = None,
    shared_layers: bool = True,
) -> CompiledModel:
    """Compile a model's training step in place.

    model: a causal language model of one of FAMILIES, as transformers, peft or Unsloth's FastLanguageModel gives it, adapters
        included. LoRA, 4-bit layers, gradient checkpointing, padded, packed and padding-free batches are all inside.
        On cards other than Hopper, Unsloth's fast path takes packed and padding-free ones only under UNSLOTH_EXT_PACKED=1; without it
        they are a `CompileError`.
    scope: "block" compiles one region a class of decoder layers, which all layers of the class share; embedding, final norm
        and loss stay as they are. "step" compiles the model's whole forward, with the loss where labels are given.
    dynamic: True for one graph for all lengths and all batch sizes above 1; False for one a shape; None lets Dynamo decide.
    fullgraph: False lets graphs break; report() counts the breaks.
    shared_layers: False for a graph of a step with each layer's operations in it. True, with Inductor and without cuda_graphs: a
        layer is one operator there, compiled once for all layers that are alike (shared_layers.py), so that the step compiles in a
        fraction of the time and runs the kernels of block scope. Where layers cannot be that, report() says why, and it is as with False.
    cuda_graphs: True records batches whose shape repeats as CUDA graphs, with dense or padded rows and without checkpointing, and
        replays them; "auto" does so on one card where the step takes no more than half of its memory. All other batches run as
        without it, for reasons that report() counts (cuda_graphs.py). Worth it where the host is the limit: small models, short
        batches. A loss must be backpropagated before the forward after next.
    backend: of torch.compile. options: Inductor's, beside OPTIONS.

    Nothing is compiled yet: that happens in the first calls, with the first batch of each kind. There a `CompileError` names
    the module that cannot be traced, and the batch is not run uncompiled instead.
    Raises UsageError for a bad argument; Refused, with nothing changed, for another family, torch before 2.11, a model that is
    compiled already, and layers whose forward somebody else has replaced.
    """
    if scope not in SCOPES:
        raise UsageError(f"scope must be one of {', '.join(SCOPES)}, got {scope!r}")
    if options and backend != "inductor":
        raise UsageError(f"options are Inductor's, backend is {backend!r}", "Leave options or backend out.")
    if cuda_graphs not in recording.MODES:
        raise UsageError(f"cuda_graphs must be one of {', '.join(map(repr, recording.MODES))}, got {cuda_graphs!r}")
    if cuda_graphs and backend != "inductor":
        raise UsageError(f"cuda_graphs are Inductor's, backend is {backend!r}", "Leave cuda_graphs or backend out.")
    if not torch.torch_version.TorchVersion(torch.__version__) >= LEAST_TORCH:
        raise Refused(f"compile_model needs torch 2.11 or newer, this is {torch.__version__}")
    inner, layers = decoder(model)
    if (scope == "step" or cuda_graphs) and any(hasattr(layer, "on_another_rank") for layer in layers):
        raise Refused(
            "this is a stage of a pipeline, with layers of other ranks: only the layers can be compiled",
            "Use scope='block', without cuda_graphs.",
        )
    if "_unsloth_ext_compiled" in model.__dict__:
        raise Refused(
            "this model is compiled already", "Call restore() of the first compile_model's result before another."
        )
    if taken := [
        name for name, module in model.named_modules() if module in set(layers) and "forward" in module.__dict__
    ]:
        raise Refused(
            f"the forward of {taken[0]} was replaced by {model.get_submodule(taken[0]).forward!r}",
            "Call compile_model before memory_budget and before whatever else wraps the layers.",
        )
    for layer in layers:
        _sizes_are_fixed(layer)
    ledger = Ledger()
    graphs = recording.CudaGraphs(model, inner.model, cuda_graphs)
    compiled = CompiledModel(model, scope, ledger, graphs)

    def region(function, name):
        """(the region, with cuda_graphs the region recorded): each is compiled when it is first called."""
        if backend != "inductor":
            return (one_region(function, name, torch._dynamo.lookup_backend(backend)),)
        kinds = {name: OPTIONS | graph_passes.options() | (options or {})}
        if cuda_graphs:
            kinds[f"{name}, recorded"] = kinds[name] | recording.OPTIONS
        return tuple(
            one_region(function, kind, torch._TorchCompileInductorWrapper(None, each, dynamic))
            for kind, each in kinds.items()
        )

    def one_region(function, name, chosen):
        return torch.compile(
            _own_code(function), fullgraph=fullgraph, dynamic=dynamic, backend=ledger.counted(chosen, name)
        )

    def alone(function, name, chosen):
        copy = _own_code(function)
        run = torch.compile(copy, fullgraph=fullgraph, dynamic=dynamic, backend=ledger.counted(chosen, name))
        return functools.partial(_explained, model, ledger, run), copy.__code__

    try:
        for layer in layers:
            # Inside Unsloth's own compile of the layers ours would be one with its flags in it.
            compiled._replace(layer, types.MethodType(_plain_forward(type(layer)), layer))
        if scope == "step":
            own = model.forward
            compiled._undo = trace_input_gradients(model)

            named = _Named()
            run = region(named.forward, type(model).__name__)
            if shared_layers and backend == "inductor" and fullgraph and not cuda_graphs and len(layers) > 1:
                plain = {kind: _plain_forward(kind) for kind in dict.fromkeys(map(type, layers))}
                compiled._shared = SharedLayers(
                    layers,
                    plain,
                    OPTIONS | graph_passes.options() | (options or {}),
                    dynamic,
                    alone,
                    lambda: _checkpointed(model),
                )
            compiled._replace(model, _step(model, inner, own, named, run, ledger, graphs, compiled._shared))
        else:
            regions = {kind: region(_plain_forward(kind), kind.__name__) for kind in dict.fromkeys(map(type, layers))}
            for layer in layers:
                layer.__dict__["forward"] = _block(model, layer, regions[type(layer)], ledger, graphs)
            compiled._replace(inner.model, _without_cache(inner.model, inner.model.forward, graphs))
    except BaseException:  # a backend that does not exist, an option that Inductor does not know
        compiled.restore()
        raise
    model.__dict__["_unsloth_ext_compiled"] = compiled
    return compiled


def decoder(model: torch.nn.Module) -> tuple[torch.nn.Module, torch.nn.ModuleList]:
    """(the causal language model inside adapters, its decoder layers). Raises Refused for a model of another family."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    family = getattr(getattr(inner, "config", None), "model_type", None)
    layers = getattr(getattr(inner, "model", None), "layers", None)
    if family not in FAMILIES or not isinstance(layers, torch.nn.ModuleList):
        raise Refused(
            f"compile_model knows causal language models of the families {', '.join(FAMILIES)}; "
            f"this is {type(inner).__name__} of the family {family}",
            "Nothing was changed. torch.compile(layer.forward) on its layers may still work.",
        )
    return inner, layers


class _Named:
    """`forward(kwargs)` calls a model's forward by a global's name: Dynamo takes the numbers that it finds there, the widths and block sizes
    of all weights, for constants. Those of an argument it makes symbols of, thirty a layer, and learns one by one that they are none.

    The name is there during a call alone: Dynamo's guards keep the globals for as long as there is code, and the model would stay with them.
    """

    def __init__(self):
        self._names, self._lock, self._calls = {"__builtins__": __builtins__}, threading.Lock(), 0
        self.forward = types.FunctionType(_forward.__code__, self._names, _forward.__name__)

    @contextmanager
    def of(self, own: Callable):
        with self._lock:
            self._calls += 1
            self._names["own"] = own
        try:
            yield
        finally:
            with self._lock:
                self._calls -= 1
                if not self._calls:
                    self._names.pop("own", None)


def _forward(kwargs):
    return own(**kwargs)  # noqa: F821


def _sizes_are_fixed(layer: torch.nn.Module) -> None:
    """Tell Dynamo that a quantised weight's other tensors have no dynamic sizes, as it takes for granted of the weight: two symbols for
    each weight of the model otherwise, of which no graph makes anything."""
    for parameter in layer.parameters():
        state = getattr(parameter, "quant_state", None)
        while state is not None:
            for tensor in vars(state).values():
                if isinstance(tensor, torch.Tensor):
                    torch._dynamo.mark_static(tensor)
            state = getattr(state, "state2", None)


def _own_code(function: Callable) -> Callable:
    # Dynamo keeps its graphs at the code object.
    copy = types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _checkpointed(model: torch.nn.Module) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def _plain_forward(kind: type) -> Callable:
    """The class's forward, from under Unsloth's compile of the class (models/_block_compile.py) where it has one."""
    return getattr(kind.forward, "_unsloth_block_original", kind.forward)


class _Thread(threading.local):
    inside = False


_thread = _Thread()


@contextmanager
def _settings():
    """Dynamo's settings for what we trace. Nested, nothing is done again: setting them takes a tenth of a millisecond."""
    if _thread.inside:
        yield
        return
    with (
        constants_among_outputs(),
        short_operators(),
        remembered_arithmetic(),
        # Else two sizes that are equal by chance, a head's width and the batch's length, are one symbol.
        torch.fx.experimental._config.patch(use_duck_shape=False),
        torch._dynamo.config.patch(
            suppress_errors=False,
            fail_on_recompile_limit_hit=True,
            recompile_limit=LIMIT,
            accumulated_recompile_limit=max(LIMIT, torch._dynamo.config.accumulated_recompile_limit),
            skip_nnmodule_hook_guards=False,  # else a hook on one layer alone is not seen where another's graph is taken
            specialize_float=True,  # else each Python float is a symbol first, and everything is traced a second time
            allow_unspec_int_on_nn_module=False,  # as by default: Unsloth makes the heads' number and width symbols, for the whole process
            optimize_ddp=False,  # else Dynamo cuts a graph under DDP where a bucket of gradients is full; LoRA's are soon sent
            verbose=True,  # keeps Dynamo's frames in its exceptions: compile_failure.py reads the module in them
        ),
    ):
        _thread.inside = True
        try:
            yield
        finally:
            _thread.inside = False


def _run(root: torch.nn.Module, ledger: Ledger, function: Callable, *args, **kwargs):
    result = _explained(root, ledger, function, *args, **kwargs)
    ledger.compiled_calls += 1
    return result


def _explained(root: torch.nn.Module, ledger: Ledger, function: Callable, *args, **kwargs):
    graphs = ledger.graphs.total()
    breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
    try:
        with _settings():
            result = function(*args, **kwargs)
    except compiler_errors() as error:
        raise explain(error, root, LIMIT) from error
    finally:
        ledger.breaks += sum(torch._dynamo.utils.counters["graph_break"].values()) - breaks
        if ledger.graphs.total() != graphs:
            ledger.collect()
    return result


def _why_plain(module: torch.nn.Module, kwargs: dict[str, Any]) -> str | None:
    if not module.training:
        return "evaluation"
    if kwargs.get("past_key_values") is not None or kwargs.get("past_key_value") is not None:
        return "cache"
    return None


def _step(model, inner, own, named, compiled, ledger, graphs, shared):
    names = list(_parameters(own))

    def forward(*args, **kwargs):
        kwargs.update(zip(names, args, strict=False))  # Dynamo sees one kind of call
        why = _why_plain(model, kwargs)
        if why:
            ledger.plain_calls[why] += 1
            return own(**kwargs)
        kwargs["use_cache"] = False  # nobody reads it, and making it would be in the graph
        kwargs = _before_unsloth(inner.model, packed_arguments(kwargs))
        recorded = graphs.begin(kwargs)
        with named.of(own):
            run = functools.partial(_explained, model, ledger, compiled[recorded], kwargs)
            output = run() if shared is None else shared.step(run)
        ledger.compiled_calls += 1
        return recording.copied_out(output) if recorded else output

    return forward


def _block(model, layer, compiled, ledger, graphs):
    plain = types.MethodType(_plain_forward(type(layer)), layer)

    def forward(*args, **kwargs):
        why = _why_plain(layer, kwargs)
        if why:
            ledger.plain_calls[why] += 1
            return plain(*args, **kwargs)
        return _run(model, ledger, compiled[graphs.active], layer, *args, **kwargs)

    return forward


def _without_cache(stack, own, graphs):
    names = list(_parameters(own))

    def forward(*args, **kwargs):
        # transformers gives each training batch a cache that nobody reads; with it the layers would not be a training step's.
        if (
            stack.training
            and kwargs.get("use_cache") is None
            and kwargs.get("past_key_values") is None
            and len(args) < 4
        ):
            kwargs["use_cache"] = False
        if not stack.training:
            return own(*args, **kwargs)
        graphs.active = graphs.begin(kwargs | dict(zip(names, args, strict=False)))
        try:
            with _settings():  # once for all layers
                return own(*args, **kwargs)
        finally:
            graphs.active = False  # a layer called on its own, as checkpoints do, runs as it is

    return forward


def _parameters(function: Callable):
    import inspect

    return inspect.signature(function).parameters


def _before_unsloth(stack: torch.nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What Unsloth's forward of the layers would do inside the graph for each batch anew.

    It builds its rope tables in the first forward, as many rows as that one asks for; with position ids, any row up to the
    model's limit can be asked for. And it cuts a batch at max_seq_length, after which every size in the graph is a minimum
    of two numbers, which doubles the time to trace it: a batch that is no longer may skip the cut.
    """
    tokens = kwargs.get("input_ids") if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
    rope = getattr(stack, "rotary_emb", None)
    if tokens is None or not hasattr(rope, "extend_rope_embedding"):
        return kwargs
    if (
        tokens.shape[0] == 1
        and kwargs.get("position_ids") is not None
        and kwargs.get("attention_mask") is None
        and kwargs.get("cu_seq_lens_q") is None
    ):  # Unsloth would look for documents in the positions, inside the graph: there is one
        kwargs = packed_arguments(kwargs | {"packed_seq_lengths": [tokens.shape[1]]}) | {"packed_seq_lengths": None}
    most, limit = stack.config.max_position_embeddings, getattr(stack, "max_seq_length", None) or 0
    rows = max(tokens.shape[1], limit)
    if kwargs.get("position_ids") is not None:
        rows = max(rows, most)
    rope.extend_rope_embedding(stack.embed_tokens.weight, max(most, rows), materialize_len=rows)
    if tokens.shape[1] <= limit:
        kwargs.setdefault("packed_seq_lengths", None)  # the key alone says that the row need not be cut
    return kwargs
