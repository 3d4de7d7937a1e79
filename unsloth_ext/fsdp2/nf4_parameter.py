"""`NF4Shard`: one rank's part of an NF4 weight, as a parameter that torch's FSDP2 shards, gathers and frees.

FSDP2 lets a tensor subclass say what is gathered and what the gathered bytes become (`fsdp_pre_all_gather`,
`fsdp_post_all_gather`: pytorch#119302, pytorch#123953; torchao's NF4Tensor was their first user). This one hands over packed
bytes, absmax and absmax2, all three as uint8, so they travel in the unit's one all-gather as what they are: bytes. Stored as
bfloat16, as QLoRA under FSDP was so far, packed bytes meet copies that are free to rewrite NaN bit patterns (bitsandbytes #1945).
FSDP2 copies each field straight to its own contiguous place, so the gathered weight needs no further pass over memory.

What a module then holds is bitsandbytes' own `Params4bit` with its `QuantState`, so `Linear4bit`, Unsloth's fused LoRA kernels and
`unsloth_ext.nf4.dequantize` read it as they read any 4-bit weight. It is made once; later gathers fill the same storages. Only
the codebooks (2 KiB, shared by all weights of a device) and the offset are on every rank.

A whole weight never has to exist. An `NF4Shard` claims the padded size of the whole (see reference.py) in the dtype that it
dequantises to, and owns one rank's groups; cutting it gives that rank its own tensors, without a copy, and empty stand-ins for
the others. FSDP2 thus shards what was never whole. The claimed size is a multiple of the world size, because FSDP2 asks of an
uneven shard that all its all-gather inputs have one size; the padding is cut off after the gather.
"""

from __future__ import annotations

import functools
import inspect
import math

import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Params4bit

from .nf4_cut import NF4Cut, NF4Fields, number, shared

__all__ = ["NF4Shard"]


class _Holder:
    """Where aliases find the fields; `fields` is None for another rank's piece. `unit`: the `UnitGather` (peer_gather.py) that
    this weight is number `index` of, where weights are gathered by copies."""

    __slots__ = ("fields", "index", "unit")

    def __init__(self, fields: NF4Fields | None):
        self.fields, self.unit, self.index = fields, None, 0


