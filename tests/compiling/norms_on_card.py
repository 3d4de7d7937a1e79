"""Training steps of a small Llama on a card whose layers Unsloth compiles, with the additions inside the norms and without, or with
a memory budget: `norms_on_card.py [BUDGET]`. The last line is JSON.
"""

import json
import os
import sys

os.environ["UNSLOTH_EXT_FUSED_NORMS"] = "1"

import compile_on_card as base  # Unsloth, in the order that it asks for
import torch
from unsloth.models import _block_compile

import unsloth_ext
from unsloth_ext.compiling import compile_model, norms_fusion
from unsloth_ext.compiling.memory_controller import memory_budget

counts, plain = [], norms_fusion.fuse


def counted(graph):
    counts.append(plain(graph))
    return counts[-1]


def fresh(model):
    """Have Unsloth compile the layers' class again, as when the model was loaded."""
    torch._dynamo.reset()
    counts.clear()
    kind = type(model.get_base_model().model.layers[0])
    kind.forward = kind.forward._unsloth_block_original
    _block_compile._wrap(kind, _block_compile._COMPILE_OPTIONS)


def equal(a, b):
    return (
        torch.equal(a[0], b[0]) and a[1].keys() == b[1].keys() and all(torch.equal(a[1][n], g) for n, g in b[1].items())
    )


def main():
    base.checkpoint()
    norms_fusion.fuse = counted
    model, made = base.load("unsloth", False), base.batches(False)
    found, steps = {}, {}
    with torch.compiler.config.patch(force_disable_caches=True):
        for which, off in (("fused", ()), ("separate", ("compiling.fused_norms",)), ("unsloth", ("compiling.norms",))):
            if off:
                unsloth_ext.disable(*off)
            fresh(model)
            steps[which] = base.step(model, made)
            found[f"{which} counts"] = sorted(set(counts))
        unsloth_ext.enable("compiling.norms", "compiling.fused_norms")
        found["equal"] = [equal(steps["fused"], steps[which]) for which in ("separate", "unsloth")]
        fresh(model)
        if len(sys.argv) > 1:
            budget = memory_budget(model, sys.argv[1])
            found["budget equal"] = equal(base.step(model, made), steps["fused"])
            found["outlines"] = any(script.outline for script in budget.scripts.values())
            found["why"] = sorted({script.why for script in budget.scripts.values()})
        else:
            compiled = compile_model(model, "step", shared_layers=False)
            counts.clear()
            ours = base.step(model, made)
            found["step counts"], found["breaks"] = sorted(set(counts)), compiled.report().breaks
            found["step difference"] = base.differences(ours, steps["fused"])
    print(json.dumps(found))


if __name__ == "__main__":
    main()
