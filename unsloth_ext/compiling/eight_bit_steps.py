"""bitsandbytes' 8-bit optimizers, many parameters at once instead of one by one, with the same bits.

A LoRA adapter is hundreds of small matrices (448 in an 8B model), and bitsandbytes starts a kernel for each, behind tens of
microseconds of Python. The kernel works on blocks of 256 elements, each by itself: an absmax of its own, the same formula with the
same learning rate and step count. So parameters whose number of elements is a multiple of 256 can be laid end to end and stepped by one
call of the same kernel, and no bit of them, or of their state, is another.

How it goes: `step_together` gives the optimizer a `step` of its own. The states of a chunk of parameters (64 MiB of gradients) become
views of one tensor each. A step copies the chunk's gradients and parameters together, calls bitsandbytes' own `update_step` on that
one long parameter, and copies the parameters back: some ten launches a chunk. The copies cost memory traffic, which is a small part of
what the launches did, and the memory of two chunks for as long as the step runs.

What keeps it honest: nothing but the order of the parameters is remembered. In each step all of it is looked up again, the gradients,
the step counts, and where in memory parameters and states are; neighbours that fit each other go together, and any other parameter
goes by bitsandbytes' own `step`, at once and on the same memory, since a view is as good a state as another tensor. States that were
replaced (`load_state_dict`, a move to the host and back) are laid side by side again. The state's names, shapes and checkpoints stay
bitsandbytes', in both directions; a checkpoint holds the shared memory once (torch.save writes a storage once).

Left out on purpose: states in 32 bits; paged states, which must be fetched before a step; AdEMAMix, whose two first moments lie one
after the other for each parameter; LAMB and LARS, which look at a whole parameter. And where the current CUDA stream is another
than the default one, on which bitsandbytes' kernels run, everything goes one by one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from operator import is_
from types import MethodType

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from ..errors import Refused, UsageError
from ..patching.fingerprint import of_object

__all__ = ["refusal", "step_together"]

BLOCKSIZE = 256  # elements; bitsandbytes' blockwise optimizers know no other
CHUNK_BYTES = 64 << 20

# The sources that this reads the mind of, in bitsandbytes 0.50.0 to 0.50.2; and the step that unsloth_zoo has on a card in the place of
# bitsandbytes', which is that without a wait for the card after each parameter.
_KNOWN = {
    "Optimizer8bit": {
        "step": ("14bfedf7a74ad611", "fa1ab9956ac8ce37"),
        "get_config": ("ceac3d8a1eaa7049",),
        "prefetch_state": ("71d37ba16ffa00a7",),
    },
    "Optimizer1State": {"init_state": ("4adaa3540114176a",), "update_step": ("e54b3b8435df7b7b",)},
    "Optimizer2State": {"init_state": ("9cb88c3b5588aea2",), "update_step": ("c710c70881f9f22a",)},
}
_METHODS = ("step", "get_config", "prefetch_state", "init_state", "update_step")
_BLOCK_BY_BLOCK = {"adam", "adagrad", "lion", "momentum", "rmsprop"}  # optimizer_name; "adam" is AdamW too
_SHARED = {"Optimizer1State": ("state1", "absmax1"), "Optimizer2State": ("state1", "state2", "absmax1", "absmax2")}
_MAPS = {"Optimizer1State": ("qmap1",), "Optimizer2State": ("qmap1", "qmap2")}
_PLAIN = (Tensor, torch.nn.Parameter)
_MOST = 2**31 - BLOCKSIZE  # elements; the kernel counts in int32
# torch wraps a step for its hooks and for no_grad, and Unsloth to leave out a wait for the card after each parameter.
_WRAPPERS = ("torch.optim.optimizer", "torch.utils._contextlib", "unsloth.import_fixes")


def step_together(optimizer: torch.optim.Optimizer, *, chunk_bytes: int = CHUNK_BYTES) -> torch.optim.Optimizer:
    """Make bitsandbytes' 8-bit Adam, AdamW, Adagrad, Lion, RMSprop or SGD step its parameters in chunks; gives it back.

    The parameters after a step, and the state, are bit for bit what they would be; what cannot go together goes one by one, as before.
    Before a learning-rate scheduler is made, which keeps the `step` that it finds. A second call changes chunk_bytes alone.

    chunk_bytes: of gradients that go together; twice as much memory is taken during a step. A larger parameter goes alone.

    Raises UsageError for what is no optimizer of bitsandbytes, or where a scheduler exists already, Refused for one that cannot be
    stepped so, with the reason.
    """
    if not isinstance(chunk_bytes, int) or chunk_bytes <= 0:
        raise UsageError(f"chunk_bytes must be a positive number of bytes, got {chunk_bytes!r}")
    if (before := vars(optimizer).get("_unsloth_ext_together")) is not None:
        before.chunk_bytes, before.stale = chunk_bytes, True
        return optimizer
    if not _is_bitsandbytes(optimizer):
        raise UsageError(
            f"step_together is for bitsandbytes' optimizers, got {type(optimizer).__module__}.{type(optimizer).__name__}"
        )
    if "step" in vars(optimizer):
        raise UsageError(
            "the optimizer's step has been replaced already, as a learning-rate scheduler does",
            "Call step_together(optimizer) before the scheduler is made.",
        )
    if (reason := refusal(optimizer)) is not None:
        raise Refused(f"{type(optimizer).__name__} cannot step its parameters together: {reason}", "Use it as it is.")
    together = _Together(optimizer, chunk_bytes)

    def step(self, closure=None):
        """bitsandbytes' step, many parameters at a time (unsloth_ext.compiling.step_together)."""
        return together.step(closure)

    optimizer._unsloth_ext_together = together
    # As torch does it to the class: with the hooks that are registered for a step.
    optimizer.step = MethodType(torch.optim.Optimizer.profile_hook_step(torch.no_grad()(step)), optimizer)
    return optimizer


