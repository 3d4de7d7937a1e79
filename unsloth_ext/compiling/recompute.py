"""What autograd saves in a decoder layer, and four things to do with it: keep it, compute it again, or send it to host memory.

A layer's forward stays the model's own code (Unsloth's fast path, plain transformers, a compiled block). Around it runs a
`Frame`: PyTorch's saved-tensor hooks show it every tensor that autograd stores. While the layer runs all of them are kept;
when it ends, the frame knows the whole list and decides for each storage:

    keep         the storage stays where it is
    offload      it is copied to pinned host memory, and comes back just before the backward needs it (offload.py)
    recipe       it is dropped; a recipe computes it from something that is kept: a norm's output from its input, gate and up
                 from the MLP's input, the attention's output as the projection reads it from the one that its backward reads.
                 Neither the attention nor the down projection runs again
    replay       it is dropped; the first read runs the piece again as torch.utils.checkpoint does (non-reentrant), with the
                 random state and autocast of the first run, and fills everything that the piece had saved

Nothing is guessed. Which storage is which product is found by computing every candidate once and comparing bit for bit; the
answer belongs to the list of saved dtypes and shapes (`Frame.signature`), and another list is examined anew. What no recipe
reproduces in every bit is replayed. So losses and gradients are those of the model without a budget.

Ownership has no cycles: autograd holds `Saved`, that holds its `Value`, that holds its `Frame`, and a frame holds only its
input. A value dies when autograd frees the node that saved it, and its memory with it. A replayed or computed storage lives
as long as its value.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

SMALL = 16 * 1024  # bytes. Below it a tensor is kept: its bookkeeping would cost more than its memory
_local = threading.local()  # .frame: the layer that runs in this thread; .replay: the frame that is run again in it


@dataclass(frozen=True)
class Level:
    """What one layer does with each part of what it saves: "keep", "recompute" or "offload" it.

    norms: norms' outputs and insides, and the attention's output in its second layout, are computed again.
    gate, up: the products of the MLP; what it makes of both follows "recompute" in either.
    attention: q, k, v, the attention's output. residual: the layer's input and the second norm's.
    layer: everything up to the MLP's input is computed again from the layer's input; gate and up by their recipes."""

    name: str
    norms: bool = False
    gate: str = "keep"
    up: str = "keep"
    attention: str = "keep"
    residual: str = "keep"
    layer: bool = False
    # What a compiled layer asks about its MLP: one question, so that all levels together make two graphs.
    mlp_in_graph: bool = field(init=False)
    # Whether the MLP's tensors have to be told apart.
    inside_mlp: bool = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "mlp_in_graph", self.gate == self.up == "recompute" and not self.layer)
        object.__setattr__(self, "inside_mlp", self.gate != self.up or self.gate == "recompute")

    @property
    def late(self) -> bool:
        """Whether gate and up are computed while the attention's tensors come back: they need not be there earlier."""
        return self.mlp_in_graph and self.attention == "offload"

    def of(self, name: str) -> str:
        """What to do with one product of the MLP."""
        if name in ("gate", "up"):
            return getattr(self, name)
        return "recompute" if "recompute" in (self.gate, self.up) else self.gate


_ALL = dict(attention="offload", residual="offload")
LEVELS = {
    level.name: level
    for level in (
        Level("keep"),
        Level("norms", norms=True),
        Level("up", norms=True, up="recompute"),
        Level("gate_up", norms=True, gate="recompute", up="recompute"),
        Level("layer", gate="recompute", up="recompute", layer=True),
        Level("norms+offload", norms=True, **_ALL),
        Level("gate+offload", norms=True, gate="offload", residual="offload"),
        Level("up+offload", norms=True, gate="offload", up="recompute", residual="offload"),
        Level("gate_up+offload", norms=True, gate="recompute", up="recompute", **_ALL),
        Level("layer+offload", gate="recompute", up="recompute", layer=True, residual="offload"),
        Level("offload", norms=True, gate="offload", up="offload", **_ALL),
    )
}


class Stop(BaseException):
    """Ends a replay when all has been seen. Not an Exception: no `except Exception` of a model's code may swallow it."""


