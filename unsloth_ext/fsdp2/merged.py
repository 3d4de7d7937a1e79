"""`save_merged` and `save_full`: a sharded model as a folder that `from_pretrained` reads on one device, weight after weight.

`save_merged` adds the adapters to the dequantised base weights: W + scaling * (B @ A), computed in float32 and rounded once to the
wanted dtype. That is, bit for bit on one kind of device, PEFT's `merge_and_unload` of the same model with its weights dequantised
(as its forward does, to the dtype that they were quantised from) and everything turned to float32, then `.to(dtype)`. Merging in
the 4-bit model, as `merge_and_unload` does there, would quantise the sum again and lose most of a small update.

`save_full` writes the base model in bitsandbytes' own serialised NF4, adapters left out: what `load` made of a 16-bit checkpoint
becomes a 4-bit one.

One weight at a time is gathered and dequantised, on each rank's card; the host holds one weight in the dtype it is written in.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from ..errors import Refused, UnslothExtError, UsageError
from .adapter_state import write_stream
from .atomic_folder import begin, discard, flush, move_in, partial
from .nf4_parameter import NF4Shard
from .team import Team
from .weight_stream import Planned, WeightStream, parse_size
from .whole import local_of, plain_names, settle, shape_of, unwrap, whole

__all__ = ["save_full", "save_merged"]


class Source(NamedTuple):
    """One tensor of the model without adapters."""

    name: str
    tensor: torch.Tensor  # parameter or buffer, sharded or not
    layer: nn.Module | None = None  # the LoRA layer whose adapters are added to it
    adapters: tuple[str, ...] = ()


def save_merged(
    model: nn.Module,
    folder: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_size: int | str = "5GB",
    tokenizer=None,
    *,
    timeout: datetime.timedelta | None = None,
) -> None:
    """Write the model with its active adapters merged, in `dtype`, as safetensors with config.json. Called by every rank.

    LoRA of linear layers and embeddings, rsLoRA, DoRA of linear layers and modules_to_save are merged; the model itself is not
    changed. A head that is tied to the embedding stays tied unless one of them was trained: then both are written and
    `tie_word_embeddings` is False. Rank 0 writes. The folder must hold no weights yet; a new one appears when it is complete.

    Raises `Refused`, naming the layer, for adapters that cannot be merged so; `UsageError` for a bad argument; `UnslothExtError`
    where the disk is full or a value is too large for `dtype`. What was there before is untouched then.
    """
    what = f"saving the merged model to {folder}"
    _save(model, folder, what, _merged(dtype), max_shard_size, tokenizer, timeout)


def save_full(
    model: nn.Module,
    folder: str | Path,
    max_shard_size: int | str = "5GB",
    tokenizer=None,
    *,
    timeout: datetime.timedelta | None = None,
) -> None:
    """Write the base model with its 4-bit weights as bitsandbytes serialises them, bit for bit. Adapters are not in it.

    Called by every rank. `AutoModelForCausalLM.from_pretrained(folder)` reads it on one device, `load(folder)` in slices. Raises as
    `save_merged` does; `Refused` for a model without 4-bit weights.
    """
    _save(model, folder, f"saving the 4-bit model to {folder}", _serialised, max_shard_size, tokenizer, timeout)


def _save(model, folder, what, kind: Callable, max_shard_size, tokenizer, timeout) -> None:
    model, folder = unwrap(model), Path(folder)
    team = Team(what, timeout)
    settle(model)

    def plan():
        size = parse_size(max_shard_size)
        if held := sorted(p.name for p in (*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json"))):
            raise Refused(f"{folder} holds weights already ({held[0]})", "Choose another folder, or empty it first.")
        return size, *kind(model)

    size, planned, tensors, config = team.together(plan)
    team.on_first_only(begin, folder)
    try:
        stream = team.on_first_only(WeightStream, partial(folder), "model", planned, size, {"format": "pt"})
        write_stream(team, stream, tensors)
        team.on_first_only(_write_rest, model, partial(folder), config, tokenizer)
        team.on_first_only(move_in, folder, "config.json")
    except BaseException:
        if team.first:
            discard(folder)
        raise


# -- which tensors the model has without its adapters ------------------------------------------------------------------------


def sources(model: nn.Module, merging: bool) -> list[Source]:
    """Every tensor of the model that is left when adapters are merged (or dropped), each once. Raises `Refused`."""
    if merging and hasattr(model, "peft_config"):
        for name, config in model.peft_config.items():
            if str(getattr(config.peft_type, "value", config.peft_type)) != "LORA":
                raise Refused(f"the adapter {name!r} is of type {config.peft_type}; only LoRA can be merged")
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    found: dict[tuple, Source] = {}
    for source in _walk(base, "", merging):
        found.setdefault((id(source.tensor), source.adapters), source)
    return list(found.values())


def _walk(module: nn.Module, path: str, merging: bool) -> Iterator[Source]:
    if _is("peft.tuners.tuners_utils", "BaseTunerLayer", module):
        yield from _adapted(module, path, merging)
        return
    if _is("peft.utils.other", "AuxiliaryTrainingWrapper", module):
        if not _is("peft.utils.other", "ModulesToSaveWrapper", module):
            raise Refused(f"{path} is a {type(module).__name__}, which cannot be merged")
        active = [a for a in module.active_adapters if a in module.modules_to_save]
        if merging and active and not module.disable_adapters:
            yield from _walk(module.modules_to_save[active[0]], path, merging)
        else:
            yield from _walk(module.original_module, path, merging)
        return
    for leaf, parameter in module._parameters.items():
        if parameter is not None:
            yield Source(plain_names(f"{path}{leaf}"), parameter)
    for leaf, buffer in module._buffers.items():
        if buffer is not None and leaf not in module._non_persistent_buffers_set:
            yield Source(plain_names(f"{path}{leaf}"), buffer)
    for name, child in module._modules.items():
        if child is not None:
            yield from _walk(child, f"{path}{name}.", merging)


def _is(module_name: str, class_name: str, module: nn.Module) -> bool:
    """Without importing PEFT where nobody has."""
    import sys

    kind = getattr(sys.modules.get(module_name), class_name, None)
    return kind is not None and isinstance(module, kind)


def _adapted(layer: nn.Module, path: str, merging: bool) -> Iterator[Source]:
    base, name = layer.get_base_layer(), plain_names(path).rstrip(".")
    if not hasattr(base, "weight") or getattr(layer.base_layer, "base_layer", None) is not None:
        raise Refused(
            f"{name} is a {type(layer).__name__} around a {type(layer.base_layer).__name__}, which cannot be merged"
        )
    adapters = ()
    if merging:
        if layer.merged:
            raise Refused(f"{name} has its adapter merged already", "Call model.unmerge_adapter() first.")
        linear = isinstance(base, nn.Linear) and hasattr(layer, "lora_A")
        embedding = isinstance(base, nn.Embedding) and hasattr(layer, "lora_embedding_A")
        if not linear and not embedding:
            raise Refused(
                f"{name} is a {type(layer).__name__} of a {type(base).__name__}; only linear layers and embeddings merge"
            )
        present = layer.lora_A if linear else layer.lora_embedding_A
        adapters = () if layer.disable_adapters else tuple(a for a in layer.active_adapters if a in present)
        for adapter in adapters:
            variant = getattr(layer, "lora_variant", {}).get(adapter) if hasattr(layer, "lora_variant") else None
            kind = None if variant is None else type(variant).__name__
            if kind not in (None, "DoraLinearVariant"):
                raise Refused(f"{name} has an adapter of kind {kind}, which cannot be merged")
            if getattr(layer, "lora_bias", {}).get(adapter):
                raise Refused(f"{name} has an adapter with lora_bias, which cannot be merged")
    for source in _walk(base, path, merging):
        own = source.tensor is base._parameters.get("weight")
        yield source._replace(layer=layer, adapters=adapters) if own and adapters else source


# -- merged ------------------------------------------------------------------------------------------------------------------


def _merged(dtype: torch.dtype):
    def kind(model: nn.Module):
        if not isinstance(dtype, torch.dtype) or dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise UsageError(f"dtype must be torch.bfloat16, torch.float16 or torch.float32, got {dtype!r}")
        found = sources(model, merging=True)
        planned, tensors = [], []
        for source in found:
            local = local_of(source.tensor)
            four_bit = isinstance(local, NF4Shard) or getattr(source.tensor, "quant_state", None) is not None
            if not four_bit and not local.is_floating_point() and isinstance(source.tensor, nn.Parameter):
                raise Refused(
                    f"{source.name} is {local.dtype} ({type(local).__name__}): only 4-bit and 16 or 32 bit can be merged"
                )
            target = dtype if four_bit or local.is_floating_point() else local.dtype
            planned.append(Planned(source.name, target, shape_of(source.tensor)))
            tensors.append((source.name, lambda source=source, target=target: _dense(source, target)))
        return planned, tensors, lambda config: _plain_config(config, dtype, {s.name for s in found})

    return kind


@torch.no_grad()
def _dense(source: Source, dtype: torch.dtype) -> torch.Tensor:
    """One merged weight in `dtype`, on every rank's device."""
    weight = whole(source.tensor)
    if (state := getattr(weight, "quant_state", None)) is not None:
        from bitsandbytes import functional

        if getattr(state, "packing_format_for_cpu", False):
            raise Refused(
                f"{source.name} is in bitsandbytes' CPU inference layout", "Save the model before its first eval."
            )
        weight = functional.dequantize_4bit(weight.data, state)
    if source.adapters:
        with _full_precision():
            weight = _add_adapters(weight.to(torch.float32, copy=True), source)
    result = weight.to(dtype)
    if result.is_floating_point() and not torch.isfinite(result).all():
        raise UnslothExtError(
            f"{source.name} has values that are not finite in {dtype}",
            "The adapter is broken, or its values need dtype=torch.bfloat16 or torch.float32.",
        )
    return result


