"""`from_pretrained` of a 4-bit model under the switch: each rank reads its part, through `load`.

    AutoModelForCausalLM.from_pretrained("…-bnb-4bit")                                    # quantised already
    AutoModelForCausalLM.from_pretrained("…", quantization_config=BitsAndBytesConfig(load_in_4bit=True, ...))

and Unsloth's `FastLanguageModel.from_pretrained`, which ends in the same call. What `load` does not know (adapter folders, gguf,
several device maps, other quantisation) is loaded whole, as without the switch, with a line that says why; the Trainer then cuts it.
"""

from __future__ import annotations

import copy
import dataclasses
import datetime
import functools
import os
import sys
from pathlib import Path

import torch

from ..errors import UnslothExtError
from . import switch

__all__ = ["from_pretrained"]

# What `load` acts on, and what makes no difference to the model that comes out.
_UNDERSTOOD = {
    "quantization_config",
    "load_in_4bit",
    "dtype",
    "torch_dtype",
    "attn_implementation",
    "trust_remote_code",
    "config",
}
_FOLDER = {"cache_dir", "force_download", "local_files_only", "token", "revision"}
_INDIFFERENT = {"device_map", "low_cpu_mem_usage", "use_safetensors", "offload_folder", "max_memory", "return_unused_kwargs",
                "weights_only", "_fast_init", "fast_inference", "adapter_kwargs"}  # fmt: skip
_DOWNLOAD = datetime.timedelta(minutes=30)  # how much earlier one host may have it than another
_RAM_EFFICIENT = "FSDP_CPU_RAM_EFFICIENT_LOADING"


def from_pretrained(original):
    """Stands in for `PreTrainedModel.from_pretrained`, a classmethod object."""
    function = original.__func__

    @functools.wraps(function)
    def wrapped(cls, name, *args, **kwargs):
        settings = switch.requested()
        if settings is None or switch.world_size() == 1 or switch.unsloth_shards():
            return function(cls, name, *args, **kwargs)
        found = _plan(name, kwargs) if settings.sharded_load and not args else None
        if found is not None and (options := _agreed(name, found)) is not None:
            folder = options.pop("folder")
            from .sharded_load import load

            try:
                model = load(folder, model_class=_Concrete(cls), **options)
            except UnslothExtError as error:  # every rank has it: `load` exchanges them
                _say_whole(name, " ".join(str(error).split()))
            else:
                if "unsloth" in sys.modules and options["dtype"] is not None:
                    _dequantise_to(model, options["dtype"])
                model.config.name_or_path = model.name_or_path = str(name)
                switch.say(f"{name} is read in parts, by each of {switch.world_size()} ranks its own.")
                return model
        # Under an accelerate FSDP configuration transformers gives all ranks but the first zeros, for accelerate to overwrite. A
        # 16-bit model too is ours to shard once it has adapters, and nobody would overwrite them.
        before = os.environ.get(_RAM_EFFICIENT)
        os.environ[_RAM_EFFICIENT] = "false"
        try:
            return function(cls, name, *args, **kwargs)
        finally:
            os.environ.pop(_RAM_EFFICIENT, None)
            if before is not None:
                os.environ[_RAM_EFFICIENT] = before

    return classmethod(wrapped)


def _dequantise_to(model, dtype: torch.dtype) -> None:
    """What Unsloth does to each `quant_state.dtype` after loading: its kernels compute in the dtype that a weight comes out in."""
    from .nf4_parameter import NF4Shard

    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, NF4Shard) and weight.cut.dtype != dtype:
            part = NF4Shard.of_fields(dataclasses.replace(weight.cut, dtype=dtype), weight.rank, weight.fields)
            module.weight = torch.nn.Parameter(part, requires_grad=False)


class _Concrete:
    """The class that transformers has chosen, with the one method that `load` calls."""

    def __init__(self, cls):
        self.from_config = cls._from_config


def _say_whole(name, reason: str) -> None:
    switch.say(f"{name} is loaded whole on every rank and cut afterwards: {reason}.")


def _agreed(name, found: dict | str) -> dict | None:
    """`_plan`'s keywords if every rank has them; None, with a line, if any has a reason against. A collective.

    A rank whose download failed must not leave the others waiting in `load`.
    """
    from .processes import default_mesh
    from .team import Team

    default_mesh()
    everyone = Team(f"looking at {name}", _DOWNLOAD).gather(found if isinstance(found, str) else None)
    reasons = {rank: reason for rank, reason in enumerate(everyone) if reason is not None}
    if not reasons:
        return found
    rank, reason = next(iter(reasons.items()))
    _say_whole(name, reason if len(reasons) == len(everyone) else f"on rank {rank} {reason}")
    return None