def refusal(optimizer: torch.optim.Optimizer) -> str | None:
    """Why `optimizer` must go one by one, or None for what `step_together` takes."""
    if not _is_bitsandbytes(optimizer):
        return "it is none of bitsandbytes'"
    if (base := _base(type(optimizer))) is None:
        return f"{type(optimizer).__name__} is neither an Optimizer1State nor an Optimizer2State"
    name = getattr(optimizer, "optimizer_name", None)
    if name not in _BLOCK_BY_BLOCK:
        return f"{name} does not work block by block"
    settings = getattr(optimizer, "args", None)
    if getattr(settings, "optim_bits", None) != 8:
        return "its state is not in 8 bits"
    if getattr(settings, "max_unorm", 0.0) > 0.0:
        return "max_unorm looks at a whole parameter"
    if getattr(optimizer, "is_paged", True):
        return "its state is paged"
    if torch.version.hip is not None:
        return "this is ROCm, where it has not been looked at"
    if unknown := _unknown(type(optimizer), base):
        return f"{unknown} is not the one of bitsandbytes 0.50 that is known here"
    if own := sorted(set(vars(optimizer)).intersection(_METHODS)):
        return f"its {', '.join(own)} has been replaced"
    return None


def _is_bitsandbytes(optimizer) -> bool:
    return any(
        c.__name__ == "Optimizer8bit" and c.__module__.startswith("bitsandbytes") for c in type(optimizer).__mro__
    )


def _base(cls: type) -> str | None:
    return next((c.__name__ for c in cls.__mro__ if c.__name__ in _SHARED), None)


def _unknown(cls: type, base: str) -> str:
    """The method of an optimizer's class whose source is not known here, or which somebody unknown has wrapped; else ""."""
    known = _KNOWN["Optimizer8bit"] | _KNOWN[base]
    for name in _METHODS:
        method = getattr(cls, name, None)
        if of_object(method) not in known[name]:
            return f"{cls.__name__}.{name}"
        while (inner := getattr(method, "__wrapped__", None)) is not None:
            if (where := method.__globals__.get("__name__")) not in _WRAPPERS:
                return f"{cls.__name__}.{name}, as {where} wraps it,"
            method = inner
    return ""


@dataclass(slots=True)
class _Member:
    """A parameter of a chunk, and where it and its state were when they were laid out."""

    parameter: Tensor
    pindex: int
    elements: int
    address: int
    places: list[int] = field(default_factory=list)


@dataclass(slots=True)
class _Chunk:
    """Parameters of one group and dtype whose states lie side by side, in this order."""

    gindex: int
    dtype: torch.dtype
    device: torch.device
    members: list[_Member] = field(default_factory=list)


