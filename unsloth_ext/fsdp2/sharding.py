"""`shard(model)`: fully sharded QLoRA on torch's FSDP2, with its public interface only.

Each decoder layer is a unit: gathered before its forward, freed after it, gathered again for its backward. The input embedding
and the output head are units of their own, so that they are not gathered while layers run; where weights come by copies, a frozen
embedding with a plain lookup of its own is read by rows instead (embedding_rows.py). What is left and trained belongs to the
root. What is frozen and small, such as norms, stays whole on each rank. A head tied to the embedding is one parameter with two users
and belongs to the root.

What this closes of the gaps in Unsloth 2026.10.9's own FSDP2 (`UNSLOTH_FSDP2=1`; `models/fsdp2_native.py`, `fsdp2_load.py`):

* a 4-bit model is loaded in slices (`load`); there a sharded load is 16-bit only, and each rank first holds the whole model
* absmax is sharded and gathered with the packed bytes; there every rank keeps all of it, 1/32 of a weight's bytes
* embedding and head are gathered while they run; there they belong to the root and stay for the whole step
* `generate` works before the first forward; there the next forward raises "already been lazily initialized"
* packed bytes are never of a floating dtype, so no copy can rewrite their NaN bit patterns (bitsandbytes #1945)
* nothing private of torch's FSDP2 is patched, and releases of Unsloth without FSDP2 are served alike, or none at all
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterable

import torch
import torch.distributed as dist
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from ..errors import Refused, UsageError
from . import kept_layers, peer_gather, peer_memory, prefetching, switch
from .embedding_rows import EmbeddingRows, can_be_read_by_rows
from .nf4_parameter import NF4Shard
from .processes import default_mesh, device_of, meet, position
from .row_shard import RowShard
from .staged_collectives import staged_collectives
from .team import Team
from .workspaces import one_workspace

__all__ = ["accumulate", "gathered", "shard", "units_of"]

_SMALL = 1 << 20  # bytes of frozen parameters outside the units that are not worth a gather
_SMALL_ONE = 1 << 17  # bytes of a frozen parameter in a layer, a norm or a bias, that is not
GATHERS = ("auto", "collective", "copies")


def shard(
    model: nn.Module,
    mesh: DeviceMesh | None = None,
    *,
    reshard_after_forward: bool = True,
    cpu_offload: bool = False,
    mixed_precision: torch.dtype | MixedPrecisionPolicy | None = None,
    residency: int | str = "auto",
    gather: str = "auto",
    timeout: datetime.timedelta | None = None,
) -> nn.Module:
    """Shard a transformers (and peft) model in place, 4-bit weights included, and return it. Called by every rank, once.

    model: from `load`, or any 4-bit model that is whole on each rank: then its `Params4bit` are cut and the rest is freed. With
        its adapters: parameters added later would not be sharded. Make the optimizer afterwards, and not between a forward and its
        backward, where what is kept gathered is whole.
    mesh: one dimension, or two for replicas of shards (HSDP); all processes if None.
    reshard_after_forward: False keeps every unit gathered between its forward and its backward.
    cpu_offload: parameters, gradients and optimizer state live in host memory; units are gathered on the card. Needs gloo beside
        NCCL: `init_process_group("cpu:gloo,cuda:nccl")`.
    mixed_precision: a dtype that parameters which are not NF4 are gathered in (gradients are reduced in float32), or a policy. If
        None each parameter computes in its own dtype, as on one device.
    residency: bytes of gathered layers that a rank may keep from forward to backward and over the micro-batches of an accumulated
        step (see `accumulate`), the last layers first; "all" for no limit, 0 for the least memory. "auto": 5% of the memory that it
        may use of its card (the smallest of all ranks), nothing with cpu_offload, on a CPU, or where nothing is trained.
    gather: how NF4 weights and adapters are gathered, and the adapters' gradients reduced. "collective": with everything else, by NCCL or gloo. "copies": by reading them where they
        lie (see peer_gather.py), on one host only; a frozen embedding is then read by rows, and gives NaN for an id that it does not
        have. "auto": by copies among CUDA cards that can, else by the collective.
    timeout: how long to wait for the other ranks before sharding (10 minutes).

    Raises `UsageError` for a model that cannot be sharded, `Refused` for one that is sharded already, `UnslothExtError` where
    ranks disagree or one is missing. Nothing has been changed then, unless memory ran out. Where only "copies" are impossible,
    which is known last, the model is sharded when `UsageError` is raised, and gathers by the collective.
    """
    mesh = default_mesh() if mesh is None else mesh
    meet("sharding the model", timeout)
    device, (rank, world) = device_of(mesh), position(mesh)
    policy = mixed_precision
    if not isinstance(policy, MixedPrecisionPolicy):
        policy = MixedPrecisionPolicy(param_dtype=policy, reduce_dtype=torch.float32, cast_forward_inputs=False)
    error = None
    try:
        if not isinstance(reshard_after_forward, bool):
            raise UsageError(f"reshard_after_forward must be True or False, got {reshard_after_forward!r}")
        if residency not in ("auto", "all") and (type(residency) is not int or residency < 0):
            raise UsageError(f"residency must be a number of bytes, 'auto' or 'all', got {residency!r}")
        if gather not in GATHERS or (gather == "copies" and cpu_offload):
            known = " or ".join(GATHERS[:2] if cpu_offload else GATHERS)
            raise UsageError(f"gather must be {known}{' with cpu_offload' if cpu_offload else ''}, got {gather!r}")
        if cpu_offload and "gloo" not in dist.get_backend_config():
            raise UsageError(
                f"cpu_offload reduces on the host, for which the backend {dist.get_backend_config()!r} has nothing",
                'Start with torch.distributed.init_process_group("cpu:gloo,cuda:nccl").',
            )
        _check(model, world)
        layers, ends = units_of(model)
        root_parameters, kept_whole = _outside(model, [*layers, *ends])
        kept_whole |= _small_in(layers)
        trains = any(p.requires_grad for p in model.parameters())
        limit = kept_layers.limit_of(device) if trains and not cpu_offload else 0
        waits = peer_memory.streams_can_wait(device)
    except Exception as problem:
        error = problem
    team = Team("sharding the model", timeout)
    team.agree(error)
    settings = dict(
        reshard_after_forward=reshard_after_forward, cpu_offload=cpu_offload, mixed_precision=policy, residency=residency,
        gather=gather,
    )  # fmt: skip
    everyone = team.gather((settings, limit, waits))
    for name in settings:
        if len(different := dict.fromkeys(str(one[name]) for one, *_ in everyone)) > 1:
            raise UsageError(f"{name} must be the same on every rank, got {' and '.join(different)}")
    if residency == "auto":
        residency = min(limit for _, limit, _ in everyone)
    elif residency == "all":
        residency = float("inf")

    offload = CPUOffloadPolicy(pin_memory=device.type == "cuda") if cpu_offload else OffloadPolicy()
    options = dict(mesh=mesh, mp_policy=policy, offload_policy=offload, reshard_after_forward=reshard_after_forward)
    for parameter in kept_whole:
        parameter.data = parameter.data.to(device=device, dtype=policy.param_dtype or parameter.dtype)
    # A unit is cut before the next is touched: a model that is whole on the card gives its memory back layer by layer.
    by_copies = gather == "copies" or (gather == "auto" and mesh.device_type == "cuda" and not cpu_offload)
    rows, plain = None, ends and ends[0] is model.get_input_embeddings() and can_be_read_by_rows(ends[0])
    if by_copies and world > 1 and plain and policy.output_dtype is None:
        rows = EmbeddingRows(ends.pop(0), mesh, rank, world, device, policy.param_dtype)
    for unit in (*layers, *ends):
        cut_4bit(unit, rank, world, device)
        fully_shard(unit, **options, ignored_params=kept_whole)
    cut_4bit(model, rank, world, device)
    _move_rest(model, device)
    fully_shard(model, **options, ignored_params=kept_whole | ({rows.embedding.weight} if rows else set()))
    can_wait = all(waits for *_, waits in everyone)
    staged = staged_collectives(layers, world, policy) if by_copies and can_wait else []
    if by_copies and world > 1 and not can_wait:
        switch.say("adapters go by collectives, not by copies: the driver lets no stream wait for a number.")
    others = [*([rows] if rows else []), *staged]
    hindrance = _connect(model, layers, ends, mesh, others, timeout) if by_copies else None
    if rows and hindrance:
        fully_shard(rows.embedding, **options)
        ends.insert(0, rows.embedding)
    model._unsloth_ext_staged = staged if by_copies and not hindrance else []
    prefetching.arrange(model, layers, ends, by_copies and not hindrance)
    model._unsloth_ext_resident = kept_layers.keep(layers, residency, kept_whole)
    kept = (model._unsloth_ext_resident, ()) if reshard_after_forward else (layers, ends)
    kept_layers.free_in_time(model, *kept, root_trains=any(p.requires_grad for p in root_parameters))
    model._unsloth_ext_reshards = reshard_after_forward  # what generation.py goes back to
    model._unsloth_ext_offloads = cpu_offload
    if device.type == "cuda":
        one_workspace(model)
    _initialise(model)
    if rows and not hindrance:
        prefetching.first_layer_first(model, layers)
    if root_parameters and hasattr(model, "generate"):
        register_fsdp_forward_method(model, "generate")  # it calls inner forwards that pass the root's hooks by
    if hindrance and gather == "auto":
        switch.say(f"4-bit weights are gathered by the collective, not by copies: {hindrance}.")
    if hindrance and gather == "copies":
        raise UsageError(f"gather='copies' is not possible: {hindrance}", "Leave it at 'auto'.")
    return model


def units_of(model: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """(decoder layers, [embedding, head]) of a transformers model, peft or not; the second without what is tied or missing.

    Layers are the modules of the classes that the model declares in `_no_split_modules`, else the members of its outermost
    lists of blocks. Raises `UsageError` if there are none.
    """
    declared = {name for m in model.modules() for name in (getattr(m, "_no_split_modules", None) or ())}
    layers = [m for m in model.modules() if type(m).__name__ in declared and any(True for _ in m.parameters())]
    if not layers:
        for module in model.modules():
            if isinstance(module, nn.ModuleList) and len(module) > 1 and all(any(m.children()) for m in module):
                layers = list(module)
                break
    if not layers:
        raise UsageError(f"no decoder layers were found in {type(model).__name__}")
    within = {id(inner) for layer in layers for inner in layer.modules() if inner is not layer}
    layers = [layer for layer in layers if id(layer) not in within]
    inside = {id(m) for layer in layers for m in layer.modules()}
    ends = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        module = getattr(model, getter, lambda: None)()
        if isinstance(module, nn.Module) and id(module) not in inside and any(True for _ in module.parameters()):
            ends.append(module)
    weights = [{id(p) for p in module.parameters()} for module in ends]
    if len(ends) == 2 and weights[0] & weights[1]:
        ends = []
    return layers, ends


def _check(model: nn.Module, world: int) -> None:
    if sharded := [name or type(model).__name__ for name, m in model.named_modules() if isinstance(m, FSDPModule)]:
        raise Refused(
            f"the model is sharded by FSDP2 already ({sharded[0]})",
            "Where Unsloth or accelerate shards the model itself (UNSLOTH_FSDP2, an FSDP accelerate config), turn one of them off.",
        )
    for name, parameter in model.named_parameters():
        if isinstance(parameter, (NF4Shard, RowShard)):
            cut_for = parameter.cut.world if isinstance(parameter, NF4Shard) else parameter.world
            if cut_for != world:
                raise UsageError(f"{name} was loaded for {cut_for} ranks and cannot be sharded over {world}")
        elif parameter.is_meta:
            raise UsageError(f"{name} is on the meta device: it has not been loaded")
        elif isinstance(parameter, Params4bit):
            state = parameter.quant_state
            if state is None:
                raise UsageError(
                    f"{name} is a 4-bit weight that has not been quantised yet", "Move the model to its device."
                )
            if state.quant_type != "nf4":
                raise UsageError(f"{name} is quantised as {state.quant_type}; only nf4 can be sharded")
        elif not parameter.is_floating_point():
            raise UsageError(
                f"{name} is {parameter.dtype} ({type(parameter).__name__}); only NF4 and floating dtypes can be sharded"
            )


def _outside(model: nn.Module, units: Iterable[nn.Module]) -> tuple[list[nn.Parameter], set[nn.Parameter]]:
    """(parameters for the root to shard, small frozen ones that stay whole) of those that no unit has."""
    inside = {id(p) for unit in units for p in unit.parameters()}
    left = [p for p in model.parameters() if id(p) not in inside]
    plain = [p for p in left if not p.requires_grad and not isinstance(p, (NF4Shard, RowShard, Params4bit))]
    small = set(plain) if sum(p.numel() * p.itemsize for p in plain) <= _SMALL else set()
    return [p for p in left if p not in small], small


def _small_in(layers: list[nn.Module]) -> set[nn.Parameter]:
    """Their frozen norms and biases."""
    found = (p for layer in layers for p in layer.parameters() if not p.requires_grad and p.ndim == 1)
    found = (p for p in found if p.is_floating_point() and not isinstance(p, RowShard))
    return {p for p in found if p.numel() * p.itemsize <= _SMALL_ONE}


def cut_4bit(module: nn.Module, rank: int, world: int, device: torch.device) -> None:
    """Replace each whole 4-bit weight by this rank's part, and drop the references to the whole."""
    known: dict[int, nn.Parameter] = {}
    for owner in module.modules():
        for name, parameter in list(owner._parameters.items()):
            if isinstance(parameter, Params4bit):
                if id(parameter) not in known:
                    part = NF4Shard.of_whole(parameter, parameter.quant_state, rank, world).to(device)
                    known[id(parameter)] = nn.Parameter(part, requires_grad=False)
                owner._parameters[name] = known[id(parameter)]
        if isinstance(owner, Linear4bit):
            owner.quant_state = None
            # bitsandbytes would swap the gathered bytes for another layout when it evaluates on such a CPU.
            owner.support_avx512bf16_for_cpu = False