def _plan(name, kwargs) -> dict | str | None:
    """Keywords of `load`, its folder among them, for a 4-bit model; None for any other, and, with a line, for one that is to be
    loaded whole. A text is a reason for that which may be this rank's alone."""
    import transformers

    given = {k: v for k, v in kwargs.items() if v is not None and v is not False}
    wish = given.get("quantization_config")
    wish = transformers.BitsAndBytesConfig.from_dict(wish) if isinstance(wish, dict) else wish
    if wish is None and given.get("load_in_4bit"):
        wish = transformers.BitsAndBytesConfig(load_in_4bit=True)
    try:
        where = {k: v for k, v in given.items() if k in _FOLDER}
        config = given.get("config")
        if not isinstance(config, transformers.PretrainedConfig):
            trust = bool(given.get("trust_remote_code"))
            config = transformers.AutoConfig.from_pretrained(config or name, trust_remote_code=trust, **where)
    except (OSError, ValueError):
        return None  # transformers has its own words for it
    config = copy.deepcopy(config)  # the caller's is the caller's
    stored = getattr(config, "quantization_config", None)
    stored = stored if isinstance(stored, dict) or stored is None else stored.to_dict()
    four_bit = bool((stored or {}).get("load_in_4bit")) or bool(getattr(wish, "load_in_4bit", False))
    if not four_bit:
        return None

    try:
        return _keywords(name, kwargs, given, config, stored, wish, where)
    except Exception as error:  # of this rank alone, perhaps
        return f"it cannot be read in parts ({type(error).__name__}: {error})"


def _keywords(name, kwargs, given, config, stored: dict | None, wish, where: dict) -> dict | str | None:
    kind = (stored or {}).get("bnb_4bit_quant_type") or getattr(wish, "bnb_4bit_quant_type", None)
    if kind != "nf4":
        return _say_whole(name, f"its 4-bit type is {kind!r}, and only 'nf4' is read in parts")
    settings = {}
    for key, value in kwargs.items():  # not `given`: use_cache=False is a setting
        if key in _UNDERSTOOD | _FOLDER | _INDIFFERENT or value is None:
            continue
        if not hasattr(config, key):
            if value is False:
                continue
            return _say_whole(name, f"from_pretrained got {key}=, which reading in parts does not know")
        settings[key] = value
    if isinstance(given.get("device_map"), dict) and len(set(map(str, given["device_map"].values()))) > 1:
        return _say_whole(name, "its device_map spreads it over several devices")
    folder = Path(name)
    if folder.is_dir() and (folder / "adapter_config.json").is_file():
        return "the folder holds an adapter"
    try:
        folder = folder if folder.is_dir() else _download(str(name), where)
    except Exception as error:
        return f"it cannot be downloaded as a folder ({type(error).__name__}: {error})"
    if not any(folder.glob("*.safetensors")):
        return "it has no safetensors files"
    for key, value in settings.items():
        setattr(config, key, value)
    dtype = given.get("dtype", given.get("torch_dtype"))
    dtype = None if dtype == "auto" else getattr(torch, dtype) if isinstance(dtype, str) else dtype
    if dtype is None and stored is None and getattr(config, "dtype", None) is None:
        dtype = _first_dtype(folder)
    return {
        "folder": folder, "config": config, "dtype": dtype, "quantization_config": wish if stored is None else None,
        "attn_implementation": given.get("attn_implementation"),
        "trust_remote_code": bool(given.get("trust_remote_code")),
    }  # fmt: skip


def _download(name: str, where: dict) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.py", "*.model", "*.txt", "*.jinja"]
    return Path(snapshot_download(name, allow_patterns=patterns, **where))


def _first_dtype(folder: Path) -> torch.dtype | None:
    """Of the first weight of a checkpoint whose configuration does not say."""
    from safetensors import safe_open

    file = sorted(folder.glob("*.safetensors"))[0]
    with safe_open(file, framework="pt") as tensors:
        name = next(iter(tensors.keys()), None)
        kind = tensors.get_slice(name).get_dtype() if name else None
    return {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}.get(kind)
