"""The seam: what the replacement takes, what it hands on as it came, and the real Unsloth imported on a CPU."""

import types
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from nf4_states import Spec, as_list

from unsloth_ext.nf4 import dequantization
from unsloth_ext.nf4.patch import PATCHES, _changes, _replacement


@pytest.fixture
def seam():
    """(module, replacement, calls): a stand-in for unsloth.kernels.utils, whose original records how it was called."""
    calls = []

    def original(W, quant_state=None, out=None, use_global_buffer=False, dtype=None):
        calls.append((W, quant_state, out, use_global_buffer, dtype))
        return "original"

    module = types.ModuleType("utils")
    module._SCRATCH, module.usable = {}, True
    module._can_use_scratch = lambda device: module.usable

    def scratch(kind, device, numel, dtype):
        buffer = module._SCRATCH.get((kind, -1))
        if buffer is None or buffer.dtype != dtype or buffer.numel() < numel:
            buffer = module._SCRATCH[kind, -1] = torch.empty(numel, dtype=dtype)
        return buffer[:numel]

    module._scratch = scratch
    yield module, _replacement(module, original), calls
    dequantization.forget()


def test_everything_else_is_handed_on_as_it_came(seam):
    _, replacement, calls = seam
    packed, state = Spec().make()
    fp4 = Spec().make()[1]
    fp4.quant_type = "fp4"
    out = torch.empty(2)
    for arguments in (
        (packed, None),
        (packed, fp4),
        (packed, state),  # on a CPU
        (packed, as_list(state)),
        (packed, torch.ones(1)),  # an FP8 weight's scale
        (packed, types.SimpleNamespace(quant_type="nf4")),  # not bitsandbytes' own
    ):
        assert replacement(*arguments, out=out, use_global_buffer=True, dtype=torch.float16) == "original"
        last = calls[-1]
        assert (
            last[0] is arguments[0] and last[1] is arguments[1] and last[2] is out and last[3:] == (True, torch.float16)
        )
    # Before 2026.10.8 the original knows no dtype: nothing is passed that did not come.
    assert (
        _replacement(seam[0], lambda W, quant_state=None, out=None, use_global_buffer=False: "older")(packed) == "older"
    )


def test_a_plan_writes_into_unsloths_buffer(seam):
    module, replacement, _ = seam
    packed, state = Spec().make()
    seen = []
    dequantization.plans[id(state)] = lambda W, s, out: seen.append(out) or "planned"
    assert replacement(packed, state) == "planned" and seen.pop() is None
    assert replacement(packed, state, use_global_buffer=True) == "planned"
    first = seen.pop()
    assert first.shape == state.shape and first.data_ptr() == module._SCRATCH["weight", -1].data_ptr()
    replacement(packed, state, use_global_buffer=True)
    assert seen.pop() is first
    module._SCRATCH["weight", -1] = torch.empty(10_000, dtype=state.dtype)  # somebody needed a larger one
    replacement(packed, state, use_global_buffer=True)
    assert seen.pop().data_ptr() == module._SCRATCH["weight", -1].data_ptr()
    module.usable = False  # another stream, or a graph is being captured
    replacement(packed, state, use_global_buffer=True)
    assert seen.pop() is None


def test_the_buffers_of_2026_9_14(seam):
    module, _, _ = seam
    del module._can_use_scratch
    before = dict(vars(module))
    replacement = _replacement(module, None)
    seen = []
    for spec in (Spec(), Spec(rows=2), Spec(rows=64), Spec(rows=64, dtype=torch.float16)):
        packed, state = spec.make()
        dequantization.plans[id(state)] = lambda W, s, out: seen.append(out) or out
        with torch.inference_mode():
            out = replacement(packed, state, use_global_buffer=True)
        assert out.shape == state.shape and out.dtype == state.dtype and not out.is_inference()
    assert len({out.data_ptr() for out in seen[:2]}) == 1  # the smaller weight used the buffer that was there
    assert vars(module) == before  # Unsloth's buffers come in pairs: one alone would break its own way after an undo


def test_a_plan_that_steps_aside_leads_back_to_the_original(seam):
    _, replacement, calls = seam
    packed, state = Spec().make()
    dequantization.plans[id(state)] = lambda W, s, out: None
    assert replacement(packed, state, use_global_buffer=True) == "original" and calls[-1][3] is True


def test_an_unknown_source_behind_the_seam_is_left_alone():
    module = types.ModuleType("utils")
    module._fast_dequantize_bnb = lambda W, quant_state=None: W
    with pytest.raises(RuntimeError, match="upstream changed: _fast_dequantize_bnb is"):
        _changes(module, PATCHES[0].targets[0])


def test_without_triton_all_but_the_kernels_can_be_imported(python):
    python(
        "import sys\n"
        "sys.modules['triton'] = None\n"
        "import unsloth_ext.nf4.dequantization, unsloth_ext.nf4.products, unsloth_ext.compiling.projections, unsloth_ext.compiling.rope\n"
        "import unsloth_ext.compiling.norms_operators\n"
    )


@pytest.mark.skipif(find_spec("unsloth") is None, reason="Unsloth is not installed: make setup")
def test_on_the_installed_unsloth(python):
    from unsloth_ext.patching.release import folder_of
    from unsloth_ext.patching.survey import survey

    rows = survey(PATCHES, {name: folder_of(name) for name in ("unsloth", "bitsandbytes")})
    assert {row.state for row in rows} == {"applied"}, rows
    python(
        "import sys; sys.path.insert(0, sys.argv[1]) if sys.argv[1:] else None\n"
        "import unsloth_ext\n"
        "from unsloth_ext.patching import Registry\n"
        "from unsloth_ext.nf4.patch import PATCHES\n"
        "registry = Registry()\n"
        "registry.register(PATCHES)\n"
        "import unsloth\n"
        "from unsloth.kernels import utils, fast_lora\n"
        "from bitsandbytes.functional import quantize_4bit\n"
        "import torch\n"
        "import bitsandbytes\n"
        "from unsloth.models import llama\n"
        "before = dict(vars(utils))\n"
        "others = [bitsandbytes.matmul_4bit, llama.unsloth_fast_generate]  # not as globals: those are rebound too\n"
        "for _ in range(3):\n"
        "    registry.enable(*(patch.id for patch in PATCHES))\n"
        "    assert {row.state for row in registry.status()} == {'applied'}, registry.status()\n"
        "    changed = {name for name in before if vars(utils)[name] is not before[name]}\n"
        "    assert changed == {'_fast_dequantize_bnb', '_fast_gemv_bnb', 'fast_linear_forward', 'matmul_lora'}, changed\n"
        "    assert fast_lora.matmul_lora is utils.matmul_lora and llama.fast_linear_forward is utils.fast_linear_forward\n"
        "    assert bitsandbytes.matmul_4bit is bitsandbytes.autograd._functions.matmul_4bit is not others[0]\n"
        "    assert llama.unsloth_fast_generate.__name__ == 'unsloth_fast_generate'\n"
        "    assert llama.unsloth_fast_generate is not others[1]\n"
        "    assert utils.fast_dequantize is fast_lora.fast_dequantize\n"
        "    assert utils.fast_dequantize(7, None) == 7\n"
        "    registry.disable()\n"
        "    assert all(vars(utils)[name] is value for name, value in before.items())\n"
        "    assert bitsandbytes.matmul_4bit is others[0] and llama.unsloth_fast_generate is others[1]\n",
        path=[Path(__file__).parents[2]],
        UNSLOTH_ALLOW_CPU="1",
        UNSLOTH_EXT_DISABLE="nf4",
        UNSLOTH_EXT_QUIET="1",
    )
