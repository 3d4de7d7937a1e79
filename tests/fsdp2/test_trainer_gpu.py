"""The same script on one card and under torchrun on two: plain transformers + trl, and Unsloth's FastLanguageModel."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

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


def _run(folder, name, kind, half, cards, **environment):
    import torch

    from unsloth_ext.training.embedded import ensure_base

    if torch.cuda.device_count() < cards:
        pytest.skip(f"needs {cards} CUDA cards")
    if kind == "unsloth" and find_spec("unsloth") is None:
        pytest.skip("needs Unsloth")
    (folder / "script.py").write_text(SCRIPT)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={cards}"] if cards > 1 else []
    visible = {} if cards > 1 else {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}
    words = [
        sys.executable,
        *launcher,
        str(folder / "script.py"),
        kind,
        str(ensure_base("embedded")),
        str(folder / name),
        half,
    ]
    done = subprocess.run(
        words, cwd=folder, env={**os.environ, **visible, **environment}, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    return json.loads((folder / name / "facts.json").read_text())


@pytest.mark.gpu
@pytest.mark.parametrize("switch", ["1", "cpu_offload", "residency=all"])
@pytest.mark.parametrize("half", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["plain", "unsloth"])
def test_two_cards_equal_one(tmp_path, kind, half, switch):
    one = _run(tmp_path, "one", kind, half, 1)
    two = _run(tmp_path, "two", kind, half, 2, UNSLOTH_EXT_FSDP2=switch)
    assert two["sharded"] and not one["sharded"]
    assert max(abs(a - b) for a, b in zip(one["losses"], two["losses"], strict=True)) < 2e-2
    assert len(two["spoken"]) == len(one["spoken"])


@pytest.mark.gpu
def test_bitsandbytes_optimizer_on_two_cards(tmp_path):
    one = _run(tmp_path, "one", "plain", "bfloat16", 1, OPTIM="adamw_8bit")
    two = _run(tmp_path, "two", "plain", "bfloat16", 2, OPTIM="adamw_8bit", UNSLOTH_EXT_FSDP2="1")
    assert max(abs(a - b) for a, b in zip(one["losses"], two["losses"], strict=True)) < 5e-2


def _workspaces(rank, world, folder):
    """Bytes of cuBLAS' workspaces where the loss's gradient arrives, which is after the forward, and between steps; of one of them."""
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
