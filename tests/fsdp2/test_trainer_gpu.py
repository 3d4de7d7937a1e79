"""The same script on one card and under torchrun on two: plain transformers + trl, and Unsloth's FastLanguageModel."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import pytest

KINDS, HALVES = ("plain", "unsloth"), ("bfloat16", "float16")
SCRIPT = """
import json, os, sys
import unsloth_ext
kind, folder, output, half = sys.argv[1:5]
if kind == "unsloth":
    from unsloth import FastLanguageModel
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, Trainer, DataCollatorForSeq2Seq
from transformers import TrainingArguments
from peft import LoraConfig, get_peft_model
from unsloth_ext.training.data import read_rows, tokenize

world, dtype = int(os.environ.get("WORLD_SIZE", "1")), getattr(torch, half)
targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
if kind == "unsloth":
    model, tokenizer = FastLanguageModel.from_pretrained(folder, max_seq_length=256, dtype=dtype, load_in_4bit=True)
    model = FastLanguageModel.get_peft_model(model, r=8, lora_alpha=16, lora_dropout=0, target_modules=targets, random_state=1)
else:
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=nf4, dtype=dtype, device_map={"": int(os.environ.get("LOCAL_RANK", 0))})
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM"))
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
text = [{"text": " ".join(m["content"] for m in row["messages"])} for row in read_rows("embedded")]
rows = tokenize(text[:80], tokenizer, 128)
arguments = TrainingArguments(
    output_dir=output, max_steps=6, per_device_train_batch_size=4 // world, gradient_accumulation_steps=2, learning_rate=1e-3,
    logging_steps=1, report_to="none", seed=3, fp16=half == "float16", bf16=half == "bfloat16", optim=os.environ.get("OPTIM", "adamw_torch"),
    gradient_checkpointing=kind != "unsloth", gradient_checkpointing_kwargs={"use_reentrant": False}, save_steps=3, disable_tqdm=True,
)
trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=DataCollatorForSeq2Seq(tokenizer), processing_class=tokenizer)
if kind == "unsloth":
    FastLanguageModel.for_training(model)
trainer.train()
trainer.save_model(output)
if kind == "unsloth":
    FastLanguageModel.for_inference(model)
model.eval()
prompt = tokenizer("def open(", return_tensors="pt").to(model.device)
spoken = model.generate(**prompt, max_new_tokens=8, do_sample=False, pad_token_id=tokenizer.pad_token_id)[0].tolist()
facts = {"losses": [e["loss"] for e in trainer.state.log_history if "loss" in e], "spoken": spoken,
         "sharded": type(trainer.model).__name__.startswith("FSDP")}
if trainer.is_world_process_zero():
    json.dump(facts, open(os.path.join(output, "facts.json"), "w"))
"""


def _run(folder, kind, half, cards, **environment):
    from unsloth_ext.training.embedded import ensure_base

    script = folder / "script.py"
    script.write_text(SCRIPT)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={cards}"] if cards > 1 else []
    own = {"UNSLOTH_COMPILE_LOCATION": str(folder / "compiled")}  # several runs at a time would write one another's
    if cards == 1:
        own["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    words = [sys.executable, *launcher, str(script), kind, str(ensure_base("embedded")), str(folder / "out"), half]
    done = subprocess.run(
        words, cwd=folder, env={**os.environ, **own, **environment}, capture_output=True, text=True, timeout=900
    )
    if done.returncode:
        return done.stdout[-4000:] + done.stderr[-8000:]
    return json.loads((folder / "out" / "facts.json").read_text())


# (kind, half, optimizer), and UNSLOTH_EXT_FSDP2 of the run on two cards
CASES = [
    *((k, h, "adamw_torch", s) for k in KINDS for h in HALVES for s in ("1", "cpu_offload", "residency=all")),
    ("plain", "bfloat16", "adamw_8bit", "1"),
]


@pytest.fixture(scope="module")
def trained(request, tmp_path_factory):
    """trained(kind, half, optimizer, switch or None for one card): the facts of a run. All that the chosen tests need run side by side:
    one after the other they take most of their time to import."""
    import torch

    if torch.cuda.device_count() < 2:
        pytest.skip("needs 2 CUDA cards")
    here = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    cases = [item.callspec.params["case"] for item in here if "case" in item.callspec.params]
    wanted = dict.fromkeys(one for case in cases for one in ((*case[:3], None), case))

    def run(kind, half, optimizer, switch):
        folder = tmp_path_factory.mktemp("run")
        environment = {"OPTIM": optimizer} | ({"UNSLOTH_EXT_FSDP2": switch} if switch else {})
        return _run(folder, kind, half, 2 if switch else 1, **environment)

    with ThreadPoolExecutor(max(2, (os.cpu_count() or 1) // 3)) as pool:
        found = {one: pool.submit(run, *one) for one in wanted if one[0] == "plain" or find_spec("unsloth")}
        yield lambda *one: found[one].result()


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_two_cards_equal_one(trained, case):
    if case[0] == "unsloth" and find_spec("unsloth") is None:
        pytest.skip("needs Unsloth")
    one, two = trained(*case[:3], None), trained(*case)
    for facts in (one, two):
        assert isinstance(facts, dict), facts
    assert two["sharded"] and not one["sharded"]
    allowed = 5e-2 if case[2] == "adamw_8bit" else 2e-2
    assert max(abs(a - b) for a, b in zip(one["losses"], two["losses"], strict=True)) < allowed
    assert len(two["spoken"]) == len(one["spoken"])


def _workspaces(rank, world, folder):
    """Bytes of one cuBLAS workspace, and of all of them after a forward and after two whole steps."""
    import fsdp2_models as models
    import torch

    from unsloth_ext.fsdp2 import load, shard

    def workspaces():
        held = torch.cuda.memory_allocated()
        torch._C._cuda_clearCublasWorkspaces()
        return held - torch.cuda.memory_allocated()

    model, found = shard(models.with_lora(load(folder, dtype=torch.float32))), []
    batch = models.batches(1, 2)[0].cuda()
    workspaces()
    torch.ones(64, 64, device="cuda").mm(torch.ones(64, 64, device="cuda"))
    one = workspaces()
    for where in ("forward", "backward", "backward"):
        loss = model(input_ids=batch, labels=batch).loss
        if where == "forward":
            found.append(workspaces())
        loss.backward()
        if where == "backward":
            found.append(workspaces())
    return one, found


@pytest.mark.gpu
def test_forward_and_backward_have_one_workspace_in_turns(cuda_ranks, checkpoints):
    for one, found in cuda_ranks(2, _workspaces, folder=str(checkpoints["nf4"])):
        assert one > 0 and found == [0, one, one]
