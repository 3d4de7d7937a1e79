"""One rank's share of a 4-bit model with LoRA: its own layers, read from the checkpoint; the others stay empty.

The model is built without memory for its weights, and a rank reads the tensors of its own layers, one at a time: packed NF4 bytes
as they are, or 16-bit weights that are quantised at once. Then peft puts the adapters on the whole model. So target modules,
patterns and `layers_to_transform` mean what they mean on one device, every parameter has its usual name, and with one
`torch.manual_seed` on all ranks the adapters begin as those of one process. Afterwards the layers of other ranks, adapters
included, are replaced by `Elsewhere`.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from pathlib import Path

import torch
from torch import nn

from ..errors import Refused, UsageError
from . import sharded_load
from .checkpoint_index import CheckpointIndex

__all__ = ["Blueprint", "Elsewhere", "blueprint", "fill", "with_adapters"]

# Families whose decoder runs its layers on hidden states and does nothing to them between the embedding and the first layer.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_NEEDS_NO_WEIGHTS = (True, False, "gaussian", "orthogonal")


class Elsewhere(nn.Module):
    """In the place of a module of another rank."""

    on_another_rank = True

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def forward(self, *args, **kwargs):
        raise RuntimeError(f"{self.name} is on another rank; call PipelineModel.step instead of the model")

    def extra_repr(self) -> str:
        return self.name


@dataclasses.dataclass
class Blueprint:
    """The model on the meta device, and where its tensors are."""

    model: nn.Module
    index: CheckpointIndex
    plan: dict
    quantizer: object
    dtype: torch.dtype
    folder: Path


def blueprint(checkpoint, mesh, device, dtype=None, quantization_config=None, attn_implementation=None) -> Blueprint:
    """Reads headers and configuration only. Raises `UsageError` as `sharded_load.load` does, `Refused` for another family."""
    import transformers

    folder = sharded_load._folder(checkpoint)
    config = transformers.AutoConfig.from_pretrained(folder)
    if config.model_type not in FAMILIES:
        raise Refused(
            f"{checkpoint} is a {config.model_type!r} model; a pipeline is known to be exact for {', '.join(FAMILIES)}",
            "Shard it instead: unsloth_ext.fsdp2.load and shard.",
        )
    quantizer, dtype = sharded_load._quantizer(config, quantization_config, dtype)
    index = CheckpointIndex(folder)
    model = sharded_load._skeleton(
        config, quantizer, dtype, transformers.AutoModelForCausalLM, device, attn_implementation, False
    )
    plan = sharded_load._plan(model, index, mesh, quantizer.pre_quantized)
    return Blueprint(model, index, plan, quantizer, dtype, folder)


def is_mine(name: str, layers: set[int], first: bool, last: bool) -> bool:
    """Whether a rank with these layers, and with the first or the last stage, has the module or parameter `name`."""
    parts = name.split(".")
    if "layers" in parts:
        after = parts[parts.index("layers") + 1 :]
        return bool(after) and int(after[0]) in layers
    if "embed_tokens" in parts:
        return first
    return last  # norm and head


def fill(blue: Blueprint, layers: set[int], first: bool, last: bool, device) -> nn.Module:
    """Give this rank's parameters their values, in place. Peak: they and one weight before it is quantised."""
    import transformers
    from bitsandbytes.nn import Linear4bit, Params4bit

    model, index = blue.model, blue.index
    modules = dict(model.named_modules())
    for names in sharded_load._tied(model):
        mine = [name for name in names if is_mine(name, layers, first, last)]
        if not mine:
            continue
        source, facts = blue.plan[names[0]]
        module, leaf = modules[mine[0].rpartition(".")[0]], mine[0].rpartition(".")[2]
        old = getattr(module, leaf)
        if isinstance(module, Linear4bit) and leaf == "weight":
            # bitsandbytes would swap the bytes for an inference layout when it evaluates on such a CPU, and training goes on.
            module.support_avx512bf16_for_cpu = False
            if facts is not None:
                parts = [part for part in index.names() if part.startswith(f"{source}.")]
                stats = {part: index.whole(part) for part in parts}
                packed = index.whole(source)
                value = Params4bit.from_prequantized(packed, stats, device=device, module=module)
            else:
                weight = index.whole(source).to(device=device, dtype=blue.dtype)
                value = Params4bit(
                    weight, requires_grad=False, blocksize=old.blocksize, compress_statistics=old.compress_statistics,
                    quant_type=old.quant_type, quant_storage=old.quant_storage, module=module,
                ).to(device)  # fmt: skip
                del weight
        else:
            value = index.whole(source).to(device=device, dtype=old.dtype, copy=True)  # not the mapped file
            value = nn.Parameter(value, requires_grad=False) if isinstance(old, nn.Parameter) else value
        for name in mine:
            setattr(modules[name.rpartition(".")[0]], name.rpartition(".")[2], value)
    for module in model.modules():
        for leaf, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta and buffer.device != device:
                module._buffers[leaf] = buffer.to(device)
    blue.quantizer.postprocess_model(model)
    with contextlib.suppress(OSError, ValueError):
        model.generation_config = transformers.GenerationConfig.from_pretrained(blue.folder)
    index.close()
    return model