class NF4Shard(torch.Tensor):
    """The part of rank `rank` of an NF4 weight. Claims shape [world * chunk, weights a group] and `cut.dtype`.

    cut: `NF4Cut`; fields: `NF4Fields`, or None for a stand-in. Frozen: it has no gradient. It cannot be computed with:
    `unsloth_ext.fsdp2.shard` makes it part of a model. Conversions of dtype leave it as it is, like those of `Params4bit`.
    """

    @staticmethod
    def __new__(cls, cut: NF4Cut, rank: int, holder, *, device, shape=None):
        shape = (cut.world * cut.chunk, cut.group_weights) if shape is None else tuple(shape)
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=cut.dtype, device=device, requires_grad=False)

    def __init__(self, cut: NF4Cut, rank: int, holder, *, device, shape=None):
        self.cut, self.rank = cut, rank
        self._holder = holder if isinstance(holder, _Holder) else _Holder(holder)

    # -- making one --------------------------------------------------------------------------------------------------------

    @classmethod
    def of_fields(cls, cut: NF4Cut, rank: int, fields: NF4Fields) -> NF4Shard:
        """From tensors that are this rank's already, padded to the chunk. Raises ValueError for a wrong size or dtype."""
        expected = {
            "packed": (torch.uint8, cut.chunk * cut.group_bytes),
            "absmax": (cut.absmax_dtype, cut.chunk * cut.group_blocks),
        }
        if cut.blocksize2:
            expected["absmax2"] = (torch.float32, cut.chunk)
        for name, (dtype, numel) in expected.items():
            tensor = getattr(fields, name)
            if tensor.dtype != dtype or tensor.numel() != numel or not tensor.is_contiguous():
                raise ValueError(
                    f"{name} must be {numel} contiguous entries of {dtype} for rank {rank} of {cut.world}, "
                    f"got {tuple(tensor.shape)} of {tensor.dtype}"
                )
        return cls(cut, rank, fields, device=fields.packed.device)

    @classmethod
    def of_whole(cls, packed: torch.Tensor, state: QuantState, rank: int, world: int) -> NF4Shard:
        """This rank's part of a weight that is here whole: its pieces are copied, so that the rest can be freed.

        packed: the weight's bytes in any storage dtype; state: its `QuantState`. Raises ValueError as `NF4Cut.of` does.
        """
        cut = NF4Cut.of(state, world)
        start, stop = cut.real(rank)

        def piece(field, per_group):
            field = field.detach().reshape(-1)
            part = field[start * per_group : stop * per_group]
            out = part.new_zeros(cut.chunk * per_group)
            out[: part.numel()] = part
            return out

        as_bytes = packed.detach().as_subclass(torch.Tensor).reshape(-1).view(torch.uint8)[: cut.n_bytes]
        fields = NF4Fields(
            packed=piece(as_bytes, cut.group_bytes),
            absmax=piece(state.absmax, cut.group_blocks),
            absmax2=piece(state.state2.absmax, 1) if state.nested else None,
            offset=number(state.offset, as_bytes.device) if state.nested else None,
            code2=shared(state.state2.code) if state.nested else None,
            code=shared(state.code),
        )
        return cls.of_fields(cut, rank, fields)

    # -- what it holds -----------------------------------------------------------------------------------------------------

    @property
    def fields(self) -> NF4Fields:
        if self._holder.fields is None:
            raise RuntimeError("this is a stand-in for another rank's part of an NF4 weight; it has no data here")
        return self._holder.fields

    def bytes_held(self) -> int:
        """Bytes of packed weights, absmax and absmax2 on this rank, padding included."""
        return 0 if self._holder.fields is None else sum(t.numel() * t.itemsize for t in self.fields.tensors())

    # peft asks these of the weight of a Linear4bit.
    @property
    def compress_statistics(self) -> bool:
        return self.cut.blocksize2 > 0

    @property
    def quant_type(self) -> str:
        return self.cut.quant_type

    @property
    def blocksize(self) -> int:
        return self.cut.blocksize

    @property
    def quant_storage(self) -> torch.dtype:
        return torch.uint8

    bnb_quantized = True

    def __repr__(self, *, tensor_contents=None) -> str:
        owns = "stand-in" if self._holder.fields is None else f"{self.bytes_held()} bytes on {self.device}"
        return f"NF4Shard({tuple(self.cut.shape)}, rank {self.rank} of {self.cut.world}, {owns})"

    def _alias(self, shape=None, holder=None) -> NF4Shard:
        holder = self._holder if holder is None else holder
        device = self.device if holder.fields is None else holder.fields.packed.device
        return NF4Shard(self.cut, self.rank, holder, device=device, shape=self.shape if shape is None else shape)

    # -- FSDP2's hooks -----------------------------------------------------------------------------------------------------

    def fsdp_pre_all_gather(self, mesh, outer_size, outer_stride, module, mp_policy):
        fields, cut = self.fields, self.cut
        if mesh.size() != cut.world:
            raise RuntimeError(
                f"the weight {tuple(cut.shape)} was cut for {cut.world} ranks and is gathered over {mesh.size()}"
            )
        if (unit := self._holder.unit) is not None:
            unit.start()
            return (unit.token,), (cut, fields)
        return tuple(t.view(torch.uint8) for t in fields.tensors()), (cut, fields)

    def fsdp_post_all_gather(self, all_gather_outputs, metadata, param_dtype, *, out=None):
        cut, fields = metadata
        if (unit := self._holder.unit) is not None:
            unit.used()
            if out is None:
                weight = gathered(cut, fields, *unit.weight(self._holder.index))
                return _Gathered.carry(weight, unit.buffer), (unit.buffer,)
            all_gather_outputs = (unit.buffer,)
        if out is not None:  # FSDP2 has filled the storages that `out` looks at
            if out.untyped_storage().data_ptr() != all_gather_outputs[0].untyped_storage().data_ptr():
                raise RuntimeError(f"the gathered weight {tuple(cut.shape)} lost its storage: was its .data replaced?")
            return None
        if cut.world == 1:  # FSDP2 then copies the first input and gathers nothing
            all_gather_outputs = (all_gather_outputs[0], *(t.view(torch.uint8) for t in fields.tensors()[1:]))
        return _Gathered.carry(gathered(cut, fields, *all_gather_outputs), all_gather_outputs[0]), ()

    # -- what FSDP2, nn.Module and copy do with a parameter ----------------------------------------------------------------

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        implementation = _OPERATIONS.get(func)
        if implementation is None:
            raise NotImplementedError(
                f"{func} on a sharded NF4 weight: only its gathered form can be computed with. "
                "Call unsloth_ext.fsdp2.shard(model) and run the model's own forward."
            )
        return implementation(func, args, kwargs or {})


# FSDP2 asks for it in each gather of each weight, and inspect takes 60 us of the host's time to find out what is not written down.
NF4Shard.fsdp_pre_all_gather.__signature__ = inspect.signature(NF4Shard.fsdp_pre_all_gather)


def gathered(cut: NF4Cut, fields: NF4Fields, packed, absmax, absmax2=None) -> Params4bit:
    """The whole weight as `Params4bit` over gathered buffers (uint8, rank after rank), of which it is a view."""
    device = packed.device
    absmax = absmax.view(-1).view(cut.absmax_dtype)[: cut.blocks]
    state2 = None
    if cut.blocksize2:
        scales = absmax2.view(-1).view(torch.float32)[: cut.groups]
        state2 = QuantState(absmax=scales, code=fields.code2.to(device), blocksize=cut.blocksize2, dtype=torch.float32)
    state = QuantState(
        absmax=absmax, shape=cut.shape, code=fields.code.to(device), blocksize=cut.blocksize,
        quant_type=cut.quant_type, dtype=cut.dtype, state2=state2,
        offset=None if fields.offset is None else fields.offset.to(device),
    )  # fmt: skip
    return Params4bit(
        packed.view(-1)[: cut.n_bytes].view(-1, 1),
        requires_grad=False,
        quant_state=state,
        blocksize=cut.blocksize,
        compress_statistics=cut.blocksize2 > 0,
        quant_type=cut.quant_type,
        bnb_quantized=True,
    )