class Value:
    """One storage that was saved, in however many views."""

    __slots__ = ("__weakref__", "device", "frame", "host", "name", "nbytes", "ready", "recipe", "restored", "storage")

    def __init__(self, frame: Frame | None, storage: torch.UntypedStorage):
        self.frame, self.storage, self.nbytes, self.device = frame, storage, storage.nbytes(), storage.device
        self.host = self.recipe = self.restored = self.ready = None
        self.name = None

    def __del__(self):
        if self.ready is not None:  # brought back and never read: the copy may still write to what is now freed
            self.ready()

    def get(self) -> torch.UntypedStorage:
        """The storage, brought back or computed where it was given up."""
        if self.storage is not None:
            return self.storage
        if self.restored is None:
            if self.host is not None:
                self.host.fetch(self)
            elif self.recipe is not None:
                self.restored = self.recipe()
            else:
                self.frame.replay()
            if self.restored is None:
                raise RuntimeError(f"{self.frame.where}: {self.name or 'a saved tensor'} did not come up in the replay")
        if self.ready is not None:
            self.ready()
            self.ready = None
        return self.restored

    def tensor(self, like: Saved) -> torch.Tensor:
        storage = self.get()
        return torch.empty(0, dtype=like.dtype, device=self.device).set_(storage, like.offset, like.shape, like.stride)


class Saved:
    """What autograd holds instead of a tensor: a view of a value."""

    __slots__ = ("dtype", "offset", "shape", "stride", "value")

    def __init__(self, value: Value, tensor: torch.Tensor):
        self.value, self.dtype, self.shape, self.stride = value, tensor.dtype, tensor.shape, tensor.stride()
        self.offset = tensor.storage_offset()

    def tensor(self) -> torch.Tensor:
        return self.value.tensor(self)


def unpack(saved):
    return saved.tensor() if type(saved) is Saved else saved


def address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _autocast(device: torch.device) -> list[tuple]:
    kinds = dict.fromkeys((device.type, "cpu"))
    return [(k, torch.is_autocast_enabled(k), torch.get_autocast_dtype(k)) for k in kinds]


class Surroundings:
    """Random state and autocast as they are now, to run something under them later."""

    __slots__ = ("autocast", "cache", "cpu_rng", "cuda_rng", "device")

    def __init__(self, device: torch.device, rng: bool = True):
        self.device = device
        self.autocast = _autocast(device)
        self.cache = torch.is_autocast_cache_enabled()
        self.cpu_rng = torch.get_rng_state() if rng else None
        self.cuda_rng = torch.cuda.get_rng_state(device) if rng and device.type == "cuda" else None

    @contextlib.contextmanager
    def again(self):
        with contextlib.ExitStack() as stack:
            if _autocast(self.device) != self.autocast:  # else compiled code would see another global state
                for kind, enabled, dtype in self.autocast:
                    stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=self.cache))
            if self.cpu_rng is not None:
                devices = [self.device] if self.cuda_rng is not None else []
                stack.enter_context(torch.random.fork_rng(devices))
                torch.set_rng_state(self.cpu_rng)
                if self.cuda_rng is not None:
                    torch.cuda.set_rng_state(self.cuda_rng, self.device)
            yield