class _Together:
    """What is kept of one optimizer between steps."""

    def __init__(self, optimizer, chunk_bytes: int):
        self.optimizer, self.chunk_bytes = optimizer, chunk_bytes
        self.known, base = (type(optimizer), type(optimizer).step), _base(type(optimizer))
        self.shared, self.maps = _SHARED[base], _MAPS[base]
        self.keys = {"step", *self.shared, *self.maps}
        self.chunks: list[_Chunk] = []
        self.parameters: list[list[Tensor]] = []  # of each group, when they were laid out
        self.waiting: list[Tensor] = []  # had no state yet then
        self.stale = True

    def step(self, closure):
        optimizer, loss = self.optimizer, None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # The first step is bitsandbytes' own: it makes the states. So is every one of a class that somebody has changed since.
        known = self.known == (type(optimizer), type(optimizer).step)
        runs = self._runs() if optimizer.initialized and known else []
        for chunk, run in runs:
            self._update(chunk, run)
        taken = {id(member.parameter) for _, run in runs for member in run}
        left = [
            p for group in optimizer.param_groups for p in group["params"] if p.grad is not None and id(p) not in taken
        ]
        if left or not optimizer.initialized:
            self._step_alone([member.parameter for _, run in runs for member in run])
        return loss

    def _step_alone(self, done: list[Tensor]) -> None:
        """The optimizer's own step of all but `done`. Without torch's layer for the hooks, which are ours to call."""
        step = type(self.optimizer).step
        step = step.__wrapped__ if getattr(step, "hooked", False) else step
        gradients = [p.grad for p in done]
        try:
            for p in done:
                p.grad = None
            step(self.optimizer)
        finally:
            for p, gradient in zip(done, gradients, strict=True):
                p.grad = gradient

    # -- what can go together now ----------------------------------------------------------------------------------------

    def _runs(self) -> list[tuple[_Chunk, list[_Member]]]:
        """Neighbours in a chunk that can be stepped by one call, two at least."""
        if self.stale or self._changed():
            self._lay_out()
        runs = self._found()
        if self.stale:  # something has moved
            self._lay_out()
            runs = self._found()
            self.stale = False  # what does not lie where it was laid a moment ago goes alone
        return runs

    def _changed(self) -> bool:
        """Whether there are other parameters than those that were laid out, or a state that was still missing."""
        groups, state = self.optimizer.param_groups, self.optimizer.state
        if len(groups) != len(self.parameters) or any(state.get(p) for p in self.waiting):
            return True
        return any(
            len(group["params"]) != len(before) or not all(map(is_, group["params"], before))
            for group, before in zip(groups, self.parameters, strict=True)
        )

    def _found(self) -> list[tuple[_Chunk, list[_Member]]]:
        runs = []
        for chunk in self.chunks:
            if chunk.device.type == "cuda":  # bitsandbytes' kernels run on the default stream
                if torch.cuda.current_stream(chunk.device) != torch.cuda.default_stream(chunk.device):
                    return []
            for run in self._neighbours(chunk):
                if self._in_one_storage(run):
                    runs.append((chunk, run))
                else:
                    self.stale = True
        return runs

    def _neighbours(self, chunk: _Chunk) -> list[list[_Member]]:
        manager, state_of, shared, dtype = self.optimizer.mng, self.optimizer.state, self.shared, chunk.dtype
        overridden = bool(manager.index2config or manager.pid2config)
        maps = None
        runs, run, count = [], [], None
        for member in chunk.members:
            p = member.parameter
            grad = p.grad
            fits = (
                grad is not None
                and type(grad) is Tensor
                and grad.dtype is dtype
                and p.dtype is dtype
                and grad.layout is torch.strided
                and p.is_contiguous()
                and not (overridden and self._is_overridden(chunk.gindex, member))
            )
            state = state_of.get(p) if fits else None
            if fits and not state:
                fits, self.stale = False, True
            if fits:
                now = [state[key] for key in self.maps]
                maps = maps or now
                if (
                    p.data_ptr() != member.address
                    or p.numel() != member.elements
                    or [state[key].data_ptr() for key in shared] != member.places
                    or not all(map(is_, now, maps))
                ):
                    fits, self.stale = False, True
            if run and not (fits and state["step"] == count):
                runs.append(run)
                run = []
            if fits:
                count = state["step"]
                run.append(member)
        return [run for run in (*runs, run) if len(run) > 1]

    def _in_one_storage(self, run: list[_Member]) -> bool:
        # The places are next to each other; so are, sometimes, two tensors of the allocator's that have nothing to do with each other.
        first, last = (self.optimizer.state[member.parameter] for member in (run[0], run[-1]))
        return all(
            first[key].untyped_storage().data_ptr() == last[key].untyped_storage().data_ptr() for key in self.shared
        )

    def _is_overridden(self, gindex: int, member: _Member) -> bool:
        manager = self.optimizer.mng
        return (gindex, member.pindex) in manager.index2config or id(member.parameter) in manager.pid2config

    # -- the step --------------------------------------------------------------------------------------------------------

    def _update(self, chunk: _Chunk, run: list[_Member]) -> None:
        optimizer = self.optimizer
        parameters = [member.parameter for member in run]
        states = [optimizer.state[p] for p in parameters]
        long = _flatten_dense_tensors(parameters)
        long.grad = _flatten_dense_tensors([p.grad for p in parameters])
        state, blocks = dict(states[0]), long.numel() // BLOCKSIZE
        for key in self.shared:
            state[key] = state[key].as_strided((blocks if key.startswith("absmax") else long.numel(),), (1,))
        optimizer.state[long] = state
        try:
            optimizer.update_step(optimizer.param_groups[chunk.gindex], long, chunk.gindex, run[0].pindex)
        finally:
            del optimizer.state[long]
        torch._foreach_copy_(parameters, _unflatten_dense_tensors(long, parameters))
        for one in states:
            one["step"] = state["step"]

    # -- the layout ------------------------------------------------------------------------------------------------------

    def _lay_out(self) -> None:
        """Choose the chunks anew, and lay the states of each side by side. No value changes."""
        optimizer = self.optimizer
        self.parameters = [list(group["params"]) for group in optimizer.param_groups]
        self.waiting = [p for group in self.parameters for p in group if not optimizer.state.get(p)]
        overlapping = _overlapping([p for group in self.parameters for p in group if type(p) in _PLAIN])
        chunks: list[_Chunk] = []
        for gindex, group in enumerate(self.parameters):
            opened: dict = {}
            for pindex, p in enumerate(group):
                if id(p) in overlapping or not self._can_lie_beside_others(p):
                    continue
                kind = p.dtype, p.device
                chunk, size = opened.get(kind, (None, 0))
                if chunk is None or size + p.numel() > min(self.chunk_bytes // p.element_size(), _MOST):
                    chunk, size = _Chunk(gindex, p.dtype, p.device), 0
                    chunks.append(chunk)
                opened[kind] = chunk, size + p.numel()
                chunk.members.append(_Member(p, pindex, p.numel(), p.data_ptr()))
        self.chunks = [chunk for chunk in chunks if len(chunk.members) > 1 and self._same_maps(chunk)]
        for chunk in self.chunks:
            states = [optimizer.state[member.parameter] for member in chunk.members]
            for key in self.shared:
                _side_by_side(states, key)
            for member, state in zip(chunk.members, states, strict=True):
                member.places = [state[key].data_ptr() for key in self.shared]
        self.stale = False

    def _can_lie_beside_others(self, p: Tensor) -> bool:
        state = self.optimizer.state.get(p)
        if not state or type(p) not in _PLAIN or p.device.type not in ("cpu", "cuda"):
            return False
        n = p.numel()
        if n == 0 or n % BLOCKSIZE or n * p.element_size() > self.chunk_bytes or not p.is_contiguous():
            return False
        if set(state) != self.keys or type(state["step"]) is not int:
            return False
        for key in self.shared:
            dtype, size = (torch.float32, n // BLOCKSIZE) if key.startswith("absmax") else (torch.uint8, n)
            one = state[key]
            if type(one) is not Tensor or one.dtype is not dtype or one.numel() != size or one.device != p.device:
                return False
            if not one.is_contiguous() or getattr(one, "is_paged", False):
                return False
        return all(state[key].device == p.device for key in self.maps)

    def _same_maps(self, chunk: _Chunk) -> bool:
        """Whether all of the chunk are quantised by the same maps; a checkpoint brings copies of them, which become one."""
        states = [self.optimizer.state[member.parameter] for member in chunk.members]
        for key in self.maps:
            different = list({id(state[key]): state[key] for state in states}.values())
            if len({one.shape for one in different}) > 1 or len({one.dtype for one in different}) > 1:
                return False
            if len(different) > 1 and not bool((torch.stack(different) == different[0]).all()):
                return False
        for key in self.maps:
            for state in states:
                state[key] = states[0][key]
        return True


def _overlapping(parameters: list[Tensor]) -> set[int]:
    """The ids of those that share memory with another: one of two is stepped from what the other has become."""

    def span(p):
        reach = sum((n - 1) * step for n, step in zip(p.shape, p.stride(), strict=True)) + 1
        return str(p.device), p.data_ptr(), p.data_ptr() + reach * p.element_size(), id(p)

    found, furthest = set(), ("", 0, 0, 0)
    for one in sorted(span(p) for p in parameters if p.numel()):
        if one[0] == furthest[0] and one[1] < furthest[2]:
            found |= {one[3], furthest[3]}
        if one[0] != furthest[0] or one[2] > furthest[2]:
            furthest = one
    return found


def _side_by_side(states: list[dict], key: str) -> None:
    """Make `key` of these states views of one new tensor, unless they lie so already."""
    tensors = [state[key] for state in states]
    storages = {one.untyped_storage().data_ptr() for one in tensors}
    ends = [one.data_ptr() + one.numel() * one.element_size() for one in tensors]
    if len(storages) == 1 and all(end == one.data_ptr() for end, one in zip(ends, tensors[1:], strict=False)):
        return
    whole = _flatten_dense_tensors(tensors)
    for state, view in zip(states, _unflatten_dense_tensors(whole, tensors), strict=True):
        state[key] = view