class _Gathered(torch.Tensor):
    """Carries a finished `Params4bit` through FSDP2, which makes the parameter of what post_all_gather returns.

    It does so by `nn.Parameter(torch.as_strided(it, ...))`, and nn.Parameter by `.detach()`. Both make a new object, which would
    lose the quant_state, so the first gives the finished parameter and the second, once, the same.
    """

    @staticmethod
    def carry(weight: Params4bit, storage: torch.Tensor) -> _Gathered:
        carrier = storage.as_subclass(_Gathered)
        carrier.weight = weight
        return carrier

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.as_strided:
            weight = args[0].weight

            def detach():
                del weight.detach
                return weight

            weight.detach = detach
            return weight
        return super().__torch_function__(func, types, args, kwargs or {})


# -- dispatch: shapes are played, data is shared -----------------------------------------------------------------------------

_aten = torch.ops.aten
_OPERATIONS: dict = {}


def _implements(*operations):
    def register(function):
        _OPERATIONS.update(dict.fromkeys(operations, function))
        return function

    return register


@_implements(_aten.detach.default, _aten.alias.default)
def _same(func, args, kwargs):
    return args[0]._alias()


@_implements(_aten.clone.default)
def _clone(func, args, kwargs):
    fields = args[0]._holder.fields
    return args[0]._alias(holder=_Holder(None if fields is None else fields.map(torch.clone)))


@_implements(_aten.split.Tensor)
def _split(func, args, kwargs):
    shard, size, dim = args[0], args[1], args[2] if len(args) > 2 else kwargs.get("dim", 0)
    cut = shard.cut
    whole = (cut.world * cut.chunk, cut.group_weights)
    if dim != 0 or size != cut.chunk or tuple(shard.shape) != whole:
        raise RuntimeError(
            f"the NF4 weight {tuple(cut.shape)} was cut for {cut.world} ranks ({cut.chunk} groups each) and cannot be "
            f"cut again, into {math.ceil(whole[0] / size)} parts along dimension {dim}"
        )
    nothing = _Holder(None)
    shape = (cut.chunk, cut.group_weights)
    return [shard._alias(shape, shard._holder if rank == shard.rank else nothing) for rank in range(cut.world)]


@_implements(_aten.new_zeros.default)
def _new_zeros(func, args, kwargs):
    return args[0]._alias(args[1], _Holder(None))  # filled by copy_


@_implements(_aten.slice.Tensor)
def _slice(func, args, kwargs):
    shard, dim, start, end, step = (*args, *(0, 0, None, None, 1)[len(args) :])
    length = shard.shape[dim]
    if (start or 0) != 0 or step != 1 or (end is not None and end < length):
        raise RuntimeError(f"a part [{start}:{end}:{step}] of a sharded NF4 weight's {length} groups cannot be taken")
    return shard._alias()


@_implements(_aten.copy_.default)
def _copy(func, args, kwargs):
    target, source = args[0], args[1]
    if not isinstance(source, NF4Shard) or source.cut != target.cut or source.rank != target.rank:
        raise RuntimeError(f"only the same part of the same weight can be copied into {target}, not {source}")
    if (fields := source._holder.fields) is not None and target._holder.fields is None:
        target._holder.fields = fields
    elif fields is not None:
        for mine, other in zip(target._holder.fields.tensors(), fields.tensors(), strict=True):
            mine.copy_(other)
    return target


@_implements(_aten.view.default)
def _view(func, args, kwargs):
    shard, shape = args[0], list(args[1])
    if -1 in shape:
        shape[shape.index(-1)] = shard.numel() // -math.prod(shape)
    return shard._alias(shape)


@_implements(_aten._to_copy.default)
def _to(func, args, kwargs):
    shard, device = args[0], kwargs.get("device")
    if device is None or shard._holder.fields is None:
        return shard._alias()
    move = functools.partial(torch.Tensor.to, device=device, non_blocking=kwargs.get("non_blocking", False))
    return shard._alias(holder=_Holder(shard.fields.map(move)))


@_implements(_aten._pin_memory.default)
def _pin(func, args, kwargs):
    return args[0]._alias(holder=_Holder(args[0].fields.map(torch.Tensor.pin_memory)))


@_implements(_aten.is_pinned.default)
def _is_pinned(func, args, kwargs):
    return args[0].fields.packed.is_pinned()
