"""What the room changes in Unsloth's RMS norms: in a graph they are operators that can take the addition beside them along.

`fast_rms_layernorm` chooses while a graph is traced; outside of one, and for what `norms_operators.refusal` names, Gemma's form or a
trained weight, it is Unsloth's own, with the same bits. Inductor's passes that join norms and additions, and small kernels (graph_passes.py), go into the
options with which Unsloth compiles its layers; `compile_model` has it too. On by itself on Hopper, with UNSLOTH_EXT_FUSED_NORMS=1 elsewhere.
"""

from __future__ import annotations

import functools

from ..patching import NotHere, Patch, SetAttribute, SetItem, Target
from .measured_cards import refuse_where_not_measured

_NORMS, _BLOCKS, _KERNELS = "unsloth.kernels.rms_layernorm", "unsloth.models._block_compile", "unsloth.kernels.utils"
_SINCE = ">=2026.10.9"
_SWITCH = "UNSLOTH_EXT_FUSED_NORMS"


def _in_graphs(module, target):
    refuse_where_not_measured(_SWITCH)
    if not module._TRACEABLE:
        raise NotHere("this torch does not trace Unsloth's norms")
    if differs := _other_launches(module):
        raise NotHere(f"Unsloth launches its norms otherwise, rows of {differs}: other bits")
    return [SetAttribute(module, "fast_rms_layernorm", _stand_in(module.fast_rms_layernorm))]


def _other_launches(module) -> str:
    """Widths for which Unsloth takes other blocks or warps than our kernel does, on any of the cards."""
    import torch

    from .norms_kernel import settings

    widths = sorted({*range(256, 16385, 128), 32768, 65536} | {width for _, width in module._NUM_WARPS})
    wrong = set()
    for index in range(torch.cuda.device_count()):
        card, capability = torch.device("cuda", index), tuple(torch.cuda.get_device_capability(index))
        wrong |= {width for width in widths if tuple(module._settings(width, card)) != settings(width, capability)}
    return ", ".join(map(str, sorted(wrong)))


def _stand_in(original):
    import torch

    from .norms_operators import refusal, rms_norm

    is_compiling = torch.compiler.is_compiling

    @functools.wraps(original)
    def fast_rms_layernorm(layernorm, X, gemma=False, save_output=False, reuse_grad=False):
        # Neither of the last two says anything in a graph: what is kept and what is written over is the compiler's.
        if is_compiling() and not gemma and not refusal(X, layernorm.weight):
            eps = layernorm.variance_epsilon if hasattr(layernorm, "variance_epsilon") else layernorm.eps
            return rms_norm(X.contiguous(), layernorm.weight, eps)[0]
        return original(layernorm, X, gemma, save_output, reuse_grad)

    return fast_rms_layernorm


def _in_layers(module, target):
    refuse_where_not_measured(_SWITCH)
    from .graph_passes import ENTRY, options

    ours = options()
    if ENTRY not in ours or ENTRY in module._COMPILE_OPTIONS:
        raise NotHere(f"somebody else has set Inductor's {ENTRY}")
    return [
        SetItem(module._COMPILE_OPTIONS, name, value)
        for name, value in ours.items()
        if name not in module._COMPILE_OPTIONS
    ]


PATCHES = (
    Patch(
        id="compiling.norms",
        challenge="C",
        summary="in a compiled layer Unsloth's RMS norms are operators that additions can be joined to, with the same bits (by itself on Hopper)",
        targets=(Target(_NORMS, "fast_rms_layernorm", _SINCE, ("01a48f79bc21f059",)),),
        relies_on=(
            Target(_NORMS, "_rms_layernorm_forward", _SINCE, ("aa0b69c6aa1fba0f",)),
            Target(_NORMS, "_rms_backward_row", _SINCE, ("e749b7e4ec93f39b",)),
            Target(_NORMS, "_rms_forward", _SINCE, ("1eb14d40f3b7f4db",)),
            Target(_NORMS, "_rms_backward", _SINCE, ("679097863445d67e",)),
            Target(_NORMS, "_arch_settings", _SINCE, ("54759f8d4536edbf",)),
            Target(_KERNELS, "calculate_settings", _SINCE, ("bbb5fc11e6e040d5",)),
            Target(_KERNELS, "norm_num_warps", _SINCE, ("e6741f0c520a0f6a",)),
        ),
        changes=_in_graphs,
        run_time_only="its kernels and the pass over Inductor's graphs go with it",
        switch=_SWITCH,
        on_unless_switched_off=True,
    ),
    Patch(
        id="compiling.fused_norms",
        challenge="C",
        summary="Unsloth's compiled layers do residual additions inside the norm or product beside them, and small kernels together (by itself on Hopper)",
        targets=(Target(_BLOCKS, "patch_block_compile", _SINCE, ("2028faa98103725a",)),),
        changes=_in_layers,
        run_time_only="its kernels and the pass over Inductor's graphs go with it",
        switch=_SWITCH,
        on_unless_switched_off=True,
    ),
)
