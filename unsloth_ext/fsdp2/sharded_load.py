"""`load(checkpoint)`: a 4-bit model of which each rank reads, and holds, only its part.

    model = unsloth_ext.fsdp2.load("a/bnb-4bit/checkpoint")     # or a 16-bit one, quantised on the way
    model = peft.get_peft_model(model, LoraConfig(...))
    unsloth_ext.fsdp2.shard(model)

The model is built without memory for its weights. Then, weight by weight, each rank reads the bytes of its own groups (NF4) or
rows (what is not quantised) from the safetensors files and puts them where the weight belongs. From a 16-bit checkpoint it reads
its rows and quantises them at once. So the most that a rank holds is its part of the model and a part of one weight, and the host
holds nothing but what the page cache keeps of the files.
"""

from __future__ import annotations

import contextlib
import datetime
from pathlib import Path

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from ..errors import UsageError
from . import quantization
from .checkpoint_index import CheckpointIndex
from .processes import default_mesh, device_of, position
from .row_shard import RowShard, rows_of
from .team import Team

__all__ = ["load", "materialise"]

_OTHER_KINDS = {".SCB": "bitsandbytes int8", ".qweight": "GPTQ or AWQ", ".weight_scale": "fp8 or compressed-tensors",
                ".weight_scale_inv": "fp8", "_blocks": "MXFP4"}  # fmt: skip


def load(
    checkpoint: str | Path,
    mesh: DeviceMesh | None = None,
    *,
    dtype: torch.dtype | None = None,
    quantization_config=None,
    config=None,
    model_class=None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    timeout: datetime.timedelta | None = None,
):
    """A transformers model in NF4 whose weights are `NF4Shard` (linear layers) and `RowShard` (the rest). Called by every rank.

    checkpoint: a folder with safetensors files, or the name of a repository on the hub, downloaded once a host (the hub's file
        locks see to that). Quantised by bitsandbytes to NF4, or 16 or 32 bit.
    mesh: the last dimension is what parameters are sharded over; all processes in one dimension if None.
    dtype: of what is not quantised, and what NF4 weights dequantise to; the checkpoint's own if None. A quantised checkpoint
        keeps the dtype that it was quantised with.
    quantization_config: `BitsAndBytesConfig` for a 16-bit checkpoint; NF4 with double quantisation if None.
    config, model_class, attn_implementation, trust_remote_code: as in transformers; `AutoModelForCausalLM` if None.
    timeout: how long to wait for the other ranks at the end (10 minutes).

    Call `shard` on the result before using it. Raises `UsageError` or, where only some ranks failed, `UnslothExtError` on every
    rank, naming file and tensor.
    """
    import transformers

    mesh = default_mesh() if mesh is None else mesh
    device = device_of(mesh)
    error = folder = None
    try:
        folder = _folder(checkpoint)
        config = config or transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        quantizer, dtype = _quantizer(config, quantization_config, dtype)
        index = CheckpointIndex(folder)
        model = _skeleton(
            config, quantizer, dtype, model_class or transformers.AutoModelForCausalLM, device,
            attn_implementation, trust_remote_code,
        )  # fmt: skip
        plan = _plan(model, index, mesh, quantizer.pre_quantized)
    except Exception as problem:
        error = problem
    Team(f"loading {checkpoint}", timeout).agree(error)
    try:
        materialise(model, index, mesh, dtype, plan)
        quantizer.postprocess_model(model)
    except Exception as problem:
        if not quantizer.pre_quantized:  # the others are in a gather, which ends when this process does
            raise
        error = problem
    Team(f"loading {checkpoint}", timeout).agree(error)
    model.hf_quantizer = quantizer  # a Trainer asks it whether the model can be trained
    with contextlib.suppress(OSError, ValueError):
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    model.config.name_or_path = model.name_or_path = str(checkpoint)
    index.close()
    return model.eval()


def _folder(checkpoint) -> Path:
    path = Path(checkpoint)
    if path.is_dir():
        return path
    if path.is_absolute() or str(checkpoint).startswith("."):
        raise UsageError(f"checkpoint {str(checkpoint)!r} is no folder")
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(str(checkpoint), allow_patterns=["*.json", "*.safetensors", "*.py", "*.model", "*.txt"])
    )


def _quantizer(config, quantization_config, dtype):
    from transformers import BitsAndBytesConfig
    from transformers.quantizers.auto import AutoHfQuantizer

    stored = getattr(config, "quantization_config", None)
    pre_quantised = stored is not None
    if pre_quantised:
        given = stored if isinstance(stored, dict) else stored.to_dict()
        if given.get("quant_method") not in (None, "bitsandbytes") or not given.get("load_in_4bit"):
            kind = given.get("quant_method", "unknown") + (" 8-bit" if given.get("load_in_8bit") else "")
            raise UsageError(
                f"the checkpoint is quantised as {kind}; only bitsandbytes NF4 and 16-bit ones can be loaded"
            )
        chosen = BitsAndBytesConfig.from_dict({k: v for k, v in given.items() if not k.startswith("_")})
    else:
        chosen = quantization_config or BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        )
    dtype = dtype or getattr(config, "dtype", None) or getattr(config, "torch_dtype", None) or torch.bfloat16
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    if not getattr(chosen, "load_in_4bit", False) or chosen.bnb_4bit_quant_type != "nf4":
        raise UsageError(f"quantization_config must be 4-bit of type 'nf4', got {chosen}")
    if not pre_quantised and quantization_config is None:
        chosen.bnb_4bit_compute_dtype = dtype
    return AutoHfQuantizer.from_config(chosen, pre_quantized=pre_quantised), dtype


