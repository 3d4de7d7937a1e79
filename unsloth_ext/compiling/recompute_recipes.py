"""Which saved tensor is which product: found by computing the candidates and comparing every bit.

The fused kernels of a fast path hand autograd tensors without names. For each new list of saved tensors (`Frame.signature`) the
norms and the MLP of the layer are run once more on what went in, and every saved tensor that equals a product in all its bits
gets that product's recipe. A projection may be summed in three orders: as a peft module does, as Unsloth's fused kernels do
(`out.addmm_(XA, B, alpha=s)`), and in one sum of both products, as a compiled layer may (projections.py). The right one is the one
that gives the same bits. This costs one forward of a layer without attention, or a few, once.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from .recompute import Frame, Saved


@dataclass
class Script:
    """norm: name of the norm that made the MLP's input and the event that holds the norm's input (None for the layer's input).
    norms: the same for the layer's own events.
    products: event index -> name of the product ("gate", "up", "act", "product"); None where some wide tensor is none of them: then
    the MLP is replayed. fused: how projections are summed, "in place" or "one sum"; "" for as modules. final: whether it need
    not be looked for again.
    copies: event of the attention's output as the output projection reads it -> event as the attention's backward reads it.
    outline, mlp_input: of a compiled layer (retrace.py). why: what was not found, in words. adapters: `trained` when it was found."""

    norm: tuple[str, int | None] | None = None
    products: dict[int, str] | None = None
    fused: str = ""
    final: bool = True
    norms: dict[int, tuple[str, int | None]] = field(default_factory=dict)
    copies: dict[int, int] = field(default_factory=dict)
    outline: dict[int, tuple[int, bool]] | None = None
    mlp_input: int | None = None
    why: str = ""
    adapters: tuple[bool, ...] | None = None

    def says_as_much_as(self, other: Script) -> bool:
        """Whether all that `other` found was found here too."""
        found = (self.norm, self.products, self.norms, self.copies, self.outline, self.mlp_input)
        return found == (other.norm, other.products, other.norms, other.copies, other.outline, other.mlp_input)


def norms_of(layer: torch.nn.Module) -> dict[str, torch.nn.Module]:
    return {name: child for name, child in layer.named_children() if "norm" in name.lower()}


def norm_functions(layer: torch.nn.Module) -> dict[str, Callable]:
    """How the layer's forward may compute each of its norms: by calling the module, or, as Unsloth's fast paths do, by handing it
    to the function `fast_rms_layernorm` that the forward finds among its globals."""
    functions = {}
    fast = getattr(inspect.unwrap(type(layer).forward), "__globals__", {}).get("fast_rms_layernorm")
    if fast is None:  # an instance's own forward
        before = getattr(layer.__dict__.get("_unsloth_ext_memory"), "before", None)
        fast = (
            getattr(inspect.unwrap(before), "__globals__", {}).get("fast_rms_layernorm") if before is not None else None
        )
    for name, norm in norms_of(layer).items() if fast is not None else ():
        functions[f"{name}, fast"] = functools.partial(fast, norm)
        functions[f"{name}, fast, gemma"] = functools.partial(fast, norm, gemma=True)
    return functions | norms_of(layer)  # the fast ones first: on few numbers both may give the same bits


def lora_of(projection):
    """(base layer, A, B, scaling) of a peft Linear with one plain active adapter; A is None without; None for what is not that."""
    base = getattr(projection, "base_layer", projection)
    if base is projection or getattr(projection, "disable_adapters", False) or getattr(projection, "merged", False):
        return base, None, None, None
    active = getattr(projection, "active_adapters", ())
    if len(active) != 1 or active[0] not in getattr(projection, "lora_A", {}):
        return None
    name = active[0]
    return base, projection.lora_A[name].weight, projection.lora_B[name].weight, projection.scaling[name]


def trained(mlp: torch.nn.Module | None) -> tuple[bool, ...]:
    """For each adapter of gate and up, whether its B is other than zeros. One synchronisation."""
    projections = (getattr(mlp, f"{name}_proj", None) for name in ("gate", "up"))
    parts = (lora_of(projection) for projection in projections if projection is not None)
    adapters = [part[2] for part in parts if part and part[2] is not None]
    return tuple(torch.stack([b.detach().any() for b in adapters]).tolist()) if adapters else ()


def dense_weight(base: torch.nn.Module, dtype: torch.dtype) -> torch.Tensor:
    weight = base.weight
    state = getattr(weight, "quant_state", None)
    if state is None:
        return weight
    if getattr(state, "quant_type", None) == "nf4":
        from ..nf4 import dequantize

        return dequantize(weight, state)
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight, state)


def fused_projection(projection, tensor: torch.Tensor) -> torch.Tensor | None:
    """A projection in the order of the fused kernels: x W^T, then += s (x A^T) B^T in the output's own dtype."""
    parts = lora_of(projection)
    if parts is None:
        return None
    base, a, b, scaling = parts
    flat = tensor.reshape(-1, tensor.shape[-1])
    out = flat @ dense_weight(base, tensor.dtype).t()
    if a is not None:
        out.addmm_(flat @ a.to(tensor.dtype).t(), b.to(tensor.dtype).t(), alpha=scaling)
    return out.view(*tensor.shape[:-1], -1)


def one_sum_projection(mlp: torch.nn.Module, name: str, tensor: torch.Tensor) -> torch.Tensor | None:
    """Gate or up as one sum of its products, as a compiled layer has it."""
    from .projections import gate_or_up, mlp_refusal

    both = []
    for projection in (mlp.gate_proj, mlp.up_proj):
        if (parts := lora_of(projection)) is None or parts[1] is None:
            return None
        base, a, b, scaling = parts
        both.append((base.weight, getattr(base.weight, "quant_state", None), a, b, scaling))
    return None if mlp_refusal(tensor, *both) else gate_or_up(name, tensor, *both)


class Products:
    """The MLP's inner tensors, computed from its input when they are wanted. `gate`, `up`, `act` (of gate), `product`.

    part: the MLP's frame, or the MLP's `retrace.Part` of a compiled layer's."""

    def __init__(self, mlp: torch.nn.Module, part, script: Script):
        self.mlp, self.part, self.fused = mlp, part, script.fused
        self.events = {name: index for index, name in (script.products or {}).items()}

    def __call__(self, name: str) -> torch.UntypedStorage:
        with torch.no_grad(), self.part.surroundings.again():
            return self.make(name).contiguous().untyped_storage()

    def make(self, name: str) -> torch.Tensor:
        if name in ("gate", "up"):
            projection, tensor = getattr(self.mlp, f"{name}_proj"), self.part.input.tensor()
            if self.fused == "one sum":
                return one_sum_projection(self.mlp, name, tensor)
            if self.fused:
                return fused_projection(projection, tensor)
            with (
                torch.enable_grad()
            ):  # as in the forward: peft sums in place, in another order, where no gradient is wanted
                return projection(tensor).detach()
        if name == "act":
            return self.mlp.act_fn(self._have("gate"))
        return self._have("act") * self._have("up")

    def _have(self, name: str) -> torch.Tensor:
        """Taken from the value that holds it, or made for it: the backward will ask for that value soon."""
        ref, dtype, shape = self.part.events[self.events[name]] if name in self.events else (None, None, None)
        value = None if ref is None else ref()
        if value is None:
            return self.make(name)
        return torch.empty(0, dtype=dtype, device=value.device).set_(value.get(), 0, shape)


def norm_recipe(norm: Callable, source: Saved, surroundings) -> Callable[[], torch.UntypedStorage]:
    def recipe():
        with torch.no_grad(), surroundings.again():
            return norm(source.tensor()).contiguous().untyped_storage()

    return recipe


def copy_recipe(source: Saved, sequence: int, surroundings) -> Callable[[], torch.UntypedStorage]:
    def recipe():
        with torch.no_grad(), surroundings.again():
            return rows_of(source.tensor(), sequence).untyped_storage()

    return recipe


def rows_of(attended: torch.Tensor, sequence: int) -> torch.Tensor:
    """An attention's output (batch, heads, length, width), length perhaps padded, as rows for the output projection."""
    return attended[:, :, :sequence].transpose(1, 2).contiguous(memory_format=torch.contiguous_format)


def view(frame: Frame, index: int) -> Saved | None:
    """An event's view if it covers its storage, in whatever order of dimensions."""
    ref, dtype, shape = frame.events[index]
    value = None if ref is None else ref()
    if value is None or shape.numel() * dtype.itemsize != value.nbytes:
        return None
    stride, offset = frame.layouts[index]
    like = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
    return Saved(value, like) if offset == 0 and dense(shape, stride) else None


def dense(shape, stride) -> bool:
    expected = 1
    for step, size in sorted((step, size) for step, size in zip(stride, shape, strict=True) if size > 1):
        if step != expected:
            return False
        expected *= size
    return True


def whole(frame: Frame, index: int) -> Saved | None:
    """The value of an event read as one contiguous tensor, or None if the event's view does not cover its storage."""
    ref, dtype, shape = frame.events[index]
    value = None if ref is None else ref()
    if value is None or shape.numel() * dtype.itemsize != value.nbytes:
        return None
    return Saved(value, torch.empty(shape, dtype=dtype, device="meta"))


def same(candidate: torch.Tensor | None, saved: torch.Tensor) -> bool:
    """Whether the bytes of two tensors are equal; of `saved` the storage is compared, whatever view of it was saved."""
    if candidate is None or candidate.numel() != saved.numel() or candidate.dtype != saved.dtype:
        return False
    return torch.equal(candidate.reshape(-1), saved.reshape(-1))


def examine(
    layer: torch.nn.Module,
    frame: Frame,
    mlp: torch.nn.Module | None,
    inner: Frame | None,
    pattern: Script | None = None,
) -> Script:
    """The script of one run of `layer` whose frames are still open; inner: the frame of its MLP, if that was one.

    pattern: what was found in another layer of the same kind. Then only that is computed and compared, nothing searched."""
    script = Script(adapters=trained(mlp))
    with torch.no_grad(), frame.surroundings.again():
        x = frame.input.tensor()
        handles = [(i, h) for i in range(len(frame.events)) if (h := whole(frame, i)) and h.shape.numel() == x.numel()]
        wanted = [(i, h) for i, h in handles if h.value is not frame.input.value and address_of(h) not in frame.outputs]
        goal = None if inner is None or address_of(inner.input) in frame.outputs else inner.input
        norms = norm_functions(layer) if wanted or goal else {}
        found: dict[
            int | None, list
        ] = {}  # event, or None for the MLP's input -> (norm, event of its input, that input's value), all that fit
        for source, handle in [(None, frame.input), *wanted]:
            for name, norm in norms.items():
                if pattern is not None and (name, source) not in (pattern.norm, *pattern.norms.values()):
                    continue
                made = norm(handle.tensor().view(x.shape))
                for index, other in wanted:
                    if pattern is not None and pattern.norms.get(index) != (name, source):
                        continue
                    if other.value is not handle.value and same(made, other.tensor()):
                        found.setdefault(index, []).append((name, source, handle.value))
                if (
                    goal is not None
                    and (pattern is None or pattern.norm == (name, source))
                    and same(made, goal.tensor())
                ):
                    found.setdefault(None, []).append((name, source, handle.value))
        for index, fits in found.items():
            fit = lasting(layer, fits)
            if fit is not None and index is None:
                script.norm = fit
            elif fit is not None:
                script.norms[index] = fit
        script.norms = without_cycles(script.norms)
        _find_copies(script, frame, wanted, pattern)
        if inner is not None and mlp is not None:
            find_products(script, mlp, inner, pattern)
    return script


def lasting(layer: torch.nn.Module, fits: list) -> tuple[str, int | None] | None:
    """The (norm, event of its input) of all that fit, or None where they are equal today and training will part them: norms
    that are trained and start alike, and inputs that differ by an attention whose output projection starts as zeros."""
    modules = {name.partition(",")[0] for name, _, _ in fits}
    trained_norms = any(p.requires_grad for name in modules for p in getattr(layer, name).parameters())
    if not fits or len({value for _, _, value in fits}) > 1 or len(modules) > 1 and trained_norms:
        return None
    return fits[0][:2]


def without_cycles(norms: dict[int, tuple[str, int | None]]) -> dict[int, tuple[str, int | None]]:
    """Those that end at something else. A norm whose weights are ones gives back what has been normed already, so that two copies of
    its result look like norms of each other."""

    def ends(index):
        seen = set()
        while index in norms and index not in seen:
            seen.add(index)
            index = norms[index][1]
        return index not in seen

    return {index: fit for index, fit in norms.items() if ends(index)}


def _find_copies(script: Script, frame: Frame, wanted: list, pattern: Script | None) -> None:
    for index, handle in wanted:
        if index in script.norms:
            continue
        for other, (_, dtype, shape) in enumerate(frame.events):
            if pattern is not None and pattern.copies.get(index) != other:
                continue
            if len(shape) != 4 or shape[0] != frame.batch or shape[2] < frame.sequence or dtype != handle.dtype:
                continue
            if shape[1] * shape[3] * frame.sequence * frame.batch != handle.shape.numel():
                continue
            source = view(frame, other)
            if source is None or source.value in (handle.value, frame.input.value):
                continue
            if same(rows_of(source.tensor(), frame.sequence), handle.tensor()):
                script.copies[index] = other
                break


def address_of(handle: Saved) -> int:
    return handle.value.get().data_ptr()


def find_products(script: Script, mlp: torch.nn.Module, part, pattern: Script | None = None) -> None:
    """Fill script.products from `part` (see Products), or say in script.why what was found instead."""
    # While B is all zeros the two orders cannot be told apart by their bits: look again when it is not.
    script.final = all(script.adapters or ())
    if pattern is not None and pattern.products is None:
        script.why = pattern.why
        return
    least = part.input.value.nbytes // 8  # x A^T is small: it is kept
    wide = {
        i
        for i, (ref, _, _) in enumerate(part.events)
        if ref is not None and ref() is not part.input.value and ref().nbytes >= least
    }
    adapters = [
        parts[1:3]
        for name in ("gate", "up")
        if (parts := lora_of(getattr(mlp, f"{name}_proj"))) and parts[2] is not None
    ]
    ranks = {a.shape[0] for a, _ in adapters}
    # As modules, the projections leave x A^T behind; the fused kernels compute that again in their backward.
    as_modules = any(
        shape and shape[-1] in ranks and len(shape) > 1
        for ref, _, shape in part.events
        if not _is_adapter(shape, adapters)
    )
    # Where the functions that do are there, a compiled layer has one sum: first, because a short batch may have the same bits in place.
    one_sum = not isinstance(part, Frame) and f"{__package__}.projections" in sys.modules
    orders = ("",) if as_modules else (*(("one sum",) if one_sum else ()), "in place", "")
    for fused in orders if pattern is None else (pattern.fused,):
        products, drawn = Products(mlp, part, Script(fused=fused)), _random_state(part)
        try:
            made = {name: products.make(name) for name in ("gate", "up")}
            if any(one is None for one in made.values()):
                continue  # nothing that can be summed like this
            found = _named(wide, made, part)
            if found.keys() != wide:  # an MLP that is not fused saves more
                made["act"] = mlp.act_fn(made["gate"])
                made["product"] = made["act"] * made["up"]
                found = _named(wide, made, part)
        except torch.OutOfMemoryError:  # says nothing about the MLP
            raise
        except (AttributeError, TypeError, ValueError, RuntimeError) as error:
            script.why += f"{fused or 'as modules'}: {type(error).__name__}: {str(error)[:200]}; "
            continue  # another kind of MLP
        if any(not torch.equal(a, b) for a, b in zip(drawn, _random_state(part), strict=True)):
            script.why += "its dropout draws; "
            return  # each product alone would draw other masks than all in their order
        if found.keys() == wide:
            script.products, script.fused = found, fused
            return
        script.why += _how_far(wide - found.keys(), made, part, fused)


def _named(wide: set[int], made: dict[str, torch.Tensor], part) -> dict[int, str]:
    found = {}
    for index in wide:
        handle = whole(part, index)
        for name, tensor in made.items() if handle is not None else ():
            if same(tensor, handle.tensor()):
                found[index] = name
                break
    return found


def _how_far(left: set[int], made: dict[str, torch.Tensor], part, fused: str) -> str:
    """For the reader of a report: rounding in another place, or another thing altogether."""
    said = []
    for index in sorted(left):
        if (handle := whole(part, index)) is None or handle.dtype != made["gate"].dtype:
            said.append(f"{tuple(part.events[index][2])}: not contiguous or of another dtype")
            continue
        saved = handle.tensor().reshape(-1)
        shares = {
            n: (t.reshape(-1) != saved).float().mean().item() for n, t in made.items() if t.numel() == saved.numel()
        }
        said.append(f"{tuple(handle.shape)}: {', '.join(f'{v:.2%} unlike {n}' for n, v in shares.items())}")
    return f"{fused or 'as modules'}: {'; '.join(said)}; "


def _is_adapter(shape, adapters) -> bool:
    return any(tuple(shape) in (tuple(w.shape), tuple(w.shape[::-1])) for pair in adapters for w in pair)


def _random_state(frame) -> list[torch.Tensor]:
    device = frame.input.value.device
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])
