"""What a Trainer's user gets: the same run bit for bit, its checkpoints, and a step of many parameters, with Unsloth or without."""

from importlib.util import find_spec

import pytest

needs = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("bitsandbytes", "transformers", "accelerate")),
    reason="bitsandbytes and transformers are not installed: make setup",
)
needs_unsloth = pytest.mark.skipif(find_spec("unsloth") is None, reason="Unsloth is not installed: make setup")

TRAINER = """
import torch, unsloth_ext
from transformers import Trainer, TrainingArguments

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(64, 64) for _ in range(6))
        self.norm = torch.nn.LayerNorm(64)

    def forward(self, x, labels=None):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return {"loss": ((self.norm(x) - labels) ** 2).mean()}

draw = torch.Generator().manual_seed(5)
rows = [{"x": torch.randn(64, generator=draw), "labels": torch.randn(64, generator=draw)} for _ in range(32)]

def train(folder, steps, trainer=Trainer, resume=None):
    arguments = TrainingArguments(folder, optim="adamw_8bit", learning_rate=1e-2, weight_decay=0.1, max_steps=steps, save_steps=3,
        per_device_train_batch_size=4, logging_steps=1, report_to=[], use_cpu=True, seed=7, disable_tqdm=True)
    made = trainer(Model(), arguments, train_dataset=rows)
    made.train(resume_from_checkpoint=resume)
    return made, [p.detach().clone() for p in made.model.parameters()]
"""

RUNS = """
import sys, warnings
state = {row.id: row for row in unsloth_ext.status()}["compiling.eight_bit_steps"]
assert state.state == "applied", state

def own(self):  # as Unsloth's trainer does with a learning rate for the embeddings
    from bitsandbytes.optim import AdamW
    self.optimizer = AdamW(self.model.parameters(), lr=1e-2, optim_bits=8)
    return self.optimizer

class Own(Trainer):
    create_optimizer = own

def together(made):
    inner = getattr(made.optimizer, "optimizer", made.optimizer)
    found = getattr(inner, "_unsloth_ext_together", None)
    return found and [len(chunk.members) for chunk in found.chunks]

ours, result = train("ours", 6)
assert together(ours) == [6], together(ours)
owns, result_of_own = train("own", 6, trainer=Own)
assert together(owns) == [6]
resumed, result_resumed = train("ours", 6, resume="ours/checkpoint-3")
assert together(resumed) == [6]

unsloth_ext.disable("compiling.eight_bit_steps")
plain, expected = train("plain", 6)
assert together(plain) is None
_, expected_of_own = train("plain own", 6, trainer=Own)
_, from_ours = train("plain", 6, resume="ours/checkpoint-3")
for one in (result, result_resumed, from_ours):
    assert all(map(torch.equal, one, expected))
assert all(map(torch.equal, result_of_own, expected_of_own))
import os
sizes = [os.path.getsize(f"{name}/checkpoint-6/optimizer.pt") for name in ("ours", "plain")]
assert sizes[0] <= sizes[1], sizes

unsloth_ext.enable("compiling.eight_bit_steps")
resumed, result = train("ours too", 6, resume="plain/checkpoint-3")
assert together(resumed) == [6] and all(map(torch.equal, result, expected))
print("the same")
"""


@needs
def test_a_trainer(python):
    done = python(TRAINER + RUNS, path=[_root()], UNSLOTH_EXT_EIGHT_BIT_STEPS="1", CUDA_VISIBLE_DEVICES="")
    assert done.stdout.splitlines()[-1] == "the same"


def test_on_a_cpu_it_is_out(monkeypatch):
    from unsloth_ext.compiling.eight_bit_steps_patch import PATCHES
    from unsloth_ext.patching import NotHere

    (patch,) = PATCHES
    monkeypatch.setenv("UNSLOTH_EXT_EIGHT_BIT_STEPS", "0")
    assert patch.is_switched_off
    monkeypatch.delenv("UNSLOTH_EXT_EIGHT_BIT_STEPS")
    assert not patch.is_switched_off
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(NotHere, match="for CUDA cards: UNSLOTH_EXT_EIGHT_BIT_STEPS=1 has it here"):
        patch.changes(None, patch.targets[0])


