"""What the room changes in Unsloth's LoRA functions: while a graph is traced, projections.py computes them.

The three names `LoRA_MLP`, `LoRA_QKV` and `LoRA_W` stand for objects whose `apply` chooses. Outside of a trace, and for what
`projections.refusal` names, dropout, a bias or another activation than SwiGLU, it is Unsloth's own. On by itself on Hopper, where it was
measured to be faster, with UNSLOTH_EXT_SIDE_BY_SIDE=1 elsewhere.
"""

from __future__ import annotations

from ..patching import NotHere, Patch, SetAttribute, Target
from .measured_cards import refuse_where_not_measured

_LORA, _SWIGLU = "unsloth.kernels.fast_lora", "unsloth.kernels.swiglu"
_SINCE = ">=2026.10.9"
_SWITCH = "UNSLOTH_EXT_SIDE_BY_SIDE"


def _side_by_side(module, target):
    if not module.TRACE_LORA_FUNCTIONS:  # torch before 2.11 runs them outside of the graph
        raise NotHere("this torch does not trace Unsloth's LoRA functions")
    refuse_where_not_measured(_SWITCH)
    routes = {"LoRA_MLP": _mlp, "LoRA_QKV": _qkv, "LoRA_W": _linear}
    return [SetAttribute(module, name, _stand_in(getattr(module, name), of(module))) for name, of in routes.items()]


def _stand_in(original, route):
    """What Unsloth calls `apply` of. (Dynamo cannot ask which of several autograd functions it was given.)"""
    from .as_traced import as_traced

    def apply(*args):
        if as_traced():
            found = route(*args)
            if found is not None:
                return found[0].apply(*found[1])
        return original.apply(*args)

    own = {"__doc__": original.__doc__, "__module__": original.__module__, "__wrapped__": original}
    own |= {name: vars(original)[name] for name in ("forward", "backward")}
    return type(original.__name__, (), own | {"apply": staticmethod(apply)})


# Each gives a function of the arguments that answers (the function to take, its arguments), or None for Unsloth's own. more: what
# Unsloth has at the end, (dropout probabilities, biases).


def _mlp(module):
    from .projections import MLP, mlp_refusal, refusal

    def route(x, *args):
        given, (forward_function, backward_function), more = args[:15], args[15:17], args[18:]
        if forward_function is not module.swiglu_fg_kernel or backward_function is not module.swiglu_DWf_DW_dfg_kernel:
            return None
        if any(one is not None for one in more) or mlp_refusal(x, given[:5], given[5:10]):
            return None
        if refusal(x.new_empty(1, given[3].shape[0]), given[10:]):  # down reads what gate makes
            return None
        return MLP, (x, *given)

    return route


def _qkv(module):
    from .projections import QKV, refusal

    def route(x, *args):
        given, more = args[:15], args[16:]
        if any(one is not None for one in more) or refusal(x, given[:5], given[5:10], given[10:]):
            return None
        return QKV, (x, *given)

    return route


def _linear(module):
    from .projections import Linear, refusal

    def route(x, *args):
        given, more = args[:5], args[5:]
        if any(one is not None for one in more) or refusal(x, given):
            return None
        return Linear, (x, *given)

    return route


PATCHES = (
    Patch(
        id="compiling.projections",
        challenge="C",
        summary="in a compiled layer what LoRA adds to products, and sums over projections, are added inside them: fewer passes (by itself on Hopper)",
        targets=(Target(_LORA, "LoRA_MLP.forward", _SINCE, ("3d16b7f6e9731421",)),),
        relies_on=(
            Target(_LORA, "_apply", _SINCE, ("774bdd994e7a5855",)),
            Target(_LORA, "LoRA_MLP.backward", _SINCE, ("c240ebf50006149c",)),
            Target(_LORA, "LoRA_QKV.forward", _SINCE, ("8a78aab5ea8db80e",)),
            Target(_LORA, "LoRA_QKV.backward", _SINCE, ("5824d2799c3e3bfb",)),
            Target(_LORA, "LoRA_W.forward", _SINCE, ("639e4ce4bd906981",)),
            Target(_LORA, "LoRA_W.backward", _SINCE, ("fbed11db9d7a47f2",)),
            Target(_LORA, "apply_lora_mlp_swiglu", _SINCE, ("5033c7a624401c86",)),
            Target(_LORA, "apply_lora_qkv", _SINCE, ("00fceda6e8b17a21",)),
            Target(_LORA, "apply_lora_o", _SINCE, ("f2e96e8a34f2e85f",)),
            Target(_SWIGLU, "swiglu_DWf_DW_dfg_kernel", _SINCE, ("f8785da3c7e7fedd",)),
            Target(_SWIGLU, "_DWf_DW_dfg_traced", _SINCE, ("dd145e5e5c97e4d1",)),
            Target("unsloth.kernels.utils", "matmul_lora", _SINCE, ("3382a29ecb3b3264",)),
        ),
        changes=_side_by_side,
        run_time_only="a thousand lines of Triton and CUDA go with it",
        switch=_SWITCH,
        on_unless_switched_off=True,
    ),
)