class Frame:
    """The saved tensors of one run of one piece: a layer, its MLP or one of its norms.

    where: the module's path, for messages. run: calls the piece once more, given its input tensor. outside: addresses of
    storages that are not this piece's to give up (masks, position embeddings).
    """

    def __init__(
        self, where: str, tensor: torch.Tensor, run: Callable, outside=(), owner: Frame | None = None, rng=True
    ):
        self.where, self.run, self.outside = where, run, outside if owner is None else owner.outside
        self.values: dict[int, Value] = {}  # by address; all alive while the piece runs, emptied by `close`
        self.events: list = []  # (weak reference to a value or None, dtype, shape) for each saved tensor, in order
        self.layouts: list = []  # (stride, offset) of the same, None where there is no value
        self.outline = None  # of a compiled layer: how to fill its values without its graph (retrace.py)
        self.outputs: dict[int, tuple] = {}  # address of a norm's output -> (norm, its input)
        self.mlp: Frame | None = None  # the inner frames of this run, until it ends
        self.norms: list[Frame] = []
        self.mlp_input = lambda: None
        self.surroundings = Surroundings(tensor.device, rng)
        self.batch, self.sequence = (*tensor.shape[:2],) if tensor.dim() > 2 else (1, tensor.shape[0])
        self.requires_grad = tensor.requires_grad
        self.input = (owner or self).adopt(tensor)
        self.values[address(tensor)] = self.input.value
        self.replayed = -1

    # -- the forward ---------------------------------------------------------------------------------------------------------

    def adopt(self, tensor: torch.Tensor) -> Saved:
        """A view of the value that holds `tensor`, whether or not autograd saves it."""
        key = address(tensor)
        value = self.values.get(key)
        if value is None:
            value = self.values[key] = Value(None, tensor.untyped_storage())
        return Saved(value, tensor)

    def pack(self, tensor: torch.Tensor):
        value = None
        if self._ours(tensor):
            key = address(tensor)
            value = self.values.get(key)
            if value is None:
                value = self.values[key] = Value(self, tensor.untyped_storage())
            elif value.frame is None:
                value.frame = self if value is not self.input.value else None
        self.events.append((None if value is None else weakref.ref(value), tensor.dtype, tensor.shape))
        self.layouts.append(None if value is None else (tensor.stride(), tensor.storage_offset()))
        return tensor if value is None else Saved(value, tensor)

    def _ours(self, tensor: torch.Tensor) -> bool:
        if type(tensor) is not torch.Tensor or tensor.layout != torch.strided:
            return False  # parameters (FSDP frees and refills their storage) and subclasses
        if tensor.numel() * tensor.element_size() < SMALL:
            return False
        base = tensor._base
        if isinstance(base, torch.nn.Parameter) or (base is None and tensor.is_leaf and tensor.requires_grad):
            return False  # a view made without gradients, as in a custom Function, is a leaf too, and an activation
        return tensor.device.type != "meta" and address(tensor) not in self.outside

    @contextlib.contextmanager
    def recording(self):
        with torch.autograd.graph.saved_tensors_hooks(self.pack, unpack):
            yield self

    @property
    def signature(self) -> tuple:
        """What was saved, with the batch's own sizes left out: the same code on another batch has the same signature."""
        names = {self.batch * self.sequence: "bs", self.sequence: "s", self.batch: "b"}
        return tuple(
            (ref is None, dtype, tuple(names.get(n, n) if n > 1 else n for n in shape))
            for ref, dtype, shape in self.events
        )

    def close(self) -> None:
        """End of the run: from here on only autograd's own references keep a value."""
        self.values, self.outputs, self.norms, self.mlp = {}, {}, [], None

    # -- the backward --------------------------------------------------------------------------------------------------------

    def replay(self) -> None:
        """Run the piece again and fill every value of this frame that is still wanted."""
        tensor = self.input.tensor().detach().requires_grad_(self.requires_grad)
        if self.outline is not None:
            self.outline.fill(self, tensor)
            return
        self.replayed = 0
        with again(self, self.surroundings, self._capture):
            self.run(tensor)
        if self.replayed != len(self.events):
            raise RuntimeError(
                f"{self.where} saved {len(self.events)} tensors for the backward and {self.replayed} when it was run again: "
                "its forward must do the same work each time it is called with the same input"
            )
        self.replayed = -1

    def _capture(self, tensor: torch.Tensor):
        if self.replayed >= len(self.events):
            raise RuntimeError(f"{self.where} saved more than {len(self.events)} tensors when it was run again")
        ref, dtype, shape = self.events[self.replayed]
        self.replayed += 1
        if (tensor.dtype, tensor.shape) != (dtype, shape):
            raise RuntimeError(
                f"{self.where} saved {tensor.dtype} {tuple(tensor.shape)} when it was run again where it had saved {dtype} {tuple(shape)}"
            )
        value = None if ref is None else ref()
        if value is not None and value.storage is None and value.restored is None and value.frame is self:
            value.restored = tensor.untyped_storage()
        return None  # nobody differentiates the second run: its graph shall hold nothing

    @property
    def seen_all(self) -> bool:
        return self.replayed == len(self.events)


def _unread(nothing):
    raise RuntimeError("the graph of a second run was differentiated")


@contextlib.contextmanager
def again(run, surroundings: Surroundings, pack: Callable):
    """A second run, known to the wrapped modules as `run`, ended by `Stop` or by itself; `pack` gets what it saves."""
    outer, _local.replay = getattr(_local, "replay", None), run
    frame, _local.frame = getattr(_local, "frame", None), None
    try:
        with torch.enable_grad(), surroundings.again():
            with torch.autograd.graph.saved_tensors_hooks(pack, _unread), contextlib.suppress(Stop):
                yield
    finally:
        _local.replay, _local.frame = outer, frame


def current() -> Frame | None:
    return getattr(_local, "frame", None)


def replaying():
    """The frame, or the `retrace.Retrace`, that is run again in this thread."""
    return getattr(_local, "replay", None)


@contextlib.contextmanager
def inside(frame: Frame):
    outer, _local.frame = getattr(_local, "frame", None), frame
    try:
        yield
    finally:
        _local.frame = outer