def _add_adapters(weight: torch.Tensor, source: Source) -> torch.Tensor:
    layer, embedding = (
        source.layer,
        hasattr(source.layer, "lora_embedding_A") and isinstance(source.layer.get_base_layer(), nn.Embedding),
    )
    for adapter in source.adapters:
        if embedding:
            a, b = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
        else:
            a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        delta = whole(b).to(weight.device, torch.float32) @ whole(a).to(weight.device, torch.float32)
        delta = (delta.T if embedding or getattr(layer, "fan_in_fan_out", False) else delta) * layer.scaling[adapter]
        if adapter in getattr(layer, "lora_variant", {}):  # DoRA: https://arxiv.org/abs/2402.09353, equation 5
            magnitude = whole(layer.lora_magnitude_vector[adapter].weight).to(weight.device, torch.float32)
            norm = torch.linalg.norm(weight + delta, dim=1)
            weight = (magnitude / norm).view(-1, 1) * (weight + delta)
        else:
            weight += delta
    return weight


@contextlib.contextmanager
def _full_precision():
    """No TF32 in products of float32 matrices."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _plain_config(config, dtype: torch.dtype, names: set[str]):
    config = copy.deepcopy(config)
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(config, name):
            delattr(config, name)
    both = any(n.endswith("lm_head.weight") for n in names) and any(n.endswith("embed_tokens.weight") for n in names)
    for one in {id(c): c for c in (config, getattr(config, "text_config", None)) if c is not None}.values():
        setattr(one, "dtype" if hasattr(one, "dtype") else "torch_dtype", dtype)
        if both and getattr(one, "tie_word_embeddings", False):
            one.tie_word_embeddings = False
    return config


def _write_rest(model: nn.Module, folder: Path, config: Callable, tokenizer) -> None:
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    if hasattr(base, "config"):
        written = config(base.config)
        written.architectures = [type(base).__name__.removeprefix("FSDP")]
        written.save_pretrained(str(folder))
    if getattr(base, "generation_config", None) is not None:
        base.generation_config.save_pretrained(str(folder))
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))
    for path in folder.rglob("*"):
        if path.is_file():
            flush(path)


# -- 4-bit as it is ----------------------------------------------------------------------------------------------------------


def _serialised(model: nn.Module):
    from bitsandbytes.functional import QuantState

    found = sources(model, merging=False)
    planned, tensors, dtypes = [], [], set()

    def packed(state: QuantState) -> dict[str, torch.Tensor]:
        return {f".{key}": tensor for key, tensor in state.as_dict(packed=True).items()}

    for source in found:
        local, state = local_of(source.tensor), getattr(source.tensor, "quant_state", None)
        if isinstance(local, NF4Shard):
            cut, fields = local.cut, local.fields
            # The state's own shapes, from tensors without memory: the last entry is text, which only the numbers decide.
            with torch.device("meta"):
                state2 = QuantState(
                    torch.empty(cut.groups), code=torch.empty(256), blocksize=cut.blocksize2, dtype=torch.float32
                )
                absmax, code = torch.empty(cut.blocks, dtype=cut.absmax_dtype), torch.empty(16)
            state = QuantState(
                absmax, shape=cut.shape, code=code, blocksize=cut.blocksize, quant_type=cut.quant_type, dtype=cut.dtype,
                offset=fields.offset, state2=state2 if cut.blocksize2 else None,
            )  # fmt: skip
            weight = Planned(source.name, torch.uint8, (cut.n_bytes, 1))
        elif state is not None:
            if getattr(state, "packing_format_for_cpu", False):
                raise Refused(
                    f"{source.name} is in bitsandbytes' CPU inference layout", "Save the model before its first eval."
                )
            weight = Planned(source.name, source.tensor.dtype, tuple(source.tensor.shape))
        else:
            planned.append(Planned(source.name, local.dtype, tuple(source.tensor.shape)))
            tensors.append((source.name, lambda source=source: whole(source.tensor).detach()))
            continue
        dtypes.add(str(state.dtype).removeprefix("torch."))
        planned.append(weight)
        planned += [Planned(source.name + k, t.dtype, tuple(t.shape)) for k, t in packed(state).items()]
        # A gathered weight is kept until its last part is written.
        kept: dict = {}

        def part(ending, last, source=source, kept=kept):
            if not kept:
                full = whole(source.tensor)
                kept.update({"": full.data, **packed(full.quant_state)})
            tensor = kept[ending]
            if last:
                kept.clear()
            return tensor

        endings = ["", *packed(state)]
        tensors += [(source.name + e, lambda e=e, last=e == endings[-1], part=part: part(e, last)) for e in endings]
    if not dtypes:
        raise Refused("the model has no 4-bit weight", "save_merged writes it in 16 bit.")
    return planned, tensors, copy.deepcopy