def adapter_config(lora):
    """(peft's config, folder of saved weights or None) of a `LoraConfig` or of a folder from `save_adapter` or peft.

    Raises `UsageError` or `Refused` for what cannot be put on a model whose other layers are empty.
    """
    from peft import LoraConfig, PeftConfig

    folder = None
    if isinstance(lora, (str, Path)):
        folder = Path(lora)
        if not (folder / "adapter_config.json").is_file() or not (folder / "adapter_model.safetensors").is_file():
            raise UsageError(f"lora {str(lora)!r} has no adapter_config.json and adapter_model.safetensors")
        lora = PeftConfig.from_pretrained(str(folder))
    if not isinstance(lora, LoraConfig):
        raise UsageError(f"lora must be a peft LoraConfig or the folder of a saved adapter, got {type(lora).__name__}")
    if lora.use_dora:
        raise Refused("use_dora needs the weights of every layer, and a rank has its own only", "Use plain LoRA.")
    if folder is None and lora.init_lora_weights not in _NEEDS_NO_WEIGHTS:
        raise Refused(
            f"init_lora_weights={lora.init_lora_weights!r} needs the weights of every layer, and a rank has its own only",
            f"Use one of {', '.join(map(repr, _NEEDS_NO_WEIGHTS))}.",
        )
    for option in ("layer_replication", "target_parameters", "trainable_token_indices"):
        if getattr(lora, option, None):
            raise Refused(f"{option}={getattr(lora, option)!r} cannot be put on a pipeline's layers")
    lora = copy.deepcopy(lora)
    lora.inference_mode = False
    if folder is not None:
        lora.init_lora_weights = True  # what is drawn is overwritten
    return lora, folder


def with_adapters(model: nn.Module, lora, folder: Path | None, layers: set[int], first: bool, last: bool) -> nn.Module:
    """The peft model with the adapters of all layers of this rank, and nothing of the others. Raises `UsageError`."""
    from peft import get_peft_model

    tied = getattr(model.config, "tie_word_embeddings", False)
    model = get_peft_model(model, lora)
    base = model.get_base_model()
    if tied:
        for end in (base.get_input_embeddings(), base.get_output_embeddings()):
            if any(p.requires_grad for p in end.parameters()):
                raise UsageError(
                    "the head is tied to the embedding, and they are on different ranks: they cannot be trained",
                    "Leave embed_tokens and lm_head out of target_modules and modules_to_save.",
                )
    inner = base.model
    for i in range(len(inner.layers)):
        if i not in layers:
            inner.layers[i] = Elsewhere(f"layer {i}")
    if not first:
        inner.embed_tokens = Elsewhere("the embedding")
    if not last:
        inner.norm = Elsewhere("the last norm")
        base.lm_head = Elsewhere("the head")
    empty = [name for name, p in model.named_parameters() if p.is_meta]
    if empty:
        raise UsageError(f"{empty[0]} has no values: the checkpoint does not have it")
    if folder is not None:
        load_adapter(model, folder)
    return model.train()


def adapter_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """This rank's adapters under the names of peft's files."""
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(model, save_embedding_layers=False)


def load_adapter(model: nn.Module, folder: Path) -> None:
    """Set this rank's adapters from adapter_model.safetensors, of which only they are read. Raises `UsageError`."""
    from peft import set_peft_model_state_dict
    from safetensors import SafetensorError, safe_open

    file = folder / "adapter_model.safetensors"
    wanted = adapter_state(model)
    try:
        with safe_open(str(file), framework="pt", device="cpu") as stored:
            known = set(stored.keys())
            if absent := sorted(set(wanted) - known):
                raise UsageError(f"{file} has no {absent[0]!r} ({len(absent)} missing): it is of another model or LoRA")
            found = {name: stored.get_tensor(name) for name in wanted}
    except SafetensorError as error:
        raise UsageError(f"{file} is truncated or no safetensors file: {error}") from error
    for name, tensor in found.items():
        if tensor.shape != wanted[name].shape:
            raise UsageError(
                f"{name!r} in {file} has shape {tuple(tensor.shape)}, the model {tuple(wanted[name].shape)}"
            )
    set_peft_model_state_dict(model, found)