@needs
@pytest.mark.parametrize("setting, reason", [
    pytest.param("0", "until UNSLOTH_EXT_EIGHT_BIT_STEPS=1", marks=pytest.mark.extended),
    pytest.param("", "for CUDA cards: UNSLOTH_EXT_EIGHT_BIT_STEPS=1 has it here", marks=pytest.mark.extended),
])  # fmt: skip
def test_where_it_is_out(python, setting, reason):
    code = TRAINER + (
        "state = {row.id: row for row in unsloth_ext.status()}['compiling.eight_bit_steps']\n"
        "made, _ = train('run', 2)\n"
        "assert not hasattr(getattr(made.optimizer, 'optimizer', made.optimizer), '_unsloth_ext_together')\n"
        "print(state.state, state.reason)"
    )
    done = python(code, path=[_root()], UNSLOTH_EXT_EIGHT_BIT_STEPS=setting, CUDA_VISIBLE_DEVICES="")
    assert f"disabled {reason}" in done.stdout


WITH_UNSLOTH = """
import unsloth_ext, unsloth, torch, transformers
from unsloth_ext.compiling.eight_bit_steps import refusal
from bitsandbytes.optim import AdamW8bit
import unsloth.import_fixes as fixes
if hasattr(fixes, "patch_bitsandbytes_optimizer_step_sync"):
    fixes.patch_bitsandbytes_optimizer_step_sync()  # done at import where there is a card
    import bitsandbytes
    assert bitsandbytes.optim.optimizer.Optimizer8bit.step.__globals__["__name__"] == "unsloth.import_fixes"
assert refusal(AdamW8bit([torch.nn.Parameter(torch.ones(4096))])) is None
state = {row.id: row for row in unsloth_ext.status()}["compiling.eight_bit_steps"]
assert state.state == "applied", state
wrapped = transformers.Trainer.create_optimizer
assert transformers.Trainer.create_scheduler.__module__ == "transformers.trainer"
while wrapped.__globals__["__name__"] != "unsloth_ext.compiling.eight_bit_steps_patch":
    wrapped = wrapped.__wrapped__
print("taken")
"""


@needs
@needs_unsloth
def test_with_unsloths_own_wrappers_it_is_taken(python):
    done = python(WITH_UNSLOTH, path=[_root()], UNSLOTH_EXT_EIGHT_BIT_STEPS="1")
    assert done.stdout.splitlines()[-1] == "taken"


def _root():
    from pathlib import Path

    return Path(__file__).parents[2]


ZOO = """
import unsloth_ext, unsloth, torch, bitsandbytes
if not hasattr(torch._C, "_cuda_getCurrentRawStream"):
    torch._C._cuda_getCurrentRawStream = lambda index: 0  # a build without CUDA: only looked for
from unsloth_zoo.temporary_patches import bitsandbytes_optimizer_sync as zoo
zoo.patch_bitsandbytes_optimizer_step_sync()
from unsloth_ext.compiling.eight_bit_steps import refusal
optimizer = bitsandbytes.optim.AdamW8bit([torch.nn.Parameter(torch.zeros(4096))])
step = bitsandbytes.optim.optimizer.Optimizer8bit.step
while hasattr(step, "__wrapped__"):
    step = step.__wrapped__
assert step.__globals__["__name__"] == zoo.__name__, step.__globals__["__name__"]
assert refusal(optimizer) is None, refusal(optimizer)
"""


@needs_unsloth
def test_with_the_step_that_unsloth_zoo_has_on_a_card_it_is_taken(python):
    python(ZOO)
