"""What the compiling room changes in Unsloth."""

from importlib import import_module

from ..patching import Patch, SetAttribute, Target
from .attention_patch import PATCHES as ATTENTION_PATCHES
from .eight_bit_steps_patch import PATCHES as EIGHT_BIT_STEPS_PATCHES
from .memory_patch import PATCHES as MEMORY_PATCHES
from .norms_patch import PATCHES as NORMS_PATCHES
from .packed_patch import PATCHES as PACKED_PATCHES
from .projections_patch import PATCHES as PROJECTIONS_PATCHES
from .rope_patch import PATCHES as ROPE_PATCHES

_LLAMA = "unsloth.models.llama"
_SINCE = ">=2026.10.9"


def _ours(name: str):
    """The replacement `name` of traceable.py."""

    def replace(original):
        return getattr(import_module(".traceable", __package__), name)(original)

    return replace


def _peft_forward(module, target):
    fast_forward = _ours("without_disable")(module.PeftModel_fast_forward)
    made = [SetAttribute(module, "PeftModel_fast_forward", fast_forward)]
    if vars(module.PeftModelForCausalLM).get("forward") is module.PeftModel_fast_forward:  # a model was loaded already
        made.append(SetAttribute(module.PeftModelForCausalLM, "forward", fast_forward))
    return made


def _row_count(module, target):
    import sys

    llama = sys.modules[_LLAMA]  # mistral.py imports it, and the other families take their forward from it
    without, make = _ours("without_row_count"), _ours("with_forwards_without_row_count")
    return [
        SetAttribute(module, "MistralForCausalLM_fast_forward", without(module.MistralForCausalLM_fast_forward)),
        SetAttribute(llama, "CausalLM_fast_forward", make(llama.CausalLM_fast_forward)),
    ]


PATCHES = (
    Patch(
        id="compiling.peft_forward",
        challenge="C",
        summary="torch.compile traces through the PEFT model's fast forward instead of breaking the graph there",
        targets=(
            Target(_LLAMA, "PeftModel_fast_forward", _SINCE, ("2dadbfefeebde115",), patched=("912f4cec09e7d57e",)),
        ),
        changes=_peft_forward,
    ),
    Patch(
        id="compiling.pretrain_hook",
        challenge="C",
        summary="torch.compile(model) traces through the hook that notes a forward before train()",
        targets=(
            Target(
                "unsloth.models._utils",
                "_unsloth_install_pretrain_detector",
                _SINCE,
                ("a1e78bc2800ee704",),
                patched=("62fcbdde41eb32b7",),
            ),
        ),
        replace=_ours("with_plain_hook_entry"),
    ),
    Patch(
        id="compiling.traced_layers",
        challenge="C",
        summary="a checkpointed layer can be traced in a larger graph: no flag is written inside the checkpoint",
        targets=(
            Target(
                "unsloth.models._block_compile",
                "_wrap",
                _SINCE,
                ("370a8675ff63a08a",),
                patched=("b464d1c7a1cb8c2e", "99eb2af88a114e4d"),
            ),
        ),
        replace=_ours("with_traced_layers_plain"),
    ),
    Patch(
        id="compiling.row_count",
        challenge="C",
        summary="one graph for batches under and over 1024 tokens: the branch between them did nothing",
        targets=(
            Target(
                "unsloth.models.mistral",
                "MistralForCausalLM_fast_forward",
                _SINCE,
                ("2152970ec4f20bf2",),
                patched=("f0b5992b5eddb656",),
            ),
        ),
        relies_on=(Target(_LLAMA, "CausalLM_fast_forward", _SINCE, ("d390d906b0bcb354",)),),
        changes=_row_count,
    ),
    *ATTENTION_PATCHES,
    *PACKED_PATCHES,
    *MEMORY_PATCHES,
    *PROJECTIONS_PATCHES,
    *ROPE_PATCHES,
    *EIGHT_BIT_STEPS_PATCHES,
    *NORMS_PATCHES,
)