def _move_rest(model: nn.Module, device: torch.device) -> None:
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device != device:
                module._buffers[name] = buffer.to(device)


def _connect(model, layers, ends, mesh, others: list, timeout) -> str | None:
    """Connect the ranks for gathers by copies. Returns what stands against it."""
    shards, seen = [], set()
    for module in (*layers, *ends, model):  # the model: what no unit has
        # A shared one is gathered and freed with its first unit.
        new = [p for p in module.parameters() if id(p) not in seen]
        seen.update(map(id, new))
        shards.append([shard for p in new if (shard := _shard_of(p)) is not None])
    return peer_gather.connect([unit for unit in shards if unit], mesh, timeout, others)


def _shard_of(parameter) -> NF4Shard | None:
    local = getattr(parameter, "_local_tensor", None)
    return local if isinstance(local, NF4Shard) else None


def _initialise(model: nn.Module) -> None:
    """Let FSDP2 settle who the root is, by a forward of nothing through the root's hooks.

    It otherwise does so at the first forward, and takes the first module that runs for the root. If that is not the outermost one
    (generate of a peft model, say), the next forward of the outermost raises "already been lazily initialized".
    """
    name = "_unsloth_ext_begin"
    setattr(model, name, lambda nothing: None)
    register_fsdp_forward_method(model, name)
    with torch.no_grad():
        getattr(model, name)(None)  # with no argument at all, FSDP2 fails where it would move the first one to the card
    delattr(model, name)
    model.reshard()