def _skeleton(config, quantizer, dtype, model_class, device, attn_implementation, trust_remote_code):
    """The model with its parameters on the meta device and its buffers computed."""
    from accelerate import init_empty_weights

    try:
        from transformers.initialization import no_init_weights
    except ImportError:  # transformers 4
        from transformers.modeling_utils import no_init_weights

    if hasattr(config, "quantization_config"):
        del config.quantization_config
    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    if trust_remote_code:
        options["trust_remote_code"] = True
    with init_empty_weights(include_buffers=False), no_init_weights():
        model = model_class.from_config(config, dtype=dtype, **options)
    quantizer.preprocess_model(model=model, dtype=dtype, device_map={"": device})
    model.tie_weights()
    model.requires_grad_(False)
    return model


def _plan(model: nn.Module, index: CheckpointIndex, mesh, pre_quantised: bool) -> dict[str, tuple]:
    """{parameter or buffer: (checkpoint name, cut and state of a quantised weight or None)}. Everything is checked here, before
    any rank waits for another. Raises `UsageError`."""
    from bitsandbytes.nn import Linear4bit

    _, world = position(mesh)
    for name in index.names():
        for ending, kind in _OTHER_KINDS.items():
            if name.endswith(ending):
                raise UsageError(
                    f"{index.where(name)} belongs to {kind} quantisation; only bitsandbytes NF4 can be sharded"
                )
    names, missing = {}, []
    modules = dict(model.named_modules())
    for names_of_one in _tied(model):
        stored = [n for n in (_stored_name(model, index, name) for name in names_of_one) if n]
        if not stored:
            missing.append(names_of_one[0])
            continue
        source, first = stored[0], names_of_one[0]
        module = modules[first.rpartition(".")[0]]
        quantised = isinstance(module, Linear4bit) and first.endswith("weight")
        facts = None
        if quantised and pre_quantised:
            if not quantization.is_quantised(index, source):
                raise UsageError(
                    f"{index.where(source)} is not quantised, but the configuration says that it is (mixed quantisation)",
                    f"Add {first.rpartition('.')[0]!r} to llm_int8_skip_modules in the checkpoint's config.json.",
                )
            facts = quantization.check_quantised(index, source, (module.out_features, module.in_features), world)
        else:
            if quantization.is_quantised(index, source):
                raise UsageError(
                    f"{index.where(source)} is quantised, but the configuration says that it is not (mixed quantisation)"
                )
            shape = (module.out_features, module.in_features) if quantised else tuple(_get(model, first).shape)
            if index.shape(source) != shape:
                raise UsageError(f"{index.where(source)} has shape {index.shape(source)}, the model has {shape}")
            if quantised and index.dtype(source) not in (torch.float16, torch.bfloat16, torch.float32):
                raise UsageError(f"{index.where(source)} is {index.dtype(source)}; 16 or 32 bit can be quantised")
        for name in names_of_one:
            names[name] = (source, facts)
    if missing:
        raise UsageError(
            f"the checkpoint {index.folder} has no tensor for {len(missing)} parameters of {type(model).__name__}: "
            f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}",
            "Its names differ from the model's, or it is incomplete.",
        )
    return names


def _tied(model: nn.Module) -> list[list[str]]:
    """Names of parameters and saved buffers; those of one tensor together."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    saved = set(model.state_dict(keep_vars=True))
    for name, buffer in model.named_buffers():
        if name in saved:
            groups.setdefault(id(buffer), []).append(name)
    return list(groups.values())


def _stored_name(model, index: CheckpointIndex, name: str) -> str | None:
    """A base model's checkpoint has no prefix where a causal model has one, and the other way round."""
    prefix = f"{getattr(model, 'base_model_prefix', '') or 'model'}."
    for candidate in (name, name.removeprefix(prefix), prefix + name):
        if candidate in index:
            return candidate
    return None


def _get(model: nn.Module, name: str) -> torch.Tensor:
    module, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(module), leaf)


def materialise(model: nn.Module, index: CheckpointIndex, mesh: DeviceMesh, dtype: torch.dtype, plan: dict) -> None:
    """Give each parameter of a model on the meta device this rank's part of it, in the order of the modules. A collective."""
    from bitsandbytes.nn import Linear4bit

    rank, world = position(mesh)
    device, group = device_of(mesh), mesh.get_group(mesh.ndim - 1)
    modules = dict(model.named_modules())
    for names in _tied(model):
        source, facts = plan[names[0]]
        module, leaf = modules[names[0].rpartition(".")[0]], names[0].rpartition(".")[2]
        old = getattr(module, leaf)
        if isinstance(module, Linear4bit) and leaf == "weight":
            if facts is not None:
                value = quantization.read_quantised(index, source, *facts, rank, device)
            else:
                old_weight = module.weight
                value = quantization.quantise_slice(
                    index, source, dtype, rank, world, device, group,
                    blocksize=old_weight.blocksize, nested=old_weight.compress_statistics,
                )  # fmt: skip
            module.quant_state = None
        elif old.ndim >= 2 and isinstance(old, nn.Parameter):
            start, stop = rows_of(rank, world, old.shape[0])
            rows = index.rows(source, start, stop).to(device=device, dtype=old.dtype, copy=True)  # not the mapped file
            value = RowShard(rows, old.shape, rank, world)
        else:
            value = index.whole(source).to(device=device, dtype=old.dtype, copy=True)
        if isinstance(old, nn.Parameter):
            value = nn.Parameter(value, requires_grad=False)
        for name in names:
            module, _, leaf = name.rpartition(".")
            setattr(modules[module], leaf, value)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device != device:
                module._buffers[name] = buffer.to(device)