def accumulate(model: nn.Module, last: bool) -> None:
    """Say before each micro-batch whether it is the last of its step.

    Before the last one gradients stay on each rank, unreduced, and the layers within `residency` stay gathered after their
    backward: they are gathered once a step.
    """
    if not isinstance(model, FSDPModule):
        raise UsageError("accumulate needs the model that shard() returned")
    model.set_requires_gradient_sync(last)
    for layer in model._unsloth_ext_resident:
        layer.set_reshard_after_backward(last, recurse=False)


@contextlib.contextmanager
def gathered(*modules: nn.Module):
    """Within it the parameters of these units are whole, for code that reads them without a forward. A collective.

    A unit is a decoder layer, with its adapters, an untied embedding or head, or the model itself, which has what belongs to no other
    unit. Raises `UsageError` for another module with sharded parameters.
    """
    read_by_rows = [module for module in modules if hasattr(module, "_unsloth_ext_rows")]
    for module in modules:
        if isinstance(module, FSDPModule) or module in read_by_rows:
            continue
        if any(isinstance(p, DTensor) for p in module.parameters()):
            raise UsageError(f"{type(module).__name__} is no unit of its own", "Pass its decoder layer, or the model.")
    with contextlib.ExitStack() as opened:
        for module in modules:
            if module in read_by_rows:
                opened.enter_context(module._unsloth_ext_rows.whole(module))
            elif isinstance(module, FSDPModule):
                module.unshard()
                opened.callback(module.reshard)
        yield
